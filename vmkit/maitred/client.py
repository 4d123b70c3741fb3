"""A client of maitred for this host: each method with types.

grpclib is loaded with the first client, and may be missing until then.
"""

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from vmkit.errors import HostError, MachineError
from vmkit.maitred.messages import (
    EXITED,
    LAUNCHED,
    METHODS,
    SIGNALED,
    EmptyMessage,
    GetAvailableSpaceResponse,
    GetKernelVersionResponse,
    LaunchProcessRequest,
    LaunchProcessResponse,
    Mount9PRequest,
    MountRequest,
    MountResponse,
    SetTimeRequest,
    SetTimezoneRequest,
    SetUpUserRequest,
    SetUpUserResponse,
    Timestamp,
)
from vsh.address import Address
from vsh.session import STATUS_MAX
from vshd.wire.messages import SIGNAL_MAX
from vshd.wire.proto3 import Message

if TYPE_CHECKING:
    from vmkit.maitred.channel import MaitredCalls

# ChromeOS's own limit of a call.
TIMEOUT_S = 20.0

T = TypeVar("T", bound=Message)


class Maitred:
    """ChromeOS's agent in a guest whose image has the service maitred, as a with-block. Machine.maitred() makes one.

    Each call has timeout_s. Raises MachineError where the guest refuses or cannot do it, TimedOut, VshError kinds.
    HostError: this host lacks the Python package grpclib.
    """

    def __init__(self, vm: Address, *, timeout_s: float = TIMEOUT_S) -> None:
        """vm: as vsh.address finds it."""
        self._name = vm.name
        self._calls = _open_calls(vm, timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection. Programs that maitred started go on."""
        self._calls.close()

    def call(self, name: str, request: Message) -> Message:
        """A method by its name, with its own kind of message: see vmkit.maitred.messages. Raises KeyError."""
        return self._calls.call(METHODS[name], request)

    def launch_process(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        respawn: bool = False,
        use_console: bool = False,
        wait_for_exit: bool = False,
    ) -> int | None:
        """Starts a program as root. With wait_for_exit its exit status, negative for a signal; else None.

        respawn: start it again when it ends. Raises MachineError where the guest cannot execute it.
        """
        request = LaunchProcessRequest()
        request.argv = [os.fsencode(word) for word in argv]
        request.env = {os.fsencode(name): os.fsencode(value) for name, value in (env or {}).items()}
        request.respawn = respawn
        request.use_console = use_console
        request.wait_for_exit = wait_for_exit
        reply = self._take("LaunchProcess", request, LaunchProcessResponse)
        if reply.status == LAUNCHED:
            return None
        if reply.status not in (EXITED, SIGNALED):
            raise MachineError(f"the guest cannot execute {argv[0]}")
        # A caller may end with it: the low byte of 256 is that of success, and so is "signal 0".
        is_signal = reply.status == SIGNALED
        if not (0 < reply.code <= SIGNAL_MAX if is_signal else 0 <= reply.code <= STATUS_MAX):
            number = f"signal {reply.code}" if is_signal else f"status {reply.code}"
            raise MachineError(f"{self._name} reported the exit {number} of {argv[0]}, which no process can have")
        return -reply.code if is_signal else reply.code

    def mount(
        self,
        source: str,
        target: str,
        fstype: str,
        *,
        flags: int = 0,
        options: str = "",
        create_target: bool = False,
        permissions: int = 0,
        mkfs_if_needed: bool = False,
    ) -> None:
        """mount(2) in the guest. create_target: make the folder. permissions: of the mounted folder, where not 0."""
        request = MountRequest()
        request.source, request.target = os.fsencode(source), os.fsencode(target)
        request.fstype, request.options = os.fsencode(fstype), os.fsencode(options)
        request.mountflags, request.permissions = flags, permissions
        request.create_target, request.mkfs_if_needed = create_target, mkfs_if_needed
        self._check_mount(target, self._take("Mount", request, MountResponse))

    def mount_9p(self, port: int, target: str) -> None:
        """Mounts what a 9P server at a vsock port of this host serves."""
        self._check_mount(target, self._take("Mount9P", Mount9PRequest(port, os.fsencode(target)), MountResponse))

    def _check_mount(self, target: str, reply: MountResponse) -> None:
        if reply.error:
            raise MachineError(f"the guest cannot mount {target}: {os.strerror(reply.error)}")

    def set_time(self, seconds: float) -> None:
        """Sets the guest's clock: seconds since 1970."""
        whole = int(seconds)
        self.call("SetTime", SetTimeRequest(Timestamp(whole, int((seconds - whole) * 1e9))))

    def set_timezone(self, name: str, *, use_bind_mount: bool = False) -> None:
        """Sets the guest's time zone, such as Europe/Berlin."""
        self.call("SetTimezone", SetTimezoneRequest(os.fsencode(name), use_bind_mount=use_bind_mount))

    def get_kernel_version(self) -> tuple[str, str]:
        """The release and the version of the guest's kernel, as `uname -r` and `uname -v` print them."""
        reply = self._take("GetKernelVersion", EmptyMessage(), GetKernelVersionResponse)
        return reply.kernel_release.decode(errors="replace"), reply.kernel_version.decode(errors="replace")

    def get_available_space(self) -> int:
        """Bytes that the guest's root can still write."""
        return self._take("GetAvailableSpace", EmptyMessage(), GetAvailableSpaceResponse).available_space

    def set_up_user(self, name: str, *, uid: int | None = None, groups: Sequence[str] = ()) -> str:
        """Makes a user with a home, or adds groups to one. Returns the name. uid: 1000 where it is None.

        Raises MachineError where the uid is another user's, or the user has another uid.
        """
        request = SetUpUserRequest()
        request.username, request.uid = os.fsencode(name), uid
        request.group_names = [os.fsencode(group) for group in groups]
        reply = self._take("SetUpUser", request, SetUpUserResponse)
        owner = reply.username.decode(errors="replace")
        if not reply.success:
            raise MachineError(f"{reply.failure_reason.decode(errors='replace')}: {owner}")
        return owner

    def prepare_to_suspend(self) -> None:
        """Has the guest write to its disks what it still holds."""
        self.call("PrepareToSuspend", EmptyMessage())

    def shutdown(self) -> None:
        """Asks the guest to power off, and does not wait for it."""
        self.call("Shutdown", EmptyMessage())

    def _take(self, name: str, request: Message, kind: type[T]) -> T:
        reply = self.call(name, request)
        assert isinstance(reply, kind)
        return reply


def _open_calls(vm: Address, timeout_s: float) -> "MaitredCalls":
    try:
        from vmkit.maitred.channel import MaitredCalls  # noqa: PLC0415 - grpclib is an extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("vmkit", "vsh", "vshd"):
            raise
        raise HostError(
            f"a client of maitred needs the Python package grpclib: {error}", hint="pip install 'vmkit-vsh[rpc]'"
        ) from error
    return MaitredCalls(vm, timeout_s)
