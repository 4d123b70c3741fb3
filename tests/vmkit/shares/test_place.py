"""HOST[:GUEST][:ro], as people write it."""

from pathlib import Path

import pytest

from vmkit.errors import ConfigError, HostError
from vmkit.shares.place import SharedPlace, check_folder, make_place, parse_place


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("/src/app", SharedPlace(Path("/src/app"), "/mnt/app")),
        ("/src/app:ro", SharedPlace(Path("/src/app"), "/mnt/app", True)),
        ("/src/app:/work", SharedPlace(Path("/src/app"), "/work")),
        ("/src/app:/work:ro", SharedPlace(Path("/src/app"), "/work", True)),
        ("/src/app:/work:rw", SharedPlace(Path("/src/app"), "/work")),
        ("/src/app/:/a//b/./c/", SharedPlace(Path("/src/app"), "/a/b/c")),
        ("/:/host:ro", SharedPlace(Path("/"), "/host", True)),
    ],
)
def test_share_is_read(text: str, place: SharedPlace) -> None:
    assert parse_place(text) == place
    assert parse_place(place.render()) == place


def test_present_folder_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "app").mkdir()
    monkeypatch.chdir(tmp_path / "app")
    assert parse_place(".") == SharedPlace(tmp_path / "app", "/mnt/app")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no folder"),
        (":/work", "names no folder"),
        ("/", "needs a place in the guest"),
        ("/src:work", "must be an absolute path"),
        ("/src:/", "must be an absolute path"),
        ("/src:/a/../b", "must be an absolute path"),
        ("/src:/a:/b", "has more colons"),
        ("/src:/a:ro:ro", "has more colons"),
        ("/src:/a:rx", "'/src:/a:rx' ends with 'rx', and a share's mode is ro or rw"),
        ("/src:/a:b:ro", "has more colons"),
        ("~no such user/src", "no home folder for '~no such user/src'"),
    ],
)
def test_wrong_share_is_explained(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_place(text)


def test_place_is_made_of_its_parts() -> None:
    """A colon is a letter then."""
    assert make_place("/a:b") == SharedPlace(Path("/a:b"), "/mnt/a:b")
    assert make_place("/a", "/b//c/", read_only=True) == SharedPlace(Path("/a"), "/b/c", True)
    with pytest.raises(ConfigError, match="'/' needs a place in the guest"):
        make_place("/")
    with pytest.raises(ConfigError, match="must be an absolute path"):
        make_place("/a", "b")


def test_folder_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="is not a directory"):
        check_folder(SharedPlace(tmp_path / "file", "/mnt/x"))
    with pytest.raises(HostError, match="does not exist"):
        check_folder(SharedPlace(tmp_path / "none", "/mnt/x"))


def test_links_in_a_circle_are_explained(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(HostError, match="Too many levels of symbolic links"):
        check_folder(parse_place(str(tmp_path / "one")))
