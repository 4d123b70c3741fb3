"""The keeper's entry: `python -m vmkit.pool FD` reads its order from the socket FD, answers by a line, and keeps."""

import asyncio
import os
import pickle
import socket
import sys

from vmkit.errors import NameInUseError
from vmkit.pool.keeper import LENGTH_BYTES, Keeper, Order
from vmkit.pool.registry import CONTROL, check_control_path, keep
from vmkit.pool.words import render_answer
from vsh.errors import VshError
from vshd.carry.inherited import settle_signals

MAX_ORDER_BYTES = 1 << 20


def main() -> int:
    """Keeps a pool until its end."""
    settle_signals()
    os.umask(0o077)
    reports = socket.socket(fileno=int(sys.argv[1]))
    with reports.makefile("rb") as stream:
        size = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        text = stream.read(size) if size <= MAX_ORDER_BYTES else b""
    if len(text) < size or not text:
        return 1
    # The other end is the process that has started this one.
    order: Order = pickle.loads(text)  # noqa: S301
    try:
        with keep(order.name, order.spec.image, order.size) as entry, socket.socket(socket.AF_UNIX) as listener:
            check_control_path(entry.directory)
            listener.bind(str(entry.directory / CONTROL))
            listener.listen(socket.SOMAXCONN)
            listener.setblocking(False)
            entry.publish()
            reports.sendall(render_answer())
            reports.close()
            asyncio.run(_keep(order, listener))
    except (VshError, OSError) as error:
        if reports.fileno() < 0:
            return 1
        brief, hint = (error.brief, error.hint) if isinstance(error, VshError) else (str(error), "")
        reports.sendall(render_answer(error=brief, hint=hint, is_taken=isinstance(error, NameInUseError)))
        return 1
    return 0


async def _keep(order: Order, listener: socket.socket) -> None:
    await Keeper(order).run(listener)


if __name__ == "__main__":
    sys.exit(main())
