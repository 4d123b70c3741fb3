"""The loop of SFTP: reads requests from the connection, has them carried out, and writes the answers.

Owns the connection and its waiting. Requests that came together are answered together. Bulk of a regular file goes
through a conduit, so that it stays in the kernel; what cannot be spliced is copied.
"""

import os
import select

from vshd.carry.conduit import LEAVING_CAPACITY, SPLICE_SIZE, Conduit, open_conduit, write_output
from vshd.services.sftp.handles import File
from vshd.services.sftp.packets import DATA_HEAD_SIZE, READ, PacketError, Splitter, render_data_head
from vshd.services.sftp.requests import Requests
from vshd.signals import SIGINT, SIGTERM
from vshd.wire.output import Output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.log import Log
    from vshd.signals import Wakeup

# Answers wait for one another up to here.
FLUSH_SIZE = 1 << 17
# A client may send many small requests before it reads. With one more of PACKET_MAX, this is all that ever waits.
WAITING_MAX = 1 << 20


def open_subsystem(home: str) -> "SftpService":
    """Starts in the user's home, or in / if that cannot be entered."""
    try:
        os.chdir(home)
    except OSError:
        os.chdir("/")
    return SftpService(os.fsencode(home))


class EndError(Exception):
    """The service ends, for the reason that is the text."""


class SftpService:
    """Invariant: `_conduit` holds exactly those bytes of `_output` that are elsewhere."""

    description = b""

    def __init__(self, home: bytes, *, capacity: int = LEAVING_CAPACITY) -> None:
        """capacity: of the pipe that bulk goes through, in bytes."""
        self._capacity = capacity
        self._output = Output()
        self._requests = Requests(self._output, home, self._is_wanted)
        self._conduit: Conduit | None = None
        self._fd = -1
        # The client takes no more now.
        self._is_blocked = False
        self._wakeup: Wakeup | None = None
        self._gone = select.poll()

    def run(self, fd: int, rest: bytes, wakeup: "Wakeup", _log: "Log") -> str:
        """Serves until the client has closed its side; the end in words, for the log."""
        self._fd, self._wakeup = fd, wakeup
        # For errors alone.
        self._gone.register(fd, 0)
        self._gone.register(wakeup.fd, select.POLLIN)
        self._conduit = open_conduit(self._capacity)
        requests = self._requests
        if self._conduit is not None:
            requests.read_file = self._splice
        end = "ended"
        try:
            self._serve(rest)
        except EndError as error:
            end = str(error)
        except PacketError as error:
            end = f"ended: the client sent {error}"
        except OSError as error:
            end = f"ended: {error.strerror}"
        finally:
            requests.close()
            if self._conduit is not None:
                self._conduit.close()
            os.close(fd)
        return f"{end}, {requests.count} requests, {requests.bytes_out} bytes read, {requests.bytes_in} bytes written"

    def _serve(self, rest: bytes) -> None:
        """Raises EndError, PacketError, OSError."""
        splitter, output = Splitter(), self._output
        assert self._wakeup is not None
        fd, wakeup_fd = self._fd, self._wakeup.fd
        poll = select.poll()
        poll.register(wakeup_fd, select.POLLIN)
        mask = 0
        splitter.feed(rest)
        while True:
            self._take_all(splitter)
            wanted = select.POLLIN | (select.POLLOUT if output.size else 0)
            if wanted != mask:
                poll.register(fd, wanted)
                mask = wanted
            for found, events in poll.poll():
                if found == wakeup_fd:
                    self._check_signals()
                    continue
                if events & select.POLLOUT:
                    self._write()
                if not events & ~select.POLLOUT:
                    continue
                try:
                    size = os.readv(fd, [splitter.room()])
                except BlockingIOError:
                    continue
                if not size:
                    self._flush()
                    return
                splitter.received(size)

    def _take_all(self, splitter: Splitter) -> None:
        """Has the packets that have come carried out, and sends the answers as far as the client takes them.

        While it takes none, more small answers may wait, but no READ is carried out: its client must read.
        """
        requests, output = self._requests, self._output
        try:
            for packet in splitter.packets():
                if self._is_blocked and (packet[0] == READ or output.size >= WAITING_MAX):
                    self._flush()
                requests.take(packet)
                if output.size >= FLUSH_SIZE and not self._is_blocked:
                    self._write()
        except PacketError:
            # What came before it has answers.
            self._flush()
            raise
        if not self._is_blocked:
            self._write()

    def _write(self) -> None:
        """Sends what the client takes now. Raises OSError."""
        output = self._output
        self._is_blocked = False
        output.join()
        try:
            while output.size:
                write_output(output, self._fd)
        except BlockingIOError:
            self._is_blocked = True

    def _flush(self) -> None:
        """Sends all answers. Raises EndError, OSError."""
        self._write()
        if not self._is_blocked:
            return
        assert self._wakeup is not None
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        poll.register(self._wakeup.fd, select.POLLIN)
        while self._is_blocked:
            if any(found != self._fd for found, _ in poll.poll()):
                self._check_signals()
            self._write()

    def _check_signals(self) -> None:
        assert self._wakeup is not None
        numbers = self._wakeup.take()
        if SIGTERM in numbers or SIGINT in numbers:
            raise EndError("vshd is shutting down")

    def _is_wanted(self) -> bool:
        """Whether the client is still connected, and this process may go on."""
        return not self._gone.poll(0)

    def _splice(self, ident: int, file: File, offset: int, size: int) -> bool:
        """Answers a READ through the conduit; False: it must be copied."""
        conduit = self._conduit
        if size < SPLICE_SIZE or not file.is_regular or conduit is None:
            return False
        size = min(size, os.fstat(file.fd).st_size - offset)
        if size < SPLICE_SIZE:
            return False
        if conduit.size:
            self._flush()
        conduit.put(render_data_head(ident, size))
        filled = 0
        try:
            while filled < size:
                taken = conduit.fill_from(file.fd, size - filled, offset + filled)
                if not taken:
                    break
                filled += taken
        except OSError:
            # A file system without splice, or a file that cannot be read: the copy's error is the answer.
            pass
        if filled == size:
            self._output.append_elsewhere(conduit, DATA_HEAD_SIZE + size)
        else:
            # The file is shorter by now, and the head is wrong.
            data = conduit.read(conduit.size)[DATA_HEAD_SIZE:]
            if not data:
                return False
            self._output.append(render_data_head(ident, filled))
            self._output.append(data)
        self._requests.bytes_out += filled
        return True
