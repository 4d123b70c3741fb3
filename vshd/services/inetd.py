"""Commands started by connections: each gets its own as stdin and stdout (inetd), or one gets the listening socket
(systemd's LISTEN_FDS).

Owns the listener and the children. Who connects is checked before a command is started for it; a command that gets the
listening socket accepts, and so checks, itself.
"""

import os
import select
import time

from vshd import ready
from vshd.flags import Options
from vshd.listener import LISTEN_FDS_START, Listener, open_listener, parse_allowed_cids, take_passed_listener
from vshd.log import Log
from vshd.processes import reap_ended, wait_until_none
from vshd.root import open_root
from vshd.signals import SIGCHLD, SIGINT, SIGKILL, SIGTERM, Wakeup, find_ignored

# Commands get TERM and then this long before they are killed.
SHUTDOWN_S = 5.0
# After an accept() that failed for want of descriptors or memory.
ACCEPT_PAUSE_S = 0.1
# A command that ends more often than this in the period, with connections still waiting, will not serve them.
RESPAWN_MAX = 10
RESPAWN_PERIOD_S = 30.0


class _Children:
    """Invariant: `pids` are exactly the children not yet reaped, with what the log calls them."""

    def __init__(self, listener: Listener, options: Options, log: Log, wakeup: Wakeup) -> None:
        """wakeup: has SIGCHLD, SIGTERM and SIGINT, perhaps already."""
        self.listener = listener
        self.options = options
        self.log = log
        self.pids: dict[int, str] = {}
        self.is_stopping = False
        self._wakeup = wakeup
        self._poll = select.poll()
        self._poll.register(wakeup.fd, select.POLLIN)

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT."""
        fd = self.listener.socket.fileno()
        while not self.is_stopping:
            if self.is_wanted():
                self._poll.register(fd, select.POLLIN)
            ready = [ready for ready, _ in self._poll.poll()]
            if self._wakeup.fd in ready:
                self._take_signals()
            if fd in ready and not self.is_stopping:
                self.serve()
            if self.is_wanted() is False:
                self._forget(fd)
        self._stop()

    def is_wanted(self) -> bool:
        """Whether connections are looked at now."""
        raise NotImplementedError

    def ends_commands(self) -> bool:
        """Whether the end of this process is that of its commands."""
        return self.options.end_sessions

    def serve(self) -> None:
        """A connection waits."""
        raise NotImplementedError

    def _forget(self, fd: int) -> None:
        try:
            self._poll.unregister(fd)
        except KeyError:
            pass

    def _take_signals(self) -> None:
        numbers = self._wakeup.take()
        if SIGTERM in numbers or SIGINT in numbers:
            self.is_stopping = True
        for pid, status in reap_ended():
            who = self.pids.pop(pid, "")
            self.log.info(f"{who}: {self.options.command[0]}: ended with {os.waitstatus_to_exitcode(status)}")

    def _stop(self) -> None:
        self.listener.close()
        if not self.ends_commands():
            return
        self._signal(SIGTERM)
        wait_until_none(self.pids, self._wakeup, self._take_signals, SHUTDOWN_S)
        self._signal(SIGKILL)

    def _signal(self, number: int) -> None:
        for pid in self.pids:
            try:
                # Each is the leader of its own group.
                os.killpg(pid, number)
            except ProcessLookupError:
                pass


class Inetd(_Children):
    """A command for each connection."""

    def is_wanted(self) -> bool:
        return len(self.pids) < self.options.max_sessions

    def serve(self) -> None:
        try:
            fd, who, is_allowed = self.listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self.log.error(f"cannot accept a connection: {error.strerror}")
            time.sleep(ACCEPT_PAUSE_S)
            return
        try:
            if is_allowed:
                self._start(fd, who)
            else:
                self.log.warning(f"{who}: refused: this CID is not allowed")
        finally:
            os.close(fd)

    def _start(self, fd: int, who: str) -> None:
        command = self.options.command
        actions = [(os.POSIX_SPAWN_DUP2, fd, 0), (os.POSIX_SPAWN_DUP2, fd, 1)]
        ignored = find_ignored()
        try:
            pid = os.posix_spawnp(
                command[0], command, os.environ, file_actions=actions, setsid=True, setsigmask=(), setsigdef=ignored
            )
        except OSError as error:
            self.log.error(f"{who}: cannot start {command[0]}: {error.strerror}")
            return
        self.pids[pid] = who


class Activator(_Children):
    """One command at a time, which accepts itself; started when a client connects and it does not run."""

    def __init__(self, listener: Listener, options: Options, log: Log, wakeup: Wakeup) -> None:
        super().__init__(listener, options, log, wakeup)
        self._starts_s: list[float] = []
        # What it is made for expects accept() to wait.
        listener.socket.setblocking(True)

    def is_wanted(self) -> bool:
        return not self.pids

    def ends_commands(self) -> bool:
        # It holds the listening socket, which the next vshd must be able to open.
        return True

    def serve(self) -> None:
        now_s = time.monotonic()
        self._starts_s = [start_s for start_s in self._starts_s if now_s - start_s < RESPAWN_PERIOD_S] + [now_s]
        if len(self._starts_s) > RESPAWN_MAX:
            self.log.error(f"{self.options.command[0]} ends and does not accept: given up")
            self.is_stopping = True
            return
        pid = os.fork()
        if pid:
            self.pids[pid] = "socket"
            return
        self._become_command()

    def _become_command(self) -> None:
        """In the child: never returns."""
        command = self.options.command
        try:
            self._wakeup.close()
            for number in find_ignored():
                _reset(number)
            os.setsid()
            os.dup2(self.listener.socket.fileno(), LISTEN_FDS_START)
            # When it has that number already, dup2() has changed nothing.
            os.set_inheritable(LISTEN_FDS_START, True)
            environment = {**os.environ, "LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
            os.execvpe(command[0], command, environment)  # noqa: S606 - what it is for
        except OSError as error:
            self.log.error(f"cannot start {command[0]}: {error.strerror}")
        finally:
            os._exit(127)


def _reset(number: int) -> None:
    import _signal  # type: ignore[import-not-found]  # noqa: PLC0415 - one call, in a child

    _signal.signal(number, _signal.SIG_DFL)


def serve_commands(options: Options, log: Log) -> int:
    """Starts a command for each connection, or one command for the listening socket. Raises OSError, FlagError."""
    where = options.inetd or options.activate
    allowed_cids = parse_allowed_cids(options.allow_cid)
    root = open_root(options.root_namespace)
    if root is not None:
        root.enter()
    listener = take_passed_listener(allowed_cids) or open_listener(
        f"vsock:{where}" if where.isdigit() else where, allowed_cids
    )
    wakeup = Wakeup((SIGCHLD, SIGTERM, SIGINT))
    ready.tell_systemd()
    server = Inetd if options.inetd else Activator
    server(listener, options, log, wakeup).run()
    return 0
