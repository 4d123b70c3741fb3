"""A recipe's keyring and lock file vouch for packages whose programs run here: not before the user has said so."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmkit.errors import ConfigError, HostError, TrustError
from vmkit.image.build import build_image, fetch_packages, plan_image, update_lock_file
from vmkit.image.debian.lockfile import find_lock_path
from vmkit.image.recipe.config import ImageSpec, load_image
from vmkit.image.trust import find_untrusted

FakeSpec = Callable[..., ImageSpec]


@pytest.fixture
def untrusted(fake_spec: FakeSpec, tmp_path: Path) -> ImageSpec:
    """An image whose keyring nobody has trusted."""
    spec = fake_spec()
    (tmp_path / "state/.trusted").unlink()
    return spec


def test_keyring_of_a_recipe_needs_trust_once(untrusted: ImageSpec, cache_dir: Path) -> None:
    for build in (build_image, lambda spec: fetch_packages(spec, lambda _text, _part: None)):
        with pytest.raises(
            TrustError, match=r"my\.toml: you have not trusted the keyring .*keyring\.gpg yet"
        ) as caught:
            build(untrusted)
        assert caught.value.hint.endswith(f"vmkit build --trust {untrusted.origin}")
        assert "run on this host" in caught.value.details
    # Nothing was fetched, nothing was run; what is only looked at needs no trust.
    assert not list(cache_dir.glob("apt/*")) and not list(cache_dir.glob("packages/*"))
    assert "resolve packages" in plan_image(untrusted).render()
    build_image(untrusted, trust=True)
    # From now on it is trusted, for each build that looks for newer packages.
    build_image(untrusted, refresh=True)


def test_trust_is_for_the_content_and_not_for_the_name(untrusted: ImageSpec, tmp_path: Path, archive: Any) -> None:
    text = untrusted.origin.read_text().replace(str(archive.keyring), "mine.gpg")
    (tmp_path / "mine.gpg").write_bytes(archive.keyring.read_bytes())
    untrusted.origin.write_text(text)
    build_image(load_image(str(untrusted.origin)), trust=True)
    assert find_untrusted(load_image(str(untrusted.origin)), None) == []
    (tmp_path / "mine.gpg").write_bytes(archive.keyring.read_bytes() + b"\0")
    with pytest.raises(TrustError, match=r"mine\.gpg"):
        build_image(load_image(str(untrusted.origin)), refresh=True)


def test_image_that_is_built_already_needs_no_trust(untrusted: ImageSpec, tmp_path: Path) -> None:
    built = build_image(untrusted, trust=True)
    (tmp_path / "state/.trusted").unlink()
    again = build_image(untrusted)
    assert (again.cached, again.digest) == (True, built.digest)


def test_recipe_without_a_keyring_and_one_with_debian_s_need_no_trust(
    untrusted: ImageSpec, archive: Any, monkeypatch: pytest.MonkeyPatch, write_recipe: Callable[..., Path]
) -> None:
    assert find_untrusted(load_image("tiny"), None) == []
    # A mirror needs none: what comes from there is signed.
    other = write_recipe('extends = "tiny"\nmirror = "http://example.org/debian"\n', "other")
    assert find_untrusted(load_image(str(other)), None) == []
    monkeypatch.setattr("vmkit.image.trust.find_keyring", lambda: archive.keyring)
    assert find_untrusted(untrusted, None) == []


def test_keyring_of_an_image_in_the_image_is_asked_for_too(
    untrusted: ImageSpec, fake_spec: FakeSpec, tmp_path: Path
) -> None:
    outer = fake_spec('prebuilt = ["./my.toml"]\n', name="outer")
    with pytest.raises(TrustError, match=r"my\.toml: you have not trusted"):
        build_image(outer)
    build_image(outer, trust=True)


def test_lock_file_of_a_recipe_needs_trust(fake_spec: FakeSpec, tmp_path: Path, cache_dir: Path) -> None:
    """Its hashes stand for the archive's signature: with them a mirror could give anything."""
    spec = fake_spec()
    build_image(spec)
    path = find_lock_path(spec)
    update_lock_file(spec, path)
    # This host has made it.
    assert find_untrusted(spec, path) == []
    path.write_text(path.read_text() + "\n")
    for build in (build_image, lambda spec, **words: fetch_packages(spec, lambda _text, _part: None, **words)):
        with pytest.raises(TrustError, match=r"you have not trusted the lock file .*my\.lock yet") as caught:
            build(spec, lock_file=path)
        assert f"vmkit build --locked --trust {spec.origin}" in caught.value.hint
    build_image(spec, lock_file=path, trust=True)
    build_image(spec, lock_file=path)
    tiny = load_image("tiny")
    assert find_untrusted(tiny, find_lock_path(tiny)) == []


def test_trust_that_others_could_write_does_not_count(untrusted: ImageSpec, tmp_path: Path) -> None:
    build_image(untrusted, trust=True)
    trusted = tmp_path / "state/.trusted"
    assert trusted.stat().st_mode & 0o777 == 0o600
    trusted.chmod(0o620)
    with pytest.raises(HostError, match="other users can write"):
        build_image(untrusted, refresh=True)
    trusted.unlink()
    trusted.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError, match="other users can write"):
        build_image(untrusted, trust=True)
    assert not (tmp_path / "elsewhere").exists()


def test_user_without_a_home_is_told(untrusted: ImageSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmkit.image.trust.find_state_folder", lambda: None)
    with pytest.raises(HostError, match="no home directory to remember trust in"):
        build_image(untrusted)


def test_keyring_that_cannot_be_read_is_named(untrusted: ImageSpec, archive: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    untrusted.origin.write_text(untrusted.origin.read_text().replace(str(archive.keyring), "fifo"))
    with pytest.raises(ConfigError, match=r"cannot read the keyring .*fifo: it is a FIFO"):
        build_image(load_image(str(untrusted.origin)))
