"""What a guest can make its front-end say: features, sizes, addresses, bases, and in any order.

The device refuses what cannot be, stays alive, and works again after the next reset of the driver.
"""

import itertools
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vmkit.vsock import fake_driver as fd
from tests.vmkit.vsock.device_process import Bench, open_bench
from vmkit.vsock import vhost_user as vu
from vmkit.vsock.notices import BURST_LINES


@pytest.fixture
def cold_bench() -> Iterator[Bench]:
    """A device whose front-end has only said hello."""
    with open_bench() as bench:
        bench.driver.connect()
        yield bench


def assert_works(bench: Bench) -> None:
    """Bytes go both ways after the next start of the driver."""
    bench.driver.reboot()
    program, guest = bench.open_to_guest(9001)
    guest.send(b"to the host")
    program.send(b"to the guest")
    bench.wait(lambda: program.data == b"to the host" and guest.data == b"to the guest")
    assert bench.process.poll() is None


def set_features(bench: Bench, features: int) -> int:
    return bench.driver.front.ask_u64(vu.SET_FEATURES, struct.pack("<Q", features), flags=9)


def test_any_feature_bit_leaves_a_device_that_lives(bench: Bench) -> None:
    for bit in range(64):
        bench.driver.stop()
        set_features(bench, fd.ALL_FEATURES | 1 << bit)
        assert_works(bench)


def test_features_that_change_nothing_are_taken(bench: Bench) -> None:
    """QEMU offers these by itself, and a driver agrees to them: 27 once ended the device."""
    for bit in (24, 27, 36, 40):
        bench.driver.features = fd.ALL_FEATURES | 1 << bit
        assert_works(bench)
        assert set_features(bench, bench.driver.features) == 0
    assert "refused" not in bench.log()


@pytest.mark.parametrize("features", [1 << 1, 1 << 34 | fd.ALL_FEATURES, 2**64 - 1])
def test_rings_wait_for_a_driver_without_features_that_were_never_offered(cold_bench: Bench, features: int) -> None:
    driver = cold_bench.driver
    driver.features = features
    driver.start()
    driver.send_packet(driver.header(1, 2, 5))
    driver.sync()
    driver.sync()
    driver.poll()
    assert not driver.received and len(driver.tx.free) == fd.RING_SIZE - 1
    assert "were never offered" in cold_bench.log() and "driver runs" not in cold_bench.log()
    driver.features = fd.ALL_FEATURES
    assert_works(cold_bench)


def test_new_features_under_running_rings_are_those_of_the_rings(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    assert set_features(bench, fd.ALL_FEATURES & ~fd.F_EVENT_IDX) == 0
    for ring in (bench.driver.rx, bench.driver.tx):
        ring.has_event_idx = False
    program.send(b"without event indices")
    guest.send(b"here, too")
    bench.wait(lambda: program.data == b"here, too" and guest.data == b"without event indices")
    assert set_features(bench, 1 << 34) == 1
    bench.wait_log("the rings stand still")
    for ring in (bench.driver.rx, bench.driver.tx):
        ring.has_event_idx = True
    assert_works(bench)


def count_refused_rings(bench: Bench) -> int:
    """How often the device refused to run a ring; most of it is not printed."""
    bench.open_count()
    return int(bench.log().rsplit("refused-ring ")[-1].split(",")[0])


@pytest.mark.parametrize("index", [0, 1])
def test_ring_size_that_cannot_be_stops_the_ring(bench: Bench, index: int) -> None:
    front, ring = bench.driver.front, (bench.driver.rx, bench.driver.tx)[index]
    sizes = (0, 3, 127, 1025, 2048, 2**16, 2**32 - 1)
    for size in sizes:
        bench.driver.stop()
        front.send(vu.SET_VRING_NUM, struct.pack("<II", index, size))
        front.send(vu.SET_VRING_KICK, struct.pack("<Q", index), (ring.kick_fd,))
        front.send(vu.SET_VRING_ENABLE, struct.pack("<II", index, 1))
        assert_works(bench)
    assert f"ring {index} stands still: ring size 0" in bench.log()
    assert count_refused_rings(bench) == len(sizes)


HIGH = fd.FRONT_BASE + fd.HIGH_START
END = fd.FRONT_BASE + fd.RAM_BYTES
ADDRESSES = [
    (0, 0, 0),
    (HIGH + 8, HIGH + 0x1000, HIGH + 0x2000),
    (HIGH, HIGH + 0x1001, HIGH + 0x2000),
    (HIGH, HIGH + 0x1000, HIGH + 0x2002),
    (END - 16, HIGH, HIGH),
    (HIGH, END - 4, HIGH),
    (HIGH, HIGH, END - 4),
    (fd.FRONT_BASE + fd.LOW_END - 16, HIGH, HIGH),
    (2**64 - 16, 2**64 - 2, 2**64 - 4),
    (2**63, 2**63, 2**63),
]


@pytest.mark.parametrize("index", [0, 1])
def test_ring_address_that_cannot_be_stops_the_ring(bench: Bench, index: int) -> None:
    for desc, avail, used in ADDRESSES:
        bench.driver.front.send(vu.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, 0, desc, used, avail, 0))
        assert_works(bench)
    assert count_refused_rings(bench) == len(ADDRESSES)


