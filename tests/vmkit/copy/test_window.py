"""The window grows while a larger one is faster, shrinks when the peer gives much less, and has limits."""

from vmkit.copy.window import WINDOW_BYTES_MAX, WINDOW_BYTES_MIN, Window


def run_round(window: Window, now_s: float, rate: float) -> float:
    """Moves one full window at a rate; returns the time after it."""
    window.hold(window.limit_bytes)
    assert not window.has_room()
    window.release(window.held_bytes)
    size = window.limit_bytes
    now_s += size / rate
    window.count(size, now_s)
    return now_s


def test_window_grows_while_it_is_faster() -> None:
    window = Window()
    window.count(0, 0.0)
    now_s, rate = 0.0, 1e6
    for _ in range(10):
        now_s = run_round(window, now_s, rate)
        rate *= 1.5
    assert window.limit_bytes == WINDOW_BYTES_MAX


def test_window_stays_when_more_brings_nothing() -> None:
    window = Window()
    window.count(0, 0.0)
    now_s = 0.0
    for _ in range(20):
        now_s = run_round(window, now_s, 1e6)
    assert window.limit_bytes == 2 * WINDOW_BYTES_MIN


def test_window_shrinks_when_the_peer_slows_down() -> None:
    window = Window()
    window.count(0, 0.0)
    now_s = 0.0
    for rate in (1e6, 2e6, 4e6, 1e6):
        now_s = run_round(window, now_s, rate)
    assert window.limit_bytes == 4 * WINDOW_BYTES_MIN
    for _ in range(10):
        now_s = run_round(window, now_s, 1e3)
    assert window.limit_bytes >= WINDOW_BYTES_MIN


def test_window_that_is_never_full_stays() -> None:
    window = Window()
    window.count(0, 0.0)
    for number in range(1, 100):
        window.count(WINDOW_BYTES_MIN, number / number**2)
    assert window.limit_bytes == WINDOW_BYTES_MIN
