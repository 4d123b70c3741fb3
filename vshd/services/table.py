"""What a connection, or the whole daemon, can become beside sessions that run commands: two tables of names.

A row of SERVICES is asked for by a field of the client's request, and is handed the connection once its account is
known. A row of MODES is asked for by a flag of vshd's, and takes the place of the server. A row's module is loaded when
the row is asked for, and not before: sessions that run commands, nearly all, pay for none. `budget` is how many modules
loading it may bring in; tests/vshd/test_services.py holds it.

To add a service: a module here with `open_service`, `user_of` and `describe`, and a row. With is_own it has `serve` in
place of `open_service`.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from vshd.flags import Options
    from vshd.log import Log
    from vshd.root import Root
    from vshd.session.account import Account
    from vshd.signals import Wakeup
    from vshd.wire.messages import SetupConnectionRequest
    from vshd.wire.server import ServerConnection

    class Handed(Protocol):
        """A service that was opened for one connection. description: what the client is answered, such as a port."""

        description: bytes

        def run(self, fd: int, rest: bytes, wakeup: Wakeup, log: Log) -> str:
            """Serves the connection `fd`, of which `rest` was read already, to its end; the end in words, for the log.

            The service closes fd.
            """

    class Serving(Protocol):
        """The session of a service that answers for itself: its connection, past the request."""

        fd: int
        who: str
        options: Options
        log: Log
        wakeup: Wakeup
        connection: ServerConnection
        around: "Surroundings"

        def hand_over(self, description: bytes) -> None:
            """Answers READY, with these words."""

        def send(self, data: bytes) -> None:
            """Sends bytes behind the answer."""


class Service:
    """One row of SERVICES.

    is_hosts: only the host may ask for it, whomever else this vshd serves. is_thaw: a frozen machine serves it, and
    nothing else; one that is not frozen does not. is_own: it runs as vshd's own user, answers the client itself, and
    must look at whose client it is. is_outside: it acts in vshd's own root, where --root_namespace names another.
    later: modules that it loads when it runs. From another root it could not.
    """

    __slots__ = ("budget", "field", "is_hosts", "is_outside", "is_own", "is_thaw", "later", "module", "name")

    def __init__(
        self,
        name: str,
        field: str,
        module: str,
        budget: int,
        *,
        is_hosts: bool = False,
        is_thaw: bool = False,
        is_outside: bool = False,
        is_own: bool = False,
        later: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.field = field
        self.module = module
        self.budget = budget
        self.is_hosts = is_hosts
        self.is_thaw = is_thaw
        self.is_outside = is_outside
        self.is_own = is_own
        self.later = later


class Mode:
    """One row of MODES. flags: those that ask for it. entry: a function of the options and the log, in `module`."""

    __slots__ = ("budget", "entry", "flags", "module", "name")

    def __init__(self, name: str, flags: tuple[str, ...], module: str, entry: str, budget: int) -> None:
        self.name = name
        self.flags = flags
        self.module = module
        self.entry = entry
        self.budget = budget


class Surroundings:
    """What a service may know of its daemon.

    is_frozen: the machine awaits its thaw. facts: the wall's layers as pid 1 found them, a line each. renew: has the
    server read the machine's state again, before it accepts the next connection. preload: has the server load what
    sessions that last need. forget: has this process, which serves no other client, forget its server and the token.
    home: of the service's user, once that is known. root: that of sessions, where it is not vshd's own.
    """

    __slots__ = ("facts", "forget", "home", "is_frozen", "options", "preload", "renew", "root")

    def __init__(
        self,
        options: "Options",
        *,
        is_frozen: bool,
        facts: bytes,
        renew: "Callable[[], None]",
        preload: "Callable[[], None]" = lambda: None,
        forget: "Callable[[], None]" = lambda: None,
        root: "Root | None" = None,
    ) -> None:
        self.options = options
        self.is_frozen = is_frozen
        self.facts = facts
        self.renew = renew
        self.preload = preload
        self.forget = forget
        self.home = "/"
        self.root = root

    def prove_wall(self) -> bytes:
        """The wall's layers as they are now, a line each; none where there is no wall."""
        if not self.facts:
            return b""
        from vshd.pid1.duties import prove_wall  # noqa: PLC0415 - a thaw alone asks

        return prove_wall(self.facts)


