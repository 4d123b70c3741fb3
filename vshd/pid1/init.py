"""pid 1 of a small guest: starts vshd and keeps it running, reaps orphaned processes, and ends the guest on request.

Where a root that is not vshd's own has systemd, that becomes pid 1, and a child of ours keeps vshd (vshd.pid1.system).

/init has mounted and loaded what the guest needs and then becomes this process. vshd is forked from it: the guest
starts one interpreter, and pid 1 has imported no more than listening needs. The words are busybox init's: USR2 powers
off, TERM and INT reboot, USR1 halts. pid 1 must not die, so that every failure ends in a line for the console and a
power-off.
"""

import _socket
import fcntl
import os
import select
import struct
import sys
import time

from vshd.__main__ import serve
from vshd.carry.inherited import hold_stdio, settle_signals
from vshd.carry.vsock import VsockError
from vshd.flags import HOST_CID, FlagError, Options, parse_flags
from vshd.listener import bind_early, parse_allowed_cids
from vshd.pid1.collector import HANDED, CollectorKeeper
from vshd.pid1.duties import (
    Duties,
    DutyError,
    describe_wall,
    lock_modules,
    raise_kernel_layer,
    run_hook,
    start_service,
    take_duties,
)
from vshd.signals import SIGCHLD, SIGINT, SIGKILL, SIGTERM, SIGUSR1, SIGUSR2, Wakeup

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import NoReturn

    from vshd.root import Root

READY_ARGUMENT = "vmkit.ready="
# Says that there is a token, and where: a guest that cannot find it must not serve without.
TOKEN_ARGUMENT = "vmkit.token="  # noqa: S105 - a word, not a secret
# The machine's name.
NAME_ARGUMENT = "vmkit.name="
# A vshd that dies is started again: the first time at once, then after a pause that doubles with each death. One that
# has lived this long starts from the beginning. pid 1 never gives up: what else runs in the guest would end with it.
PAUSE_FIRST_S = 0.1
PAUSE_MAX_S = 10.0
LIVED_S = 30.0
# Where the state of a machine that is saved and restored is kept; the directory is memory.
FREEZE_FILE = "/run/vshd.freeze"
# How long processes have after TERM, and the kernel after KILL.
TERM_S = 2.0
KILL_S = 1.0
# linux/sockios.h, linux/if.h
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
BUSYBOX = "/bin/busybox"

WAYS_DOWN = {SIGUSR2: "poweroff", SIGTERM: "reboot", SIGINT: "reboot", SIGUSR1: "halt"}


class InitError(Exception):
    """The guest cannot go on; one line says why."""


def main(argv: list[str] | None = None) -> "NoReturn":
    """Runs the guest until it is powered off. argv: flags for vshd, and those of vshd.pid1.duties."""
    way = "poweroff"
    init = None
    try:
        settle_signals()
        hold_stdio()
        init = Init(sys.argv[1:] if argv is None else argv)
        way = init.run()
    except (InitError, DutyError, FlagError, VsockError, OSError) as error:
        _report(str(error))
    except BaseException as error:  # pid 1 must not die of anything
        _report(f"{type(error).__name__}: {error}")
    if init is not None and init.is_beside:
        # The guest is the other pid 1's to end. vshd goes on, if it runs.
        os._exit(1)
    _end_guest(way)