def test_rings_that_lie_over_each_other_harm_the_guest_alone(bench: Bench) -> None:
    for desc, avail, used in ((HIGH, HIGH, HIGH), (HIGH, HIGH + 64, HIGH + 64)):
        for index in (0, 1):
            bench.driver.front.send(vu.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, 0, desc, used, avail, 0))
        for ring in (bench.driver.rx, bench.driver.tx):
            ring.kick(is_forced=True)
        bench.driver.sync()
        bench.driver.sync()
    assert_works(bench)


def test_any_base_leaves_a_device_that_lives(bench: Bench) -> None:
    for base in (1, 127, 2**16 - 1, 2**16, 2**31, 2**32 - 1):
        bench.driver.stop()
        bench.driver.start((base, base))
        assert_works(bench)


def set_up(driver: fd.FakeDriver, index: int) -> list[Callable[[], None]]:
    """The words that start one ring."""
    front, ring = driver.front, (driver.rx, driver.tx)[index]
    addresses = (fd.FRONT_BASE + ring.desc, fd.FRONT_BASE + ring.used, fd.FRONT_BASE + ring.avail)
    return [
        lambda: front.send(vu.SET_VRING_NUM, struct.pack("<II", index, ring.size)),
        lambda: front.send(vu.SET_VRING_BASE, struct.pack("<II", index, 0)),
        lambda: front.send(vu.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, 0, *addresses, 0)),
        lambda: front.send(vu.SET_VRING_KICK, struct.pack("<Q", index), (ring.kick_fd,)),
        lambda: front.send(vu.SET_VRING_ENABLE, struct.pack("<II", index, 1)),
    ]


def test_rings_run_in_whatever_order_they_are_set_up(bench: Bench) -> None:
    driver = bench.driver
    for order in list(itertools.permutations(range(5)))[::7]:
        driver.stop()
        driver.forget_rings()
        words = [set_up(driver, index) for index in (1, 0)]
        for step in order:
            for ring_words in words:
                ring_words[step]()
        driver.sync()
        driver.refill()
        program, guest = bench.open_to_guest(9001)
        program.send(b"x")
        bench.wait_for_data(guest, b"x")


REFUSED = [
    (vu.SET_VRING_NUM, b"abcd"),
    (vu.SET_VRING_NUM, struct.pack("<II", 2, 128)),
    (vu.SET_VRING_BASE, struct.pack("<II", 2**32 - 1, 0)),
    (vu.SET_VRING_ADDR, bytes(39)),
    (vu.SET_VRING_ADDR, struct.pack("<IIQQQQ", 2, 0, 0, 0, 0, 0)),
    (vu.SET_VRING_ENABLE, struct.pack("<II", 2, 1)),
    (vu.SET_VRING_KICK, struct.pack("<Q", 0)),
    (vu.SET_VRING_KICK, struct.pack("<Q", 0x100)),
    (vu.SET_VRING_KICK, struct.pack("<Q", 2)),
    (vu.SET_VRING_CALL, struct.pack("<Q", 1)),
    (vu.SET_VRING_ERR, struct.pack("<Q", 2)),
    (vu.SET_FEATURES, b""),
    (vu.SET_PROTOCOL_FEATURES, struct.pack("<Q", 1 << 5)),
    (vu.SET_MEM_TABLE, struct.pack("<II", 9, 0)),
    (200, b"what?"),
]


@pytest.mark.parametrize(("request_number", "payload"), REFUSED)
def test_message_that_asks_for_what_cannot_be_is_refused(bench: Bench, request_number: int, payload: bytes) -> None:
    assert bench.driver.front.ask_u64(request_number, payload, flags=9) == 1
    assert f"refused-message: vhost-user message {request_number}: " in bench.log()
    assert_works(bench)


def test_question_that_cannot_be_answered_gets_an_answer_all_the_same(bench: Bench) -> None:
    front = bench.driver.front
    assert front.ask(vu.GET_VRING_BASE, struct.pack("<II", 7, 0)) == bytes(8)
    assert front.ask(vu.GET_VRING_BASE, b"") == bytes(8)
    assert front.ask(vu.GET_CONFIG, struct.pack("<III", 0, 5000, 0)) == b""
    assert_works(bench)


def test_kick_that_no_epoll_can_watch_stops_the_ring(bench: Bench) -> None:
    with Path(__file__).open("rb") as file:
        message = struct.pack("<Q", 1)
        assert bench.driver.front.ask_u64(vu.SET_VRING_KICK, message, (file.fileno(),), flags=9) == 1
    assert_works(bench)


def test_refusals_without_end_are_a_few_lines(bench: Bench) -> None:
    for _ in range(300):
        bench.driver.front.send(vu.SET_FEATURES, struct.pack("<Q", 1 << 34))
    bench.driver.sync()
    assert bench.log().count("were never offered") == BURST_LINES
    assert_works(bench)
