"""The errors of vsh and vmkit: each has what was seen, and what to do about it.

Only a program's __main__ prints them and turns them into an exit status.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vsh.client import Result


class VshError(Exception):
    """A failure a person reads.

    brief: one line, what happened. details: what was seen (a console's last lines, a command's stderr), may span lines.
    hint: what to do next. status: the exit status the program ends with.
    """

    status = 1

    def __init__(self, brief: str, *, details: str = "", hint: str = "", status: int | None = None) -> None:
        super().__init__(brief)
        self.brief = brief
        self.details = details
        self.hint = hint
        if status is not None:
            self.status = status

    def render(self, program: str) -> str:
        """Returns the lines for stderr: `program: brief`, the details indented, then `hint: ...`. Text of a guest may
        be in them, so they hold no control characters.
        """
        from vsh.text import clean_text  # noqa: PLC0415 - only after a failure

        lines = [f"{program}: {_join(clean_text(self.brief))}"]
        lines += [f"  {line}" for line in clean_text(self.details).rstrip("\n").split("\n") if self.details]
        if self.hint:
            lines.append(f"hint: {_join(clean_text(self.hint))}")
        return "\n".join(lines)


def _join(text: str) -> str:
    return text.strip("\n").replace("\n", " ")


class UsageError(VshError):
    """A call or an option has a wrong form, and was not carried out."""

    status = 64


class ConnectionLost(VshError):  # noqa: N818 - it names what happened
    """A session ended without its target's exit: the peer is gone, silent or stopped, or broke the protocol."""

    # Upstream's, chosen to be conspicuous.
    status = 123


class Unreachable(VshError):  # noqa: N818 - it names what happened
    """The session did not start: no program listens or answers, or the connection ended before."""


class Busy(Unreachable):
    """All places for connections are taken now. One comes free when another connection ends."""


class Unanswered(Unreachable):
    """No answer came in time. A guest that is only slow answers after a longer wait."""


class HungUp(Unreachable):
    """The connection ended behind the request, before an answer: the command may have run."""


class ExecError(VshError):
    """The command was not run. kind: a FailureKind of docs/reference/protocol.md. error: the guest's errno, or 0."""

    def __init__(self, brief: str, *, kind: int, error: int = 0, status: int = 1) -> None:
        super().__init__(brief, status=status)
        self.kind = kind
        self.error = error


class CommandFailed(VshError):  # noqa: N818 - it names what happened
    """run(check=True): the command ran, and its status is not 0. result: its output. status: the command's own."""

    def __init__(self, brief: str, *, result: "Result[Any]", details: str = "", status: int = 1) -> None:
        super().__init__(brief, details=details, status=status)
        self.result = result
