"""Two peers that keep to the rules, in any order of turns: no violation, no lost or mixed byte, no stall, no leftovers.

The guest is a model of Linux's stack, the device's side is its real core. Hypothesis plays their turns and delays every
packet as it likes; at the end all wires run dry, and the books of both must agree.
"""

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.vmkit.vsock.peers import DevicePeer, GuestPeer, GuestSocket, Program
from vmkit.vsock import packet as pk
from vmkit.vsock.connection import State
from vmkit.vsock.muxer import FIRST_WINDOW_BYTES, WINDOW_BYTES

GUEST_PORTS = (9001, 9002)
HOST_PORTS = (600, 601)
NOBODYS_PORT = 7
SOURCE_PORTS = (2000, 2001, 2002)
MAX_CONNECTIONS = 6
# More than two peers of this size can need to run dry.
MAX_ROUNDS = 2000

SIZES = st.sampled_from((1, 5000, 10_000, 70_000, 300_000))
PICKS = st.integers(0, 2**16)


class TwoPeers(RuleBasedStateMachine):
    """One guest, one device, and a wire each way."""

    def __init__(self) -> None:
        super().__init__()
        self.guest = GuestPeer(set(GUEST_PORTS))
        self.notices: list[tuple[str, str]] = []
        self.device = DevicePeer(set(HOST_PORTS), lambda *notice: self.notices.append(notice), MAX_CONNECTIONS)

    def socket(self, pick: int) -> GuestSocket:
        sockets = list(self.guest.sockets.values())
        return sockets[pick % len(sockets)]

    def program(self, pick: int) -> Program:
        programs = list(self.device.programs.values())
        return programs[pick % len(programs)]

    has_sockets = precondition(lambda self: self.guest.sockets)
    has_programs = precondition(lambda self: self.device.programs)

    # New connections.

    @initialize(from_host=st.integers(0, 2), from_guest=st.integers(0, 2))
    def some_are_open(self, from_host: int, from_guest: int) -> None:
        for _ in range(from_host):
            self.device.connect(GUEST_PORTS[0])
        for source in SOURCE_PORTS[:from_guest]:
            self.guest.connect(HOST_PORTS[0], source, 65_536)
        self.run_dry()

    @rule(port=st.sampled_from((*GUEST_PORTS, NOBODYS_PORT)))
    def host_connects(self, port: int) -> None:
        self.device.connect(port)

    @rule(
        port=st.sampled_from((*HOST_PORTS, NOBODYS_PORT)),
        source=st.sampled_from(SOURCE_PORTS),
        buf_alloc=st.sampled_from((1000, 65_536, 262_144, 2**32 - 1)),
    )
    def guest_connects(self, port: int, source: int, buf_alloc: int) -> None:
        # What is on its way to a socket would reach the next one at its ports, for packets carry no more than these. A
        # socket that was closed before the answer came has said nothing of it.
        asked = {(header.dst_port, header.src_port) for header, _ in self.guest.wire if header.op == pk.OP_REQUEST}
        if (port, source) not in asked and not self.device.owes(port, source):
            self.guest.connect(port, source, buf_alloc)

    @precondition(lambda self: self.device.dialing)
    @rule()
    def device_dials(self) -> None:
        self.device.dial()

    # The guest's programs.

    @has_sockets
    @rule(pick=PICKS, size=SIZES)
    def guest_writes(self, pick: int, size: int) -> None:
        self.socket(pick).write(size)

    @has_sockets
    @rule(pick=PICKS, size=SIZES, tells=st.booleans())
    def guest_reads(self, pick: int, size: int, tells: bool) -> None:
        self.socket(pick).take(size, tells=tells)

    @has_sockets
    @rule(pick=PICKS, flags=st.sampled_from((1, 2, 3)))
    def guest_shuts(self, pick: int, flags: int) -> None:
        self.socket(pick).shutdown(flags)

    @has_sockets
    @rule(pick=PICKS)
    def guest_asks_for_credit(self, pick: int) -> None:
        self.socket(pick).ask()

    @has_sockets
    @rule(pick=PICKS, end=st.sampled_from((GuestSocket.close, GuestSocket.close, GuestSocket.reset)))
    def guest_leaves(self, pick: int, end: Callable[[GuestSocket], None]) -> None:
        end(self.socket(pick))

    # The host's programs.

    @has_programs
    @rule(pick=PICKS, size=SIZES)
    def host_writes(self, pick: int, size: int) -> None:
        self.device.write(self.program(pick), size)

    @has_programs
    @rule(pick=PICKS, size=SIZES)
    def host_reads(self, pick: int, size: int) -> None:
        self.device.take(self.program(pick), size)

    @has_programs
    @rule(pick=PICKS)
    def host_ends(self, pick: int) -> None:
        self.device.end(self.program(pick))

    @has_programs
    @rule(pick=PICKS, end=st.sampled_from((DevicePeer.close, DevicePeer.close, DevicePeer.abandon)))
    def host_leaves(self, pick: int, end: Callable[[DevicePeer, Program], None]) -> None:
        end(self.device, self.program(pick))

    # A user's faults. They end before all is said, as `vmkit vsock fault NAME clear` ends them.

    @has_programs
    @rule(pick=PICKS, directions=st.sampled_from(((True, False), (False, True), (True, True))))
    def user_freezes_credit(self, pick: int, directions: tuple[bool, bool]) -> None:
        connection = self.program(pick).connection
        if connection.is_open():
            if directions[0]:
                connection.freeze_send()
            if directions[1]:
                connection.freeze_receive()

    @has_programs
    @rule(pick=PICKS)
    def user_thaws_credit(self, pick: int) -> None:
        connection = self.program(pick).connection
        connection.thaw_send()
        connection.thaw_receive()

    # The wires.

    @rule(pick=PICKS, size=SIZES, count=st.integers(1, 5))
    def device_sends(self, pick: int, size: int, count: int) -> None:
        for _ in range(count):
            program = self.program(pick) if self.device.programs else None
            if not self.device.send(program, size):
                return

    @rule(count=st.integers(1, 5))
    def device_hears(self, count: int) -> None:
        for _ in range(min(count, len(self.guest.wire))):
            self.device.receive(*self.guest.wire.popleft())

    @rule(count=st.integers(1, 5))
    def guest_hears(self, count: int) -> None:
        for _ in range(min(count, len(self.device.wire))):
            self.guest.receive(*self.device.wire.popleft())

    @rule()
    def all_is_said_and_heard(self) -> None:
        self.run_dry()

    # What holds at every moment.

    @invariant()
    def guest_that_keeps_the_rules_is_never_told_off(self) -> None:
        assert not [notice for notice in self.notices if notice[0] not in {"refused-full"}]

    @invariant()
    def books_of_the_device_balance(self) -> None:
        muxer = self.device.muxer
        assert muxer.member_count <= MAX_CONNECTIONS
        assert set(muxer.connections()) == set(self.device.programs)
        for connection, program in self.device.programs.items():
            assert connection.receive.pending == len(program.pending) <= connection.receive.window
            assert connection.receive.window in {FIRST_WINDOW_BYTES, WINDOW_BYTES}
            assert program.sent <= program.written
            assert (connection in muxer._members) == (connection.state is not State.CLOSING)

    # When everything has been said.

    def run_dry(self) -> None:
        """Delivers all packets, with programs on both sides that read all, until nothing moves. No fault is left."""
        for pick in range(len(self.device.programs)):
            self.user_thaws_credit(pick=pick)
        for _ in range(MAX_ROUNDS):
            if not self.move_all():
                break
        else:
            raise AssertionError("two peers without new turns do not come to rest")
        for program in self.device.programs.values():
            self.check_pair(program)

    def move_all(self) -> bool:
        device, guest = self.device, self.guest
        has_moved = False
        while device.dialing:
            device.dial()
            has_moved = True
        for program in list(device.programs.values()):
            if program.pending:
                device.take(program, len(program.pending))
                has_moved = True
            while device.send(program, 2**20):
                has_moved = True
            has_moved |= self.probe(program)
        has_moved |= device.send(None, 0)
        while guest.wire:
            device.receive(*guest.wire.popleft())
            has_moved = True
        while device.wire:
            guest.receive(*device.wire.popleft())
            has_moved = True
        for sock in list(guest.sockets.values()):
            sock.take(2**20, tells=True)
            has_moved |= sock.push()
        # News of credit alone is a turn, too.
        return has_moved or bool(guest.wire)

    def probe(self, program: Program) -> bool:
        """A guest that did not report what it read is asked, as after a second without credit; True when it was."""
        connection = program.connection
        is_starved = connection.is_flowing() and program.sent < program.written and not connection.send.free()
        is_asked = is_starved and not self.guest.wire and not self.device.wire
        if is_asked:
            connection.probe_credit()
        return is_asked

    def check_pair(self, program: Program) -> None:
        """Both ends of a connection that is open: every byte has arrived, and every end."""
        connection = program.connection
        sock = self.guest.sockets.get(program.key)
        assert connection.state in {State.OPEN, State.CLOSING}
        assert sock is not None, "the device holds a connection of which the guest knows nothing"
        assert sock.is_open and connection.state is State.OPEN
        assert program.taken == sock.sent
        assert sock.sent == sock.written or not sock.can_send
        assert not sock.is_asking
        if not connection.told & pk.SHUTDOWN_SEND:
            assert connection.heard & pk.SHUTDOWN_RECEIVE or program.sent == program.written
        assert sock.received == program.sent
        assert connection.told == sock.heard and connection.heard == sock.told
        assert program.is_ended_by_guest == bool(sock.told & pk.SHUTDOWN_SEND)

    def teardown(self) -> None:
        """Every connection ends, from this side or from that, and nothing is left of any."""
        self.run_dry()
        for number, program in enumerate(list(self.device.programs.values())):
            sock = self.guest.sockets[program.key]
            if number % 2:
                self.device.close(program)
            else:
                sock.close()
        self.run_dry()
        assert not self.device.programs and not self.device.muxer.strays
        assert not self.device.muxer.member_count and not self.device.muxer._table
        assert not self.device.muxer._wide_count
        assert not self.guest.sockets


