"""A client of maitred for this host: blocking calls with a deadline, and each method with types.

The connection is vsh's, so a machine of the registry is found as vsh finds it. Where clients must prove a token it
leads through vshd, to the guest's own socket. Nothing of the guest is trusted: an answer has a ceiling.
"""

import asyncio
import binascii
import os
import socket
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

from grpclib.client import Channel, Handler, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.protocol import H2Protocol

from vmkit.errors import MachineError
from vmkit.maitred.codec import Codec
from vmkit.maitred.joined import join_writes
from vmkit.maitred.messages import (
    EXITED,
    LAUNCHED,
    METHODS,
    PORT,
    SIGNALED,
    SOCKET,
    EmptyMessage,
    GetAvailableSpaceResponse,
    GetKernelVersionResponse,
    LaunchProcessRequest,
    LaunchProcessResponse,
    Method,
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
from vsh.ending import explain_loss
from vsh.errors import Busy, ConnectionLost, ExecError, Unanswered, Unreachable, VshError
from vsh.forward.guest import connect_guest
from vsh.pump import TimedOut
from vsh.session import STATUS_MAX
from vshd.wire.messages import SIGNAL_MAX
from vshd.wire.proto3 import Message

# ChromeOS's own limit of a call.
TIMEOUT_S = 20.0
# The largest answer is a line of text. A guest that sends more than this in a call is cut off.
ANSWER_BYTES_MAX = 1 << 20

# A guest's services start once it is ready. A machine that is younger than this may still be at it.
START_S = 60.0
LOOK_S = 0.1

# What grpclib raises for an answer that is none: two messages or no message, a compressed one, one that ends early,
# headers without a status, or with what is not base64.
NO_ANSWER = (ProtocolError, AssertionError, NotImplementedError, KeyError, binascii.Error, UnicodeError)

T = TypeVar("T", bound=Message)


class _BoundedProtocol(H2Protocol):
    """Cuts off a peer that sends more than ANSWER_BYTES_MAX since `taken` was set to 0, or what h2 cannot read."""

    taken = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(join_writes(transport))

    def data_received(self, data: bytes) -> None:
        self.taken += len(data)
        if self.taken > ANSWER_BYTES_MAX:
            self.connection.close()
            return
        try:
            super().data_received(data)
        except Exception:
            # Such as headers that are no text. asyncio would print a traceback.
            self.connection.close()


class _GuestChannel(Channel):
    """Connects through vsh, and not by a host's name."""

    def __init__(self, vm: Address, timeout_s: float) -> None:
        super().__init__("localhost", codec=Codec())
        self._vm = vm
        self._timeout_s = timeout_s
        self._bounded: _BoundedProtocol | None = None

    def begin_call(self) -> None:
        """What the guest has sent so far counts no more."""
        if self._bounded is not None:
            self._bounded.taken = 0

    def _protocol_factory(self) -> H2Protocol:
        self._bounded = _BoundedProtocol(Handler(), self._config, self._h2_config)
        return self._bounded

    async def _create_connection(self) -> H2Protocol:
        fd, rest = await self._connect()
        sock = socket.socket(fileno=fd)
        try:
            _, protocol = await asyncio.get_running_loop().create_connection(self._protocol_factory, sock=sock)
        except BaseException:
            sock.close()
            raise
        if rest:
            protocol.data_received(rest)
        return protocol

    async def _connect(self) -> tuple[int, bytes]:
        """A connection to the guest's maitred, and what was read from it already. Raises VshError."""
        target = f"unix:{SOCKET}" if self._vm.token_file else f"vsock:{PORT}"
        deadline_s = time.monotonic() + min(self._timeout_s, _find_rest_of_start_s(self._vm))
        while True:
            try:
                return connect_guest(self._vm, target, user="root", timeout_s=self._timeout_s)
            except (Busy, Unanswered):
                raise
            except (Unreachable, ExecError) as error:
                if time.monotonic() >= deadline_s:
                    raise MachineError(
                        f"no maitred listens in {self._vm.name}: {error.brief}",
                        hint='its image needs `services = ["maitred"]` in its recipe',
                    ) from error
            # The guest is ready before its services, and announces none of them.
            await asyncio.sleep(LOOK_S)


def _find_rest_of_start_s(vm: Address) -> float:
    """How long the services of a machine may still take to start; 0 for one that has run for a while."""
    started_s = vm.entry.record.get("started") if vm.entry is not None else None
    return started_s + START_S - time.time() if isinstance(started_s, int | float) else 0.0


class Maitred:
    """ChromeOS's agent in a guest whose image has the service maitred, as a with-block.

    Each call has timeout_s. Raises MachineError where the guest refuses or cannot do it, TimedOut, VshError kinds.
    """

    def __init__(self, vm: Address, *, timeout_s: float = TIMEOUT_S) -> None:
        """vm: as vsh.address finds it."""
        self._vm = vm
        self._timeout_s = timeout_s
        self._runner = asyncio.Runner()
        self._channel: _GuestChannel | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection. Programs that maitred started go on."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._runner.close()

    def call(self, name: str, request: Message) -> Message:
        """A method by its name. Raises KeyError for another name than those of METHODS."""
        method = METHODS[name]
        try:
            return self._runner.run(self._call(method, request))
        except GRPCError as error:
            raise self._explain(method, error) from error
        except TimeoutError as error:
            raise TimedOut(f"{name} of {self._vm.name} took longer than {self._timeout_s:g} s") from error
        except (StreamTerminatedError, OSError) as error:
            lost = ConnectionLost(
                f"the connection to maitred of {self._vm.name} ended during {name}",
                hint="the guest may have ended; vmkit status prints what is known",
            )
            explain_loss(lost, self._vm.entry)
            raise lost from error
        except NO_ANSWER as error:
            raise MachineError(
                f"{self._vm.name} answered {name} with what is no answer: {error!r}",
                hint="another program may listen there, or the guest may lie",
            ) from error

    async def _call(self, method: Method, request: Message) -> Message:
        if self._channel is None:
            self._channel = _GuestChannel(self._vm, self._timeout_s)
        self._channel.begin_call()
        unary: UnaryUnaryMethod[Message, Message] = UnaryUnaryMethod(
            self._channel, method.path, method.request, method.response
        )
        return await unary(request, timeout=self._timeout_s)

    def _explain(self, method: Method, error: GRPCError) -> VshError:
        message = error.message or error.status.name
        if error.status is Status.DEADLINE_EXCEEDED:
            return TimedOut(f"{method.name} of {self._vm.name} took longer than {self._timeout_s:g} s")
        if error.status is Status.UNIMPLEMENTED:
            return MachineError(f"maitred of {self._vm.name} has no {method.name}")
        return MachineError(f"{method.name} of {self._vm.name} failed: {message}", details=error.status.name)

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
            raise MachineError(f"{self._vm.name} reported the exit {number} of {argv[0]}, which no process can have")
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
