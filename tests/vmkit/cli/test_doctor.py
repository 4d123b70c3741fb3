"""`vmkit doctor` and the verbs about images: how findings look, and the status that says whether `up` can work."""

import contextlib
import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vmkit.cli.conftest import Vmkit


def test_doctor_tells_every_finding_and_the_verdict(vmkit: Vmkit, fake_qemu: Path) -> None:
    done = vmkit("doctor")
    assert "qemu" in done.out
    assert "fallback  vhost-vsock" in done.out
    assert done.status == (0 if done.out.endswith("vmkit up will work here\n") else 1)


def test_doctor_in_json_is_for_programs(vmkit: Vmkit, fake_qemu: Path) -> None:
    done = vmkit("doctor", "--json")
    answer = json.loads(done.out)
    assert set(answer) == {"works", "checks"}
    assert all(set(check) == {"name", "level", "text", "hint"} for check in answer["checks"])
    assert {check["level"] for check in answer["checks"]} <= {"ok", "fallback", "broken"}
    assert answer["works"] == all(check["level"] != "broken" for check in answer["checks"])
    assert done.status == (0 if answer["works"] else 1)
    assert done.err == ""


def test_doctor_without_qemu_ends_with_1_and_says_what_to_install(
    vmkit: Vmkit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = vmkit("doctor")
    assert done.status == 1
    assert "BROKEN    qemu" in done.out
    assert "sudo apt-get install qemu-system-x86" in done.out
    assert done.out.endswith("vmkit up cannot work here yet\n")


def test_images_are_listed_with_their_state(vmkit: Vmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(tmp_path / "cache"))
    assert vmkit("images").out.splitlines()[0].split() == ["IMAGE", "BUILT", "DESCRIPTION"]
    tiny = next(image for image in json.loads(vmkit("images", "--json").out) if image["name"] == "tiny")
    assert set(tiny) == {"name", "description", "built", "file"}
    assert tiny["built"] is False


def test_build_of_a_built_image_says_where_it_is(vmkit: Vmkit, recipe: str) -> None:
    done = vmkit("build", recipe)
    assert done.status == 0
    assert done.out.startswith("my is in the cache: ")
    answer = json.loads(vmkit("build", recipe, "--json").out)
    assert answer["cached"] is True
    assert os.path.isfile(answer["kernel"])  # noqa: PTH113


@pytest.fixture
def untrusted(vmkit: Vmkit, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe with a keyring that nobody has trusted, and no image of it."""
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "mine.toml"
    path.write_text(Path(recipe).read_text())
    return str(path)


def test_build_with_a_keyring_needs_trust_and_names_the_option(vmkit: Vmkit, untrusted: str) -> None:
    for verb in (("build", untrusted), ("up", untrusted, "--accel", "tcg", "--backend", "user")):
        done = vmkit(*verb)
        assert done.status == 64
        assert "mine.toml: you have not trusted the keyring" in done.err
        assert f"vmkit build --trust {untrusted}" in done.err
    done = vmkit("build", "--trust", untrusted, "-q")
    assert done.out.startswith("mine built in "), done.err
    assert vmkit("build", "--update", untrusted, "-q").status == 0


@pytest.mark.parametrize(("answer", "status"), [(b"n\n", 64), (b"\n", 64), (b"y\n", 0)])
def test_build_at_a_terminal_asks_for_trust(untrusted: str, folders: Path, answer: bytes, status: int) -> None:
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "vmkit", "build", untrusted]
    with subprocess.Popen(argv, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        while b"[y/N]" not in seen:
            assert select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 65536)
        assert b"run on this host" in seen
        assert b"SHA-256" in seen
        os.write(ours, answer)
        # A pseudo-terminal that nobody reads stops its writer.
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                seen += data
        out = process.communicate(timeout=60)[0]
    os.close(ours)
    assert process.returncode == status, seen
    assert out.startswith(b"mine built in ") == (status == 0)


def test_build_dry_run_prints_the_plan(vmkit: Vmkit, recipe: str) -> None:
    done = vmkit("build", recipe, "--dry-run")
    assert done.status == 0
    assert "digest " in done.out


def test_build_of_an_unknown_image_is_told(vmkit: Vmkit) -> None:
    done = vmkit("build", "nonsense")
    assert done.status == 64
    assert done.err.startswith("vmkit: ")


@pytest.mark.parametrize(("verb", "status"), [("doctor", 1), ("images", 1), ("build", 1)])
def test_user_without_a_home_is_told(
    vmkit: Vmkit, fake_qemu: Path, monkeypatch: pytest.MonkeyPatch, verb: str, status: int
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "VMKIT_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    done = vmkit(verb)
    assert done.status == status
    assert "there is no home directory to keep images in" in done.out + done.err
    assert "VMKIT_CACHE_DIR" in done.out + done.err
    assert "internal error" not in done.err
