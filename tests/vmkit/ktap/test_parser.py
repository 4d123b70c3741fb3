"""KTAP as kernels and test programs print it, whole and broken off: which tests there are, and what became of each."""

import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.fuzz_ktap import PIECES, check_output
from vmkit.junit import CaseVerdict
from vmkit.ktap.blocks import MAX_DEPTH, MAX_LOG_CHARACTERS, MAX_MISSING
from vmkit.ktap.parser import MAX_LINE_CHARACTERS, KtapParser
from vmkit.ktap.results import KtapResult
from vmkit.ktap.streams import DID_NOT_RUN, NO_RESULT, REBOOTED, RUNNING

PASSED, FAILED, ERROR, SKIPPED = CaseVerdict


def read(text: str, cause: str = "") -> list[KtapResult]:
    """The text of a test of this file may be indented as the file is, behind its first line."""
    parser = KtapParser()
    text = textwrap.dedent(text)[1:] if text.startswith("\n") else text
    return parser.receive_data(text.encode()) + parser.receive_end(cause)


def outline(results: list[KtapResult]) -> list[tuple[str, CaseVerdict, str]]:
    return [(" / ".join(result.path), result.verdict, result.brief) for result in results]


def names(results: list[KtapResult]) -> list[tuple[str, str]]:
    return [(" / ".join(result.path), result.verdict.value) for result in results]


def test_tests_with_subtests_are_their_subtests() -> None:
    results = read("""
        KTAP version 1
        1..2
          KTAP version 1
          1..2
            KTAP version 1
            1..1
            # deepest: said before its result
            ok 1 deepest
          ok 1 middle
          not ok 2 other
        # outer failed
        not ok 1 outer
        ok 2 alone # SKIP no such device
        """)
    assert outline(results) == [
        ("outer / middle / deepest", PASSED, ""),
        ("outer / other", FAILED, ""),
        ("alone", SKIPPED, "no such device"),
    ]
    assert results[0].log.strip() == "# deepest: said before its result"


@pytest.mark.parametrize(
    ("line", "verdict", "brief"),
    [
        ("ok 1 a", PASSED, ""),
        ("ok 1 - a", PASSED, ""),
        ("not ok 1 a", FAILED, ""),
        ("not ok 1 a # exit=1", FAILED, "exit=1"),
        ("ok 1 a # rcode=0", PASSED, "rcode=0"),
        ("ok 1 a # SKIP", SKIPPED, ""),
        ("not ok 1 a # SKIP: no root", SKIPPED, "no root"),
        ("ok 1 a # skipped, it is Monday", SKIPPED, ", it is Monday"),
        ("not ok 1 a # TIMEOUT 45 seconds", FAILED, "it took too long: 45 seconds"),
        ("not ok 1 a # ERROR no memory", ERROR, "no memory"),
        ("ok 1 a # XFAIL later", SKIPPED, "it failed as expected: later"),
        ("not ok 1 a # TODO later", SKIPPED, "it failed as expected: later"),
        ("ok 1 a # TODO later", PASSED, "later"),
        ("ok 1 a # error injected", PASSED, "error injected"),
        ("not ok 1 a # UNKNOWN word", FAILED, "UNKNOWN word"),
    ],
)
def test_directives(line: str, verdict: CaseVerdict, brief: str) -> None:
    assert outline(read(f"KTAP version 1\n1..1\n{line}\n")) == [("a", verdict, brief)]


def test_test_without_a_name_has_its_number() -> None:
    assert names(read("TAP version 13\n1..3\nok 1\nok 2 # SKIP more\nok\n")) == [
        ("test 1", "passed"), ("more", "skipped"), ("test 3", "passed")
    ]  # fmt: skip


KUNIT = """
    [    0.512345] KTAP version 1
    [    0.512400] 1..2
    [    0.512500]     KTAP version 1
    [    0.512600]     # Subtest: list
    [    0.512700]     # module: list_test
    [    0.512800]     1..2
    [    0.512900]     ok 1 list_add
    [    0.513000]         KTAP version 1
    [    0.513100]         # Subtest: list_del
    [    0.513200]         ok 1 length 1
    [    0.513300]         not ok 2 length 2
    [    0.513400]     # list_del: pass:1 fail:1 skip:0 total:2
    [    0.513500]     not ok 2 list_del
    [    0.513600] # list: pass:1 fail:1 skip:0 total:2
    [    0.513700] not ok 1 list
    [    0.513800]     KTAP version 1
    [    0.513900]     # Subtest: hash
    [    0.514000]     1..3
    [    0.514100]     ok 1 hash_add
    [    0.514200] BUG: kernel NULL pointer dereference, address: 0000000000000008
    [    0.514300] Kernel panic - not syncing: Fatal exception
    [    0.514400] Call Trace:
    """


