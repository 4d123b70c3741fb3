"""Fuzzes the reading of KTAP: any bytes give results within the limits, the same in any pieces, and a valid report.

Longer than under pytest: python -m tests.fuzz.fuzz_ktap --cases 1000000 --seed 1
"""

import random
from collections.abc import Sequence
from xml.etree import ElementTree as Xml

from tests.fuzz.seeded import run_program
from vmkit.junit import CaseVerdict, render_junit
from vmkit.ktap.blocks import MAX_DEPTH, MAX_LOG_CHARACTERS, MAX_NAME_CHARACTERS
from vmkit.ktap.parser import KtapParser
from vmkit.ktap.results import KtapResult, count_results, make_case, render_bad

# Lines, their parts, and what stands between them.
PIECES = (
    *(b"KTAP version 1\n", b"TAP version 13\n", b"  KTAP version 1\n", b"    KTAP version 1\n", b"# TAP version 13\n"),
    *(b"1..1\n", b"1..3\n", b"  1..2\n", b"    1..2\n", b"# 1..2\n", b"1..0 # SKIP no\n", b"1..20\n"),
    *(b"ok 1 a\n", b"ok 2 b\n", b"not ok 1 c\n", b"not ok 2 d # exit=1\n", b"  ok 1 e\n", b"  not ok 2 f\n"),
    *(
        b"    ok 1 g\n",
        b"        ok 1 h # SKIP\n",
        b"# ok 1 i\n",
        b"# not ok 2 j\n",
        b"ok\n",
        b"ok 3",
        b"not ok 4 # TODO\n",
    ),
    *(b"# Subtest: k\n", b"    # Subtest: l\n", b"# selftests: net: m\n", b"# #  RUN           n ...\n", b"# words\n"),
    *(b"# Bail out!\n", b"not ok 4 # TODO\n"),
    *(
        b"[    1.000000] ",
        b"<6>[    0.000000] ",
        b"[    0.000000] Linux version 6\n",
        b"Bail out! o\n",
        b"# Bail out!\n",
    ),
    *(b"[    2.0] Kernel panic - not syncing: p\n", b"  ---\n", b"  ...\n", b"      ---\n", b"\r\n", b"\n", b"\x1b[1m"),
    *(b"\0", b"\xff", b"\t", b" ", b"#", b"# ", b"]]>", b"<&>\n", b"\xe2\x80\xae", b"\xed\xa0\x80", b"x" * 300, b"9"),
)


def read_pieces(data: bytes, cuts: Sequence[int]) -> tuple[list[KtapResult], bool]:
    parser = KtapParser()
    results: list[KtapResult] = []
    start = 0
    for cut in (*sorted(cuts), len(data)):
        results += parser.receive_data(data[start:cut])
        start = max(start, min(cut, len(data)))
    results += parser.receive_end()
    return results, parser.has_found


def check_output(data: bytes, cuts: Sequence[int]) -> bool:
    """Raises AssertionError for what no output may do. Returns whether it had results."""
    results, has_found = read_pieces(data, ())
    assert read_pieces(data, cuts) == (results, has_found)
    assert has_found or not results
    for result in results:
        assert 0 < len(result.path) <= MAX_DEPTH
        assert all(0 < len(name) <= MAX_NAME_CHARACTERS for name in result.path)
        assert len(result.log) <= 2 * MAX_LOG_CHARACTERS
    report = Xml.fromstring(render_junit("x", (make_case(result, "x") for result in results)))
    counts = {name: report[0].get(name) for name in ("tests", "failures", "errors", "skipped")}
    found = [result.verdict for result in results]
    assert counts == {
        "tests": str(len(found)),
        "failures": str(found.count(CaseVerdict.FAILED)),
        "errors": str(found.count(CaseVerdict.ERROR)),
        "skipped": str(found.count(CaseVerdict.SKIPPED)),
    }
    shown = "\n".join((*render_bad(results), count_results(results)))
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
    return bool(results)


def run_seeded(rng: random.Random) -> bool:
    """One case; whether it had results. Raises whatever a case may not."""
    pieces = [
        rng.choice(PIECES) if rng.random() < 0.97 else rng.randbytes(rng.randrange(8)) for _ in range(rng.randrange(80))
    ]
    data = b"".join(pieces)
    return check_output(data, [rng.randrange(len(data) + 1) for _ in range(rng.randrange(6))])


if __name__ == "__main__":
    run_program(__doc__, "KTAP", "with results", run_seeded)
