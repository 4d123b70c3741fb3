"""When signals may interrupt a copy: only while it waits. So its connections can still be used to clean up after it.

A handler that raises (Ctrl-C) would else end a step between a packet that was sent and the note that it was.
"""

import signal
from types import TracebackType

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class HeldSignals:
    """A with-block in which signals wait."""

    def __enter__(self) -> None:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)


class LetSignals:
    """A with-block inside HeldSignals in which they come, for a call that waits."""

    def __enter__(self) -> None:
        # Python calls the handlers of those that have waited.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
