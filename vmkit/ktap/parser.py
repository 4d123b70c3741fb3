"""Bytes in, results out: KTAP, kselftest's and KUnit's output, and TAP 13 and 14 where they differ. Pure.

It takes any bytes and never fails. What is planned and does not report becomes an error, so an output that breaks off
can never pass. Each buffer has a limit: of a line, the depth, the number of tests, and the logs (vmkit.ktap.blocks).
"""

from vmkit.junit import CaseVerdict
from vmkit.ktap.blocks import MAX_LOGS_CHARACTERS, MAX_TESTS, Allowance
from vmkit.ktap.lines import BootLine, PanicLine, parse_line
from vmkit.ktap.results import KtapResult
from vmkit.ktap.streams import REBOOTED, RUNNING, Stream

# Of a longer line the start is kept. The kernel's own lines have 1 KiB at most (linux/printk.h).
MAX_LINE_CHARACTERS = 16 * 1024
# UTF-8 has four bytes for a character at most.
_MAX_LINE_BYTES = 4 * MAX_LINE_CHARACTERS


class KtapParser:
    """One output. Invariant: `_rest` is the start of a line, at most _MAX_LINE_BYTES.

    The kernel's log and what programs print are read as two streams that share a console: a module's KUnit tests may
    run within a test of kselftest.
    """

    def __init__(self, *, max_tests: int = MAX_TESTS, max_log_characters: int = MAX_LOGS_CHARACTERS) -> None:
        """max_tests: of more, one error tells. max_log_characters: of all logs together."""
        self._max_tests = max_tests
        self._allowance = Allowance(max_tests, max_log_characters)
        self._kernel = Stream(self._allowance)
        self._program = Stream(self._allowance)
        self._rest = b""

    @property
    def has_found(self) -> bool:
        """Whether there was any KTAP so far."""
        return self._kernel.has_found or self._program.has_found

    def receive_data(self, data: bytes) -> list[KtapResult]:
        """Takes the next bytes. Returns the results that are complete now: those of subtests come with their parent."""
        end = data.rfind(b"\n")
        if end < 0:
            self._rest += data[: _MAX_LINE_BYTES - len(self._rest)]
            return []
        whole, rest = self._rest + data[:end], data[end + 1 :]
        self._rest = rest[:_MAX_LINE_BYTES]
        results: list[KtapResult] = []
        for line in whole.decode(errors="replace").split("\n"):
            results += self._take(line)
        return results

    def receive_end(self, cause: str = "") -> list[KtapResult]:
        """Takes the end of the output. Returns the last results, and one for each test that is missing.

        cause: why the output ended, where that was not its own end.
        """
        results = []
        if self._rest:
            results += self._take(self._rest.decode(errors="replace"), is_last=True)
            self._rest = b""
        running = f"{RUNNING}: {cause}" if cause else RUNNING
        results += self._end_streams(running)
        if self._allowance.is_full:
            brief = f"there are more than {self._max_tests} tests, and the others were left out"
            results.append(KtapResult(("all tests",), CaseVerdict.ERROR, brief, ""))
        return results

    def _end_streams(self, running: str) -> list[KtapResult]:
        return self._program.end(running) + self._kernel.end(running)

    def _take(self, text: str, *, is_last: bool = False) -> list[KtapResult]:
        line = parse_line(text[:MAX_LINE_CHARACTERS].rstrip("\r"))
        stream, other = (self._kernel, self._program) if line.is_kernel else (self._program, self._kernel)
        kind = line.kind
        if kind is None:
            if other.is_busy and not stream.is_busy:
                # A message of the kernel while a program's test runs.
                other.keep(line)
        elif isinstance(kind, BootLine):
            return self._end_streams(REBOOTED)
        elif isinstance(kind, PanicLine):
            other.panic(kind.reason)
            other.keep(line)
        return stream.take(line, is_last=is_last)
