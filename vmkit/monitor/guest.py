"""What a monitor keeps open to its guest once that is ready: a table with a row for each link.

A link is a service of the guest that sends the host something as long as the machine lives. To add one: a module here
with a class that is a GuestLink, and a row of LINKS. A link that fails is an event of the machine, and not its end.
"""

import asyncio
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol

from vmkit.machine.launch import CrashPlan, LaunchPlan
from vmkit.machine.words import Answer, Request
from vmkit.monitor.cores import CoreKeeper
from vmkit.monitor.life import Life
from vmkit.monitor.logs import CappedLog, EventLog
from vmkit.monitor.syslog import SyslogKeeper
from vmkit.monitor.units import UnitKeeper
from vsh.registry import Entry

if TYPE_CHECKING:
    from vsh.address import Address
    from vsh.clock import GuestClock


class LinkedGuest:
    """How a link reaches its guest, and where it leaves what it learns.

    is_stopped: tells whether the guest's processors are stopped. Nothing in it answers then. await_syslog: waits until
    all that the guest has logged is in its log, or cannot be; None: no link keeps that.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        events: EventLog,
        open_log: Callable[[str], CappedLog],
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.name = plan.name
        self.cid = plan.cid
        self.events = events
        self.is_stopped = is_stopped
        self._plan = plan
        self._open_log = open_log
        self._logs: dict[str, CappedLog] = {}
        # Set by the link that keeps the guest's log.
        self.await_syslog: Callable[[], Awaitable[object]] | None = None

    def open_log(self, name: str) -> CappedLog:
        """The log of that name, which is one for all links."""
        if name not in self._logs:
            self._logs[name] = self._open_log(name)
        return self._logs[name]

    @property
    def record(self) -> Mapping[str, object]:
        """The machine's, as it was planned."""
        return self._plan.record

    @property
    def crashes(self) -> CrashPlan | None:
        """What is kept of its crashes; None: nothing."""
        return self._plan.crashes

    def find_address(self, *, has_token: bool = False) -> "Address":
        """How to reach the guest, which need not be ready. has_token: it is told the machine's token, if any."""
        from vsh.address import address_of  # noqa: PLC0415 - a machine that ends within seconds is not asked

        token = self._plan.record.get("token") if has_token else None
        return address_of(Entry(str(self._plan.directory), {**self._plan.record, "state": "ready", "token": token}))

    def open_clock(self, timeout_s: float) -> "GuestClock":
        """Connects to the guest's clock. Raises VshError."""
        from vsh.clock import open_clock  # noqa: PLC0415 - a machine that ends within seconds is not asked

        return open_clock(self.find_address(has_token=True), timeout_s=timeout_s)

    def open_logs(self, collector: bytes, next_: int, timeout_s: float) -> tuple[int, bytes]:
        """Connects to the guest's log: see vsh.logs. Raises VshError."""
        from vsh.logs import open_logs  # noqa: PLC0415 - a machine that ends within seconds is not asked

        return open_logs(self.find_address(has_token=True), collector, next_, timeout_s=timeout_s)

    def open_cores(self, size_max: int, timeout_s: float) -> tuple[int, bytes]:
        """Connects to the guest's core dumps: see vsh.cores. Raises VshError."""
        from vsh.cores import open_cores  # noqa: PLC0415 - few machines keep cores

        return open_cores(self.find_address(has_token=True), size_max=size_max, timeout_s=timeout_s)

    def open_units(self, timeout_s: float) -> tuple[int, bytes]:
        """Connects to the guest's failed services: see vsh.units. Raises VshError."""
        from vsh.units import open_units  # noqa: PLC0415 - few machines keep them

        return open_units(self.find_address(has_token=True), timeout_s=timeout_s)


class GuestLink(Protocol):
    """One row."""

    name: ClassVar[str]
    # The requests of vmkit.machine.words that it answers.
    requests: ClassVar[tuple[type[Request], ...]]

    async def keep(self) -> None:
        """Keeps the link, from READY until it is cancelled. Returns where this guest has no such service."""

    async def answer(self, request: Request) -> Answer:
        """Answers one of its requests."""


LINKS: tuple[Callable[[LinkedGuest], GuestLink], ...] = (SyslogKeeper, CoreKeeper, UnitKeeper)


class GuestLinks:
    """The links of one machine."""

    def __init__(self, guest: LinkedGuest) -> None:
        self._guest = guest
        self._links = [make(guest) for make in LINKS]
        self._is_begun = False

    def begin(self, life: Life) -> None:
        """The guest is ready."""
        self._is_begun = True
        for link in self._links:
            life.spawn(self._keep(link))

    async def answer(self, request: Request) -> Answer:
        """Has the link answer whose request it is."""
        if not self._is_begun:
            return Answer(False, f"'{self._guest.name}' is not ready")
        for link in self._links:
            if isinstance(request, link.requests):
                return await link.answer(request)
        return Answer(False, "nothing of this machine answers that")

    async def _keep(self, link: GuestLink) -> None:
        try:
            await link.keep()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            traceback.print_exception(error, file=sys.stderr)
            self._guest.events.add("link-failed", {"link": link.name, "why": str(error) or type(error).__name__})