def test_panic_of_a_kernel_is_the_end_of_its_kunit_test() -> None:
    results = read(KUNIT)
    panic = "the guest's kernel panicked: Fatal exception"
    assert outline(results) == [
        ("list / list_add", PASSED, ""),
        ("list / list_del / length 1", PASSED, ""),
        ("list / list_del / length 2", FAILED, ""),
        ("hash / hash_add", PASSED, ""),
        ("hash / test 2", ERROR, panic),
        ("hash / test 3", ERROR, f"{DID_NOT_RUN}: {panic}"),
    ]
    # What stands before and behind the panic is there to be read.
    assert "NULL pointer" in results[4].log and results[4].log.endswith("Call Trace:")


@pytest.mark.parametrize(
    "before",
    [
        "", "<6>[    0.512345] ", "[    0.512345][    T1] ", "[    0.512345][   T12] ", "<6>",
        "kern  :info  : [    0.512345] ", "[Mon Nov 30 04:18:26 2026] ", "2026-11-30T04:18:26,123456+00:00 ",
        "Nov 30 04:18:26 host kernel: ", "2026-11-30T04:18:26+0000 host kernel: ",
        "2026-11-30T04:18:26.1234567Z [    0.512345] ", "[    0.512345 <    0.000012>] ",
    ],
)  # fmt: skip
def test_what_logs_have_before_a_line_does_not_matter(before: str) -> None:
    text = "KTAP version 1\n1..2\n    KTAP version 1\n    # Subtest: in\n    1..1\n    ok 1 a\nok 1 in\nnot ok 2 b\n"
    prefixed = "".join(f"{before}{line}\r\n" for line in text.splitlines())
    assert names(read(prefixed)) == [("in / a", "passed"), ("b", "failed")]
    coloured = "".join(f"\x1b[0m{before}\x1b[32m{line}\x1b[0m\n" for line in text.splitlines())
    assert names(read(coloured)) == [("in / a", "passed"), ("b", "failed")]


KSELFTEST = """
    TAP version 13
    1..3
    # timeout set to 45
    # selftests: net: first.sh
    # TAP version 13
    # 1..2
    # # what first.sh says
    # ok 1 opens
    # # ok 7 of these is a remark
    # not ok 2 closes
    # # Totals: pass:1 fail:1 xfail:0 xpass:0 skip:0 error:0
    not ok 1 selftests: net: first.sh # exit=1
    # timeout set to 45
    # selftests: net: second
    # TAP version 13
    # 1..3
    # # Starting 3 tests from 1 test cases.
    # #  RUN           global.easy ...
    # #            OK  global.easy
    # ok 1 global.easy
    # #  RUN           global.hangs ...
    """


def test_hang_of_a_kselftest_names_the_test_that_ran() -> None:
    assert outline(read(KSELFTEST, "no end within 600 s")) == [
        ("selftests: net: first.sh / opens", PASSED, ""),
        ("selftests: net: first.sh / closes", FAILED, ""),
        ("selftests: net: second / global.easy", PASSED, ""),
        ("selftests: net: second / global.hangs", ERROR, f"{RUNNING}: no end within 600 s"),
        ("selftests: net: second / test 3", ERROR, DID_NOT_RUN),
        ("test 3", ERROR, DID_NOT_RUN),
    ]


def test_hang_between_a_failure_and_the_end_of_its_parent_is_an_error() -> None:
    text = "KTAP version 1\n1..2\n    KTAP version 1\n    # Subtest: in\n    1..1\n    not ok 1 a\n"
    assert outline(read(text)) == [("in / a", FAILED, ""), ("in", ERROR, RUNNING), ("test 2", ERROR, DID_NOT_RUN)]


def test_panic_is_the_cause_of_all_that_did_not_run_in_each_level() -> None:
    text = """
        KTAP version 1
        1..2
            KTAP version 1
            # Subtest: in
            1..2
        Kernel panic - not syncing: x
        """
    panic = "the guest's kernel panicked: x"
    not_run = f"{DID_NOT_RUN}: {panic}"
    assert outline(read(text)) == [
        ("in / test 1", ERROR, panic),
        ("in / test 2", ERROR, not_run),
        ("test 2", ERROR, not_run),
    ]


