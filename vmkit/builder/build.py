"""The builder: takes its order and its lock from a socket, makes one snapshot, and notes the reason if that fails.

Its output is a log. It ends on SIGTERM, with its machine and its files.
"""

import logging
import os
import pickle
import signal
import socket
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from vmkit.builder.order import LENGTH_BYTES, MAX_ORDER_BYTES, BuildOrder
from vmkit.entries.entry import discard
from vmkit.entries.folder import hold_registry
from vmkit.machine.builders import find_folder
from vmkit.machine.restore import open_store
from vmkit.machine.save import make_snapshot
from vmkit.snapshots.boots import note_failure, read_boots, write_boots
from vsh.errors import VshError
from vsh.registry import find_runtime_directory

log = logging.getLogger("vmkit.builder")


class OvertakenError(Exception):
    """Another process makes this snapshot: a person waits for that one."""


class _Told(BaseException):
    """SIGTERM came: unwinds every with-block, so that each undoes its work."""


def run(socket_fd: int) -> int:
    """Makes the snapshot that is ordered on the socket. Returns the status of this process."""
    os.umask(0o077)
    signal.signal(signal.SIGTERM, _end)
    with socket.socket(fileno=socket_fd) as orders:
        head, fds, _, _ = socket.recv_fds(orders, LENGTH_BYTES, 1)
        for fd in fds:
            os.set_inheritable(fd, False)
        with orders.makefile("rb") as stream:
            size = int.from_bytes(head, "little")
            text = stream.read(size) if len(head) == LENGTH_BYTES and size <= MAX_ORDER_BYTES else b""
    if not fds or not text or len(text) < size:
        return 1
    # The other end is the process that has started this one.
    order: BuildOrder = pickle.loads(text)  # noqa: S301
    os.chdir(order.directory)
    root = Path(find_runtime_directory())
    try:
        return _make(order, root)
    except _Told:
        return 128 + signal.SIGTERM
    finally:
        discard(find_folder(root) / order.key)


def _make(order: BuildOrder, root: Path) -> int:
    log.info("making the snapshot %s of %s", order.key, order.built.name)
    try:
        made = make_snapshot(
            order.spec,
            tell=lambda text, _fraction: log.info("%s", text),
            build=lambda _image, _tell: order.built,
            on_wait=_give_way,
        )
    except OvertakenError:
        log.info("another process makes it")
        return 0
    except VshError as error:
        log.error("failed: %s", "\n".join(filter(None, (error.brief, error.details, error.hint))))
        reason = error.brief
    except Exception as error:
        log.exception("failed")
        reason = f"{type(error).__name__}: {error}"
    else:
        log.info("made in %.1f s", made.seconds)
        return 0
    with hold_registry(root):
        folder = open_store().folder
        write_boots(folder, note_failure(read_boots(folder), order.key, reason, time.time()))
    return 1


def _give_way(_key: str) -> NoReturn:
    raise OvertakenError


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    # A second one must not end the clean-up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log.info("told to end")
    raise _Told
