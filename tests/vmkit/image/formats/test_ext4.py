"""A tree as an ext4 file system: what is in it, byte for byte the same twice, and what cannot be."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmkit.errors import BuildError
from vmkit.image.formats.ext4 import write_ext4
from vmkit.image.formats.tree import FileKind, Node, Tree, directory_node, file_node, symlink_node

pytestmark = pytest.mark.skipif(not Path("/usr/sbin/mke2fs").exists(), reason="needs e2fsprogs")


def make_tree() -> Tree:
    tree = Tree()
    tree.add("etc/passwd", file_node(b"root\n"))
    tree.add("usr/bin/su", Node(FileKind.FILE, 0o4755, b"x" * 70_000, uid=0, gid=70_000, mtime_s=1_700_000_000))
    tree.add("home/a user/notes", Node(FileKind.FILE, 0o600, b"", uid=1000, gid=1000))
    tree.add("home/a user", Node(FileKind.DIRECTORY, 0o700, uid=1000, gid=1000))
    tree.add("tmp", directory_node(0o1777))
    tree.add("etc/long", symlink_node("/" + "y" * 200))
    tree.add("etc/short", symlink_node("passwd"))
    tree.add("etc/ümlaut", file_node(b"1"))
    tree.add("dev/console", Node(FileKind.CHARACTER, 0o600, device=(5, 1)))
    for number in range(300):
        tree.add(f"many/{number:03}-{'n' * 200}", file_node(b""))
    return tree


def write(tree: Tree, folder: Path) -> Path:
    folder.mkdir()
    (folder / "work").mkdir()
    write_ext4(tree, folder / "root", folder / "work", "label")
    return folder / "root"


def ask(image: Path, command: str) -> str:
    words = ["/usr/sbin/debugfs", "-R", command, str(image)]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def test_file_system_holds_owners_modes_times_and_contents(tmp_path: Path) -> None:
    image = write(make_tree(), tmp_path / "a")
    told = ask(image, 'stat "/usr/bin/su"')
    assert re.search(r"Type: regular\s+Mode:\s+04755 ", told)
    assert re.search(r"User:\s+0\s+Group: 70000 ", told)
    assert "mtime: 0x6553f100" in told
    assert ask(image, 'cat "/usr/bin/su"') == "x" * 70_000
    assert re.search(r"Mode:\s+0700 .*\n.*\nUser:\s+1000", ask(image, 'stat "/home/a user"'))
    assert re.search(r"Mode:\s+01777 ", ask(image, "stat /tmp"))
    assert 'Fast link dest: "passwd"' in ask(image, "stat /etc/short")
    assert ask(image, "cat /etc/ümlaut") == "1"
    assert "Type: symlink" in ask(image, "stat /etc/long")
    assert ask(image, "cat /etc/long") == "/" + "y" * 200
    assert "console" not in ask(image, "ls /dev")
    assert len(re.findall(r"\d{3}-n{200}", ask(image, "ls -l /many"))) == 300


def test_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(make_tree(), tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name", ['a"b', "a\nb"])
def test_name_that_debugfs_cannot_be_told_is_refused(tmp_path: Path, name: str) -> None:
    tree = Tree()
    tree.add(name, file_node(b""))
    with pytest.raises(BuildError, match="its name or target has a quote or a newline"):
        write(tree, tmp_path / "a")


def test_command_that_fails_is_noticed(tmp_path: Path) -> None:
    """debugfs's status is 0 whatever happens."""

    class Wrong(Tree):
        def walk(self) -> Iterator[tuple[str, Node]]:
            yield "nowhere/orphan", file_node(b"")

    with pytest.raises(
        BuildError, match=r"debugfs cannot write the root file system: .*[Ff]ile not found by ext2_lookup"
    ):
        write(Wrong(), tmp_path / "a")
