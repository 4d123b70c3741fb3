"""The messages and methods of vm_tools.Maitred that we serve. proto/vm_guest.proto is the same for other programs.

Text is bytes here, as the guest's kernel takes it. Pure; both sides use it.
"""

from typing import ClassVar

from vshd.wire.proto3 import (
    BOOL,
    BYTES,
    BYTES_LIST,
    BYTES_MAP,
    INT32,
    MESSAGE,
    SINT32,
    UINT32,
    UINT64,
    VARINT,
    Field,
    Message,
    append_varint,
)

PORT = 8888
# The same service for root of the guest, and so for a client that has proven the machine's token to vshd.
SOCKET = "/run/maitred.sock"
SERVICE = "/vm_tools.Maitred/"

# LaunchProcessResponse.status.
UNKNOWN, EXITED, SIGNALED, LAUNCHED, FAILED = range(5)
STATUS_NAMES = ("UNKNOWN", "EXITED", "SIGNALED", "LAUNCHED", "FAILED")


class EmptyMessage(Message):
    """No fields."""

    __slots__ = ()


class LaunchProcessRequest(Message):
    """A program for the guest's root, in a session of its own. See vmkit.maitred.guest.launching."""

    __slots__ = ("argv", "env", "respawn", "use_console", "wait_for_exit")

    FIELDS = (
        Field(1, "argv", BYTES_LIST),
        Field(2, "env", BYTES_MAP),
        Field(3, "respawn", BOOL),
        Field(4, "use_console", BOOL),
        Field(5, "wait_for_exit", BOOL),
    )

    def __init__(self) -> None:
        self.argv: list[bytes] = []
        self.env: dict[bytes, bytes] = {}
        self.respawn = False
        self.use_console = False
        self.wait_for_exit = False


class LaunchProcessResponse(Message):
    """status: one of STATUS_NAMES, by number. code: the exit status or the signal, where it was waited for."""

    __slots__ = ("code", "status")

    FIELDS = (Field(1, "status", INT32), Field(2, "code", SINT32))
    NAMES: ClassVar = {"status": STATUS_NAMES}

    def __init__(self, status: int = UNKNOWN, code: int = 0) -> None:
        self.status = status
        self.code = code


class MountRequest(Message):
    """The arguments of mount(2), and what may be done before and after it."""

    __slots__ = (
        "create_target",
        "fstype",
        "mkfs_if_needed",
        "mountflags",
        "options",
        "permissions",
        "source",
        "target",
    )

    FIELDS = (
        Field(1, "source", BYTES),
        Field(2, "target", BYTES),
        Field(3, "fstype", BYTES),
        Field(4, "mountflags", UINT64),
        Field(5, "options", BYTES),
        Field(6, "create_target", BOOL),
        Field(7, "permissions", UINT32),
        Field(8, "mkfs_if_needed", BOOL),
    )

    def __init__(self) -> None:
        self.source = b""
        self.target = b""
        self.fstype = b""
        self.mountflags = 0
        self.options = b""
        self.create_target = False
        self.permissions = 0
        self.mkfs_if_needed = False


class Mount9PRequest(Message):
    """port: a vsock port of the host, where a 9P server listens."""

    __slots__ = ("port", "target")

    FIELDS = (Field(1, "port", UINT32), Field(2, "target", BYTES))

    def __init__(self, port: int = 0, target: bytes = b"") -> None:
        self.port = port
        self.target = target


class MountResponse(Message):
    """error: an errno, 0 where it is mounted."""

    __slots__ = ("error",)

    FIELDS = (Field(1, "error", SINT32),)

    def __init__(self, error: int = 0) -> None:
        self.error = error


class Timestamp(Message):
    """google.protobuf.Timestamp. seconds is int64 there; a negative one is a number above 2^63 here."""

    __slots__ = ("nanos", "seconds")

    FIELDS = (Field(1, "seconds", UINT64), Field(2, "nanos", INT32))

    def __init__(self, seconds: int = 0, nanos: int = 0) -> None:
        self.seconds = seconds
        self.nanos = nanos


class SetTimeRequest(Message):
    """time: None where the client sent none."""

    __slots__ = ("time",)

    FIELDS = (Field(1, "time", MESSAGE, Timestamp),)

    def __init__(self, time: Timestamp | None = None) -> None:
        self.time = time


class SetTimezoneRequest(Message):
    """timezone_name: below /usr/share/zoneinfo."""

    __slots__ = ("timezone_name", "use_bind_mount")

    FIELDS = (Field(1, "timezone_name", BYTES), Field(2, "use_bind_mount", BOOL))

    def __init__(self, timezone_name: bytes = b"", *, use_bind_mount: bool = False) -> None:
        self.timezone_name = timezone_name
        self.use_bind_mount = use_bind_mount


class GetKernelVersionResponse(Message):
    """As `uname -r` and `uname -v` have it."""

    __slots__ = ("kernel_release", "kernel_version")

    FIELDS = (Field(1, "kernel_release", BYTES), Field(2, "kernel_version", BYTES))

    def __init__(self, kernel_release: bytes = b"", kernel_version: bytes = b"") -> None:
        self.kernel_release = kernel_release
        self.kernel_version = kernel_version


class GetAvailableSpaceResponse(Message):
    """In bytes."""

    __slots__ = ("available_space",)

    FIELDS = (Field(1, "available_space", UINT64),)

    def __init__(self, available_space: int = 0) -> None:
        self.available_space = available_space


class SetUpUserRequest(Message):
    """uid: None where the client sent none; 0 is another thing, and is sent."""

    __slots__ = ("group_names", "uid", "username")

    FIELDS = (Field(1, "username", BYTES), Field(2, "uid", UINT32), Field(3, "group_names", BYTES_LIST))

    def __init__(self) -> None:
        self.username = b""
        self.uid: int | None = None
        self.group_names: list[bytes] = []

    def encode(self) -> bytes:
        out = bytearray(super().encode())
        if self.uid == 0:
            append_varint(out, 2 << 3 | VARINT)
            append_varint(out, 0)
        return bytes(out)


class SetUpUserResponse(Message):
    """username: whose uid it is already, where that is another user."""

    __slots__ = ("failure_reason", "success", "username")

    FIELDS = (Field(1, "success", BOOL), Field(2, "failure_reason", BYTES), Field(3, "username", BYTES))

    def __init__(self, *, success: bool = False, failure_reason: bytes = b"", username: bytes = b"") -> None:
        self.success = success
        self.failure_reason = failure_reason
        self.username = username


class Method:
    """One row of METHODS."""

    __slots__ = ("name", "request", "response")

    def __init__(self, name: str, request: type[Message], response: type[Message]) -> None:
        self.name = name
        self.request = request
        self.response = response

    @property
    def path(self) -> str:
        """As gRPC has it."""
        return SERVICE + self.name


METHODS = {
    method.name: method
    for method in (
        Method("Shutdown", EmptyMessage, EmptyMessage),
        Method("LaunchProcess", LaunchProcessRequest, LaunchProcessResponse),
        Method("Mount", MountRequest, MountResponse),
        Method("Mount9P", Mount9PRequest, MountResponse),
        Method("SetTime", SetTimeRequest, EmptyMessage),
        Method("SetTimezone", SetTimezoneRequest, EmptyMessage),
        Method("GetKernelVersion", EmptyMessage, GetKernelVersionResponse),
        Method("GetAvailableSpace", EmptyMessage, GetAvailableSpaceResponse),
        Method("PrepareToSuspend", EmptyMessage, EmptyMessage),
        Method("SetUpUser", SetUpUserRequest, SetUpUserResponse),
    )
}
