"""`vmkit build --export` and `vmkit image import`: the same image on another host, and nothing of a damaged file."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.schemas import check_form
from tests.vmkit.cli.conftest import DEADLINE_S, Vmkit

Another = Callable[[], Path]


@pytest.fixture
def exported(recipe: str, vmkit: Vmkit, tmp_path: Path) -> Path:
    path = tmp_path / "my.image"
    done = vmkit("build", recipe, "--export", str(path))
    assert done.status == 0, done.err
    head = members_of(path)[0][1]
    assert f"exported, with the SHA-256 {hashlib.sha256(head).hexdigest()}" in done.out
    return path


@pytest.fixture
def another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Another:
    """Lets the cache be that of another host, which has no archive and no packages."""

    def move() -> Path:
        cache = tmp_path / "another"
        monkeypatch.setenv("VMKIT_CACHE_DIR", str(cache))
        monkeypatch.setenv("PATH", "/nonexistent")
        return cache

    return move


def test_image_is_the_same_on_a_host_without_an_archive(
    exported: Path, another: Another, recipe: str, vmkit: Vmkit
) -> None:
    here = json.loads(vmkit("build", recipe, "--json").out)
    cache = another()
    done = vmkit("image", "import", str(exported))
    assert (done.status, done.out) == (0, f"my for amd64 is in the cache: {here['digest']}\n"), done.err
    there = json.loads(vmkit("build", recipe, "--json").out)
    assert (there["cached"], there["digest"]) == (True, here["digest"])
    for name in ("kernel", "initrd", "manifest"):
        assert Path(there[name]).read_bytes() == Path(here[name]).read_bytes()
        assert Path(there[name]).is_relative_to(cache)
    # Once more changes nothing, and it travels on from there.
    assert vmkit("image", "import", str(exported)).status == 0
    assert vmkit("build", recipe, "--export", str(exported.with_name("on.image"))).status == 0
    assert exported.with_name("on.image").read_bytes() == exported.read_bytes()


def test_image_goes_through_a_pipe(exported: Path, recipe: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "vmkit"]
    out = subprocess.run([*argv, "build", recipe, "--export", "-"], capture_output=True, check=True, timeout=DEADLINE_S)
    assert out.stdout == exported.read_bytes()
    assert b"exported, with the SHA-256" in out.stderr
    environ = {**os.environ, "VMKIT_CACHE_DIR": str(tmp_path / "another")}
    words = [*argv, "image", "import", "-", "--json"]
    taken = subprocess.run(words, input=out.stdout, env=environ, capture_output=True, check=True, timeout=DEADLINE_S)
    check_form("image-import", json.loads(taken.stdout))


def test_another_image_than_the_asked_one_is_refused(exported: Path, another: Another, vmkit: Vmkit) -> None:
    cache = another()
    done = vmkit("image", "import", str(exported), "--sha256", "0" * 64)
    assert done.status == 64
    assert "is another image than you asked for" in done.err
    assert not (cache / "images").exists()
    assert vmkit("image", "import", str(exported), "--sha256", "abc").status == 64


def members_of(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as archive:
        found = []
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            found.append((member, file.read()))
        return found


def pack(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def test_damaged_file_leaves_nothing_in_the_cache(exported: Path, another: Another, vmkit: Vmkit) -> None:
    whole = exported.read_bytes()
    members = members_of(exported)
    assert [member.name for member, _ in members] == [
        "vmkit-image.json", "lock.json", "manifest.json", "initrd", "kernel"
    ]  # fmt: skip
    hostile = tarfile.TarInfo("../../evil")
    link = tarfile.TarInfo("initrd")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    head = json.loads(members[0][1])
    bad: list[bytes] = [b"", b"\0" * 1024, whole[:600], whole[: len(whole) // 2], b"x" * 10000]
    for index in range(1, len(members)):
        changed = [(member, data[:-1] + b"#" if at == index else data) for at, (member, data) in enumerate(members)]
        bad.append(pack(changed))
        bad.append(pack([*members[:index], (hostile, b"x"), *members[index:]]))
    bad.append(pack([*members[:3], (link, b""), *members[4:]]))
    changes: list[dict[str, object]] = [
        {"digest": "../../x"}, {"request": "../x"}, {"architecture": "x"}, {"schema": 2}, {"files": {}}
    ]  # fmt: skip
    bad += [pack([(members[0][0], json.dumps({**head, **change}).encode()), *members[1:]]) for change in changes]
    cache = another()
    for data in bad:
        exported.write_bytes(data)
        done = vmkit("image", "import", str(exported))
        assert done.status == 64, (data[:100], done.out, done.err)
        assert "is no image that vmkit exported, or it is damaged" in done.err
        assert not any((cache / name).exists() for name in ("images", "imported"))
        assert not (cache / "tmp").exists() or not list((cache / "tmp").iterdir())


def claim_sizes(exported: Path, **sizes: int) -> None:
    """Changes the sizes in the manifest, with its hash."""
    head, lock, (manifest, data), *artifacts = members_of(exported)
    claimed = json.loads(data)
    for name, size in sizes.items():
        claimed["artifacts"][name]["size_bytes"] = size
    data = json.dumps(claimed).encode()
    facts = json.loads(head[1])
    facts["files"]["manifest.json"] = hashlib.sha256(data).hexdigest()
    exported.write_bytes(pack([(head[0], json.dumps(facts).encode()), lock, (manifest, data), *artifacts]))


def test_image_larger_than_the_disk_is_refused_before_anything_is_written(
    exported: Path, another: Another, vmkit: Vmkit
) -> None:
    claim_sizes(exported, initrd=1 << 60)
    another()
    done = vmkit("image", "import", str(exported))
    assert done.status == 1
    assert f"the image needs {(1 << 40) + 64} MiB, and" in done.err
    assert "VMKIT_CACHE_DIR" in done.err


def test_update_forgets_an_imported_image(exported: Path, recipe: str, vmkit: Vmkit, built: Path) -> None:
    """Where there is an archive, the user may want newer packages."""
    assert vmkit("image", "import", str(exported)).status == 0
    (imported,) = (built / "cache" / "imported").iterdir()
    assert vmkit("build", recipe, "--update", "--trust").status == 0
    assert not imported.exists()


def test_file_that_cannot_be_written_is_named_and_none_is_left(recipe: str, vmkit: Vmkit, tmp_path: Path) -> None:
    done = vmkit("build", recipe, "--export", str(tmp_path / "nowhere" / "x.image"))
    assert done.status == 1
    assert f"cannot write {tmp_path}/nowhere/x.image: No such file or directory" in done.err
    assert vmkit("image", "import", str(tmp_path / "none")).err.startswith(f"vmkit: cannot read {tmp_path}/none: ")
    assert vmkit("build", recipe, "--export", "-", "--json").status == 64
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_not_replaced_and_a_link_stays(recipe: str, vmkit: Vmkit, tmp_path: Path) -> None:
    """Root may write to /dev, and a rename there would take /dev/null from every program."""
    device = tmp_path / "null"
    os.mkfifo(device)
    done = vmkit("build", recipe, "--export", str(device))
    assert done.status == 64
    assert f"--export cannot replace {device}, which is no file" in done.err
    assert device.is_fifo()
    link = tmp_path / "link"
    link.symlink_to("x.image")
    assert vmkit("build", recipe, "--export", str(link)).status == 0
    assert link.is_symlink() and (tmp_path / "x.image").is_file()


def test_size_below_zero_hides_no_large_file(exported: Path, another: Another, vmkit: Vmkit) -> None:
    claim_sizes(exported, initrd=1 << 60, kernel=-(1 << 60))
    another()
    done = vmkit("image", "import", str(exported))
    assert done.status == 64
    assert "an artifact has no hash or no size" in done.err
