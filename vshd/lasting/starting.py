"""Starts a lasting session: forks its keeper, which becomes the user, runs the program, and reports that it runs."""

import os
import select
import time

from vshd import oom
from vshd.flags import Options
from vshd.lasting.keeper import SessionKeeper
from vshd.lasting.place import SessionsPlace, open_place
from vshd.lasting.ring import FileStore, MemoryStore, Ring
from vshd.log import Log
from vshd.session.account import Account, switch_to
from vshd.session.limits import MIB, apply_limits
from vshd.session.refusal import RefusalError
from vshd.session.target import build_environment, enter_directory, start_target
from vshd.signals import SIGCHLD, SIGKILL, SIGTERM, Wakeup
from vshd.wire import kept, messages
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.kept import KeeperAnswer, KeeperCall, SessionRecord
from vshd.wire.messages import Failure, SetupConnectionRequest
from vshd.wire.requests import Lasting

# LastingSession output: what a client may ask for, and what it gets when it asks for nothing.
SIZE_MIN = 1 << 16
MEMORY_MAX = 64 * MIB
FILE_MAX = 1 << 40
MEMORY_DEFAULT = 16 * MIB
FILE_DEFAULT = 256 * MIB
# Of the guest's memory, at most, for one session that names no size.
MEMORY_SHARE = 32
# This part of the memory is for others: without it no session starts, and none keeps more output.
MEMORY_RESERVE = 16
# As long as a client waits for any other command to start.
START_S = 30.0
ANSWER_MAX = 1 << 16
MEMINFO_MAX = 1 << 12


def start(lasting: Lasting, fd: int, account: Account, options: Options, log: Log, wakeup: Wakeup) -> SessionRecord:
    """What runs now. fd: the client's connection, which the keeper does not keep. Raises RefusalError."""
    request = SetupConnectionRequest()
    try:
        request.merge(lasting.command)
    except RemoteProtocolError as error:
        raise RefusalError(f"the command is no request: {error}", messages.BAD_REQUEST) from error
    if lasting.name and not kept.is_name(lasting.name):
        raise RefusalError("this cannot be a session's name", messages.BAD_REQUEST, subject=lasting.name)
    size = find_size(lasting)
    if not has_memory():
        raise RefusalError("the guest has no memory to spare for a session that lasts", messages.LIMIT)
    place = open_place(options)
    _make_room(place, account, options)
    reading, writing = os.pipe()
    try:
        pid = os.fork()
    except OSError as error:
        os.close(reading)
        os.close(writing)
        reason = f"could not start a session: {error.strerror}"
        raise RefusalError(reason, messages.LIMIT, error=error.errno or 0) from error
    if not pid:
        os.close(reading)
        os.close(fd)
        _become_keeper(lasting, request, size, account, options, log, wakeup, place, writing)
    os.close(writing)
    try:
        record = _take_report(reading, pid)
        # As of a session's process. Not before: the target would have inherited it.
        oom.set_score(pid, oom.LAST)
        return record
    except RefusalError:
        os.kill(pid, SIGKILL)
        os.waitpid(pid, 0)
        # It may have made its socket.
        place.ask_all(
            [session for session in place.list_sessions(account.uid) if session[0] == account.uid],
            KeeperCall(kept.LOOK),
        )
        raise
    finally:
        os.close(reading)


