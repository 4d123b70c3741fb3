"""The methods of vm_tools.Maitred: a request's form is judged here, and the doing is launching's and system's.

What reached its method answers OK, with what happened in the message; a gRPC error is a bad request, or a guest that
cannot do it at all.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Stream

from vmkit.maitred.guest.launching import Processes
from vmkit.maitred.guest.system import (
    DEFAULT_UID,
    BadRequestError,
    BrokenError,
    System,
    mount,
    mount_9p,
    set_time,
    set_timezone,
    set_up_user,
)
from vmkit.maitred.messages import (
    METHODS,
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
)

Act = Callable[[Any], Awaitable[Any]]


class Agent:
    """The service. Invariant: `calls` is how many methods run now, and `last_s` when one began or ended."""

    def __init__(self, system: System, processes: Processes, clock: Callable[[], float]) -> None:
        self.calls = 0
        self.last_s = clock()
        self._system = system
        self._processes = processes
        self._clock = clock

    @property
    def is_needed(self) -> bool:
        """Whether something ends with this process."""
        return self.calls > 0 or self._processes.is_needed

    def note(self) -> None:
        """A client has come, or a method begins or ends."""
        self.last_s = self._clock()

    def __mapping__(self) -> dict[str, Handler]:
        acts: dict[str, Act] = {
            "LaunchProcess": self._launch,
            "Mount": self._mount,
            "Mount9P": self._mount_9p,
            "SetTime": self._set_time,
            "SetTimezone": self._set_timezone,
            "GetKernelVersion": self._get_kernel_version,
            "GetAvailableSpace": self._get_available_space,
            "PrepareToSuspend": self._prepare_to_suspend,
            "SetUpUser": self._set_up_user,
        }
        handlers = {METHODS[name].path: self._make_handler(METHODS[name], act) for name, act in acts.items()}
        down = METHODS["Shutdown"]
        handlers[down.path] = Handler(self._shut_down, Cardinality.UNARY_UNARY, down.request, down.response)
        return handlers

    def _make_handler(self, method: Method, act: Act) -> Handler:
        async def serve(stream: "Stream[Any, Any]") -> None:
            request = await _receive(stream)
            self.calls += 1
            self.note()
            try:
                reply = await act(request)
            except (BadRequestError, ValueError) as error:
                raise GRPCError(Status.INVALID_ARGUMENT, str(error)) from error
            except BrokenError as error:
                raise GRPCError(Status.INTERNAL, str(error)) from error
            except OSError as error:
                raise GRPCError(Status.INTERNAL, error.strerror or str(error)) from error
            finally:
                self.calls -= 1
                self.note()
            await stream.send_message(reply)

        return Handler(serve, Cardinality.UNARY_UNARY, method.request, method.response)

    async def _launch(self, request: LaunchProcessRequest) -> LaunchProcessResponse:
        if not request.argv or not request.argv[0]:
            raise BadRequestError("missing argv")
        if request.respawn and request.wait_for_exit:
            raise BadRequestError("respawn and wait_for_exit exclude each other")
        status, code = await self._processes.launch(
            request.argv,
            request.env,
            respawn=request.respawn,
            use_console=request.use_console,
            wait_for_exit=request.wait_for_exit,
        )
        return LaunchProcessResponse(status, code)

    async def _mount(self, request: MountRequest) -> MountResponse:
        def act() -> int:
            return mount(
                self._system,
                request.source,
                request.target,
                request.fstype,
                request.mountflags,
                request.options,
                create_target=request.create_target,
                permissions=request.permissions,
                mkfs_if_needed=request.mkfs_if_needed,
            )

        return MountResponse(await asyncio.to_thread(act))

    async def _mount_9p(self, request: Mount9PRequest) -> MountResponse:
        return MountResponse(await asyncio.to_thread(mount_9p, self._system, request.port, request.target))

    async def _set_time(self, request: SetTimeRequest) -> EmptyMessage:
        if request.time is None:
            raise BadRequestError("missing time")
        set_time(self._system, request.time.seconds, request.time.nanos)
        return EmptyMessage()

    async def _set_timezone(self, request: SetTimezoneRequest) -> EmptyMessage:
        set_timezone(self._system, request.timezone_name, use_bind_mount=request.use_bind_mount)
        return EmptyMessage()

    async def _get_kernel_version(self, _request: EmptyMessage) -> GetKernelVersionResponse:
        found = os.uname()
        return GetKernelVersionResponse(os.fsencode(found.release), os.fsencode(found.version))

    async def _get_available_space(self, _request: EmptyMessage) -> GetAvailableSpaceResponse:
        return GetAvailableSpaceResponse(self._system.find_space())

    async def _prepare_to_suspend(self, _request: EmptyMessage) -> EmptyMessage:
        await asyncio.to_thread(os.sync)
        return EmptyMessage()

    async def _set_up_user(self, request: SetUpUserRequest) -> SetUpUserResponse:
        uid = DEFAULT_UID if request.uid is None else request.uid
        trouble, name = await asyncio.to_thread(set_up_user, self._system, request.username, uid, request.group_names)
        return SetUpUserResponse(success=not trouble, failure_reason=trouble.encode(), username=name)

    async def _shut_down(self, stream: "Stream[Any, Any]") -> None:
        await _receive(stream)
        await stream.send_message(EmptyMessage())
        # The answer goes first: pid 1 ends this process.
        await stream.send_trailing_metadata()
        # It leaves at the end of this turn of the loop.
        await asyncio.sleep(0)
        self._system.power_off()


async def _receive(stream: "Stream[Any, Any]") -> Any:
    request = await stream.recv_message()
    if request is None:
        raise GRPCError(Status.INVALID_ARGUMENT, "the call has no message")
    return request
