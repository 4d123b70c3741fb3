"""Which virtiofsd is used: a script on PATH that prints a help plays it, and another one plays unshare."""

import resource
import subprocess
from pathlib import Path

import pytest

from vmkit.machine import virtiofsd
from vmkit.machine.virtiofsd import (
    MAX_OPEN_FILES,
    NEEDED_OPTIONS,
    OWN_FILES,
    find_limit,
    find_sharing_virtiofsd,
    find_virtiofsd,
    has_few_entries,
    is_host_root,
    plan_view,
)

HELP = f"echo {' '.join(NEEDED_OPTIONS)}"


def install(patch: pytest.MonkeyPatch, folder: Path, help_script: str = HELP, trial: str = "exit 0") -> str:
    """Puts both programs before all others."""
    for name, script in ((virtiofsd.NAME, help_script), ("unshare", trial)):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    patch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return str(folder / virtiofsd.NAME)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five entries."""
    path = tmp_path / "root"
    (path / "etc/more").mkdir(parents=True)
    for name in ("a", "b"):
        (path / "etc" / name).touch()
    (path / "etc/loop").symlink_to("..")
    return path


def test_program_that_fits_is_used(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = install(monkeypatch, tmp_path)
    found = find_virtiofsd(root, 256)
    assert (found.program, found.open_files, found.trouble) == (program, find_limit(), "")


@pytest.mark.parametrize(
    ("help_script", "trial", "said"),
    [
        # As the C program of QEMU 7.2, which has no such options.
        ("echo '-o source=PATH'", "exit 0", "cannot serve a folder that the guest only reads"),
        ("exit 1", "exit 0", "does not run"),
        (HELP, "echo 'unshare failed: Operation not permitted' >&2; exit 1", "no namespaces for its sandbox"),
    ],
)
def test_program_that_does_not_fit_says_why(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, help_script: str, trial: str, said: str
) -> None:
    install(monkeypatch, tmp_path, help_script, trial)
    found = find_virtiofsd(root, 256)
    assert found.program == ""
    assert said in found.trouble


def test_root_of_the_host_is_served_where_it_can_be_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial for it is that of the view. A share, which the guest writes, cannot have it."""
    if subprocess.run(plan_view(tmp_path, ["true"]), capture_output=True, check=False).returncode:
        pytest.skip("this host gives no mount namespace")
    monkeypatch.setattr(virtiofsd, "find_limit", lambda: MAX_OPEN_FILES)
    program = install(monkeypatch, tmp_path)
    (tmp_path / "link").symlink_to("/")
    for path in (Path("/"), Path("//"), tmp_path / "link"):
        assert is_host_root(path)
        assert find_virtiofsd(path, 256).program == program
        assert find_sharing_virtiofsd(path, 256).trouble == "virtiofsd cannot make its sandbox of / itself"
    # A user's limit of old: nothing is counted then.
    with monkeypatch.context() as patch:
        patch.setattr(virtiofsd, "find_limit", lambda: 1024)
        said = find_virtiofsd(Path("/"), 256).trouble
        assert said == "virtiofsd may open 1024 files, and a guest with 256 MiB can remember 245760"
    # The trial is made where / is at a folder.
    install(monkeypatch, tmp_path, trial=f"test -d '{tmp_path}'/vmkit-*/usr")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert find_virtiofsd(Path("/"), 256).program
    assert find_virtiofsd(tmp_path, 256).trouble == "this host gives virtiofsd no namespaces for its sandbox"
    assert not is_host_root(tmp_path)


def test_host_without_the_program_says_how_to_get_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(virtiofsd, "PLACES", ())
    found = find_virtiofsd(root, 256)
    assert (found.program, found.trouble) == ("", "virtiofsd is not installed")
    assert "apt-get install virtiofsd" in found.hint


def test_guest_that_remembers_more_files_than_may_be_open_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest remembers at most 1024 files in each MiB beyond its first 16. A folder with few files needs but these."""
    install(monkeypatch, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(count: int) -> None:
        monkeypatch.setattr(virtiofsd, "find_limit", lambda: count)

    limit(OWN_FILES + 1024)
    assert find_virtiofsd(root, 17).program
    limit(OWN_FILES + 10)
    assert find_virtiofsd(root, 17).program
    limit(OWN_FILES + 9)
    found = find_virtiofsd(root, 17)
    assert found.trouble == "virtiofsd may open 1033 files, and a guest with 17 MiB can remember 1024"
    assert found.hint == "raise the limit (ulimit -Hn) to 2048"
    # virtiofsd itself does not start with so few.
    limit(OWN_FILES)
    assert find_virtiofsd(root.parent / "empty", 17).trouble
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)


def test_entries_are_counted_as_far_as_needed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_few_entries(root, 5)
    # What virtiofsd does not have.
    assert has_few_entries(root, 1, {str(root / "etc")})
    # The root of a host has more.
    assert not has_few_entries(Path("/"), 100)
    with monkeypatch.context() as patch:
        patch.setattr(virtiofsd, "COUNT_DEADLINE_S", -1)
        assert not has_few_entries(root, 5)
    assert not has_few_entries(root, 4)
    assert has_few_entries(root / "missing", 0)
