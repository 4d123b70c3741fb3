"""`vmkit share`, `unshare` and `shares`, as far as they need no guest."""

import json
from pathlib import Path

import pytest

from tests.docs.schemas import check_form
from tests.vmkit.cli.conftest import Vmkit
from vmkit.entries.numbered import make_numbered
from vmkit.errors import MachineError
from vmkit.shares.place import SharedPlace
from vmkit.shares.registry import SHARES, LiveShare, find_share, publish, read_shares

ONE = LiveShare(1, "my", "/src", "/mnt/src", False, "fuse", 1, 0.0)
SHARES_OF_MY = [
    ONE,
    LiveShare(2, "my", "/src", "/ro", True, "fuse", 1, 0.0),
    LiveShare(3, "my", "/b", "/b", False, "fuse", 1, 0.0),
]


def test_share_of_a_missing_folder_starts_nothing(vmkit: Vmkit, recipe: str, tmp_path: Path) -> None:
    done = vmkit("up", recipe, "--share", f"{tmp_path}/none")
    assert done.status == 1
    assert f"cannot share {tmp_path}/none: it does not exist" in done.err
    assert vmkit("list", "--json").out == "[]\n"


def test_two_shares_of_one_place_start_nothing(vmkit: Vmkit, recipe: str, tmp_path: Path) -> None:
    done = vmkit("up", recipe, "--share", f"{tmp_path}:/a", "--share", f"{tmp_path}:/a/:ro")
    assert done.status != 0
    assert "two shares have the place /a" in done.err


def test_share_needs_a_machine(vmkit: Vmkit, tmp_path: Path) -> None:
    done = vmkit("share", "nobody", str(tmp_path))
    assert done.status != 0
    assert "nobody" in done.err


def test_shares_are_listed_while_they_live(vmkit: Vmkit, folders: Path) -> None:
    assert vmkit("shares").err == "no folder is shared\n"
    with make_numbered(SHARES) as entry:
        share = publish(entry, "my", SharedPlace(Path("/src"), "/mnt/src", True), "fuse")
        listed = vmkit("shares").out.splitlines()
        assert listed[1].split() == ["my", "/src", "/mnt/src", "ro", "FUSE", "over", "vsock"]
        value = json.loads(vmkit("shares", "--json").out)
        check_form("shares", value)
        assert [one["number"] for one in value] == [share.number]
    assert read_shares() == []


def test_unshare_needs_folders_or_all(vmkit: Vmkit) -> None:
    for words in ([], ["/a", "--all"]):
        assert "give the folders, or --all" in vmkit("unshare", "my", *words).err
    assert "no machine named 'my' is running" in vmkit("unshare", "my", "/a").err
    assert vmkit("unshare", "my", "--all").status == 0


@pytest.mark.parametrize(("text", "number"), [("/mnt/src", 1), ("/src:/ro", 2), ("/ro", 2), ("/b", 3), ("/b:/b", 3)])
def test_share_is_found_by_either_side(text: str, number: int) -> None:
    assert find_share(SHARES_OF_MY, "my", text).number == number


@pytest.mark.parametrize(
    ("text", "reason"), [("/src", "my has /src 2 times"), ("/c", "my has no share /c"), ("/b:/c", "no share /b:/c")]
)
def test_share_that_is_not_clear_is_explained(text: str, reason: str) -> None:
    with pytest.raises(MachineError, match=reason):
        find_share(SHARES_OF_MY, "my", text)
