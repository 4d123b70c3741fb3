"""A terminal's attributes, as numbers: read, set, and made raw."""

import termios

# iflag, oflag, cflag, lflag, ispeed, ospeed, and the control characters.
Attributes = list[int]
LFLAG, CHARACTERS = 3, 6


def is_canonical(attributes: Attributes) -> bool:
    """Whether the terminal edits lines (ICANON). A raw terminal never does."""
    return bool(attributes[LFLAG] & termios.ICANON)


def make_raw(attributes: Attributes) -> Attributes:
    """Returns the attributes changed as cfmakeraw(3) does."""
    iflag, oflag, cflag, lflag, ispeed, ospeed, *characters = attributes
    iflag &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    oflag &= ~termios.OPOST
    lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    characters[termios.VMIN], characters[termios.VTIME] = 1, 0
    return [iflag, oflag, cflag, lflag, ispeed, ospeed, *characters]


def read_attributes(fd: int) -> Attributes | None:
    """Returns the terminal's attributes; None when `fd` is no terminal, or one that is gone."""
    try:
        *flags, characters = termios.tcgetattr(fd)
    except termios.error:
        return None
    return [*flags, *(value if isinstance(value, int) else value[0] for value in characters)]


def write_attributes(fd: int, attributes: Attributes) -> None:
    """Sets the attributes without waiting for output. In the background SIGTTOU stops the process, unless blocked."""
    values: list[int | list[int]] = [*attributes[:CHARACTERS], attributes[CHARACTERS:]]
    try:
        termios.tcsetattr(fd, termios.TCSANOW, values)
    except termios.error:
        # The terminal is gone.
        pass