def test_every_beginning_of_an_output_has_as_many_tests_as_were_planned() -> None:
    """Wherever a plain output is cut, the tests that it promised are all there, and what passed has passed."""
    text = "KTAP version 1\n1..12\n" + "".join(f"# about {n}\nok {n} name {n}\n" for n in range(1, 13))
    for end in range(len("KTAP version 1\n1..12\n"), len(text)):
        results = read(text[:end])
        assert len(results) == 12
        assert [result.verdict for result in results].count(ERROR) == 12 - sum(r.verdict is PASSED for r in results)
        # A name may lack its end; a number that lacks a digit would be another test's.
        passed = [result.path[0] for result in results if result.verdict is PASSED]
        assert all(name in (f"name {n}"[: len(name)], f"test {n}") for n, name in enumerate(passed, 1))


def test_program_that_dies_leaves_tests_that_did_not_run() -> None:
    text = """
        TAP version 13
        1..2
        # selftests: mm: crash
        # TAP version 13
        # 1..3
        # ok 1 fine
        not ok 1 selftests: mm: crash # exit=139
        # selftests: mm: next
        ok 2 selftests: mm: next
        """
    assert outline(read(text)) == [
        ("selftests: mm: crash / fine", PASSED, ""),
        ("selftests: mm: crash / test 2", ERROR, f"{NO_RESULT}: exit=139"),
        ("selftests: mm: crash / test 3", ERROR, DID_NOT_RUN),
        ("selftests: mm: next", PASSED, ""),
    ]


def test_program_that_takes_too_long_names_the_test_that_ran() -> None:
    text = KSELFTEST + "#\n    not ok 2 selftests: net: second # TIMEOUT 45 seconds\n    ok 3 third\n"
    assert outline(read(text))[3:] == [
        ("selftests: net: second / global.hangs", ERROR, f"{NO_RESULT}: it took too long: 45 seconds"),
        ("selftests: net: second / test 3", ERROR, DID_NOT_RUN),
        ("third", PASSED, ""),
    ]


def test_program_without_a_version_line_has_its_tests_under_kselftest() -> None:
    """As under KSFT_TAP_LEVEL of older kernels."""
    text = "TAP version 13\n1..1\n# selftests: net: a\n# ok 1 b\n# not ok 2 c\nnot ok 1 selftests: net: a # exit=1\n"
    assert names(read(text)) == [("selftests: net: a / b", "passed"), ("selftests: net: a / c", "failed")]


def test_log_may_be_indented_as_a_whole() -> None:
    """A prefix that is none of those that are known leaves its blanks."""
    text = " TAP version 14\n \t# Subtest: in\n \t1..2\n \tok 1 - a\n  # noise\n \tnot ok 2 - b\n not ok 1 - in\n"
    assert names(read(text)) == [("in / a", "passed"), ("in / b", "failed")]
    assert names(read(text.replace("not ok 1 - in", "")))[-1] == ("in", "error")


def test_test_that_fails_although_its_subtests_pass_is_a_result_of_its_own() -> None:
    text = "KTAP version 1\n1..1\n  KTAP version 1\n  1..1\n  ok 1 a\nnot ok 1 outer # exit=1\n"
    assert outline(read(text)) == [("outer / a", PASSED, ""), ("outer", FAILED, "exit=1")]


def test_lost_line_is_a_test_without_a_result() -> None:
    assert outline(read("KTAP version 1\n1..4\nok 1 a\nrandom: crng ok 2 b\nok 3 c\nok 4 d\n")) == [
        ("a", PASSED, ""), ("c", PASSED, ""), ("d", PASSED, ""), ("test 2", ERROR, NO_RESULT)
    ]  # fmt: skip


def test_numbers_that_come_twice_lose_no_test() -> None:
    assert names(read("KTAP version 1\n1..3\nok 1 a\nok 1 b\nok 1 c\n")) == [
        ("a", "passed"), ("b", "passed"), ("c", "passed")
    ]  # fmt: skip


def test_kernel_runs_kunit_while_a_program_runs_kselftest() -> None:
    """A module's tests go to the kernel's log, and the console shows both."""
    text = """
        TAP version 13
        1..2
        # selftests: lib: module.sh
        [   12.000001] KTAP version 1
        [   12.000002] 1..1
        [   12.000003]     KTAP version 1
        [   12.000004]     # Subtest: sort
        [   12.000005]     1..1
        [   12.000006]     ok 1 sort_some
        [   12.000007] ok 1 sort
        ok 1 selftests: lib: module.sh
        [   12.500000] WARNING: CPU: 0 PID: 77 at lib/x.c:1
        not ok 2 selftests: lib: other # exit=1
        """
    results = read(text)
    assert names(results) == [
        ("sort / sort_some", "passed"),
        ("selftests: lib: module.sh", "passed"),
        ("selftests: lib: other", "failed"),
    ]
    assert "WARNING: CPU: 0" in results[2].log