LATER_OF_SHARES = (
    "ctypes",
    *("vshd.services.share_fuse", "vshd.services.share_virtiofs", "vshd.services.share_9p"),
)
SERVICES = (
    Service("forward", "forward", "vshd.services.forward", 10, later=("vshd.services.branches",)),
    Service("ports", "ports", "vshd.services.ports", 5),
    Service("freeze", "freeze", "vshd.services.freeze", 2, is_hosts=True, is_outside=True),
    Service("thaw", "thaw", "vshd.services.thaw", 4, is_hosts=True, is_thaw=True, is_outside=True),
    Service("clock", "clock", "vshd.services.clock", 2, is_hosts=True, is_outside=True),
    Service("power-off", "power_off", "vshd.services.power_off", 2, is_hosts=True, is_outside=True),
    Service("logs", "logs", "vshd.services.logs", 4, is_hosts=True, is_outside=True),
    Service("core dumps", "cores", "vshd.services.cores", 4, is_hosts=True, is_outside=True),
    Service("failed services", "units", "vshd.services.units", 4, is_hosts=True, is_outside=True),
    Service("subsystem", "subsystem", "vshd.services.subsystem", 3, later=("vshd.services.sftp.serving",)),
    Service("share", "share", "vshd.services.share", 2, is_hosts=True, later=LATER_OF_SHARES),
    Service("lasting sessions", "lasting", "vshd.services.lasting", 5, is_own=True, later=("vshd.lasting.starting",)),
    Service("attached client", "attach", "vshd.services.lasting", 5, is_own=True),
)
MODES = (
    Mode("one session", ("forward_to_host_port", "forward_to"), "vshd.services.one", "serve_one", 40),
    Mode("commands", ("inetd", "activate"), "vshd.services.inetd", "serve_commands", 10),
    Mode("commands of the host", ("exec_from",), "vshd.services.guest_exec", "run_commands", 12),
    Mode("IPv6 mapping", ("ipv6",), "vshd.services.mapped", "run_mapping", 12),
)


class Asked:
    """A service that a request asks for. Invariant: its module is loaded."""

    def __init__(self, service: Service, value: object) -> None:
        self.service = service
        self._value = value
        self._module = __import__(service.module, fromlist=("user_of",))

    @property
    def user(self) -> bytes:
        """The user that the service runs as, as the client named it."""
        user: bytes = self._module.user_of(self._value)
        return user

    def describe(self) -> str:
        """What is asked for, for the log."""
        text: str = self._module.describe(self._value)
        return text

    def open(self, fd: int, around: Surroundings) -> "Handed":
        """Opens it for the connection `fd`, as the user that this process is now. Raises RefusalError."""
        handed: Handed = self._module.open_service(self._value, fd, around)
        return handed

    def serve(self, serving: "Serving", account: "Account") -> str:
        """Has a service that answers for itself do so; the end in words. Raises RefusalError."""
        end: str = self._module.serve(self._value, serving, account)
        return end


def find_service(request: "SetupConnectionRequest") -> Asked | None:
    """The service that a request asks for; None: it runs a command or a login shell."""
    for service in SERVICES:
        value = getattr(request, service.field)
        if value is not None:
            return Asked(service, value)
    return None


def run_mode(options: "Options", log: "Log") -> int | None:
    """Runs the mode that the flags ask for to its end, and returns the exit status; None: the server is wanted."""
    for mode in MODES:
        if any(getattr(options, flag) for flag in mode.flags):
            status: int = getattr(__import__(mode.module, fromlist=(mode.entry,)), mode.entry)(options, log)
            return status
    return None
