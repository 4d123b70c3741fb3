"""The key of a snapshot: one for each set of facts, and a difference in words."""

import pytest

from vmkit.snapshots.key import WORDS, describe_difference, make_key

FACTS = {
    "schema": 1,
    "vmkit": "0.1.0",
    "image": "0" * 64,
    "qemu": ["/usr/bin/qemu", 100, 5, "7.2.22"],
    "argv": ["qemu", "-m", "256M"],
    "accelerator": "tcg",
    "processor": {},
    "files": [["/k", 1, 2]],
}


def test_key_does_not_depend_on_order() -> None:
    assert make_key(FACTS) == make_key(dict(reversed(FACTS.items())))
    assert describe_difference(FACTS, dict(reversed(FACTS.items()))) == ""


@pytest.mark.parametrize("name", list(FACTS))
def test_every_fact_makes_another_key_and_has_a_word(name: str) -> None:
    for other in ({**FACTS, name: "other"}, {key: value for key, value in FACTS.items() if key != name}):
        assert make_key(other) != make_key(FACTS)
        assert describe_difference(FACTS, other) == WORDS[name]


def test_differences_are_named_in_one_order() -> None:
    assert describe_difference(FACTS, {**FACTS, "files": [], "qemu": []}) == "QEMU, a kernel or a disk"
    assert set(WORDS) == set(FACTS)
