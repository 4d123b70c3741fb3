"""JUnit's XML: it is valid and counts right, whatever the texts are."""

from xml.etree import ElementTree as Xml

from hypothesis import given
from hypothesis import strategies as st

from vmkit.junit import Case, CaseVerdict, render_junit

# Surrogates are bytes of a path that are no UTF-8.
TEXTS = st.text(st.characters(exclude_categories=()), max_size=40)
CASES = st.builds(Case, TEXTS, TEXTS, st.sampled_from(CaseVerdict), TEXTS, TEXTS, st.none() | st.floats(0, 1e6))


def test_cases_have_what_a_ci_system_reads() -> None:
    cases = [
        Case("a.b", "one", CaseVerdict.PASSED, seconds=1.5),
        Case("a.b", 't"wo', CaseVerdict.FAILED, "status <3>", "text & more\n"),
        Case("a", "three", CaseVerdict.ERROR, "did not run"),
        Case("a", "four", CaseVerdict.SKIPPED),
        Case("a", "five", CaseVerdict.PASSED, "", "what it said"),
    ]
    root = Xml.fromstring(render_junit("suite", cases))
    suite = root[0]
    assert (root.tag, suite.tag, suite.attrib) == (
        "testsuites",
        "testsuite",
        {"name": "suite", "tests": "5", "failures": "1", "errors": "1", "skipped": "1"},
    )
    assert suite[0].attrib == {"classname": "a.b", "name": "one", "time": "1.500"} and len(suite[0]) == 0
    assert suite[1].get("name") == 't"wo' and suite[1].get("time") is None
    assert [(case[0].tag, case[0].get("message"), case[0].text) for case in suite[1:]] == [
        ("failure", "status <3>", "text & more\n"),
        ("error", "did not run", None),
        ("skipped", "", None),
        ("system-out", None, "what it said"),
    ]


@given(TEXTS, st.lists(CASES, max_size=5))
def test_report_is_valid_for_any_text(name: str, cases: list[Case]) -> None:
    suite = Xml.fromstring(render_junit(name, cases))[0]
    assert [case.get("name") is not None for case in suite] == [True] * len(cases)
    assert suite.get("tests") == str(len(cases))
