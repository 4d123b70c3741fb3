"""Where lasting sessions are found: a directory of vshd's own user, with a socket for each session.

    UID.ID          the socket of the session's keeper
    UID@NAME        a symbolic link to it

No other user can enter the directory, so only a vshd, or root, connects to a keeper. A socket without a keeper behind
it is left over, and the next look removes it. Owns names and files, and the exchange of one call and its
answer. Knows nothing of what a keeper does.
"""

import _socket
import errno
import os
import select
import sys
import time

from vshd.session.refusal import RefusalError
from vshd.signals import SIGTERM
from vshd.wire import kept, messages
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.kept import KeeperAnswer, KeeperCall, SessionRecord

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.flags import Options

ROOTS_DIRECTORY = "/run/vshd-sessions"
# A call has at most what a client sent behind its request, beside a few names.
MESSAGE_MAX = 1 << 16
# A keeper answers at once, unless its user has stopped it.
ANSWER_S = 5.0
BACKLOG = 16
_INT_SIZE = 4
# struct ucred of socket(7): pid, uid, gid
_UCRED_SIZE = 12
_ATTEMPTS = 16


class SessionsPlace:
    """Invariant: `fd` is the directory, which belongs to this process's user, and which no other user can enter."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        os.close(self.fd)

    # Sessions that exist.

    def find(self, session: bytes, uid: int) -> tuple[int, bytes]:
        """The uid and id of the session of this id or name that a user may reach. Raises RefusalError."""
        if kept.is_id(session):
            for owner, found in self.list_sessions(uid):
                if found == session:
                    return owner, found
        elif kept.is_name(session):
            try:
                owner, found = _split(os.readlink(_name(uid, b"@", session), dir_fd=self.fd))
                os.stat(_name(owner, b".", found), dir_fd=self.fd)
                return owner, found
            except (OSError, ValueError):
                pass
        raise no_session(session)

    def list_sessions(self, uid: int) -> list[tuple[int, bytes]]:
        """The uid and id of each session that a user may reach; root may reach all."""
        sessions = []
        for name in sorted(map(os.fsencode, os.listdir(self.fd))):
            try:
                owner, found = _split(name)
            except ValueError:
                continue
            if uid in (0, owner):
                sessions.append((owner, found))
        return sessions

    # New ones.

    def make(self, uid: int, name: bytes) -> "tuple[bytes, _socket.socket]":
        """A new id, and the socket of its keeper, which listens. The calling process must be the keeper.

        Raises RefusalError when the name is taken, OSError.
        """
        for _ in range(_ATTEMPTS):
            found = os.urandom(kept.ID_DIGITS // 2).hex().encode()
            if all(found != other for _, other in self.list_sessions(0)):
                break
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        final, hidden = _name(uid, b".", found), b"." + found
        try:
            listener.bind(self._path(hidden))
            listener.listen(BACKLOG)
            # Under its own name it is never without a listener.
            os.rename(hidden, final, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            if name:
                self._link(uid, name, final)
        except BaseException:
            listener.close()
            self._unlink(hidden)
            self._unlink(final)
            raise
        return found, listener

    def _link(self, uid: int, name: bytes, target: bytes) -> None:
        link = _name(uid, b"@", name)
        for _ in range(2):
            try:
                os.symlink(target, link, dir_fd=self.fd)
                return
            except FileExistsError:
                try:
                    os.stat(link, dir_fd=self.fd)
                except FileNotFoundError:
                    self._unlink(link)
                    continue
                break
        raise RefusalError(f"a session has the name '{os.fsdecode(name)}' already", messages.BUSY, subject=name)

    def remove(self, uid: int, found: bytes) -> None:
        """Removes the session's files. Its keeper has ended, or is about to."""
        target = _name(uid, b".", found)
        self._unlink(target)
        for text in os.listdir(self.fd):
            link = os.fsencode(text)
            if b"@" in link:
                try:
                    is_its = os.readlink(link, dir_fd=self.fd) == target
                except OSError:
                    continue
                if is_its:
                    self._unlink(link)

    def _unlink(self, name: bytes) -> None:
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            pass

    def _path(self, name: bytes) -> bytes:
        # An address has 108 bytes, a path may have more.
        return b"/proc/self/fd/%d/%s" % (self.fd, name)

    # Calls.

    def ask(self, uid: int, found: bytes, call: KeeperCall, fd: int = -1) -> KeeperAnswer:
        """The keeper's answer. fd: goes to the keeper with the call. Raises RefusalError."""
        answer = self.ask_all([(uid, found)], call, fd)[0]
        if answer is None:
            raise no_session(found)
        if answer.failure is not None:
            raise RefusalError(
                os.fsdecode(answer.description),
                answer.failure.kind,
                error=answer.failure.error,
                subject=answer.failure.subject,
            )
        return answer

    def ask_all(self, sessions: list[tuple[int, bytes]], call: KeeperCall, fd: int = -1) -> list[KeeperAnswer | None]:
        """Each keeper's answer; None: there is none behind the socket, which is removed. One that does not answer in
        time has failed. Asks all at once, as far as there are descriptors.
        """
        answers: list[KeeperAnswer | None] = [_silent() for _ in sessions]
        deadline_s = time.monotonic() + ANSWER_S
        waiting: dict[int, tuple[int, _socket.socket]] = {}
        poll = select.poll()
        try:
            for index, (uid, found) in enumerate(sessions):
                channel = self._send(uid, found, call, fd)
                if channel is None:
                    answers[index] = None
                    continue
                waiting[channel.fileno()] = index, channel
                poll.register(channel.fileno(), select.POLLIN)
                if len(waiting) == BACKLOG:
                    _collect(poll, waiting, answers, deadline_s)
            while waiting and _collect(poll, waiting, answers, deadline_s):
                pass
        finally:
            for _, channel in waiting.values():
                channel.close()
        return answers

    def end_keeper(self, uid: int, found: bytes) -> int:
        """Sends TERM to the keeper of a session; a descriptor that is readable once it has ended, -1: there is none."""
        channel = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        try:
            channel.setblocking(False)
            channel.connect(self._path(_name(uid, b".", found)))
            # The kernel's word: it is the process that listens.
            pid = find_peer(channel)[0]
            fd = os.pidfd_open(pid)
            os.kill(pid, SIGTERM)
            return fd
        except OSError:
            return -1
        finally:
            channel.close()

    def _send(self, uid: int, found: bytes, call: KeeperCall, fd: int) -> "_socket.socket | None":
        """A connection with the call on its way; None, and no files of the session, when it has no keeper."""
        channel = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        try:
            channel.setblocking(False)
            channel.connect(self._path(_name(uid, b".", found)))
            rights = [] if fd < 0 else [fd.to_bytes(_INT_SIZE, sys.byteorder)]
            ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, right) for right in rights]
            channel.sendmsg([call.encode()], ancillary)
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENOENT, errno.ECONNRESET, errno.EPIPE):
                channel.close()
                self.remove(uid, found)
                return None
            # EAGAIN: its backlog is full, so it does not answer.
        return channel


