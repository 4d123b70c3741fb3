"""The marker vm as a machine: its words, the run's defaults, and one kind for each value of a list."""

from typing import Any

import pytest

from vmkit.machine.options import OPTIONS as MACHINE_OPTIONS
from vmkit.pool.pool import NOT_POOLED
from vmkit.testing.wanted import OPTIONS, MarkerError, read_marker


def test_marker_without_words_is_the_default() -> None:
    (wanted,) = read_marker((), {}, {"image": "tiny", "memory": "128M"})
    assert wanted.options == {"image": "tiny", "memory": "128M"}
    assert str(wanted) == "tiny"


def test_words_replace_the_defaults() -> None:
    (wanted,) = read_marker((), {"memory": "1G", "files": {"/a": b"b"}}, {"image": "tiny", "memory": "128M"})
    assert wanted.options == {"image": "tiny", "memory": "1G"}
    assert wanted.files == {"/a": b"b"}


def test_snapshot_has_its_own_image_and_memory_and_not_the_defaults() -> None:
    (wanted,) = read_marker((), {"snapshot": "suite"}, {"image": "tiny", "memory": "128M"})
    assert wanted.options == {"snapshot": "suite"}


def test_lists_of_images_and_kernels_make_one_kind_of_each() -> None:
    kinds = read_marker((), {"image": ["tiny", "./my.toml"], "kernel": ("a/bzImage-1", "b/bzImage-2")}, {})
    assert [str(kind) for kind in kinds] == [
        "tiny-bzImage-1",
        "tiny-bzImage-2",
        "my-bzImage-1",
        "my-bzImage-2",
    ]
    assert len({kind.digest for kind in kinds}) == 4


def test_equal_kinds_have_one_digest_whatever_their_files() -> None:
    (one,) = read_marker((), {"image": "tiny", "cpus": 2, "files": {"/a": b""}}, {})
    (other,) = read_marker((), {"cpus": 2}, {"image": "tiny"})
    assert one.digest == other.digest


@pytest.mark.parametrize(
    ("arguments", "words", "reason"),
    [
        (("tiny",), {}, "takes keywords only"),
        ((), {"imege": "tiny"}, "has no 'imege'; it has image, kernel"),
        ((), {"files": ["/a"]}, "files of the marker vm must be a dictionary"),
        ((), {"files": {"/a": 5}}, "map a path to bytes or to a file's path, not '/a' to 5"),
        ((), {"files": {5: b"a"}}, "map a path to bytes or to a file's path, not 5 to b'a'"),
        ((), {"image": []}, "the list of 'image' in the marker vm is empty"),
        ((), {"rwdisks": ["/a"]}, "has no 'rwdisks'"),
        ((), {"memory": ["128M", "1G"]}, r"'memory' of the marker vm takes one value; .*marks=pytest.mark.vm\(memory="),
    ],
)
def test_marker_that_can_be_no_machine_is_explained(arguments: Any, words: dict[str, Any], reason: str) -> None:
    with pytest.raises(MarkerError, match=reason):
        read_marker(arguments, words, {})


def test_words_are_options_of_machines_that_pools_have() -> None:
    known = {option.name for option in MACHINE_OPTIONS} | {"image"}
    assert set(OPTIONS) <= known - set(NOT_POOLED)
