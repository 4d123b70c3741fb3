"""Lock files: exactly these packages, whatever the archive has since; what is nowhere to be had is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmkit.errors import BuildError, ConfigError
from vmkit.image.build import build_image, find_drift, update_lock_file
from vmkit.image.debian.lockfile import find_lock_path, read_lock_file
from vmkit.image.debian.packages import make_request
from vmkit.image.recipe.config import ImageSpec, list_images

FakeSpec = Callable[..., ImageSpec]
OLD = "pool/busybox-static_1.0-1_amd64.deb"


@pytest.fixture
def moved(
    cache_dir: Path, fake_spec: FakeSpec, archive: Any, tmp_path: Path, make_deb: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[ImageSpec, Path, Any]:
    """A recipe with a lock, an empty cache, and an archive that has a newer busybox since."""
    growing = archive.copy(tmp_path / "growing")
    spec = fake_spec(at=growing)
    build_image(spec)
    path = find_lock_path(spec)
    update_lock_file(spec, path)
    newer = make_deb("busybox-static", {"bin/busybox": b"#!/bin/sh\n"}, version="2.0-1", executable=("bin/busybox",))
    growing.add(newer)
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(tmp_path / "another cache"))
    return spec, path, growing


def versions(built: Any) -> dict[str, str]:
    return {package["name"]: package["version"] for package in json.loads(built.manifest.read_text())["packages"]}


def test_lock_names_every_package_with_version_and_hash(moved: tuple[ImageSpec, Path, Any]) -> None:
    records = json.loads(moved[1].read_text())["records"]
    assert {record["name"] for record in records} == {"busybox-static", "linux-image-6.12.1-cloud-amd64"}
    assert all(record["version"] and len(record["sha256"]) == 64 for record in records)


def test_locked_build_takes_what_the_index_has_forgotten(moved: tuple[ImageSpec, Path, Any]) -> None:
    spec, path, _ = moved
    built = build_image(spec, lock_file=path)
    assert versions(built)["busybox-static"] == "1.0-1"
    # And so does every later build, until it is asked to look for newer ones.
    assert build_image(spec).digest == built.digest
    assert versions(build_image(spec, refresh=True))["busybox-static"] == "2.0-1"


def test_locked_build_takes_the_rest_from_a_snapshot(
    moved: tuple[ImageSpec, Path, Any], archive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, path, growing = moved
    (growing.root / OLD).unlink()
    monkeypatch.setenv("VMKIT_SNAPSHOT", archive.mirror)
    assert versions(build_image(spec, lock_file=path))["busybox-static"] == "1.0-1"


def test_what_is_gone_is_named_and_nothing_changed(moved: tuple[ImageSpec, Path, Any]) -> None:
    spec, path, growing = moved
    (growing.root / OLD).unlink()
    with pytest.raises(BuildError, match="1 packages of the lock are gone") as caught:
        build_image(spec, lock_file=path)
    assert caught.value.details == "busybox-static 1.0-1"
    assert "VMKIT_SNAPSHOT=" in caught.value.hint and "--update-lock" in caught.value.hint
    # The next unlocked build is not held to a lock that could not be kept.
    assert versions(build_image(spec))["busybox-static"] == "2.0-1"


def test_package_of_another_content_is_gone(moved: tuple[ImageSpec, Path, Any]) -> None:
    spec, path, growing = moved
    (growing.root / OLD).write_bytes(b"something else")
    with pytest.raises(BuildError, match="1 packages of the lock are gone"):
        build_image(spec, lock_file=path)


def test_drift_is_told_and_a_new_lock_ends_it(moved: tuple[ImageSpec, Path, Any]) -> None:
    spec, path, _ = moved
    build_image(spec)
    assert find_drift(spec, path) == ["busybox-static: 1.0-1 -> 2.0-1"]
    assert update_lock_file(spec, path) == ["busybox-static: 1.0-1 -> 2.0-1"]
    assert find_drift(spec, path) == []


def test_lock_of_another_question_is_refused(moved: tuple[ImageSpec, Path, Any], fake_spec: FakeSpec) -> None:
    with pytest.raises(ConfigError, match="asks for other packages than its lock"):
        build_image(fake_spec('packages = ["tool"]\n', at=moved[2]), lock_file=moved[1])


def test_missing_lock_says_how_to_make_one(cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no lock") as caught:
        build_image(fake_spec(), lock_file=tmp_path / "none.lock")
    assert "vmkit build --update-lock" in caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        lambda lock: lock.pop("records"),
        lambda lock: lock.update(schema=99),
        lambda lock: lock.update(records=3),
        lambda lock: lock.update(closure="abc"),
        lambda lock: lock["records"][0].pop("sha256"),
        lambda lock: lock["records"][0].update(sha256="../../etc/passwd"),
        lambda lock: lock["records"][0].update(size_bytes="many"),
        lambda lock: lock["records"][0].update(pool_path="../../../etc/passwd"),
        lambda lock: lock["records"][0].update(pool_path="/etc/passwd"),
        lambda lock: lock["records"][0].update(pool_path="pool/a b"),
        lambda lock: lock["records"][0].update(strange=1),
        # Parts of paths, and words of commands that run as root.
        lambda lock: lock["records"][0].update(name="../x"),
        lambda lock: lock["records"][0].update(version="1 --option"),
        lambda lock: lock.update(suite="--customize-hook=id"),
        lambda lock: lock.update(kernel="../x"),
        lambda lock: lock.update(python="3.13/../x"),
        lambda lock: lock.update(closure=["./x.deb"]),
        lambda lock: lock.update(closure=[1]),
    ],
)
def test_damaged_lock_is_refused(moved: tuple[ImageSpec, Path, Any], change: Callable[[Any], object]) -> None:
    lock = json.loads(moved[1].read_text())
    change(lock)
    moved[1].write_text(json.dumps(lock))
    with pytest.raises(ConfigError, match="lock") as caught:
        read_lock_file(moved[1])
    assert "--update-lock" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b'{"schema": 1}'])
def test_file_that_is_no_lock(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.lock").write_bytes(content)
    with pytest.raises(ConfigError, match="is damaged"):
        read_lock_file(tmp_path / "x.lock")


def test_snapshot_that_is_no_url(moved: tuple[ImageSpec, Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMKIT_SNAPSHOT", "yesterday")
    with pytest.raises(ConfigError, match="VMKIT_SNAPSHOT='yesterday'"):
        build_image(moved[0], lock_file=moved[1])


def test_shipped_locks_answer_their_recipes() -> None:
    locked = {spec.name: spec for spec in list_images() if find_lock_path(spec).exists()}
    assert {"tiny", "debian"} <= set(locked)
    for spec in locked.values():
        lock = read_lock_file(find_lock_path(spec), make_request(spec))
        assert lock.find(lock.kernel).sha256
