"""A transcript of a terminal, and its replay: every command of a page is typed into a real shell in a real terminal,
and what it prints is compared with what the page shows.

In the page `...` stands for any text of a line and, alone, for any number of lines. What depends on the host is not
compared: seconds, process ids, versions, and which accelerator and which vsock device vmkit chose, and why.
"""

import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path

from tests.docs.pages import Page

# The host's prompt; the mark in front of it is printed by our shell alone.
HOST = "$"
MARK = "\x1e"
# A step may build an image and boot a guest under emulation on a busy machine.
DEADLINE_S = 300
READ_SIZE = 65536
# Wide enough that no shell breaks a line that is typed.
ROWS, COLUMNS = 50, 400

_STEP = re.compile(r"(?P<prompt>\$|[\w-]+:[^\s#$]*[#$]) (?P<command>.*)")
_PROMPT = re.compile(rf"(?:^|\n)(?:{MARK}(?P<host>\$)|(?P<guest>[\w-]+:[^\s#$]*[#$])) $")
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07|[=>])")
_ANY_LINES = "..."
# What is another on another host, and the word that stands for it.
_VARYING = (
    (re.compile(r"^  no (KVM|vhost): .*\n?", re.MULTILINE), ""),
    (
        re.compile(
            r"^BusyBox v\S+ .* built-in shell \(ash\)\nEnter 'help' for a list of built-in commands.\n", re.MULTILINE
        ),
        "",
    ),
    (re.compile(r"accelerator (kvm|tcg)"), "accelerator A"),
    (re.compile(r"backend (user|vhost)"), "backend B"),
    (re.compile(r"\b\d+(\.\d+)? ?s\b"), "N s"),
    (re.compile(r"\b\d+\.\d+\.\d+[-+]\S*(cloud-)?amd64\b"), "KERNEL"),
    (re.compile(r"^\[1\] \d+$", re.MULTILINE), "[1] PID"),
    # bash reports the end of a background job whenever it comes to it.
    (re.compile(r"^\[1\][+-]?  (Done|Terminated|Exit).*\n", re.MULTILINE), ""),
)


@dataclass(frozen=True, slots=True)
class Step:
    """A command at a prompt, and the lines it prints. line: of the page."""

    prompt: str
    command: str
    output: str
    line: int


def parse_transcript(text: str, line: int = 1) -> list[Step]:
    """The steps of a block. A command that ends with a backslash goes on in the next line, behind `> `."""
    steps: list[Step] = []
    rows = iter(enumerate(text.splitlines(), line))
    for number, row in rows:
        found = _STEP.fullmatch(row)
        if found is None:
            if not steps:
                raise ValueError(f"line {number}: output before the first prompt: {row!r}")
            last = steps[-1]
            steps[-1] = Step(last.prompt, last.command, f"{last.output}{row}\n", last.line)
            continue
        command = found["command"]
        while command.endswith("\\"):
            command = command[:-1] + next(rows)[1].removeprefix("> ").lstrip()
        steps.append(Step(found["prompt"], command, "", number))
    return steps


def is_as_shown(shown: str, printed: str) -> bool:
    """Whether a program printed what a page shows."""
    lines = _normalise(shown).splitlines()
    patterns = [
        r"(?:.*\n)*?" if line == _ANY_LINES else ".*".join(map(re.escape, line.split("..."))) + r"\n" for line in lines
    ]
    return re.fullmatch("".join(patterns), _normalise(printed)) is not None


def _normalise(text: str) -> str:
    for pattern, word in _VARYING:
        text = pattern.sub(word, text)
    lines = [line.rstrip() for line in text.splitlines()]
    return "".join(f"{line}\n" for line in lines if line)


def clean(data: bytes) -> str:
    """What stays on the screen: without escapes, and of a line that was written over the last version."""
    text = _ESCAPES.sub("", data.decode(errors="replace")).replace("\r\n", "\n")
    return "\n".join(line.rpartition("\r")[2] for line in text.split("\n"))


class Shell:
    """bash in a terminal of its own; a shell that is opened from it is typed into just so."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self._fd, theirs = pty.openpty()
        ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        env = {**environ, "PS1": f"{MARK}$ ", "PS2": "> ", "TERM": "dumb", "HISTFILE": ""}
        self._process = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "--noediting", "-i"], stdin=theirs, stdout=theirs, stderr=theirs,
            cwd=folder, env=env, start_new_session=True, preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  (no threads here)
        )  # fmt: skip
        os.close(theirs)
        self._seen = b""
        self.read_to_prompt()

    def read_to_prompt(self, deadline_s: float = DEADLINE_S) -> tuple[str, str]:
        """What came before the next prompt, and that prompt."""
        end_s = time.monotonic() + deadline_s
        while (found := _PROMPT.search(clean(self._seen))) is None:
            left_s = end_s - time.monotonic()
            assert left_s > 0, f"no prompt came in {deadline_s} s, but:\n{clean(self._seen)}"
            if select.select([self._fd], [], [], left_s)[0]:
                self._seen += self._read()
        output = clean(self._seen)[: found.start() + 1] if found.start() else ""
        self._seen = b""
        return output, found["host"] or found["guest"]

    def _read(self) -> bytes:
        try:
            return os.read(self._fd, READ_SIZE)
        except OSError as error:
            raise AssertionError(f"the shell ended: {clean(self._seen)}") from error

    def type(self, command: str) -> tuple[str, str]:
        """Types a line; what it printed, and the prompt behind that."""
        os.write(self._fd, f"{command}\n".encode())
        output, prompt = self.read_to_prompt()
        # The first line is the terminal's echo.
        return output.partition("\n")[2], prompt

    def close(self) -> None:
        os.close(self._fd)
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def open_shell(folder: Path, environ: Mapping[str, str]) -> Iterator[Shell]:
    """A shell that ends with the block, and what runs in its process group with it."""
    shell = Shell(folder, environ)
    try:
        yield shell
    finally:
        shell.close()


def replay(page: Page, shell: Shell, folder: Path) -> int:
    """Writes the page's files and types its commands, in the page's order; how many commands that were."""
    count = 0
    for block in page.blocks:
        if block.file is not None:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
            path.chmod(0o755 if block.text.startswith("#!") else 0o644)
        if not block.is_run:
            continue
        steps = parse_transcript(block.text, block.line + 1)
        prompts = [step.prompt for step in steps[1:]] + [HOST]
        for step, following in zip(steps, prompts, strict=True):
            where = f"{page.path.name}:{step.line}: {step.prompt} {step.command}"
            printed, prompt = shell.type(step.command)
            assert is_as_shown(step.output, printed), f"{where}\nshown:\n{step.output}\nprinted:\n{printed}"
            assert prompt == following, f"{where}\nthe next prompt is {prompt!r} and not {following!r}"
            count += 1
    return count
