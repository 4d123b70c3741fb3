"""Runs one command of a guest whose output is wanted as it comes, and not in memory as a whole."""

from vsh.client import Argv, Client
from vsh.errors import ConnectionLost
from vsh.memory import BytesSource
from vsh.process import SIGNALLED
from vsh.pump import Pump, Sink, deadline_after
from vshd.wire import messages


def run_into(client: Client, argv: Argv, stdout: Sink, stderr: Sink, timeout_s: float) -> int:
    """Runs a command with an empty stdin to its end. Returns its exit status, 128+N for signal N.

    timeout_s: from the start of the command on; then vsh ends its processes. Raises ExecError, TimedOut, VshError,
    and ConnectionLost, which names the machine's end if that was the cause.
    """
    sinks = {messages.STDOUT: stdout, messages.STDERR: stderr}
    with client.open_session(argv) as session:
        try:
            end = Pump(session, BytesSource(b""), sinks).run(deadline_after(timeout_s))
        except ConnectionLost as error:
            session.explain(error)
            raise
    return SIGNALLED + end.signal if end.signal else end.code
