"""The log's rate limit."""

from vmkit.vsock.notices import BURST_LINES, PERIOD_S, Notices


def test_notices_of_a_kind_are_bounded_and_counted() -> None:
    now_s = 0.0
    lines: list[str] = []
    notices = Notices("p ", lines.append, lambda: now_s)
    for i in range(1000):
        notices.tell("flood", str(i))
    notices.tell("other", "seen")
    notices.note("quiet")
    assert lines == [*(f"p flood: {i}" for i in range(BURST_LINES)), "p other: seen"]
    now_s = PERIOD_S
    lines.clear()
    notices.tell("flood", "again")
    assert lines == [f"p flood: {1000 - BURST_LINES} more not shown", "p flood: again"]
    assert (notices.count("flood"), notices.count("nothing")) == (1001, 0)
    assert notices.render_counts() == "flood 1001, other 1, quiet 1"
