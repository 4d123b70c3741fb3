"""The one driver of a copy: it moves bytes between sockets and SFTP connections, and lets many small steps go on.

A step is a generator. It sends requests through a Channel, and yields to wait: `yield None` waits for the next reply
to one of its own requests, `yield gate` until that gate is open. Work that has not begun is a stack, so a tree is
copied depth first, and few directories are open at once.
"""

import collections
import contextlib
import select
import socket
import time
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from vmkit.copy.connection import SftpConnection, Ticket
from vmkit.copy.interruption import HeldSignals, LetSignals
from vmkit.copy.window import Window
from vmkit.copy.wire import Kind, Limits, Reply
from vmkit.errors import MachineError, VmkitError

# So many steps wait for replies at once: enough that a request for a small file never waits alone.
STEPS_MAX = 64
# Large files come one after another: half copies of many would be worth nothing.
ACTIVE_BYTES_MAX = 8 << 20
# A directory is read on when the stack is below this.
STACK_MAX = 4096
SEND_PIECES_MAX = 64
# So many steps go on between two looks at the sockets: their requests leave together.
RESUMED_MAX = 32


class Gate:
    """Steps wait for it. Invariant: once open, it stays open."""

    __slots__ = ("is_open", "waiting")

    def __init__(self) -> None:
        self.is_open = False
        self.waiting: list[Task] = []


Arrival = tuple[Ticket, Reply]
Answer = TypeVar("Answer")
Step = Generator[Gate | None, Arrival | None, Answer]


class Task:
    """A step that has begun."""

    __slots__ = ("cost_bytes", "is_waiting", "mailbox", "step")

    def __init__(self, step: Step[None], cost_bytes: int) -> None:
        self.step = step
        self.cost_bytes = cost_bytes
        self.mailbox: collections.deque[tuple[Channel, Ticket, Reply]] = collections.deque()
        # For a reply.
        self.is_waiting = False


# Changes the error of a lost connection so that it names the machine's end, if that is the cause.
Explain = Callable[[VmkitError], None]


class ChannelLostError(MachineError):
    """A guest's connection ended before its work did. explain: to be called when all is cleaned up; it may wait."""

    def __init__(self, label: str, explain: Explain) -> None:
        super().__init__(
            f"the connection to '{label}' ended before the copy did",
            hint="see why: vmkit logs, or vmkit list for a machine that still runs",
        )
        self._explain = explain

    def explain(self) -> None:
        """Names the machine's end, where that is the cause."""
        self._explain(self)


def explain_nothing(_error: VmkitError) -> None:
    """For a peer that is no machine of the registry."""


class Channel:
    """A connection to the SFTP server of one guest. label: the guest in errors. limits: as the server states them."""

    def __init__(self, sock: socket.socket, label: str, engine: "Engine", explain: Explain) -> None:
        self.label = label
        self.explain = explain
        self.limits = Limits()
        self.extensions: frozenset[bytes] = frozenset()
        self.window = Window()
        self.connection = SftpConnection()
        self.sock = sock
        self.owners: dict[Ticket, Task | None] = {}
        self._engine = engine
        sock.setblocking(False)

    def send_init(self) -> Ticket:
        """Sends the greeting."""
        return self._hold(self.connection.send_init())

    def send(
        self, kind: Kind, *texts: bytes, tail: bytes = b"", data: bytes | memoryview | None = None, size_bytes: int = 0
    ) -> Ticket:
        """Sends a request for the running step, which receives the reply; see SftpConnection.send."""
        return self._hold(self.connection.send(kind, *texts, tail=tail, data=data, size_bytes=size_bytes))

    def _hold(self, ticket: Ticket) -> Ticket:
        self.owners[ticket] = self._engine.current
        self.window.hold(ticket.cost_bytes)
        return ticket


