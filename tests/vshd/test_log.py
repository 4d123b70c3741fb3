"""Where lines go, and that nobody can forge one."""

from vshd.log import LINE_MAX, THROTTLE_S, Log, Throttle, printable


def test_lines_for_the_kernel_have_a_priority(tmp_path):
    kmsg = tmp_path / "kmsg"
    kmsg.touch()
    log = Log(str(kmsg))
    log.open(use_kmsg=True)
    log.info("one")
    log.error("two\nthree")
    log.warning("x" * 2000)
    lines = kmsg.read_text().splitlines()
    assert lines[:2] == ["<6>vshd: one", "<3>vshd: two\\nthree"]
    assert lines[2] == "<4>vshd: " + "x" * LINE_MAX


def test_kernels_log_that_cannot_be_opened_is_no_failure(tmp_path, capfd):
    log = Log(str(tmp_path / "none" / "kmsg"))
    log.open(use_kmsg=False, use_stderr=True)
    log.info("seen")
    assert capfd.readouterr().err == "vshd: seen\n"


def test_text_is_made_printable():
    assert printable("a\x1b[1m\r\n\udcff\u00e9") == "a\\x1b[1m\\r\\n\\udcff\u00e9"


def test_session_opens_the_kernels_log_anew(tmp_path):
    """/dev/kmsg counts lines per opening, 10 in 5 s: sessions must not share the daemon's."""
    path, old = tmp_path / "kmsg", tmp_path / "old"
    path.touch()
    log = Log(str(path))
    log.open(use_kmsg=True)
    path.rename(old)
    path.touch()
    log.renew()
    log.info("one")
    assert (path.read_text(), old.read_text()) == ("<6>vshd: one\n", "")
    path.rename(old)
    log.renew()
    log.info("two")
    assert old.read_text() == "<6>vshd: one\n<6>vshd: two\n"


def test_what_strangers_cause_is_a_line_in_a_while(tmp_path):
    kmsg = tmp_path / "kmsg"
    kmsg.write_text("")
    log = Log(str(kmsg))
    log.open(use_kmsg=True)
    throttle = Throttle(log)
    for number in range(100):
        throttle.warning(f"stranger {number}", 5.0 + number / 1000)
    throttle.warning("later", 5.0 + THROTTLE_S)
    throttle.warning("much later", 5.0 + 3 * THROTTLE_S)
    assert [line.partition("vshd: ")[2] for line in kmsg.read_text().splitlines()] == [
        "stranger 0",
        "later (99 more like it since the last such line)",
        "much later",
    ]