class Init:
    """Invariant: `_vshd` is the running daemon's pid, -1 while the next one is due at `_due_s` (of time.monotonic());
    `_bound` has its port all the time, if the image wants that; `is_beside` where another program is pid 1.
    """

    def __init__(self, argv: list[str]) -> None:
        self.is_beside = False
        self._duties, self._argv = take_duties(argv)
        self._bound: _socket.socket | None = None
        self._vshd = -1
        self._started_s = 0.0
        self._due_s = 0.0
        self._deaths = 0
        self._is_ready = False
        self._token_from: str | None = None
        self._power_off_signal = SIGUSR2
        self._collector = CollectorKeeper(_warn)
        self._ready, self._ready_end = os.pipe()
        os.set_blocking(self._ready, False)
        # Those that are to be started, and those that run, by their pids.
        self._waiting = list(self._duties.services)
        self._services: dict[int, str] = {}
        self._wakeup = Wakeup((SIGCHLD, *WAYS_DOWN))

    def run(self) -> str:
        """Keeps vshd running; returns the way down that was asked for. Raises InitError."""
        raise_loopback()
        command_line = _read_command_line()
        take_own_name(command_line)
        self._token_from = find_token_source(command_line)
        ready_port = find_ready_port(command_line)
        options = parse_flags(self._argv)
        if self._duties.log:
            # Before the first program that is not ours.
            self._collector.open(self._duties.log, options.logs or HANDED)
        facts = self._prepare(self._duties, options)
        if options.root_namespace:
            facts += self._hand_over(command_line, options.root_namespace)
        self._start_vshd(ready_port, facts)
        poll = select.poll()
        poll.register(self._wakeup.fd, select.POLLIN)
        if self._waiting:
            poll.register(self._ready, select.POLLIN)
        while True:
            logs = self._collector.watch(poll)
            ready = poll.poll(self._find_wait_ms())
            if self._waiting and self._was_ready():
                self._is_ready = True
                poll.unregister(self._ready)
                self._start_services()
            for number in self._wakeup.take():
                if number in WAYS_DOWN:
                    return WAYS_DOWN[number]
            self._reap()
            if any(fd in logs for fd, _ in ready):
                self._collector.tend(time.monotonic(), self._wakeup.close)
            if self._vshd < 0 and time.monotonic() >= self._due_s:
                self._restart_vshd()

    def _start_services(self) -> None:
        """The host has been told by now: what they cost at their start is no part of the boot."""
        waiting, self._waiting = self._waiting, []
        for path in waiting:
            try:
                self._services[start_service(path)] = path
            except OSError as error:
                _report(f"{path} cannot be started: {error.strerror}")

    def _find_wait_ms(self) -> float | None:
        return None if self._vshd >= 0 else max(0.0, self._due_s - time.monotonic()) * 1000 + 1

    def _prepare(self, duties: Duties, options: Options) -> bytes:
        """Everything that comes before vshd; what the host is told of it. Raises what cannot be done."""
        allowed_cids = parse_allowed_cids(options.allow_cid)
        kernel = raise_kernel_layer(duties)
        if kernel.startswith("missing"):
            _warn(f"the wall's kernel layer is {kernel}")
        if "daemon" in duties.layers:
            self._bound = bind_early(options.listen)
        if duties.hook:
            # The hook may log more than the socket holds.
            self._collector.start(self._wakeup.close)
            run_hook(duties.hook)
        if duties.lock_modules:
            lock_modules()
        return describe_wall(duties, kernel, allowed_cids) if duties.layers else b""

    def _hand_over(self, command_line: str, namespace: str) -> bytes:
        """Where the root's systemd is to be pid 1, returns in a child of it alone. Returns what the host is told."""
        from vshd.pid1 import system  # noqa: PLC0415 - most guests have one root

        root = system.find_system(system.find_wanted(command_line, self._duties.system), namespace)
        if root is None:
            return b""
        # A child of the other pid 1 would not be ours to reap.
        self._collector.stop()
        self._collector.yield_path()
        if self._collector.is_open:
            self._listen_to_journal(root)
        if os.fork():
            system.become_system(root)
        self.is_beside = True
        os.setsid()
        system.spare_keeper()
        self._power_off_signal = system.POWER_OFF
        return system.FACT

    def _listen_to_journal(self, root: "Root") -> None:
        from vshd.pid1.journal import open_journal  # noqa: PLC0415 - most guests have one root

        try:
            self._collector.take_journal(open_journal(root))
        except OSError as error:
            _warn(f"the host gets nothing of the journal: {error.strerror or error}")

    def _start_vshd(self, ready_port: int | None, facts: bytes = b"") -> None:
        options = parse_flags(self._argv)
        if ready_port is not None:
            options.ready = f"{HOST_CID}:{ready_port}"
        if self._token_from is not None:
            options.token_from = self._token_from
        options.freeze_file = options.freeze_file or FREEZE_FILE
        if self._duties.log:
            options.logs = options.logs or HANDED
        options.power_off = True
        options.power_off_signal = self._power_off_signal
        pid = os.fork()
        if pid:
            self._vshd = pid
            self._started_s = time.monotonic()
            return
        self._become_vshd(options, facts)

    def _become_vshd(self, options: Options, facts: bytes) -> "NoReturn":
        status = 1
        try:
            self._wakeup.close()
            os.setsid()
            if self.is_beside:
                from vshd.pid1 import system  # noqa: PLC0415 - see _hand_over

                system.expose_vshd()
            status = serve(options, None if self._is_ready else self._say_ready, self._bound, facts)
        except BaseException as error:  # reported here, or nowhere
            _report(f"vshd: {type(error).__name__}: {error}")
        finally:
            os._exit(status)

    def _say_ready(self) -> None:
        os.write(self._ready_end, b"1")

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._vshd:
                self._on_death(os.waitstatus_to_exitcode(status))
            elif pid == self._collector.pid:
                self._collector.note_end(os.waitstatus_to_exitcode(status), time.monotonic())
            elif pid in self._services:
                _warn(f"{self._services.pop(pid)} ended with {os.waitstatus_to_exitcode(status)}")

    def _on_death(self, status: int) -> None:
        """A vshd that has served once is started again; one that never came up will not. Raises InitError."""
        self._vshd = -1
        self._is_ready = self._is_ready or self._was_ready()
        if not self._is_ready:
            raise InitError(f"vshd ended with {status} before it was ready")
        if status == 0:
            # It was told to end, and that is how it is restarted.
            self._due_s = time.monotonic()
        else:
            self._pause(f"vshd ended with {status}")

    def _restart_vshd(self) -> None:
        try:
            # The host has been told once, and may not listen any more.
            self._start_vshd(None)
        except OSError as error:
            self._pause(f"vshd cannot be started: {error.strerror}")

    def _pause(self, why: str) -> None:
        now_s = time.monotonic()
        if now_s - self._started_s > LIVED_S:
            self._deaths = 0
        pause_s = find_pause_s(self._deaths)
        self._deaths += 1
        self._due_s = now_s + pause_s
        _report(f"{why}; it is started again {f'in {pause_s:g} s' if pause_s else 'at once'}")

    def _was_ready(self) -> bool:
        try:
            return bool(os.read(self._ready, 1))
        except BlockingIOError:
            return False