def test_window_that_grows_right_after_news_of_credit_is_told() -> None:
    """A guest that is not told waits for ever: less than half of the new window is unreported."""
    peers = TwoPeers()
    peers.guest_connects(port=600, source=2000, buf_alloc=262_144)
    peers.all_is_said_and_heard()
    peers.guest_writes(pick=0, size=300_000)
    peers.device_hears(count=5)
    peers.host_reads(pick=0, size=10_000)
    peers.host_writes(pick=0, size=1)
    # The byte tells of these 10,000.
    peers.device_sends(pick=0, size=1, count=1)
    peers.host_reads(pick=0, size=10_000)
    peers.all_is_said_and_heard()
    assert peers.program(0).taken == 300_000
    peers.teardown()


@pytest.mark.parametrize("to_guest", [True, False])
def test_credit_that_was_frozen_is_told_when_it_thaws(to_guest: bool) -> None:
    """The sender has used up what it had, and nothing but the thaw lets it go on."""
    peers = TwoPeers()
    peers.some_are_open(from_host=0, from_guest=1)
    peers.user_freezes_credit(pick=0, directions=(to_guest, not to_guest))
    if to_guest:
        peers.host_writes(pick=0, size=300_000)
    else:
        peers.guest_writes(pick=0, size=300_000)
    for _ in range(20):
        peers.device_hears(count=5)
        peers.host_reads(pick=0, size=300_000)
        peers.device_sends(pick=0, size=300_000, count=5)
        peers.guest_hears(count=5)
        peers.guest_reads(pick=0, size=300_000, tells=True)
    program, sock = peers.program(0), peers.socket(0)
    assert (sock.received if to_guest else program.taken) == (65_536 if to_guest else FIRST_WINDOW_BYTES)
    peers.all_is_said_and_heard()
    assert (sock.received if to_guest else program.taken) == 300_000
    peers.teardown()


def test_close_after_bytes_that_the_guest_will_not_read_ends_the_connection() -> None:
    peers = TwoPeers()
    peers.some_are_open(from_host=0, from_guest=2)
    for pick in (0, 1):
        peers.guest_shuts(pick=pick, flags=pk.SHUTDOWN_RECEIVE)
    peers.all_is_said_and_heard()
    for pick in (0, 1):
        peers.host_writes(pick=pick, size=1)
    peers.host_ends(pick=0)
    peers.teardown()


TestTwoPeers = TwoPeers.TestCase
TestTwoPeers.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
