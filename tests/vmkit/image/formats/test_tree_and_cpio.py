"""Trees and the archives made of them: the same in, the same out, and nothing outside."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmkit.errors import BuildError
from vmkit.image.formats import tree as tree_module
from vmkit.image.formats.cpio import read_cpio, render_cpio
from vmkit.image.formats.tree import (
    MTIME_S,
    FileKind,
    Node,
    Tree,
    directory_node,
    file_node,
    normalise_path,
    symlink_node,
)


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        ("./usr/bin/x", "usr/bin/x"),
        ("/bin/x", "usr/bin/x"),
        ("lib64/ld.so", "usr/lib64/ld.so"),
        ("/", ""),
        ("/bin", "bin"),
    ],
)
def test_path_is_normalised_and_merged(path: str, normal: str) -> None:
    assert normalise_path(path) == normal


@pytest.mark.parametrize("path", ["../x", "/a/../../b", "a\0b", "a/" * 3000])
def test_path_that_leaves_the_tree_is_refused(path: str) -> None:
    with pytest.raises(BuildError):
        normalise_path(path)


def test_tree_makes_parents_and_replaces_files() -> None:
    tree = Tree()
    tree.add("/etc/a/b", file_node(b"1"))
    tree.add("/etc/a/b", file_node(b"2", 0o600))
    assert tree.find("etc/a") == directory_node()
    assert tree.find("etc/a/b") == file_node(b"2", 0o600)


def test_tree_refuses_a_file_where_a_directory_is() -> None:
    tree = Tree()
    tree.add("/etc/a", file_node(b""))
    with pytest.raises(BuildError, match="the recipe wants '/etc/a' both as a file and as a directory"):
        tree.add("/etc/a", directory_node())
    with pytest.raises(BuildError, match="cannot put '/etc/a/b' there"):
        tree.add("/etc/a/b", file_node(b""))


def test_tree_goes_through_symlinks_to_directories() -> None:
    tree = Tree()
    tree.add("/var/run", directory_node())
    tree.add("/var/run", symlink_node("../run"))
    tree.add("/var/run", directory_node())
    tree.add("/var/run/lock/x", file_node(b""))
    assert tree.find("var/run") == symlink_node("../run")
    assert tree.find("run/lock/x") == file_node(b"")
    tree.add("/etc/a", symlink_node("/etc/b"))
    tree.add("/etc/b", symlink_node("/etc/a"))
    with pytest.raises(BuildError, match="too many symlinks"):
        tree.add("/etc/a/x", file_node(b""))
    with pytest.raises(BuildError, match="the recipe wants '/run' both as a directory and as a symlink"):
        tree.add("/run", symlink_node("/var/run"))


def test_tree_resolves_symlinks_inside_itself() -> None:
    tree = Tree()
    tree.add("/lib/x.so.1", file_node(b"x"))
    tree.add("/lib/x.so", symlink_node("x.so.1"))
    tree.add("/etc/x", symlink_node("/lib/x.so"))
    tree.add("/etc/loop", symlink_node("loop"))
    assert tree.resolve("/etc/x") == file_node(b"x")
    assert tree.resolve("/etc/loop") is None


def test_tree_has_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "TREE_LIMIT_BYTES", 10)
    tree = Tree()
    tree.add("/a", file_node(b"12345678"))
    tree.add("/a", file_node(b"1234567890"))
    with pytest.raises(BuildError, match="larger than"):
        tree.add("/b", file_node(b"1"))


def _sample(order: int) -> Tree:
    nodes = [
        ("/dev/console", Node(FileKind.CHARACTER, 0o600, device=(5, 1))),
        ("/etc/x", file_node(b"hello", 0o640)),
        ("/home/user", Node(FileKind.DIRECTORY, 0o755, uid=1000, gid=1000)),
        ("/tmp", directory_node(0o1777)),
        ("/usr/bin/tool", symlink_node("/bin/busybox")),
    ]
    tree = Tree()
    for path, node in nodes[::order]:
        tree.add(path, node)
    return tree


def test_archive_does_not_depend_on_the_order_of_adding() -> None:
    assert render_cpio(_sample(1)) == render_cpio(_sample(-1))


def test_archive_reads_back_as_the_tree() -> None:
    root, *entries = read_cpio(render_cpio(_sample(1)))
    # Without it the guest's / would be writable for every user.
    assert (root.path, root.node, root.inode) == (".", directory_node(0o755), 1)
    assert [(entry.path, entry.node) for entry in entries] == list(_sample(1).walk())
    assert [entry.inode for entry in entries] == list(range(2, len(entries) + 2))
    assert {entry.mtime_s for entry in entries} == {MTIME_S}
    paths = [entry.path for entry in entries]
    assert all(path.rpartition("/")[0] in ["", *paths[:index]] for index, path in enumerate(paths))


def test_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    done = subprocess.run(
        ["cpio", "-itv"], input=render_cpio(_sample(1)), capture_output=True, check=True, cwd=tmp_path
    )
    listing = done.stdout.decode()
    assert "crw-------   1 root     root       5,   1" in listing
    assert "drwxrwxrwt" in listing
    assert "usr/bin/tool -> /bin/busybox" in listing


@pytest.mark.parametrize("archive", [b"", b"070702" + b"0" * 104, render_cpio(_sample(1))[:300]])
def test_reader_refuses_what_is_no_archive(archive: bytes) -> None:
    with pytest.raises(BuildError):
        list(read_cpio(archive))


# Trees of roots that users bring: not merged, and changed as a container's layers change them


def test_root_of_a_user_keeps_its_own_folders() -> None:
    tree = Tree(merged=False)
    tree.put("bin/sh", file_node(b"1"))
    assert [path for path, _ in tree.walk()] == ["bin", "bin/sh"]


def test_layer_replaces_what_was_there_and_keeps_a_folder_that_stays_one() -> None:
    tree = Tree(merged=False)
    tree.put("a/b/c", file_node(b"1"))
    tree.put("a/b", directory_node(0o700))
    assert tree.find("a/b/c") is not None
    tree.put("a/b", file_node(b"2"))
    assert [path for path, _ in tree.walk()] == ["a", "a/b"]
    tree.put("a", symlink_node("/elsewhere"))
    assert [path for path, _ in tree.walk()] == ["a"]
    tree.put("a", directory_node())
    found = tree.find("a")
    assert found is not None
    assert found.kind is FileKind.DIRECTORY


def test_layer_takes_away_files_and_the_content_of_folders() -> None:
    tree = Tree(merged=False)
    for path in ("a/b/c", "a/b/d", "a/e", "f"):
        tree.put(path, file_node(b""))
    tree.discard("a/b")
    tree.discard("missing/file")
    assert [path for path, _ in tree.walk()] == ["a", "a/e", "f"]
    tree.empty("a")
    assert [path for path, _ in tree.walk()] == ["a", "f"]
    tree.empty("/")
    assert len(tree) == 0


def test_symlink_leads_nowhere_but_into_the_tree() -> None:
    tree = Tree(merged=False)
    tree.put("up", symlink_node("../../../.."))
    tree.put("bin", symlink_node("usr/bin"))
    tree.put("up/etc/passwd", file_node(b"1"))
    tree.put("bin/sh", file_node(b"2"))
    assert [path for path, _ in tree.walk()] == ["bin", "etc", "etc/passwd", "up", "usr", "usr/bin", "usr/bin/sh"]
    assert tree.look_up("bin/sh") == file_node(b"2")
    assert tree.look_up("bin") == symlink_node("usr/bin")
    tree.put("one", symlink_node("two"))
    tree.put("two", symlink_node("one"))
    with pytest.raises(BuildError, match="too many symlinks"):
        tree.put("one/file", file_node(b""))


def test_archive_holds_content_that_is_elsewhere() -> None:
    class Far:
        size_bytes = 6

        def chunks(self) -> Iterator[bytes]:
            yield from (b"far", b"off")

    tree = Tree(merged=False)
    tree.put("a", Node(FileKind.FILE, 0o644, content=Far()))
    assert [entry.node.data for entry in read_cpio(render_cpio(tree))] == [b"", b"faroff"]
