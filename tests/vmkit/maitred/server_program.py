"""maitred's server as a program of the host, on a UNIX socket, over a guest that notes what it is told to do.

argv: the socket, and the file that gets a line for each thing that is done. It ends with its standard input.
"""

import asyncio
import os
import socket
import sys
from pathlib import Path

from vmkit.maitred.guest.serving import serve
from vmkit.maitred.guest.system import System
from vshd.carry.vsock import VsockError

PASSWD = b"root:x:0:0:root:/root:/bin/sh\nann:x:1001:1001::/home/ann:/bin/sh\n"
GROUP = b"root:x:0:\nkvm:x:104:\nvideo:x:44:ann\n"


class NotedSystem(System):
    """Does nothing. A source named `19` makes mount(2) fail with that errno."""

    def __init__(self, notes: str) -> None:
        self._notes = notes

    def note(self, *words: object) -> None:
        with Path(self._notes).open("a", encoding="utf-8") as file:
            file.write(f"{words!r}\n")

    def mount(self, source: bytes, target: bytes, fstype: bytes, flags: int, options: bytes) -> int:
        self.note("mount", source, target, fstype, flags)
        return int(source) if source.isdigit() else 0

    def unmount(self, target: bytes) -> int:
        self.note("unmount", target)
        return 0

    def connect_host(self, port: int) -> int:
        if port != 564:
            raise VsockError(f"Failed to connect to vsock 2:{port}: Connection reset by peer")
        return os.open("/dev/null", os.O_RDWR)

    def set_time(self, nanoseconds: int) -> None:
        self.note("set_time", nanoseconds)

    def run(self, argv: list[bytes]) -> tuple[int, str]:
        self.note(*argv)
        return 0, ""

    def read(self, path: str) -> bytes:
        return PASSWD if path == "/etc/passwd" else GROUP

    def power_off(self) -> None:
        self.note("power_off")

    def has_systemd(self) -> bool:
        return False


async def main(path: str, notes: str) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        print("listening", flush=True)
        serving = asyncio.create_task(serve([listening.fileno()], lambda: False, system=NotedSystem(notes)))
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(0, ended.set)
        await ended.wait()
        serving.cancel()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
