"""A fixed number of fuzz cases of the SFTP client's parser, with every run of the tests."""

from tests.fuzz.fuzz_sftp_client import run_case
from tests.fuzz.seeded import count_good


def test_replies_of_any_form_are_taken_or_refused() -> None:
    assert 300 < count_good(run_case, 3000, 1) < 2700
