"""Where lines go, and that nobody can forge one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vsh.live import CHECKOUT
from vshd.log import LINE_MAX, THROTTLE_S, Log, Throttle, fit, printable

# linux/kernel/printk/internal.h: PRINTK_MESSAGE_MAX, without what the kernel puts before and behind the text.
KERNEL_RECORD_MAX = 2048 - 64
# Whatever a client can put into a command, a user's name or a directory.
HOSTILE = [
    "two\nlines",
    "\r\x1b]0;title\x07\x9b2J",
    os.fsdecode(b"\xff\xfe not UTF-8 \xc3"),
    "\u2028\u202e\ufffe\U000e0001",
    "\ud800 half a pair",
    "\0",
    "\u00e9" * LINE_MAX,
    "\udcff" * LINE_MAX,
    "\\" * LINE_MAX,
    "\n" * (1 << 20),
]
# A Python that has no codec beside those that the interpreter itself is made of, as in the image tiny.
WITHOUT_CODECS = """
import sys
class NoModules:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("encodings."):
            raise ModuleNotFoundError(name)
for name in [name for name in sys.modules if name.startswith("encodings.") and not name.endswith(".utf_8")]:
    del sys.modules[name]
sys.meta_path.insert(0, NoModules())
sys.path.insert(0, {checkout!r})
from vshd.log import Log
log = Log({kmsg!r})
log.open(use_kmsg=True)
for text in {texts!a}:
    log.info(text)
"""


def test_lines_for_the_kernel_have_a_priority(tmp_path: Path) -> None:
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


def test_kernels_log_that_cannot_be_opened_is_no_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = Log(str(tmp_path / "none" / "kmsg"))
    log.open(use_kmsg=False, use_stderr=True)
    log.info("seen")
    assert capfd.readouterr().err == "vshd: seen\n"


def test_text_is_made_printable() -> None:
    assert printable("a\x1b[1m\r\n\udcff\u00e9") == "a\\x1b[1m\\r\\n\\udcff\u00e9"


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_log_takes_any_text_as_one_line_that_fits(tmp_path: Path, text: str) -> None:
    kmsg = tmp_path / "kmsg"
    kmsg.touch()
    log = Log(str(kmsg))
    log.open(use_kmsg=True)
    log.info(text)
    (line,) = kmsg.read_bytes().splitlines()
    assert line.startswith(b"<6>vshd: ")
    assert 0 < len(line.removeprefix(b"<6>vshd: ")) <= LINE_MAX
    assert len(line) + 3 * sum(byte == ord("\\") or byte > 0x7E for byte in line) < KERNEL_RECORD_MAX
    assert line.decode().isprintable()


def test_log_needs_no_codec_that_is_a_module(tmp_path: Path) -> None:
    kmsg = tmp_path / "kmsg"
    kmsg.touch()
    script = WITHOUT_CODECS.format(checkout=str(CHECKOUT), kmsg=str(kmsg), texts=HOSTILE[:-1])
    done = subprocess.run([sys.executable, "-I", "-S", "-B", "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(kmsg.read_bytes().splitlines()) == len(HOSTILE) - 1


def test_text_is_cut_between_characters() -> None:
    assert fit("\u00e9\u00e9", 3) == "\u00e9"
    assert fit("ab", 1) == "a"


def test_session_opens_the_kernels_log_anew(tmp_path: Path) -> None:
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


def test_what_strangers_cause_is_a_line_in_a_while(tmp_path: Path) -> None:
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
