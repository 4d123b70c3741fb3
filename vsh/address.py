"""Finds a vshd: turns the user's words into an Address that a transport can open, by the registry of machines."""

from vsh import registry
from vsh.errors import VshError
from vsh.registry import Entry

VSHD_PORT = 9001
# 0 and 1 are the hypervisor and the machine itself, 2 is the host; 2^32-1 is "any" (linux/vm_sockets.h).
CID_MIN = 3
CID_MAX = (1 << 32) - 2
USAGE_STATUS = 64

UNIX, HYBRID, VSOCK, DESCRIPTOR, DOOR = "unix", "hybrid", "vsock", "fd", "door"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vsh.container import Door


class Address:
    """How to reach a vshd. The kind is UNIX (path), HYBRID (path, and a port requested with CONNECT), VSOCK (cid, port)
    or DESCRIPTOR (fd). For DOOR (door) the vshd connects to us. `name` is the name for people. `is_ours` means that it
    is in the registry. `token_file` holds the token that both sides must prove; empty: none. `entry`: the machine."""

    __slots__ = ("cid", "door", "entry", "fd", "is_ours", "kind", "name", "path", "port", "token_file")

    def __init__(
        self,
        kind: str,
        *,
        name: str,
        path: str = "",
        cid: int = 0,
        port: int = VSHD_PORT,
        fd: int = -1,
        is_ours: bool = False,
        token_file: str = "",
        entry: Entry | None = None,
        door: "Door | None" = None,
    ) -> None:
        self.kind = kind
        self.name = name
        self.path = path
        self.cid = cid
        self.port = port
        self.fd = fd
        self.is_ours = is_ours
        self.token_file = token_file
        self.entry = entry
        self.door = door

    @classmethod
    def unix(cls, path: str) -> "Address":
        """A vshd that listens on a UNIX socket itself."""
        return cls(UNIX, name=path, path=path)

    @classmethod
    def hybrid(cls, path: str, port: int = VSHD_PORT) -> "Address":
        """A VM whose vsock is a UNIX socket."""
        return cls(HYBRID, name=path, path=path, port=port)

    @classmethod
    def vsock(cls, cid: int, port: int = VSHD_PORT) -> "Address":
        """A VM of the kernel's vsock. Raises VshError for a CID that is no guest's."""
        return cls(VSOCK, name=f"CID {cid}", cid=check_cid(cid), port=port)

    @classmethod
    def descriptor(cls, fd: int) -> "Address":
        """A connection that is open already."""
        return cls(DESCRIPTOR, name=f"descriptor {fd}", fd=fd)

    @classmethod
    def behind_door(cls, door: "Door", name: str) -> "Address":
        """A vshd that connects to us, for one session."""
        return cls(DOOR, name=name, door=door)


class NotReady(VshError):  # noqa: N818 - it names what was seen
    """A machine is starting or stopping. entry: that machine."""

    def __init__(self, brief: str, *, hint: str, entry: Entry, details: str = "") -> None:
        super().__init__(brief, details=details, hint=hint)
        self.entry = entry


def check_cid(cid: int) -> int:
    """Returns `cid` if it can be a guest's. Raises VshError."""
    if cid > UINT32_MAX:
        raise VshError(f"Cid value ({cid}) is too large.  Largest valid value is {UINT32_MAX}")
    if not CID_MIN <= cid <= CID_MAX:
        raise VshError(
            f"the CID of a guest must be between {CID_MIN} and {CID_MAX}, not {cid}",
            hint=f"0 to 2 are the host's own, and {UINT32_MAX} means any",
            status=USAGE_STATUS,
        )
    return cid


UINT32_MAX = (1 << 32) - 1


def find_by_cid(cid: int, port: int = VSHD_PORT) -> Address:
    """Returns the address of a CID: a machine of the registry, else the kernel's vsock. Raises VshError."""
    machine = registry.find_machine(cid=check_cid(cid))
    return Address.vsock(cid, port) if machine is None else address_of(machine, port)


def find_by_name(name: str, port: int = VSHD_PORT) -> Address:
    """Returns the address of a machine of the registry. Raises VshError."""
    machine = registry.find_machine(name=name)
    if machine is None:
        from vsh.ending import describe_last  # noqa: PLC0415 - only after a failure

        raise VshError(
            f"no machine named '{name}' is running",
            details=describe_last(name) or registry.describe_detour(),
            hint=_known([one for one in registry.read_machines() if registry.is_for_users(one)]),
        )
    return address_of(machine, port)


def find_only(port: int = VSHD_PORT) -> Address:
    """Returns the address of the one running machine. Raises VshError when none runs, or several do."""
    machines = registry.read_machines()
    # Any other is meant only when it is named, or when no machine of the user runs.
    machines = [machine for machine in machines if registry.is_for_users(machine)] or machines
    if len(machines) != 1:
        raise VshError(
            "several machines are running: name one with --cid or --vm_name" if machines else "no machine is running",
            details="" if machines else registry.describe_detour(),
            hint=_known(machines),
        )
    return address_of(machines[0], port)


# What makes a machine in this state ready.
HINTS = {"paused": "vmkit resume {}", "pooled": "it waits in a pool; vmkit pool take starts one of the pool"}


def address_of(machine: Entry, port: int = VSHD_PORT) -> Address:
    """Returns the address of a registered machine. Raises VshError while it is not ready."""
    name = f"machine '{machine.name}'"
    if machine.state != "ready":
        raise NotReady(
            f"{name} is not ready: it is {machine.state or 'in an unknown state'}",
            # Of one that no person paused.
            details=str(machine.record.get("trouble", "")),
            hint=HINTS.get(machine.state, "vmkit status {}").format(machine.name),
            entry=machine,
        )
    kind = VSOCK if machine.vsock is None else HYBRID
    return Address(
        kind,
        name=name,
        path=machine.vsock or "",
        cid=machine.cid,
        port=port,
        is_ours=True,
        token_file=machine.token_file,
        entry=machine,
    )


def _known(machines: list[Entry]) -> str:
    if not machines:
        return "start a machine: vmkit up"
    names = ", ".join(f"{machine.name} (--cid {machine.cid})" for machine in machines)
    return f"running: {names}; choose one with --vm_name or --cid"
