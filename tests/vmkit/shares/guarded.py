"""A guard with a fake virtiofsd, and QEMU's end of its connection."""

import errno
import os
import socket
import struct
from pathlib import Path

from tests.vmkit.shares.device_driver import FsDriver
from vmkit.shares.guard import LISTENER_MARK, WantedServer
from vmkit.shares.over_virtiofs import Guard

FAKE = Path(__file__).parents[2] / "fakes/shares/virtiofsd"
READ, FORGET = 15, 2


def start_guard(path: Path) -> Guard:
    """path: where QEMU connects."""
    return Guard(WantedServer((str(FAKE), "--fd", LISTENER_MARK), str(path), os.geteuid(), os.getegid()))


def find_child(pid: int) -> int:
    """The only one."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


class Bench:
    """Invariant: QEMU has connected."""

    def __init__(self, folder: Path) -> None:
        self.guard = start_guard(folder / "qemu")
        self.process = self.guard._process
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(folder / "qemu"))
        self.driver = FsDriver(self.sock)

    def find_guard(self) -> int:
        """The pid of the deputy's child."""
        return find_child(self.process.pid)

    def find_server(self) -> int:
        """The pid of the fake."""
        return find_child(self.find_guard())

    def close(self) -> None:
        """It goes on until QEMU has let go of the device."""
        self.guard.end()
        self.driver.close()


def expect_error(answer: bytes, unique: int) -> None:
    """ENOTCONN, for the request of that number."""
    assert struct.unpack("<IiQ", answer) == (16, -errno.ENOTCONN, unique)
