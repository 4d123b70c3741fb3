"""A folder of the host as a root: what is in it, what is not, and what happens when it changes meanwhile."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vmkit.errors import BuildError
from vmkit.image.formats.tree import FileKind
from vmkit.roots.folder import list_folder, make_tree, require_same
from vmkit.roots.limits import Budget, RootLimits

CHECKOUT = Path(__file__).parents[3]
# What it imports is the tests' own, which the other user may not be able to read.
LIST_AS_ANOTHER = """
import os, sys
from pathlib import Path
from vmkit.errors import ConfigError
from vmkit.roots.folder import list_folder
from vmkit.roots.limits import Budget, RootLimits
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    list_folder(Path(sys.argv[1]), Budget(RootLimits()))
except ConfigError as error:
    print(error.brief, error.hint)
"""


def budget() -> Budget:
    return Budget(RootLimits())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "etc").mkdir(parents=True)
    (folder / "etc/passwd").write_text("root\n")
    (folder / "etc/passwd-").hardlink_to(folder / "etc/passwd")
    (folder / "etc/link").symlink_to("/etc/shadow")
    (folder / "out").symlink_to("../..")
    os.mkfifo(folder / "pipe")
    (folder / os.fsdecode(b"caf\xe9")).write_bytes(b"1")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    return folder


def test_tree_is_the_folder_without_sockets_and_follows_no_link(root: Path) -> None:
    tree = make_tree(list_folder(root, budget()))
    assert [path for path, _ in tree.walk()] == [
        "caf\udce9",
        "etc",
        "etc/link",
        "etc/passwd",
        "etc/passwd-",
        "out",
        "pipe",
    ]
    file, link, pipe = tree.find("etc/passwd"), tree.find("etc/link"), tree.find("pipe")
    assert file is not None
    assert link is not None
    assert pipe is not None
    assert b"".join(file.chunks()) == b"root\n"
    assert tree.find("etc/passwd-") is file
    assert (link.data, pipe.kind) == (b"/etc/shadow", FileKind.FIFO)


def test_digest_is_another_after_any_change(root: Path) -> None:
    first = list_folder(root, budget()).digest()
    assert list_folder(root, budget()).digest() == first
    (root / "etc/passwd").chmod(0o600)
    second = list_folder(root, budget()).digest()
    os.utime(root / "etc/passwd", ns=(1, 1))
    third = list_folder(root, budget()).digest()
    (root / "etc/link").unlink()
    assert len({first, second, third, list_folder(root, budget()).digest()}) == 4


def test_file_that_changes_before_it_is_read_is_an_error(root: Path) -> None:
    tree = make_tree(list_folder(root, budget()))
    file = tree.find("etc/passwd")
    assert file is not None
    (root / "etc/passwd").write_text("ROOT\n")
    with pytest.raises(BuildError, match="etc/passwd changed while vmkit packed its folder"):
        list(file.chunks())
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to("/etc/shadow")
    with pytest.raises(BuildError, match="etc/passwd changed while vmkit packed its folder"):
        list(file.chunks())


def test_file_that_changes_while_it_is_read_is_an_error(root: Path) -> None:
    (root / "large").write_bytes(b"x" * (3 << 20))
    file = make_tree(list_folder(root, budget())).find("large")
    assert file is not None
    chunks = file.chunks()
    next(chunks)
    os.truncate(root / "large", 10)
    with pytest.raises(BuildError, match="large changed while vmkit packed its folder"):
        list(chunks)


def test_file_that_comes_or_goes_is_an_error(root: Path) -> None:
    listing = list_folder(root, budget())
    require_same(listing, budget())
    (root / "etc/new").write_bytes(b"")
    with pytest.raises(BuildError, match=r"etc(/new)? changed while"):
        require_same(listing, budget())


@pytest.mark.root
def test_folder_that_the_user_may_not_read_is_named_with_the_remedy() -> None:
    # pytest's own folders are closed to the other user.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "secret").mkdir(mode=0o700)
        words = [sys.executable, "-c", LIST_AS_ANOTHER, name]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=CHECKOUT, check=False)
    assert f"this user may not read {folder / 'secret'}" in done.stdout, done.stderr
    assert "sudo tar -C FOLDER" in done.stdout


def test_more_files_than_the_limit_is_an_error(root: Path) -> None:
    with pytest.raises(BuildError, match="the root has more than 3 files"):
        list_folder(root, Budget(RootLimits(entries=3)))
    with pytest.raises(BuildError, match="the root is larger than 0 MiB"):
        list_folder(root, Budget(RootLimits(size_bytes=4)))


def test_folder_without_an_end_is_an_error(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(300):
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
    finally:
        os.close(here)
    with pytest.raises(BuildError, match="is more than 256 folders deep"):
        list_folder(tmp_path, budget())