def test_machine_that_starts_again_ends_the_test() -> None:
    text = """
        [    0.000000] Linux version 6.12.0
        [    1.000000] KTAP version 1
        [    1.000001] 1..2
        [    1.000002] ok 1 a
        [    0.000000] Linux version 6.12.0
        [    1.000000] KTAP version 1
        [    1.000001] 1..1
        [    1.000002] ok 1 c
        """
    assert outline(read(text)) == [
        ("a", PASSED, ""), ("test 2", ERROR, REBOOTED), ("c", PASSED, "")
    ]  # fmt: skip


def test_panic_behind_the_last_test_is_no_fault_of_a_test() -> None:
    """A kernel with KUnit and no root ends so."""
    text = "[ 1.0] KTAP version 1\n[ 1.0] 1..1\n[ 1.0] ok 1 a\n[ 1.1] Kernel panic - not syncing: VFS: no root\n"
    assert names(read(text)) == [("a", "passed")]


def test_test_that_only_names_a_panic_has_none() -> None:
    text = "KTAP version 1\n1..1\n# Kernel panic - not syncing: in a remark\nok 1 a\n"
    assert names(read(text)) == [("a", "passed")]


def test_bailing_out_is_an_error() -> None:
    assert outline(read("TAP version 13\n1..3\nok 1 a\nBail out! no memory\n")) == [
        ("a", PASSED, ""),
        ("test 2", ERROR, "bailed out: no memory"),
        ("test 3", ERROR, f"{DID_NOT_RUN}: bailed out: no memory"),
    ]
    assert outline(read("TAP version 13\nok 1 a\nBail out!\n"))[1:] == [("Bail out!", ERROR, "bailed out")]


def test_tap_13_and_14() -> None:
    text = """
        TAP version 14
        # Subtest: first
            ok 1 - one
            not ok 2 - two
              ---
              message: what went wrong
              ok 7: no result
              ...
            1..2
        not ok 1 - first
        ok - without a number
        ok 3 a \\# b
        1..3
        """
    results = read(text)
    assert names(results) == [
        ("first / one", "passed"), ("first / two", "failed"), ("without a number", "passed"), ("a # b", "passed")
    ]  # fmt: skip
    assert "what went wrong" in results[1].log


def test_file_of_kunit_begins_within_a_block() -> None:
    """/sys/kernel/debug/kunit/NAME/results."""
    text = "    KTAP version 1\n    # Subtest: base\n    1..2\n    ok 1 a\n    ok 2 b\n"
    assert names(read(text + "ok 1 base\n")) == [("base / a", "passed"), ("base / b", "passed")]
    # Some have no last line, and none is missing.
    assert names(read(text)) == [("base / a", "passed"), ("base / b", "passed")]
    assert names(read(text + text.replace("base", "more"))) == [
        ("base / a", "passed"), ("base / b", "passed"), ("more / a", "passed"), ("more / b", "passed")
    ]  # fmt: skip
    assert names(read(text.replace("1..2", "1..3")))[-1] == ("base / test 3", "error")


def test_log_that_lost_its_start_has_the_rest() -> None:
    assert names(read("ok 57 late\nnot ok 58 later\n")) == [("late", "passed"), ("later", "failed")]
    assert names(read("# TAP version 13\n# 1..1\n# ok 1 in\nok 9 out\n")) == [("out / in", "passed")]


def test_outputs_behind_each_other_are_all_read() -> None:
    text = "TAP version 13\n1..1\nok 1 a\nTAP version 13\n1..2\nok 1 b\nTAP version 13\nTAP version 13\n1..1\nok 1 c\n"
    assert outline(read(text)) == [
        ("a", PASSED, ""), ("b", PASSED, ""), ("test 2", ERROR, DID_NOT_RUN), ("c", PASSED, "")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("KTAP version 1\n", ("all tests", "error")),
        ("KTAP version 1\n1..0\n", ("all tests", "error")),
        ("TAP version 13\n1..0 # SKIP no root\n", ("all tests", "skipped")),
        ("TAP version 13\n1..1\n# TAP version 13\n", ("test 1", "error")),
        ("TAP version 13\n# TAP version 13\n# 1..1\n# ok 1 a\n", ("test 1", "error")),
    ],
)
def test_output_without_results_has_not_passed(text: str, expected: tuple[str, str]) -> None:
    assert names(read(text))[-1] == expected


