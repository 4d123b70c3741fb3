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


def test_root_of_a_stranger_is_kept_as_it_is(tmp_path: Path) -> None:
    """Hard links, attributes, devices, pipes, and names that debugfs could take for something else."""
    tree = Tree(merged=False)
    shared = Node(FileKind.FILE, 0o755, b"shared", xattrs=(("security.capability", b"\1\0\0\2" + bytes(16)),))
    for name in ("bin/one", "bin/two", 'etc/"three"'):
        tree.put(name, shared)
    tree.put("<2>", Node(FileKind.FILE, 0o600, b"no inode's number", uid=5))
    tree.put("caf\udce9", file_node(b"latin-1"))
    tree.put("srv/disk", Node(FileKind.BLOCK, 0o660, device=(8, 1)))
    tree.put("dev/null", Node(FileKind.CHARACTER, 0o666, device=(1, 3)))
    tree.put("run/pipe", Node(FileKind.FIFO, 0o622))
    tree.put("old", Node(FileKind.FILE, 0o644, b"", mtime_s=-5))
    image = write(tree, tmp_path / "a")
    inodes = {ask(image, f'stat "{name}"').split()[1] for name in ("/bin/one", "/bin/two", '/etc/""three""')}
    assert len(inodes) == 1
    told = ask(image, 'stat "/bin/two"')
    assert "Links: 3 " in told
    assert "security.capability (20) = 01 00 00 02" in told
    assert ask(image, 'cat "/<2>"') == "no inode's number"
    assert re.search(r"Mode:\s+0600 .*\n.*\nUser:\s+5 ", ask(image, 'stat "/<2>"'))
    assert re.search(r"Mode:\s+0755 ", ask(image, "stat <2>"))
    assert "Device major/minor number: 08:01" in ask(image, "stat /srv/disk")
    assert "Type: FIFO" in ask(image, "stat /run/pipe")
    assert "mtime: 0x00000000" in ask(image, "stat /old")
    assert "null" not in ask(image, "ls /dev")
    words = ["/usr/sbin/debugfs", "-R", "ls -p /", str(image)]
    assert b"/caf\xe9/" in subprocess.run(words, check=True, capture_output=True).stdout


class Holes:
    """200 MB of zeros and a word."""

    size_bytes = (200 << 20) + 4

    def chunks(self) -> Iterator[bytes]:
        for _ in range(200):
            yield bytes(1 << 20)
        yield b"word"


def test_content_that_is_not_in_memory_is_written_batch_by_batch(tmp_path: Path) -> None:
    tree = Tree(merged=False)
    for name in "abc":
        tree.put(name, Node(FileKind.FILE, 0o644, content=Holes()))
    image = write(tree, tmp_path / "a")
    assert image.stat().st_blocks * 512 < 16 << 20
    # Each of the three is a batch, and they share one file.
    assert sorted(path.name for path in (tmp_path / "a/work").iterdir()) == ["0", "debugfs.commands"]
    for name in "abc":
        told = ask(image, f"stat /{name}")
        assert f"Size: {Holes.size_bytes}\n" in told
        assert "(51200):" in told


@pytest.mark.parametrize(
    ("name", "node", "seen"),
    [
        ("a\nb", file_node(b""), "has a line break, or is too long"),
        ("a", symlink_node("x\ny"), "has a line break, or is too long"),
        ("a", Node(FileKind.FILE, 0o644, xattrs=(("user.x", bytes(4000)),)), "attributes are larger than ext4 allows"),
    ],
)
def test_what_debugfs_cannot_write_is_refused(tmp_path: Path, name: str, node: Node, seen: str) -> None:
    tree = Tree()
    tree.add(name, node)
    with pytest.raises(BuildError, match=seen):
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
