"""apt in private state: only what a known key has signed, and every failure with its cause."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.vmkit.image.conftest import make_module
from vmkit.errors import BuildError, ConfigError, HostError
from vmkit.image.build import build_image
from vmkit.image.cache import open_cache
from vmkit.image.debian.apt import UntrustedError
from vmkit.image.debian.packages import Lock, fetch, make_request, read_lock, resolve
from vmkit.image.recipe.config import ImageSpec, load_image

FakeSpec = Callable[..., ImageSpec]


def _resolve(cache_dir: Path, spec: ImageSpec) -> Lock:
    with open_cache(cache_dir) as cache:
        return resolve(cache, make_request(spec), lambda _text, _part: None)


def test_request_resolves_to_exact_packages(cache_dir: Path, fake_spec: FakeSpec) -> None:
    spec = fake_spec('packages = ["tool"]\n')
    lock = _resolve(cache_dir, spec)
    assert [record.name for record in lock.records] == [
        "busybox-static",
        "libtool1",
        "linux-image-6.12.1-cloud-amd64",
        "tool",
    ]
    assert (lock.suite, lock.kernel, lock.closure) == ("stable", "linux-image-6.12.1-cloud-amd64", ("libtool1", "tool"))
    with open_cache(cache_dir) as cache:
        assert read_lock(cache, make_request(spec)) == lock


def test_packages_are_fetched_once(cache_dir: Path, fake_spec: FakeSpec) -> None:
    spec = fake_spec()
    lock = _resolve(cache_dir, spec)
    told: list[str] = []
    with open_cache(cache_dir) as cache:
        first = fetch(cache, make_request(spec), lock, lambda text, _part: told.append(text))
        second = fetch(cache, make_request(spec), lock, lambda text, _part: told.append(text))
    assert first == second
    assert len(told) == 1
    assert all(path.is_file() for path in first.values())


def test_package_that_is_used_is_as_of_now(cache_dir: Path, fake_spec: FakeSpec) -> None:
    """Else `vmkit prune` goes by the time that the archive gave it."""
    spec = fake_spec()
    lock = _resolve(cache_dir, spec)
    with open_cache(cache_dir) as cache:
        paths = fetch(cache, make_request(spec), lock, lambda _text, _part: None)
        for path in paths.values():
            os.utime(path, (1, 1))
        fetch(cache, make_request(spec), lock, lambda _text, _part: None)
    assert all(path.stat().st_mtime > 1 for path in paths.values())


def test_package_that_was_changed_in_the_cache_is_fetched_again(cache_dir: Path, fake_spec: FakeSpec) -> None:
    """One of the same size, too."""
    spec = fake_spec()
    lock = _resolve(cache_dir, spec)
    told: list[str] = []
    with open_cache(cache_dir) as cache:
        paths = fetch(cache, make_request(spec), lock, lambda _text, _part: None)
        changes: tuple[Callable[[bytes], bytes], ...] = (
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            lambda data: data[:-1],
        )
        for change in changes:
            whole = paths["busybox-static"].read_bytes()
            paths["busybox-static"].write_bytes(change(whole))
            assert fetch(cache, make_request(spec), lock, lambda text, _part: told.append(text)) == paths
            assert paths["busybox-static"].read_bytes() == whole
    assert [text.split(",")[0] for text in told] == ["fetching 1 packages"] * 2


def test_kernel_may_come_from_another_suite(
    cache_dir: Path, fake_spec: FakeSpec, archive: Any, tmp_path: Path, make_deb: Callable[..., Path]
) -> None:
    both = archive.copy(tmp_path / "both")
    kernel = "linux-image-6.1.0-cloud-amd64"
    files = {
        "boot/vmlinuz-6.1.0-cloud-amd64": b"the older kernel",
        "lib/modules/6.1.0-cloud-amd64/kernel/second.ko": make_module("second"),
    }
    both.add_suite(
        "older",
        make_deb("linux-image-cloud-amd64", fields=f"Depends: {kernel}\n", version="0.9"),
        make_deb(kernel, files, version="0.9"),
    )
    built = build_image(fake_spec('kernel_suite = "older"\n', at=both))
    assert built.kernel.read_bytes() == b"the older kernel"
    manifest = json.loads(built.manifest.read_text())
    suites = {entry["name"]: entry["suite"] for entry in manifest["packages"]}
    assert suites == {"busybox-static": "stable", kernel: "older"}
    assert build_image(fake_spec('kernel_suite = "stable"\n', at=both)).kernel.read_bytes() == b"not a real kernel"
    with pytest.raises(BuildError, match="has no suite 'oldest'"):
        build_image(fake_spec('kernel_suite = "oldest"\n', at=both))


def test_lock_is_found_whatever_the_host(cache_dir: Path, fake_spec: FakeSpec) -> None:
    spec = replace(fake_spec(), suite="auto", mirror="")
    request = make_request(spec)
    assert replace(request, suites=("other",), host_mirror="http://example.org/debian").key() == request.key()
    assert replace(request, kernel_suite="older").key() != request.key()


def test_damaged_lock_is_made_again(cache_dir: Path, fake_spec: FakeSpec) -> None:
    spec = fake_spec()
    _resolve(cache_dir, spec)
    with open_cache(cache_dir) as cache:
        path = cache.lock_path(make_request(spec).key())
        for damage in (b"", b"{}", b"[1]", json.dumps({"records": [{}]}).encode()):
            path.write_bytes(damage)
            assert read_lock(cache, make_request(spec)) is None


def test_unknown_package_names_the_recipe_s_line(cache_dir: Path, fake_spec: FakeSpec) -> None:
    with pytest.raises(ConfigError, match=r"my\.toml:3: there is no package 'tol' in stable \(main\)"):
        build_image(fake_spec('packages = ["tol"]\n'))


def test_unknown_package_in_extract_is_named(
    cache_dir: Path, fake_spec: FakeSpec, write_recipe: Callable[..., Path]
) -> None:
    fake_spec(name="base")
    spec = load_image(str(write_recipe('extends = "./base.toml"\n[extract]\ngone = ["x"]\n')))
    with pytest.raises(ConfigError, match=r"my\.toml:3: there is no package 'gone'"):
        build_image(spec)


def test_strange_signature_is_refused(cache_dir: Path, fake_spec: FakeSpec, archive: Any) -> None:
    stranger = type(archive)(archive.root, archive.stranger_keyring, archive.keyring, archive.sign)
    with pytest.raises(UntrustedError, match=r"is not signed by a key of .*stranger\.gpg"):
        build_image(fake_spec(at=stranger))
    assert not list((cache_dir / "resolved").glob("*"))


def test_missing_signature_is_refused(cache_dir: Path, fake_spec: FakeSpec, archive: Any, tmp_path: Path) -> None:
    unsigned = archive.copy(tmp_path / "unsigned")
    (unsigned.root / "dists/stable/InRelease").unlink()
    with pytest.raises(UntrustedError):
        build_image(fake_spec(at=unsigned))


def test_changed_index_is_refused(cache_dir: Path, fake_spec: FakeSpec, archive: Any, tmp_path: Path) -> None:
    changed = archive.copy(tmp_path / "changed")
    packages = changed.root / "dists/stable/main/binary-amd64/Packages"
    packages.write_bytes(packages.read_bytes().replace(b"SHA256: ", b"SHA256: 0", 1)[:-1])
    with pytest.raises(BuildError, match="cannot fetch the package index"):
        build_image(fake_spec(at=changed))


def test_changed_package_is_refused(cache_dir: Path, fake_spec: FakeSpec, archive: Any, tmp_path: Path) -> None:
    changed = archive.copy(tmp_path / "changed")
    deb = changed.root / "pool/busybox-static_1.0-1_amd64.deb"
    deb.write_bytes(deb.read_bytes()[:-1] + b"x")
    with pytest.raises(BuildError, match=r"cannot fetch packages|apt fetched another package"):
        build_image(fake_spec(at=changed))
    assert not [path for path in (cache_dir / "packages").glob("*") if path.stat().st_size == deb.stat().st_size]


@pytest.mark.parametrize("damage", ["unsigned", "missing"])
def test_host_s_suite_is_used_where_the_preferred_one_cannot_be(
    cache_dir: Path, fake_spec: FakeSpec, archive: Any, tmp_path: Path, damage: str
) -> None:
    copy = archive.copy(tmp_path / "copy")
    if damage == "unsigned":
        shutil.copytree(copy.root / "dists/stable", copy.root / "dists/preferred")
        (copy.root / "dists/preferred/InRelease").unlink()
    request = replace(make_request(fake_spec(at=copy)), suites=("preferred", "stable"))
    told: list[str] = []
    with open_cache(cache_dir) as cache:
        lock = resolve(cache, request, lambda text, _part: told.append(text))
    assert lock.suite == "stable"
    assert [text for text in told if "trying the host's own suite" in text]


def test_missing_suite_is_told(cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path, archive: Any) -> None:
    empty = type(archive)(tmp_path / "empty", archive.keyring, archive.keyring, archive.sign)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BuildError, match=r"has no suite 'stable'|cannot fetch the package index"):
        build_image(fake_spec(at=empty))


def test_no_network_with_an_empty_cache_is_told(
    cache_dir: Path, write_recipe: Callable[..., Path], archive: Any
) -> None:
    text = f'suite = "stable"\nmirror = "http://127.0.0.1:9/debian"\nkeyring = "{archive.keyring}"\nkernel = "linux"\n'
    with pytest.raises(BuildError, match=r"cannot fetch the package index of stable \(main\) at http://127") as caught:
        build_image(load_image(str(write_recipe(text))), trust=True)
    assert "VMKIT_MIRROR" in caught.value.hint


def test_no_network_with_a_full_cache_does_not_matter(
    cache_dir: Path, fake_spec: FakeSpec, archive: Any, tmp_path: Path
) -> None:
    moving = archive.copy(tmp_path / "moving")
    build_image(fake_spec(at=moving))
    moving.root.rename(tmp_path / "gone")
    # Another recipe over the same packages: something to build, nothing to fetch.
    again = build_image(fake_spec('kernel_args = ["changed"]\n', at=moving))
    assert not again.cached


def test_refresh_takes_newer_versions(
    cache_dir: Path, fake_spec: FakeSpec, archive: Any, tmp_path: Path, make_deb: Any
) -> None:
    growing = archive.copy(tmp_path / "growing")
    spec = fake_spec(at=growing)
    old = build_image(spec)
    growing.add(
        make_deb("busybox-static", {"bin/busybox": b"#!/bin/sh\n"}, version="2.0-1", executable=("bin/busybox",))
    )
    assert build_image(spec).digest == old.digest
    new = build_image(spec, refresh=True)
    assert (new.cached, new.digest == old.digest) == (False, False)
    versions = {entry["name"]: entry["version"] for entry in json.loads(new.manifest.read_text())["packages"]}
    assert versions["busybox-static"] == "2.0-1"
    assert build_image(spec) == type(new)(**{n: getattr(new, n) for n in new.__slots__} | {"cached": True})


def test_packages_that_are_gone_from_the_mirror_ask_for_an_update(
    cache_dir: Path, fake_spec: FakeSpec, archive: Any, tmp_path: Path
) -> None:
    shrinking = archive.copy(tmp_path / "shrinking")
    spec = fake_spec(at=shrinking)
    _resolve(cache_dir, spec)
    (shrinking.root / "pool/busybox-static_1.0-1_amd64.deb").unlink()
    with pytest.raises(BuildError, match="cannot fetch packages") as caught:
        build_image(spec)
    assert "vmkit build --update" in caught.value.hint


def test_host_s_apt_state_is_not_touched(cache_dir: Path, fake_spec: FakeSpec) -> None:
    def listing() -> bytes:
        return subprocess.run(
            ["ls", "-laR", "--full-time", "/var/lib/apt", "/var/cache/apt"], capture_output=True, check=False
        ).stdout

    before = listing()
    build_image(fake_spec())
    assert listing() == before


def test_missing_apt_is_told(
    cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = fake_spec()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="cannot find the program 'apt-get'"):
        build_image(spec)
