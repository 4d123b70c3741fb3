"""A service of vshd in a thread, over a socket pair."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from tests.vsh.live import DEADLINE_S
from vshd.log import Log
from vshd.signals import Wakeup

if TYPE_CHECKING:
    from vshd.services.table import Handed


class Served(Protocol):
    """The test's view of a running service. `end` is its last word."""

    client: socket.socket
    end: str


@contextlib.contextmanager
def serve_in_thread(
    service: Callable[[], "Handed"], served: Served, theirs: socket.socket, rest: bytes
) -> Iterator[None]:
    """Runs a service on `theirs`, whose client is `served`, until the block ends or the service does."""
    wakeup = Wakeup((signal.SIGTERM,))

    def run() -> None:
        served.end = service().run(theirs.detach(), rest, wakeup, Log())

    theirs.setblocking(False)
    served.client.settimeout(DEADLINE_S)
    thread = threading.Thread(target=run)
    with served.client:
        thread.start()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                served.client.shutdown(socket.SHUT_WR)
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
            wakeup.close()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
