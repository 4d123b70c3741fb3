"""A backtrace takes the files that a core names from the image, whatever a guest names, and gdb gets no other."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fuzz.fuzz_notes import make_core
from tests.vmkit.crashes.test_store import keep
from vmkit.crashes import backtrace
from vmkit.crashes.backtrace import MAX_FRAMES, find_node, plan_gdb, print_backtrace
from vmkit.crashes.record import Crash, CrashKind, Program
from vmkit.crashes.store import KeptCrash, list_of
from vmkit.errors import MachineError
from vmkit.image.formats.cpio import render_cpio
from vmkit.image.formats.tree import Tree, directory_node, file_node, symlink_node

DIGEST = "0123456789abcdef" * 4
PROGRAM = Program(7, 0, 0, 11, "web", ("web",), "/usr/bin/web (deleted)", "0::/", is_contained=False, is_whole=True)
CRASH = Crash(CrashKind.CORE, 1.0, "web was ended", image="tiny", digest=DIGEST, program=PROGRAM)
# The test plays gdb, and prints what it was given.
GDB = """#!/bin/sh
for word; do printf '%s\\n' "$word"; done
for word; do
    case $word in
    "set sysroot "*) cd "${word#set sysroot }" && find . ! -type d | sort && cat usr/lib/libweb.so.1.2 ;;
    esac
done
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an image in a cache, and the test's gdb."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gdb").write_text(GDB)
    (programs / "gdb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin")
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(tmp_path / "cache"))
    image = tmp_path / "cache" / "images" / DIGEST
    image.mkdir(parents=True)
    return image


def keep_core(tmp_path: Path, *names: bytes, crash: Crash = CRASH) -> KeptCrash:
    folder = keep(tmp_path / "crashes", "web", crash)
    (folder / "core").write_bytes(make_core(names))
    return list_of(tmp_path / "crashes", "web")[-1]


def make_tree() -> Tree:
    tree = Tree()
    for path in ("usr", "usr/bin", "usr/lib"):
        tree.add(path, directory_node())
    tree.add("usr/bin/web", file_node(b"program"))
    tree.add("usr/lib/libweb.so.1.2", file_node(b"library"))
    tree.add("lib", symlink_node("usr/lib"))
    tree.add("usr/lib/round", symlink_node("round"))
    return tree


HOSTILE = (
    b"/../../../etc/passwd",
    b"/usr/lib/x y",
    b"/dev/zero (deleted)",
    b"relative",
    b"/a\ndump /usr/bin/web /tmp/x",
    b"/" + b"long" * 64 + b"/x",
    b"/.",
)


def make_disk(tmp_path: Path, disk: Path, library: bytes = b"library") -> None:
    folder = tmp_path / "tree"
    (folder / "usr/bin").mkdir(parents=True)
    (folder / "usr/lib").mkdir()
    (folder / "usr/bin/web").write_bytes(b"program")
    (folder / "usr/lib/libweb.so.1.2").write_bytes(library)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", folder, disk, "8M"], check=True)


@pytest.mark.parametrize("kind", ["initrd", "root", "given"])
def test_files_come_from_the_image_and_no_name_leads_elsewhere(tmp_path: Path, cache: Path, kind: str) -> None:
    crash = CRASH
    if kind == "initrd":
        (cache / "initrd").write_bytes(render_cpio(make_tree()))
    else:
        disk = cache / "root" if kind == "root" else tmp_path / "disk"
        make_disk(tmp_path, disk)
        crash = replace(CRASH, root="" if kind == "root" else str(disk))
    kept = keep_core(tmp_path, b"/usr/lib/libweb.so.1.2", b"/usr/lib/missing", *HOSTILE, crash=crash)
    words = print_backtrace(kept).decode().splitlines()
    files = [word for word in words if word.startswith("./")]
    assert files == ["./bin", "./lib", "./usr/bin/web", "./usr/lib/libweb.so.1.2"]
    assert words[-1] == "library"
    assert "/etc/passwd" not in "".join(words)