class Engine:
    """Runs steps until none is left. Invariant: a task is in `_ready`, waits for a reply, or waits at a gate."""

    def __init__(self) -> None:
        self.current: Task | None = None
        self._channels: list[Channel] = []
        self._stack: list[tuple[int, Callable[[], Step[None]]]] = []
        self._ready: collections.deque[Task] = collections.deque()
        self._tasks: set[Task] = set()
        # Without those at a gate.
        self._active = 0
        self._active_bytes = 0
        self._room = Gate()
        self._room.is_open = True

    def open_channel(self, sock: socket.socket, label: str, explain: Explain = explain_nothing) -> Channel:
        """Adds a connection. The caller closes the socket, after the engine's end."""
        channel = Channel(sock, label, self, explain)
        self._channels.append(channel)
        return channel

    def push(self, jobs: Iterable[tuple[int, Callable[[], Step[None]]]]) -> None:
        """Puts work on the stack: the first of `jobs` begins first. A job has the file's size, and makes the step."""
        self._stack.extend(reversed(list(jobs)))

    def find_room(self) -> Gate:
        """Returns a gate that opens when the stack has room, which may be now."""
        if self._room.is_open and len(self._stack) >= STACK_MAX:
            self._room = Gate()
        return self._room

    def open_gate(self, gate: Gate) -> None:
        """Lets the tasks at a gate go on."""
        gate.is_open = True
        for task in gate.waiting:
            self._active += 1
            self._active_bytes += task.cost_bytes
            self._ready.append(task)
        gate.waiting.clear()

    def run(self, silence_s: float) -> None:
        """Runs all work to its end. silence_s: how long a guest may not answer.

        Raises what a step raises, and MachineError when a connection ends or is silent.
        """
        with HeldSignals():
            while self._begin() or self._ready or self._active:
                while self._ready:
                    for _ in range(min(len(self._ready), RESUMED_MAX)):
                        self._resume(self._ready.popleft())
                        self._begin()
                    # Steps that read local files must not hold up replies.
                    self._exchange(0)
                if self._active:
                    self._exchange(silence_s)

    def abandon(self) -> None:
        """Ends all steps where they stand, so that each gives back what it holds."""
        self._stack.clear()
        self._ready.clear()
        self._active = self._active_bytes = 0
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            with contextlib.suppress(Exception):
                task.step.close()
        for channel in self._channels:
            channel.owners = dict.fromkeys(channel.owners)

    def _begin(self) -> bool:
        """Begins as many jobs as may run at once. Returns whether one began."""
        began = False
        while self._stack and (
            not self._active
            or (self._active < STEPS_MAX and self._active_bytes + self._stack[-1][0] <= ACTIVE_BYTES_MAX)
        ):
            cost, make = self._stack.pop()
            task = Task(make(), cost)
            self._tasks.add(task)
            self._active += 1
            self._active_bytes += cost
            self._ready.append(task)
            began = True
        if len(self._stack) < STACK_MAX // 2 and not self._room.is_open:
            self.open_gate(self._room)
        return began

    def _resume(self, task: Task) -> None:
        """Lets a task go on until it waits or ends."""
        self.current = task
        try:
            arrival: Arrival | None = None
            if task.is_waiting:
                arrival = self._take(task)
                task.is_waiting = False
            while True:
                gate = task.step.send(arrival)
                arrival = None
                if gate is None:
                    if not task.mailbox:
                        task.is_waiting = True
                        return
                    arrival = self._take(task)
                elif not gate.is_open:
                    gate.waiting.append(task)
                    self._leave(task)
                    return
        except StopIteration:
            self._tasks.discard(task)
            self._leave(task)
            while task.mailbox:
                self._take(task)
        finally:
            self.current = None

    def _leave(self, task: Task) -> None:
        self._active -= 1
        self._active_bytes -= task.cost_bytes

    def _take(self, task: Task) -> Arrival:
        channel, ticket, reply = task.mailbox.popleft()
        channel.window.release(ticket.cost_bytes)
        return ticket, reply

    def _exchange(self, timeout_s: float) -> None:
        """Sends and receives what the sockets take and have; waits up to timeout_s where they are not ready."""
        poll = select.poll()
        by_fd = {}
        for channel in self._channels:
            wanted = select.POLLIN | (select.POLLOUT if channel.connection.output else 0)
            if channel.owners:
                by_fd[channel.sock.fileno()] = channel
                poll.register(channel.sock, wanted)
        if not by_fd:
            return
        with LetSignals():
            events = poll.poll(timeout_s * 1000)
        if not events and timeout_s:
            names = " and ".join(f"'{channel.label}'" for channel in by_fd.values())
            raise MachineError(f"{names} did not answer for {timeout_s:g} s", hint="look at the machine: vmkit list")
        for fd, event in events:
            channel = by_fd[fd]
            try:
                if event & select.POLLOUT:
                    self._send(channel)
                if event & ~select.POLLOUT:
                    self._receive(channel)
            except BlockingIOError:
                continue
            except OSError as error:
                raise ChannelLostError(channel.label, channel.explain) from error

    def _send(self, channel: Channel) -> None:
        output = channel.connection.output
        sent = channel.sock.sendmsg(output[:SEND_PIECES_MAX])
        done = 0
        for piece in output:
            if sent < len(piece):
                break
            sent -= len(piece)
            done += 1
        del output[:done]
        if sent:
            output[0] = memoryview(output[0])[sent:]

    def _receive(self, channel: Channel) -> None:
        count = channel.sock.recv_into(channel.connection.get_buffer())
        if not count:
            raise ChannelLostError(channel.label, channel.explain)
        now_s = time.monotonic()
        for ticket, reply in channel.connection.receive(count):
            task = channel.owners.pop(ticket)
            channel.window.count(ticket.size_bytes, now_s)
            if task is None or task not in self._tasks:
                channel.window.release(ticket.cost_bytes)
                continue
            task.mailbox.append((channel, ticket, reply))
            if task.is_waiting and len(task.mailbox) == 1:
                self._ready.append(task)
