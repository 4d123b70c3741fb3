"""The one vocabulary of failure for vsh and vmkit: what was seen, and what to do about it.

Only a program's __main__ prints these and turns them into an exit status.
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
        """The lines for stderr: `program: brief`, the details indented, then `hint: ...`. Fit for a terminal: words of
        a guest may be in them.
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
    """A call or an option that cannot be carried out as it is written."""

    status = 64


class ConnectionLost(VshError):  # noqa: N818 - it names what happened
    """A session ended without its target's exit: the peer is gone, silent, stopped, or talks nonsense."""

    # Upstream's, chosen to be conspicuous.
    status = 123


class Unreachable(VshError):  # noqa: N818 - it names what happened
    """There is no session: nothing listens, nothing answers, or the connection ended before it was one."""


class Busy(Unreachable):
    """There is no place for one more connection now. One comes free when another connection ends."""


class Unanswered(Unreachable):
    """Nothing answered in time. A guest that is only slow answers those who wait longer."""


class ExecError(VshError):
    """The command was not run. kind: a FailureKind of docs/reference/protocol.md. error: the guest's errno, or 0."""

    def __init__(self, brief: str, *, kind: int, error: int = 0, status: int = 1) -> None:
        super().__init__(brief, status=status)
        self.kind = kind
        self.error = error


class CommandFailed(VshError):  # noqa: N818 - it names what happened
    """run(check=True): the command ran, and its status is not 0. result has its output; the exit status is its own."""

    def __init__(self, brief: str, *, result: "Result[Any]", details: str = "", status: int = 1) -> None:
        super().__init__(brief, details=details, status=status)
        self.result = result
