"""A guest whose kernel is the attacker's: packets with forged addresses put straight into our device's ring.

No machine: a fake driver feeds the real device process. Over vhost the host's kernel is what must refuse these.
"""

import socket
from itertools import product

from tests.guest.wall.ledger import LEDGER
from tests.vmkit.vsock.device_process import Bench, HostProgram, open_bench
from tests.vmkit.vsock.fake_driver import GUEST_CID, GuestSocket
from vmkit.vsock import packet as pk

READY_PORT = 7777
HOST_CID = 2
# The hypervisor, loopback, the host, a sibling, any; and what becomes the guest's own CID, or the host's, in 32 bits.
FORGED_SOURCES = (0, 1, 2, 4, 2**32 - 1, 2**32 + GUEST_CID, 2**63)
WRONG_DESTINATIONS = (0, 1, GUEST_CID, 4, 2**32 - 1, 2**32 + HOST_CID, 2**63)
TYPES = (0, pk.TYPE_STREAM, 2, 3)
OPS = range(10)
PAYLOAD = b"forged"
# So many packets are put into the ring before the device's answers are taken.
BURST = 50


def test_forged_addresses_reach_no_host_program_and_no_connection() -> None:
    with open_bench("--privileged-port", str(READY_PORT)) as bench:
        bench.driver.boot()
        program, guest = bench.open_to_guest(9001)
        listeners = [bench.listen(READY_PORT), bench.listen(9001)]
        headers = plan_forgeries(bench, guest)
        # The fake stack knows ports alone: a RST for another CID's packet would end the guest's own connection.
        bench.driver.is_stack_on = False
        for start in range(0, len(headers), BURST):
            for header in headers[start : start + BURST]:
                bench.driver.send_packet(header, PAYLOAD)
            bench.settle()
        reached = count_callers(listeners) + bool(program.data) + program.is_ended
        LEDGER.add("our device, forged packets", len(headers), reached)
        assert reached == 0
        bench.driver.is_stack_on = True
        assert_open(bench, program, guest)


def plan_forgeries(bench: Bench, victim: GuestSocket) -> list[pk.Header]:
    """Every operation under a wrong address, aimed at the ready port, at another, and at a connection that is open."""
    ports = ((READY_PORT, 1000), (9001, 1000), (victim.host_port, victim.guest_port))
    addresses = [(source, HOST_CID) for source in FORGED_SOURCES]
    addresses += [(GUEST_CID, destination) for destination in WRONG_DESTINATIONS]
    addresses += [(source, destination) for source in FORGED_SOURCES for destination in WRONG_DESTINATIONS]
    return [
        bench.driver.header(
            host_port, guest_port, op, src_cid=source, dst_cid=destination, type=kind, length=len(PAYLOAD), flags=3
        )
        for (source, destination), (host_port, guest_port), kind, op in product(addresses, ports, TYPES, OPS)
    ]


def test_ready_cannot_be_said_from_an_unprivileged_port() -> None:
    sources = (0x400, 5000, 65535, 2**31, 2**32 - 1)
    with open_bench("--privileged-port", str(READY_PORT)) as bench:
        bench.driver.boot()
        listener = bench.listen(READY_PORT)
        for source in sources:
            refused = bench.driver.dial(READY_PORT, source_port=source)
            bench.wait_for_reset(refused)
        reached = count_callers([listener])
        LEDGER.add("our device, READY from a user's port", len(sources), reached)
        assert reached == 0


def count_callers(listeners: list[socket.socket]) -> int:
    """How many connections the device made to host programs."""
    count = 0
    for listener in listeners:
        try:
            while True:
                listener.accept()[0].close()
                count += 1
        except BlockingIOError:
            pass
    return count


def assert_open(bench: Bench, program: HostProgram, guest: GuestSocket) -> None:
    """The connection that was there before still carries bytes, both ways."""
    program.send(b"to the guest")
    guest.send(b"to the host")
    bench.wait(lambda: program.data == b"to the host" and guest.data == b"to the guest")