@pytest.mark.parametrize("kind", ["initrd", "root"])
@pytest.mark.parametrize(("file_bytes", "copy_bytes"), [(2 << 20, 64 << 20), (64 << 20, 4 << 20)])
def test_files_that_are_too_large_are_left_out_and_told(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str, file_bytes: int, copy_bytes: int
) -> None:
    """A guest chooses the names: it could fill this host with the largest files of its disk."""
    monkeypatch.setattr(backtrace, "MAX_FILE_BYTES", file_bytes)
    monkeypatch.setattr(backtrace, "MAX_COPY_BYTES", copy_bytes)
    large = bytes(range(256)) * (20 << 10)
    if kind == "initrd":
        tree = make_tree()
        tree.put("usr/lib/libweb.so.1.2", file_node(large))
        (cache / "initrd").write_bytes(render_cpio(tree))
    else:
        make_disk(tmp_path, cache / "root", large)
    told: list[str] = []
    words = print_backtrace(keep_core(tmp_path, b"/usr/lib/libweb.so.1.2"), tell=told.append).decode().splitlines()
    assert [word for word in words if word.startswith("./")] == ["./bin", "./usr/bin/web"]
    assert told == ["left out /usr/lib/libweb.so.1.2, which has 5 MiB: gdb has no names of its functions"]


def test_root_that_is_a_folder_is_read_where_it_is(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "root"
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/web").write_bytes(b"program")
    kept = keep_core(tmp_path, crash=replace(CRASH, root=str(root)))
    assert f"{root}/usr/bin/web" in plan_gdb(kept, root)
    assert f"set sysroot {root}" in print_backtrace(kept).decode().splitlines()
    # The guest may have written the folder.
    (root / "usr/bin/web").unlink()
    (root / "usr/bin/web").symlink_to(shutil.which("true") or "/bin/true")
    assert not [word for word in plan_gdb(kept, root) if word.endswith(("web", "true"))]
    assert cache.is_dir()


def test_file_of_the_program_can_be_given(tmp_path: Path, cache: Path) -> None:
    (cache / "initrd").write_bytes(render_cpio(make_tree()))
    (tmp_path / "mine").write_bytes(b"")
    words = print_backtrace(keep_core(tmp_path), program=tmp_path / "mine").decode().splitlines()
    assert str(tmp_path / "mine") in words


def test_recursion_without_end_has_a_backtrace_with_a_limit(tmp_path: Path, cache: Path) -> None:
    """gdb takes two minutes for the 170,000 frames of a stack that is full."""
    (cache / "initrd").write_bytes(render_cpio(make_tree()))
    words = print_backtrace(keep_core(tmp_path)).decode().splitlines()
    limit = words.index(f"set backtrace limit {MAX_FRAMES}")
    assert limit < words.index("thread apply all bt")


def test_backtrace_that_cannot_be_says_why(tmp_path: Path, cache: Path) -> None:
    kept = keep_core(tmp_path)
    with pytest.raises(MachineError, match="the image 'tiny' of that time is not there any more"):
        print_backtrace(kept)
    (cache / "initrd").write_bytes(b"no archive")
    with pytest.raises(MachineError, match="cannot read"):
        print_backtrace(kept)
    (kept.folder / "core").write_bytes(b"no core")
    with pytest.raises(MachineError, match="it is no core"):
        print_backtrace(kept)
    contained = keep_core(tmp_path, crash=replace(CRASH, program=replace(PROGRAM, is_contained=True)))
    with pytest.raises(MachineError, match="in a container"):
        print_backtrace(contained)
    panic = keep_core(tmp_path, crash=Crash(CrashKind.PANIC, 1.0, "panic"))
    with pytest.raises(MachineError, match="is of no program") as caught:
        print_backtrace(panic)
    assert caught.value.hint == f"vmkit crashes {panic.machine} show {panic.number}"
    digest = keep_core(tmp_path, crash=replace(CRASH, digest="../../.."))
    with pytest.raises(MachineError, match="not there any more"):
        print_backtrace(digest)


def test_links_of_an_image_are_followed_and_rings_end() -> None:
    nodes = dict(make_tree().walk())
    found = find_node(nodes, "/lib/libweb.so.1.2")
    assert found is not None
    assert found.data == b"library"
    assert find_node(nodes, "/usr/lib/round") is None
    assert find_node(nodes, "/../../usr/bin/web") is not None
    assert find_node(nodes, "/usr/nothing") is None
