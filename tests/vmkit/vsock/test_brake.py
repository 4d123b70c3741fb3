"""The brakes alone, with a clock of the test's own: when how many bytes may pass."""

from vmkit.vsock.brake import MAX_GROUPS, PORTION_S, Delay, Fuse, Rate


def test_delay_lets_each_group_pass_at_its_time() -> None:
    brake = Delay(2.0, start=100)
    assert brake.grant(110, 100, 10.0) == 0
    assert brake.next_s() == 12.0
    # More came a second later, and the first have not passed.
    assert brake.grant(150, 100, 11.0) == 0
    brake.wake(12.0)
    assert brake.grant(150, 100, 12.0) == 10
    assert brake.next_s() == 13.0
    assert brake.grant(150, 110, 12.5) == 0
    assert brake.grant(150, 110, 13.0) == 40
    assert brake.next_s() is None


def test_delay_that_is_due_asks_for_no_second_wake() -> None:
    brake = Delay(2.0, start=0)
    brake.grant(10, 0, 10.0)
    brake.wake(12.0)
    # The guest has no credit: the bytes stay, and the loop must not spin.
    assert brake.next_s() is None
    assert brake.grant(10, 0, 20.0) == 10


def test_delay_of_many_small_groups_has_a_ceiling_and_forgets_no_byte() -> None:
    brake = Delay(2.0, start=0)
    for number in range(3 * MAX_GROUPS):
        brake.grant(number + 1, 0, 0.0001 * number)
    assert len(brake._groups) <= MAX_GROUPS
    assert brake.grant(3 * MAX_GROUPS, 0, 100.0) == 3 * MAX_GROUPS


def test_rate_grants_portions_and_no_savings() -> None:
    brake = Rate(1000, now_s=0.0)
    portion = int(1000 * PORTION_S)
    assert brake.grant(500, 0, 0.0) == portion
    brake.spend(portion)
    assert brake.grant(500, portion, 0.001) == 0
    due_s = brake.next_s()
    assert due_s is not None and 0.02 <= due_s <= 0.022
    # An idle hour is not saved up.
    assert brake.grant(500, portion, 3600.0) == portion


def test_rate_of_one_byte_a_second_moves() -> None:
    brake = Rate(1, now_s=0.0)
    assert brake.grant(5, 0, 0.0) == 1
    brake.spend(1)
    assert brake.grant(5, 1, 0.5) == 0
    assert brake.next_s() == 1.0
    assert brake.grant(5, 1, 1.0) == 1


def test_rate_waits_for_no_portion_when_less_is_left() -> None:
    brake = Rate(1000, now_s=0.0)
    brake.spend(brake.grant(500, 0, 0.0))
    assert brake.grant(500, 497, 0.004) >= 3
    assert brake.next_s() is None


def test_fuse_burns_once_when_its_bytes_have_passed() -> None:
    burnt: list[int] = []
    brake = Fuse(10, lambda: burnt.append(1))
    assert brake.grant(100, 0, 0.0) == 10
    brake.spend(6)
    assert (brake.grant(100, 6, 0.0), brake.next_s()) == (4, None)
    brake.wake(0.0)
    assert burnt == []
    brake.spend(4)
    assert (brake.grant(100, 10, 0.0), brake.next_s()) == (0, 0.0)
    brake.wake(0.0)
    brake.wake(0.0)
    assert burnt == [1]
    assert brake.next_s() is None
