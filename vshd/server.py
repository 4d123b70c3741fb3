"""Accepts connections and gives each a process of its own while it lasts; reaps the processes and bounds their number.

The server itself never reads a byte from a client. Sessions outlive the server, unless --end_sessions is set.
"""

import _socket
import gc
import os
import select
import sys
import time

from vshd.flags import Options
from vshd.listener import Listener
from vshd.log import Log, Throttle
from vshd.oom import Shield
from vshd.processes import kill_session, reap_ended, wait_until_none
from vshd.services.table import Surroundings
from vshd.session.session import ENDED, Session
from vshd.signals import SIGCHLD, SIGINT, SIGKILL, SIGTERM, Wakeup
from vshd.spare import Spare, Spares, is_waited_for, make_channel, rehearse, wait_for_connection
from vshd.wire import messages
from vshd.wire.connection import default_limits
from vshd.wire.frames import LEGACY_MAX_PAYLOAD, encode_frame
from vshd.wire.messages import Failure, SetupConnectionResponse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.root import Root

# Sessions get TERM and then this long to end their targets (processes.GRACE_S) before they are killed.
SHUTDOWN_S = 7.0
# (session's pid, target's pid); a pipe writes so few bytes whole.
# Two ints of C. Without the module struct, and the one behind it, every daemon starts half a millisecond sooner.
REPORT_SIZE = 8
REPORTS_AT_ONCE = 512
# In place of a target's pid: the machine was frozen or thawed.
RENEW = -1
# In place of a target's pid: a session that lasts has started, and others will follow.
PRELOAD = -2
# Clients at once whose command does not run yet, or that have not proven the token. Each is a process of 0.6 MiB, and
# together they must not fill a small guest's memory: 200 did so at 256 MiB.
UNPROVEN_MAX = 128
# Which part of the time for its request such a client keeps when others wait behind a full house.
PATIENCE = 1 / 3
# After an accept() that failed for want of descriptors or memory.
ACCEPT_PAUSE_S = 0.1


