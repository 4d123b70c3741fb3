"""Which suite, mirror and keyring a host suggests."""

from pathlib import Path

import pytest

from vmkit.errors import ConfigError, HostError
from vmkit.image.debian.origin import PUBLIC_MIRROR, choose_mirror, choose_suites, find_keyring, parse_stanza


def _host(tmp_path: Path, release: str, files: dict[str, str]) -> Path:
    (tmp_path / "etc/apt/sources.list.d").mkdir(parents=True)
    (tmp_path / "etc/os-release").write_text(release)
    for name, text in files.items():
        (tmp_path / "etc/apt" / name).write_text(text)
    return tmp_path


DEBIAN = 'ID=debian\nVERSION_CODENAME="bookworm"\n'
DEB822 = """Types: deb
# a comment
URIs: https://mirror.example/security
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: https://disabled.example/debian
Suites: bookworm
Components: main

Types: deb deb-src
URIs: https://mirror.example/debian/
Suites: bookworm bookworm-updates
Components: main
 contrib
"""


def test_mirror_is_the_host_s_own(tmp_path: Path) -> None:
    root = _host(tmp_path, DEBIAN, {"sources.list.d/debian.sources": DEB822})
    assert choose_mirror("", root, {}) == "https://mirror.example/debian"


def test_mirror_is_read_from_one_line_sources(tmp_path: Path) -> None:
    text = "deb [arch=amd64] http://vendor.example/debian cloud main\ndeb [x=y] http://m.example/debian bookworm main\n"
    assert choose_mirror("", _host(tmp_path, DEBIAN, {"sources.list": text}), {}) == "http://m.example/debian"


def test_mirror_named_by_the_recipe_or_environment_comes_first(tmp_path: Path) -> None:
    root = _host(tmp_path, DEBIAN, {"sources.list.d/debian.sources": DEB822})
    assert (
        choose_mirror("http://recipe.example/debian", root, {"VMKIT_MIRROR": "http://e"})
        == "http://recipe.example/debian"
    )
    assert choose_mirror("", root, {"VMKIT_MIRROR": "http://e.example/debian/"}) == "http://e.example/debian"


def test_mirror_of_another_distribution_is_the_public_one(tmp_path: Path) -> None:
    root = _host(
        tmp_path, "ID=ubuntu\nVERSION_CODENAME=noble\n", {"sources.list": "deb http://u.example/debian noble main\n"}
    )
    assert choose_mirror("", root, {}) == PUBLIC_MIRROR
    assert choose_mirror("", tmp_path / "nothing", {}) == PUBLIC_MIRROR


def test_mirror_variable_must_be_a_url(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="VMKIT_MIRROR='debian'"):
        choose_mirror("", tmp_path, {"VMKIT_MIRROR": "debian"})


def test_suites_fall_back_to_the_host_s(tmp_path: Path) -> None:
    assert choose_suites("sid", tmp_path) == ("sid",)
    assert choose_suites("auto", tmp_path) == ("trixie",)
    assert choose_suites("auto", _host(tmp_path, DEBIAN, {})) == ("trixie", "bookworm")


def test_keyring_is_found_or_asked_for(tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        find_keyring(tmp_path)
    assert "debian-archive-keyring" in caught.value.hint
    (tmp_path / "debian-archive-keyring.gpg").touch()
    assert find_keyring(tmp_path).name == "debian-archive-keyring.gpg"


def test_stanza_joins_continuation_lines() -> None:
    assert parse_stanza("A: 1\n# no\nB: 2\n 3\n") == {"a": "1", "b": "2\n3"}
