"""Why nothing was run, in the words the client gets."""

from vshd.wire.messages import Failure


class RefusalError(Exception):
    """The request is refused: a line for people, and a typed Failure for programs."""

    def __init__(self, description: str, kind: int, *, error: int = 0, subject: bytes = b"") -> None:
        super().__init__(description)
        self.description = description
        self.failure = Failure(kind, error, subject)
