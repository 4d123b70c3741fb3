"""The connection of a client to maitred, over which it calls methods: gRPC by grpclib, with a deadline for each call.

The connection is vsh's, so a machine of the registry is found as vsh finds it. Where clients must prove a token it
leads through vshd, to the guest's own socket. Nothing of the guest is trusted: an answer has a ceiling.
"""

import asyncio
import binascii
import socket
import time

from grpclib.client import Channel, Handler, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.protocol import H2Protocol

from vmkit.errors import MachineError
from vmkit.maitred.codec import Codec
from vmkit.maitred.joined import join_writes
from vmkit.maitred.messages import PORT, SOCKET, Method
from vsh.address import Address
from vsh.ending import explain_loss
from vsh.errors import Busy, ConnectionLost, ExecError, Unanswered, Unreachable, VshError
from vsh.forward.guest import connect_guest
from vsh.pump import TimedOut
from vshd.wire.proto3 import Message

# The largest answer is a line of text. A guest that sends more than this in a call is cut off.
ANSWER_BYTES_MAX = 1 << 20

# A guest's services start once it is ready. A machine that is younger than this may still be at it.
START_S = 60.0
LOOK_S = 0.1

# What grpclib raises for an answer that is none: two messages or no message, a compressed one, one that ends early,
# headers without a status, or with what is not base64.
NO_ANSWER = (ProtocolError, AssertionError, NotImplementedError, KeyError, binascii.Error, UnicodeError)


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


class MaitredCalls:
    """Calls methods of one guest's maitred; connects with the first. Blocking; each call has timeout_s."""

    def __init__(self, vm: Address, timeout_s: float) -> None:
        self._vm = vm
        self._timeout_s = timeout_s
        self._runner = asyncio.Runner()
        self._channel: _GuestChannel | None = None

    def close(self) -> None:
        """Ends the connection."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._runner.close()

    def call(self, method: Method, request: Message) -> Message:
        """Raises MachineError where the guest refuses or cannot do it, TimedOut, VshError kinds."""
        name = method.name
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