def find_size(lasting: Lasting) -> int:
    """How many bytes of output are kept. Raises RefusalError."""
    most = FILE_MAX if lasting.file else MEMORY_MAX
    if lasting.size and not SIZE_MIN <= lasting.size <= most:
        raise RefusalError(
            f"the kept output must be between {SIZE_MIN} and {most} bytes, not {lasting.size}", messages.BAD_REQUEST
        )
    if lasting.size:
        return lasting.size
    if lasting.file:
        return FILE_DEFAULT
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(MIB, min(MEMORY_DEFAULT, memory // MEMORY_SHARE))


def has_memory() -> bool:
    """Whether the guest has some to spare; True where it does not say."""
    try:
        fd = os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        text = os.read(fd, MEMINFO_MAX)
    finally:
        os.close(fd)
    # proc(5): lines such as `MemAvailable:  165660 kB`, those two among the first.
    sizes = {line.partition(b":")[0]: line.split()[1] for line in text.splitlines() if line.startswith(b"Mem")}
    if b"MemTotal" not in sizes or b"MemAvailable" not in sizes:
        return True
    return int(sizes[b"MemAvailable"]) * MEMORY_RESERVE >= int(sizes[b"MemTotal"])


def _make_room(place: SessionsPlace, account: Account, options: Options) -> None:
    """Forgets the session of this user that ended first when there is no place for one more. Raises RefusalError."""
    own = _list_own(place, account)
    if len(own) < options.max_lasting:
        return
    answers = place.ask_all(own, KeeperCall(kept.LOOK, account.uid + 1))
    if len([answer for answer in answers if answer is not None]) < options.max_lasting:
        return
    ended = [answer.record for answer in answers if answer is not None and answer.record and answer.record.has_ended]
    if not ended:
        raise RefusalError(f"{len(own)} sessions of {account.name} are kept, and all run", messages.LIMIT)
    oldest = min(ended, key=lambda record: record.ended_s)
    place.ask(account.uid, oldest.id, KeeperCall(kept.FORGET, account.uid + 1))
    place.remove(account.uid, oldest.id)


def _list_own(place: SessionsPlace, account: Account) -> list[tuple[int, bytes]]:
    return [session for session in place.list_sessions(account.uid) if session[0] == account.uid]


def _take_report(reading: int, pid: int) -> SessionRecord:
    """What the keeper says of the start. Raises RefusalError."""
    deadline_s = time.monotonic() + START_S
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    data = b""
    while True:
        if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            raise RefusalError(f"the command did not start within {START_S:g} s", messages.OTHER)
        piece = os.read(reading, ANSWER_MAX)
        if not piece:
            break
        data += piece
    answer = KeeperAnswer()
    answer.merge(data)
    if answer.failure is not None:
        failure = answer.failure
        raise RefusalError(os.fsdecode(answer.description), failure.kind, error=failure.error, subject=failure.subject)
    if answer.record is None:
        raise RefusalError("the session's process was ended before the command ran", messages.LIMIT)
    return answer.record


def _become_keeper(
    lasting: Lasting,
    request: SetupConnectionRequest,
    size: int,
    account: Account,
    options: Options,
    log: Log,
    wakeup: Wakeup,
    place: SessionsPlace,
    report: int,
) -> None:
    """Runs the session in the child and exits."""
    status = 1
    try:
        os.setsid()
        wakeup.close()
        log.renew()
        try:
            keeper = _prepare(lasting, request, size, account, options, log, place)
        except RefusalError as refusal:
            _report(report, KeeperAnswer(os.fsencode(refusal.description), refusal.failure))
            return
        except OSError as error:
            _report(report, KeeperAnswer(b"could not start a session: " + os.fsencode(error.strerror or ""), Failure()))
            return
        _report(report, KeeperAnswer(record=keeper.record))
        keeper.run()
        status = 0
    except BaseException as error:  # whatever it is, it must be seen, and end here
        log.error(f"a session that lasts: {type(error).__name__}: {error}")
    finally:
        os._exit(status)


def _report(fd: int, answer: KeeperAnswer) -> None:
    os.write(fd, answer.encode())
    os.close(fd)


def _prepare(
    lasting: Lasting,
    request: SetupConnectionRequest,
    size: int,
    account: Account,
    options: Options,
    log: Log,
    place: SessionsPlace,
) -> SessionKeeper:
    """The keeper with its target, as the user. Raises RefusalError, OSError."""
    owner = os.geteuid()
    found, listener = place.make(account.uid, lasting.name)
    place.close()
    apply_limits(options, account)
    if options.allow_to_switch_user:
        switch_to(account)
    enter_directory(request, account)
    # Before the program runs: a file that cannot be made is no reason to end one.
    store = _open_store(lasting.file, size)
    wakeup = Wakeup((SIGCHLD, SIGTERM))
    target = start_target(request, account, build_environment(request, account, inherit=options.inherit_env))
    record = SessionRecord()
    record.id, record.name, record.user = found, lasting.name, os.fsencode(account.name)
    record.uid, record.pid = account.uid, target.pid
    record.command = b" ".join(request.argv)[: kept.COMMAND_MAX]
    record.started_s = max(1, int(time.time()))
    record.has_pty, record.size, record.file = target.has_pty, size, lasting.file[: kept.COMMAND_MAX]
    log.info(f"session {os.fsdecode(found)}: user {account.name}: {os.fsdecode(record.command[:100])}")
    return SessionKeeper(listener, target, Ring(store), record, options, log, wakeup, owner)


def _open_store(path: bytes, size: int) -> "MemoryStore | FileStore":
    """Raises RefusalError."""
    if not path:
        return MemoryStore(size, has_memory)
    try:
        return FileStore(path, size)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        shown = os.fsdecode(path[: kept.COMMAND_MAX])
        raise RefusalError(
            f"cannot make {shown}: {reason}", messages.OTHER, error=getattr(error, "errno", 0) or 0, subject=path
        ) from error
