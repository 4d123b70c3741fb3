"""What the plugin takes out of a machine's logs, and what it ends with the machine."""

from vmkit.testing.supply import EVIDENCE_LINES, PANIC, find_lines

TRACE = [f"trace {number}" for number in range(70)]
BOOT = [f"boot {number}" for number in range(300)]


def test_last_lines_explain_a_failure() -> None:
    assert find_lines("\n".join(BOOT).encode()).split("\n") == BOOT[-EVIDENCE_LINES:]
    assert find_lines(b"one\n\ntwo\n") == "one\ntwo"
    assert find_lines(b"") == ""


def test_panic_is_shown_from_its_first_line_on() -> None:
    """The registers and the trace below it are longer than what is shown."""
    panic = f"{PANIC}: sysrq triggered crash"
    lines = find_lines("\n".join([*BOOT, panic, *TRACE]).encode()).split("\n")
    assert lines == [*BOOT[-5:], panic, *TRACE[: EVIDENCE_LINES - 6]]


def test_panic_at_the_end_keeps_what_came_before() -> None:
    lines = find_lines("\n".join([*BOOT, PANIC, "the end"]).encode()).split("\n")
    assert lines == [*BOOT, PANIC, "the end"][-EVIDENCE_LINES:]