@pytest.mark.parametrize("text", ["", "hello\n", "ok\n", "ok then\n", "okay 1\n", "1..3", "# ok 1 a\n", "1..", "\0"])
def test_text_without_results(text: str) -> None:
    parser = KtapParser()
    assert parser.receive_data(text.encode()) + parser.receive_end() == []
    assert not parser.has_found


def test_limits_hold() -> None:
    long = "x" * (3 * MAX_LINE_CHARACTERS)
    (result,) = read(f"KTAP version 1\n1..1\nok 1 {long}\n")
    assert result.verdict is PASSED and len(result.path[0]) <= MAX_LINE_CHARACTERS
    (result,) = read("KTAP version 1\n1..1\n" + f"{long}\n" * 100 + "the last words\nnot ok 1 a\n")
    assert len(result.log) <= MAX_LOG_CHARACTERS and result.log.endswith("the last words")
    results = read("KTAP version 1\n1..999999999\nok 1 a\n")
    assert len(results) == MAX_MISSING + 3
    assert outline(results)[-1] == (f"tests {MAX_MISSING + 3} to 999999999", ERROR, DID_NOT_RUN)
    deep = "".join(f"{'  ' * depth}KTAP version 1\n" for depth in range(10 * MAX_DEPTH))
    assert len(read(deep)[-1].path) <= MAX_DEPTH


def test_more_tests_than_the_limit_never_pass() -> None:
    parser = KtapParser(max_tests=3)
    results = parser.receive_data(b"KTAP version 1\n" + b"".join(b"ok %d a\n" % n for n in range(1, 6)))
    results += parser.receive_end()
    assert outline(results)[3:] == [
        ("all tests", ERROR, "there are more than 3 tests, and the others were left out")
    ]  # fmt: skip


def test_logs_have_a_limit_together_and_results_have_not() -> None:
    parser = KtapParser(max_log_characters=1000)
    text = "KTAP version 1\n1..40\n" + "".join(f"{'x' * 99}\nnot ok {n} a\n" for n in range(1, 41))
    results = parser.receive_data(text.encode()) + parser.receive_end()
    assert len(results) == 40
    assert 500 < sum(len(result.log) for result in results) <= 1000


# A name alone, or a name with subtests.
Tree = tuple[str, "list[Tree]"]
NAMES = st.text("abcxyz_", min_size=1, max_size=8)
LEAVES: st.SearchStrategy[Tree] = st.tuples(NAMES, st.just([]))
TREES: st.SearchStrategy[Tree] = st.recursive(
    LEAVES, lambda inner: st.tuples(NAMES, st.lists(inner, min_size=1, max_size=4)), max_leaves=8
)


def render(tests: list[Tree], indent: str, step: str) -> list[str]:
    """As a kernel prints it when all pass."""
    lines = [f"{indent}KTAP version 1", f"{indent}1..{len(tests)}"]
    for number, (name, subtests) in enumerate(tests, 1):
        if subtests:
            lines += render(subtests, indent + step, step)
        lines += [f"{indent}# {name}: a remark", f"{indent}ok {number} {name}"]
    return lines


def list_leaves(tests: list[Tree]) -> list[str]:
    return [
        name if not subtests else f"{name} / {leaf}"
        for name, subtests in tests
        for leaf in (list_leaves(subtests) if subtests else [""])
    ]


@given(
    st.lists(TREES, min_size=1, max_size=4),
    st.sampled_from(["  ", "    ", "\t", "# "]),
    st.sampled_from(["", "[    1.250000] ", "<6>[    1.250000][    T1] "]),
    st.data(),
)
def test_any_output_passes_as_a_whole_and_no_part_of_it_does(
    tests: list[Tree], step: str, before: str, data: st.DataObject
) -> None:
    text = "".join(f"{before}{line}\n" for line in render(tests, "", step))
    assert names(read(text)) == [(name, "passed") for name in list_leaves(tests)]
    # From the first plan to the last result's number.
    start, end = text.index("1..") + 4, text.rindex(f"ok {len(tests)}") + 3
    results = read(text[: data.draw(st.integers(start, max(start, end - 1)))])
    assert any(result.verdict is ERROR for result in results)


@given(st.lists(st.sampled_from(PIECES), max_size=60).map(b"".join), st.lists(st.integers(0, 4000), max_size=5))
def test_any_order_of_lines_is_read_alike_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    check_output(data, cuts)


@given(st.binary(max_size=400))
def test_any_bytes_are_read(data: bytes) -> None:
    check_output(data, [len(data) // 2])
