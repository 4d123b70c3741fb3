"""A fixed number of fuzz cases of failed services, with every run of the tests."""

from tests.fuzz.fuzz_units import run_seeded
from tests.fuzz.seeded import count_good


def test_any_word_about_failed_services_is_survived() -> None:
    assert count_good(run_seeded, 1000, 0) > 200