def open_place(options: "Options") -> SessionsPlace:
    """The directory, which is made where it does not exist. Raises RefusalError."""
    path = options.lasting_dir or _find_default()
    if not path:
        raise RefusalError("this vshd has no directory for sessions that last: --lasting_dir=DIR", messages.BAD_REQUEST)
    try:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        reason = f"cannot use {path} for sessions that last: {error.strerror}"
        raise RefusalError(reason, messages.OTHER, error=error.errno or 0) from error
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        os.close(fd)
        raise RefusalError(f"other users can enter {path}, so vshd keeps no sessions there", messages.OTHER)
    return SessionsPlace(fd)


def find_peer(channel: "_socket.socket") -> tuple[int, int]:
    """The pid and the uid of the process at the other end."""
    words = memoryview(channel.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _UCRED_SIZE)).cast("i")
    return words[0], words[1] & 0xFFFFFFFF


def end_keepers(options: "Options", timeout_s: float) -> None:
    """Has every keeper end its session, and waits for that."""
    path = options.lasting_dir or _find_default()
    if not os.path.isdir(path):
        return
    try:
        place = open_place(options)
    except RefusalError:
        return
    deadline_s = time.monotonic() + timeout_s
    fds = [fd for uid, found in place.list_sessions(0) if (fd := place.end_keeper(uid, found)) >= 0]
    place.close()
    for fd in fds:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000)
        os.close(fd)


def no_session(session: bytes) -> RefusalError:
    """There is none, or it is not this user's."""
    shown = os.fsdecode(session[: kept.NAME_MAX])
    return RefusalError(f"no session has the id or name '{shown}'", messages.NO_SESSION, subject=session)


def _find_default() -> str:
    if os.geteuid() == 0:
        return ROOTS_DIRECTORY
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return f"{runtime}/vshd-sessions" if runtime else ""


def _name(uid: int, between: bytes, rest: bytes) -> bytes:
    return b"%d%s%s" % (uid, between, rest)


def _split(name: bytes) -> tuple[int, bytes]:
    """The uid and id of a socket's name. Raises ValueError."""
    uid, _, found = name.partition(b".")
    if not uid.isdigit() or not kept.is_id(found):
        raise ValueError(name)
    return int(uid), found


def _silent() -> KeeperAnswer:
    return KeeperAnswer(b"the process that keeps the session does not answer", messages.Failure(messages.OTHER))


def _collect(
    poll: "select.poll",
    waiting: "dict[int, tuple[int, _socket.socket]]",
    answers: list[KeeperAnswer | None],
    deadline_s: float,
) -> bool:
    """Takes the answers that come next; False at the deadline."""
    ready = poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000)
    for fd, _ in ready:
        index, channel = waiting.pop(fd)
        poll.unregister(fd)
        answer = KeeperAnswer()
        try:
            answer.merge(channel.recv(MESSAGE_MAX))
            # One that has ended in this moment, or knows no better.
            answers[index] = answer if answer.record is not None or answer.failure is not None else None
        except (OSError, RemoteProtocolError):
            answers[index] = None
        finally:
            channel.close()
    return bool(ready)


def record_of(answer: KeeperAnswer | None, uid: int, found: bytes) -> SessionRecord:
    """What a list shows of a session."""
    if answer is not None and answer.record is not None:
        return answer.record
    record = SessionRecord()
    record.id, record.uid = found, uid
    return record
