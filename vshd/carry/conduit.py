"""A pipe of our own that bulk passes through between two descriptors, so that it stays in the kernel (splice(2)).

A copy of bulk into this process and out again costs more than all the rest that is done with it: under emulation a
relay that splices carries half as much again. Owns the pipe. Knows nothing of streams, frames and polls. Shared with
vsh, like vshd.carry.bridge.

What is spliced is not a copy: pages of a file that a target spliced into its own stdout are sent as they are when they
leave, as sendfile(2) would.
"""

import errno
import os

from vshd.wire.output import Output

# linux/fcntl.h
F_SETPIPE_SZ = 1031
# The largest that everybody may have (/proc/sys/fs/pipe-max-size), and a whole window of a stream. All the pipes of a
# user may have 64 MiB together (pipe-user-pages-soft), so who needs less takes less.
CAPACITY = 1 << 20
# A frame as large as we send them; and one in pieces that leave room in their pages, with its head.
ARRIVING_CAPACITY, LEAVING_CAPACITY = 1 << 18, 1 << 19
# A pipe of others starts with 64 KiB; for bulk it gets this, so that fewer and larger frames leave.
PIPE_SIZE = 1 << 18
# What brings or takes this much at once is worth a conduit.
SPLICE_SIZE = 1 << 16
# Before 6.5 the kernel sent a socket one message for each page of a pipe; since, one for all of them
# (MSG_SPLICE_PAGES), which from 6.7 on does not wait for room where O_NONBLOCK says that it should not.
RELEASE_MIN = (6, 7)


class Conduit:
    """Invariant: `size` bytes are in the pipe, which no other object has. Nothing here ever blocks."""

    __slots__ = ("_reading", "_writing", "size")

    def __init__(self, capacity: int = CAPACITY) -> None:
        """capacity: bytes, in whole pages. Raises OSError when there is no such pipe to be had."""
        self.size = 0
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            set_pipe_size(self._writing, capacity)
        except OSError:
            self.close()
            raise

    def fill(self, fd: int, limit: int) -> int:
        """Takes at most `limit` bytes out of fd: how many, 0 at its end.

        Raises BlockingIOError when it has none now, or when the pipe has no room (never while it is empty), and OSError
        as read(2) does; EINVAL means a file that cannot be spliced.
        """
        taken = os.splice(fd, self._writing, limit, flags=os.SPLICE_F_NONBLOCK)
        self.size += taken
        return taken

    def fill_from(self, fd: int, limit: int, offset: int) -> int:
        """fill() from an offset of a file, whose own position stays."""
        taken = os.splice(fd, self._writing, limit, offset_src=offset, flags=os.SPLICE_F_NONBLOCK)
        self.size += taken
        return taken

    def drain(self, fd: int, limit: int) -> int:
        """Gives at most `limit` bytes to fd: how many. Raises as write(2) does; EINVAL as above."""
        given = os.splice(self._reading, fd, limit, flags=os.SPLICE_F_NONBLOCK)
        self.size -= given
        return given

    def read(self, size: int) -> bytes:
        """The next `size` of the bytes in it, for a descriptor that cannot be spliced."""
        data = b""
        while len(data) < size:
            data += os.read(self._reading, size - len(data))
        self.size -= size
        return data

    def put(self, data: bytes) -> None:
        """A few bytes (at most a page) into an empty one."""
        self.size += os.write(self._writing, data)

    def pour(self, other: "Conduit", size: int) -> int:
        """Moves at most `size` bytes into another one: how many."""
        moved = other.fill(self._reading, size)
        self.size -= moved
        return moved

    def close(self) -> None:
        """What is still in it is lost."""
        os.close(self._reading)
        os.close(self._writing)
        self.size = 0


class Sluice:
    """What turns a source's bulk into frames: data arrives in one conduit and leaves, behind its head, through another,
    so that a frame is one message to the transport and one wake-up of its receiver.

    Invariant: between frames both are empty.
    """

    __slots__ = ("_arriving", "_leaving")

    def __init__(self, arriving: Conduit, leaving: Conduit) -> None:
        self._arriving = arriving
        self._leaving = leaving

    def fill(self, fd: int, limit: int) -> int:
        """As Conduit.fill()."""
        return self._arriving.fill(fd, limit)

    def append_to(self, output: Output, head: bytes) -> None:
        """A frame: head, and all that fill() brought."""
        size = self._arriving.size
        self._leaving.put(head)
        moved = self._arriving.pour(self._leaving, size)
        output.append_elsewhere(self._leaving, len(head) + moved)
        if moved < size:
            # Small pieces that need more pages than a pipe has.
            output.append_elsewhere(self._arriving, size - moved)

    def close(self) -> None:
        self._arriving.close()
        self._leaving.close()


def open_sluice() -> Sluice | None:
    """See open_conduit()."""
    arriving = open_conduit(ARRIVING_CAPACITY)
    leaving = open_conduit(LEAVING_CAPACITY) if arriving is not None else None
    if arriving is None or leaving is None:
        if arriving is not None:
            arriving.close()
        return None
    return Sluice(arriving, leaving)


def open_conduit(capacity: int = CAPACITY) -> Conduit | None:
    """One to use; None where bytes are better copied: an old kernel, no descriptors, no memory for pipes left."""
    if not is_worth_it(os.uname().release):
        return None
    try:
        return Conduit(capacity)
    except OSError:
        return None


def set_pipe_size(fd: int, size: int) -> None:
    """Gives a pipe room for `size` bytes, in whole pages. Raises OSError as fcntl(2) does."""
    try:
        import fcntl  # noqa: PLC0415 - loading it is a hundredth of a short command's time, and only bulk needs it
    except ImportError as error:
        # A file of its own in some Pythons, for which this process has no descriptor left.
        raise OSError(errno.EMFILE, str(error)) from error
    fcntl.fcntl(fd, F_SETPIPE_SZ, size)


def enlarge_pipe(fd: int, size: int = PIPE_SIZE) -> None:
    """Room for `size` bytes in a pipe, if the kernel's limits allow."""
    try:
        set_pipe_size(fd, size)
    except OSError:
        pass


def write_output(output: Output, fd: int) -> int:
    """Writes some of what waits, in one system call: how much. Raises as writev(2) does."""
    turn = output.elsewhere
    if turn is None:
        taken = os.writev(fd, output.buffers())
    else:
        assert isinstance(turn.place, Conduit)
        taken = turn.place.drain(fd, turn.size)
    output.sent(taken)
    return taken


def is_worth_it(release: str) -> bool:
    """release: of the kernel, like 6.12.107+deb13-cloud-amd64."""
    words = release.split(".", 2)
    return len(words) > 1 and all(word.isdecimal() for word in words[:2]) and tuple(map(int, words[:2])) >= RELEASE_MIN
