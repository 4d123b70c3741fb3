"""A fixed number of fuzz cases of the rings of a share whose virtiofsd has ended, with every run of the tests."""

from tests.fuzz.fuzz_share_rings import run_seeded
from tests.fuzz.seeded import count_good


def test_any_ring_is_survived() -> None:
    assert count_good(run_seeded, 2000, 0) > 20