class Server:
    """Invariant: `sessions` are exactly the children not yet reaped, by pid, with their peers.

    Children write (own pid, target's pid) to the reports pipe. So the server can end the target of a killed child. A
    forward has no target and reports itself. When the server demands a token, a child also writes (own pid, 0) as soon
    as the client has proven it. A child that can serve another connection writes (own pid, ENDED), and becomes a spare.
    """

    def __init__(
        self,
        listener: Listener,
        options: Options,
        log: Log,
        wakeup: Wakeup,
        token: bytes | None = None,
        *,
        is_frozen: bool = False,
        facts: bytes = b"",
        root: "Root | None" = None,
    ) -> None:
        """wakeup: gets SIGCHLD, SIGTERM and SIGINT, perhaps already. token: the secret that clients must prove.
        is_frozen, facts, root: see Surroundings.
        """
        self.listener = listener
        self.options = options
        self.log = log
        self.sessions: dict[int, str] = {}
        self.is_stopping = False
        self._strangers = Throttle(log)
        self._refusals = Throttle(log)
        self._wakeup = wakeup
        self._token = token
        self._is_frozen = is_frozen
        self._facts = facts
        self._root = root
        self._targets: dict[int, int] = {}
        self._dropped: set[int] = set()
        self._accepted_s: dict[int, float] = {}
        self._spares = Spares(options.spare_time)
        self._shield = Shield()
        self._reports, self._reports_end = os.pipe()
        for fd in (self._reports, self._reports_end):
            os.set_blocking(fd, False)

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT."""
        self._shield.take()
        # Children share these objects' pages as long as no process touches them.
        gc.collect()
        gc.freeze()
        gc.enable()
        poll = select.poll()
        poll.register(self._wakeup.fd, select.POLLIN)
        poll.register(self._reports, select.POLLIN)
        while not self.is_stopping:
            crowd_ms = self._find_crowd_wait()
            # Clients that come to a full house wait in the backlog.
            poll.register(self.listener.socket.fileno(), select.POLLIN if crowd_ms is None else 0)
            ready = poll.poll(self._spares.find_wait(time.monotonic()) if crowd_ms is None else crowd_ms)
            for fd, _ in ready:
                if fd == self._wakeup.fd:
                    self._take_signals()
                elif fd == self._reports:
                    self._take_reports()
                else:
                    self._accept()
            if crowd_ms is None and not self.is_stopping:
                self._tend_spare()
        self._stop()

    def _find_crowd_wait(self) -> float | None:
        """Returns how many milliseconds clients must wait for a place; None: there is one. Drops a silent client when
        others have waited for long. With a token there is no wait: _make_room drops strangers at once.
        """
        if self._token is not None:
            return None
        unproven = [pid for pid in self.sessions if pid not in self._targets]
        if len(unproven) < UNPROVEN_MAX:
            return None
        oldest = unproven[0]
        wait_s = self._accepted_s[oldest] + self.options.handshake_timeout * PATIENCE - time.monotonic()
        if wait_s > 0:
            return wait_s * 1000 + 1
        self._drop(oldest, "it is silent, and others wait")
        return None

    def _tend_spare(self) -> None:
        """Makes a spare while connections come, and dismisses it after the last one."""
        now_s = time.monotonic()
        if self._spares.is_over(now_s):
            self._spares.dismiss()
            self._shield.cover()
        elif self._spares.is_due(now_s):
            self._shield.cover()
            try:
                self._spares.keep(self._fork(None), now_s)
            except OSError:
                self._spares.dismiss()

    def _fork(self, connection: tuple[int, str] | None) -> Spare:
        """Forks a process that serves this connection, or waits for one. Raises OSError."""
        ours, theirs = make_channel()
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            ours.close()
            self._become_session(connection, theirs)
        theirs.close()
        return Spare(pid, ours)

    def _take_signals(self) -> None:
        numbers = self._wakeup.take()
        if SIGTERM in numbers or SIGINT in numbers:
            self.is_stopping = True
        self._reap()

    def _take_reports(self) -> None:
        try:
            reports = os.read(self._reports, REPORTS_AT_ONCE * REPORT_SIZE)
        except BlockingIOError:
            return
        numbers = memoryview(reports).cast("i")
        for session, target in zip(numbers[::2], numbers[1::2], strict=True):
            if target == RENEW:
                self._renew()
            elif target == PRELOAD:
                self._preload()
            elif target == ENDED:
                self._take_back(session)
            elif session in self.sessions:
                self._targets[session] = target
                if target:
                    self._shield.expect(session)
        if not self._spares.is_missed():
            self._shield.cover()

    def _renew(self) -> None:
        """A session has frozen the machine, or thawed it: from here on clients need another token."""
        from vshd.freeze import read_state  # noqa: PLC0415 - few machines are saved

        try:
            state = read_state(self.options.freeze_file)
        except (OSError, ValueError) as error:
            self.log.error(f"cannot read the machine's state: {error}")
            state = None
        if state is None:
            # The next vshd finds out, and serves no client without it.
            self.is_stopping = True
            return
        self._token = state.token
        self._is_frozen = state.is_frozen
        # They know the token of before.
        self._spares.dismiss_all()
        self._shield.cover()
        if state.is_frozen:
            # Restored guests fork from here: what their thaw needs is loaded once.
            import vshd.services.thaw  # noqa: PLC0415
            import vshd.wire.proof  # noqa: F401, PLC0415

    def _preload(self) -> None:
        """Loads what keepers need, once: each later one shares these pages instead of having 0.8 MiB of its own."""
        import vshd.lasting.starting  # noqa: PLC0415
        import vshd.services.lasting  # noqa: F401, PLC0415

        gc.collect()
        gc.freeze()

    def _take_back(self, pid: int) -> None:
        """A process has served its session, and can serve another."""
        spare = self._spares.take_back(pid)
        if spare is None or pid in self._dropped:
            # It ends by itself, or was killed.
            return
        has_score = self._shield.uncover(pid)
        self._forget(pid)
        if has_score:
            self._spares.keep(spare, time.monotonic())
        else:
            spare.dismiss()

    def _forget(self, pid: int) -> tuple[str, int]:
        """A session is over. Returns its peer, and its target's pid or 0."""
        self._accepted_s.pop(pid, None)
        self._shield.forget(pid)
        # A child without a session is a spare.
        return self.sessions.pop(pid, "a spare, without a client"), self._targets.pop(pid, 0)

    def _reap(self) -> None:
        self._take_reports()
        for pid, status in reap_ended():
            self._spares.forget(pid)
            who, target = self._forget(pid)
            if pid in self._dropped:
                self._dropped.remove(pid)
            elif status != 0:
                self.log.error(f"{who}: the session's process ended with {os.waitstatus_to_exitcode(status)}")
                if target:
                    kill_session(target)

    def _accept(self) -> None:
        """Accepts one: mostly there is no other, and poll() tells of it."""
        try:
            fd, who, is_allowed = self.listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self.log.error(f"cannot accept a connection: {error.strerror}")
            time.sleep(ACCEPT_PAUSE_S)
            return
        try:
            self._admit(fd, who, is_allowed)
        finally:
            os.close(fd)

    def _admit(self, fd: int, who: str, is_allowed: bool) -> None:
        if not is_allowed:
            self._strangers.warning(f"{who}: refused: this CID is not allowed", time.monotonic())
            return
        self._reap()
        if not self._make_room():
            self._refusals.warning(f"{who}: refused: {len(self.sessions)} sessions are open", time.monotonic())
            _refuse(fd, "too many sessions", self.options)
            return
        if not self._is_frozen:
            # A spare that rehearses would take the processor from the thaw, and not outlive it.
            self._spares.expect(time.monotonic())
        try:
            spare = self._spares.hand_over(fd, who) or self._fork((fd, who))
        except OSError as error:
            self.log.error(f"{who}: cannot start a session: {error.strerror}")
            _refuse(fd, "could not start a session", self.options)
            return
        self._add(spare, who)

    def _add(self, spare: Spare, who: str) -> None:
        now_s = time.monotonic()
        self.sessions[spare.pid] = who
        self._accepted_s[spare.pid] = now_s
        self._spares.add(spare, now_s)

    def _make_room(self) -> bool:
        """Whether there is a place. With a token, drops the oldest client without a proof to make one: strangers must
        not keep out a client that has the token."""
        is_full = len(self.sessions) >= self.options.max_sessions
        if self._token is None:
            return not is_full
        unproven = [pid for pid in self.sessions if pid not in self._targets]
        if not is_full and len(unproven) < UNPROVEN_MAX:
            return True
        if not unproven:
            return False
        self._drop(unproven[0], "it has proven nothing, and others wait")
        return True

    def _drop(self, pid: int, reason: str) -> None:
        self._strangers.warning(f"{self.sessions.pop(pid)}: dropped: {reason}", time.monotonic())
        self._accepted_s.pop(pid, None)
        self._dropped.add(pid)
        os.kill(pid, SIGKILL)

    def _become_session(self, connection: tuple[int, str] | None, channel: "_socket.socket") -> None:
        """Serves one session after another in the child, and exits. It closes the server's descriptors, and never
        returns to its loop.

        connection: the first one and its peer's name; None: it comes on the channel, as all others do.
        """
        status = 1
        try:
            self._shield.drop()
            self._wakeup.close()
            self.listener.socket.close()
            os.close(self._reports)
            self._spares.dismiss_all()
            self.log.renew()
            wakeup = Wakeup((SIGCHLD, SIGTERM))
            if connection is None:
                if not is_waited_for(channel):
                    rehearse(self.options)
                connection = wait_for_connection(channel, wakeup)
            while connection is not None and self._serve(connection, channel, wakeup):
                # Its next session may write as many lines as the last one.
                self.log.renew()
                connection = wait_for_connection(channel, wakeup)
            status = 0
        except BaseException as error:  # whatever it is, it must be seen, and end here
            self.log.error(f"a session: {type(error).__name__}: {error}{_find_place(error)}")
        finally:
            os._exit(status)

    def _serve(self, connection: tuple[int, str], channel: "_socket.socket", wakeup: Wakeup) -> bool:
        """Runs one session, in the child; returns whether this process can serve another."""

        def forget() -> None:
            self._token = None
            channel.close()

        around = Surroundings(
            self.options,
            is_frozen=self._is_frozen,
            facts=self._facts,
            renew=lambda: self._report(RENEW),
            preload=lambda: self._report(PRELOAD),
            forget=forget,
            root=self._root,
        )
        return Session(*connection, self.options, self.log, wakeup, self._report, self._token, around).run()

    def _report(self, target: int) -> None:
        """Reports, in the child, the target that the server must end if this process dies first; or another word."""
        numbers = (os.getpid(), target)
        try:
            os.write(
                self._reports_end,
                b"".join(number.to_bytes(REPORT_SIZE // 2, sys.byteorder, signed=True) for number in numbers),
            )
        except OSError:
            pass

    def _stop(self) -> None:
        """Ends listening. Open sessions go on without the server; --end_sessions ends them: SIGTERM, then SIGKILL."""
        self.listener.close()
        self._spares.dismiss_all()
        if not self.options.end_sessions:
            self._reap()
            self.log.info(f"vshd ended; sessions that go on: {len(self.sessions)}")
            return
        self._signal_sessions(SIGTERM)
        self._end_lasting()
        wait_until_none(self.sessions, self._wakeup, self._take_signals, SHUTDOWN_S)
        self._signal_sessions(SIGKILL)
        for target in filter(None, self._targets.values()):
            kill_session(target)
        self.log.info("vshd ended")

    def _end_lasting(self) -> None:
        """Ends the sessions that would outlive this server. Their keepers are not its children."""
        from vshd.lasting.place import end_keepers  # noqa: PLC0415 - few servers end so

        if self._root is not None:
            # Where the sessions are. This server has closed all else, and ends.
            self._root.enter()
        end_keepers(self.options, SHUTDOWN_S)

    def _signal_sessions(self, number: int) -> None:
        for pid in self.sessions:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass


def _find_place(error: BaseException) -> str:
    """Returns the file and line of the error. A failure in a guest leaves no more than a log line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"


def _refuse(fd: int, description: str, options: Options) -> None:
    """Sends a refusal, the server's only answer of its own: as many bytes as the socket takes at once."""
    # The request was not read: if it held no offer, its sender skips the answer to one.
    response = SetupConnectionResponse(messages.FAILED, description.encode())
    if options.extended:
        response.extended = default_limits()
        response.extended.failure = Failure(messages.LIMIT)
    try:
        os.set_blocking(fd, False)
        os.write(fd, encode_frame(response.encode(), LEGACY_MAX_PAYLOAD))
    except OSError:
        pass