def find_pause_s(deaths: int) -> float:
    """How long to wait before vshd is started again, after so many deaths before this one."""
    # The exponent has a ceiling: deaths are counted for as long as the guest runs.
    return min(PAUSE_MAX_S, PAUSE_FIRST_S * 2.0 ** (min(deaths, 20) - 1)) if deaths else 0.0


def find_ready_port(command_line: str) -> int | None:
    """The port of `vmkit.ready=PORT`; None without one. Raises InitError when it is no port."""
    port = None
    for word in command_line.split():
        if word.startswith(READY_ARGUMENT):
            text = word.removeprefix(READY_ARGUMENT)
            if not (text.isascii() and text.isdigit()):
                raise InitError(f"the kernel argument {word} names no port")
            port = int(text)
    return port


def take_own_name(command_line: str) -> None:
    """The machine's name becomes the hostname: `vmkit.name=NAME`. Without one it stays the image's."""
    if NAME_ARGUMENT not in command_line:
        return
    from vshd.naming import find_name, take_name  # noqa: PLC0415 - guests of other programs have no such word

    name = find_name(command_line)
    try:
        if name:
            take_name(name)
    except OSError as error:
        _report(f"cannot set the hostname: {error.strerror}")


def find_token_source(command_line: str) -> str | None:
    """What `vmkit.token=SOURCE` says, for vshd's --token_from; None without one."""
    words = [word for word in command_line.split() if word.startswith(TOKEN_ARGUMENT)]
    return words[-1].removeprefix(TOKEN_ARGUMENT) if words else None


def raise_loopback() -> None:
    """Servers of the guest listen there, and forwards connect to them. A kernel without it has no TCP either."""
    request = struct.pack("16sH14x", b"lo", IFF_UP)
    try:
        with_interfaces = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    except OSError:
        return
    try:
        fcntl.ioctl(with_interfaces.fileno(), SIOCSIFFLAGS, request)
    except OSError as error:
        _report(f"cannot raise the interface lo: {error.strerror}")
    finally:
        with_interfaces.close()


def _read_command_line() -> str:
    with open("/proc/cmdline", encoding="utf-8", errors="replace") as file:
        return file.read()


def _report(text: str) -> None:
    """The one line the host looks for on the console."""
    _say(f"error: {text}")


def _warn(text: str) -> None:
    _say(f"warning: {text}")


def _say(text: str) -> None:
    try:
        os.write(2, f"vmkit-init: {text}\n".encode("utf-8", "replace"))
    except OSError:
        pass


def _end_guest(way: str) -> "NoReturn":
    """TERM for all, KILL for who stays, then busybox tells the kernel."""
    if os.getpid() != 1:
        # Started by mistake outside a guest: "all" would be everybody else's processes.
        _report("this is not pid 1")
        os._exit(1)
    wakeup = Wakeup((SIGCHLD,))
    for number, timeout_s in ((SIGTERM, TERM_S), (SIGKILL, KILL_S)):
        try:
            os.kill(-1, number)
        except ProcessLookupError:
            break
        if _wait_for_all(wakeup, timeout_s):
            break
    os.sync()
    try:
        os.execv(BUSYBOX, [BUSYBOX, way, "-f"])  # noqa: S606 - pid 1 becomes it
    except OSError as error:
        _report(f"cannot {way}: {BUSYBOX}: {error.strerror}")
    # The end of pid 1 is a kernel panic, which the host sees: better than a guest that hangs.
    os._exit(1)


def _wait_for_all(wakeup: Wakeup, timeout_s: float) -> bool:
    """Reaps until no process is left; False at the deadline."""
    deadline_s = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(wakeup.fd, select.POLLIN)
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            return False
        poll.poll(left_s * 1000 + 1)
        wakeup.take()


if __name__ == "__main__":
    main()
