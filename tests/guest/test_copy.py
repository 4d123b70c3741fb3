"""`vmkit cp` in and out of real guests: trees, a full guest, another user, and a guest that is killed in the middle."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.docs.schemas import check_form
from tests.guest.conftest import BIN, Run
from tests.vmkit.copy.conftest import find_temporary, show
from tests.vmkit.copy.test_copy import make_tree
from tests.vsh.live import wait_until
from vmkit.machine.running import find_machine

DEADLINE_S = 120


def test_tree_is_the_same_after_both_ways(ready: str, vmkit: Run, tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    for number in range(300):
        (tree / "many" / str(number % 7)).mkdir(parents=True, exist_ok=True)
        (tree / "many" / str(number % 7) / f"{number}").write_text(str(number))
    done = vmkit("cp", str(tree), f"{ready}:/tmp/tree")
    assert (done.returncode, done.stderr) == (0, b"")
    done = vmkit("cp", f"{ready}:/tmp/tree", f"{ready}:/tmp/again")
    assert (done.returncode, done.stderr) == (0, b"")
    done = vmkit("cp", "--json", f"{ready}:/tmp/again", str(tmp_path / "back"))
    assert done.returncode == 0, done.stderr
    check_form("cp", json.loads(done.stdout))
    assert show(tmp_path / "back") == show(tree)


def test_streams_and_holes(ready: str, vmkit: Run, tmp_path: Path) -> None:
    data = random.Random(5).randbytes(3_000_000)
    assert vmkit("cp", "-", f"{ready}:/tmp/piped", stdin=data).returncode == 0
    assert vmkit("cp", f"{ready}:/tmp/piped", "-").stdout == data
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(1 << 40)
    assert vmkit("cp", str(tmp_path / "disk"), f"{ready}:/tmp").returncode == 0
    state = find_machine(ready).run(["stat", "-c", "%s %b", "/tmp/disk"], text=True, check=True)
    assert state.stdout == f"{1 << 40} 0\n"


def test_extended_attributes_go_both_ways(ready: str, vmkit: Run, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "f").write_text("data")
    try:
        os.setxattr(tree / "f", "user.mime", b"text/plain")
        os.setxattr(tree, "user.of-a-folder", b"\0")
    except OSError as error:
        pytest.skip(f"the file system of {tree} has no extended attributes: {error.strerror}")
    assert vmkit("cp", "--xattrs", str(tree), f"{ready}:/tmp/with").returncode == 0
    assert vmkit("cp", "--xattrs", f"{ready}:/tmp/with", str(tmp_path / "back")).returncode == 0
    assert os.getxattr(tmp_path / "back" / "f", "user.mime") == b"text/plain"
    assert os.getxattr(tmp_path / "back", "user.of-a-folder") == b"\0"
    # None of a guest's /proc: a file system without them is copied as it is.
    assert vmkit("cp", "--xattrs", f"{ready}:/proc/version", str(tmp_path)).returncode == 0


def test_full_guest_keeps_its_old_file(ready: str, vmkit: Run, tmp_path: Path) -> None:
    machine = find_machine(ready)
    script = "mkdir /tmp/small && mount -t tmpfs -o size=1m small /tmp/small && echo old > /tmp/small/f"
    machine.run(["sh", "-c", script], check=True)
    (tmp_path / "f").write_bytes(os.urandom(4_000_000))
    done = vmkit("cp", str(tmp_path / "f"), f"{ready}:/tmp/small/f")
    assert done.returncode == 1
    assert b"cannot write" in done.stderr
    assert b"No space left on device" in done.stderr
    left = machine.run(["sh", "-c", "ls -A /tmp/small; cat /tmp/small/f; umount /tmp/small"], text=True, check=True)
    assert left.stdout == "f\nold\n"


def test_user_has_the_rights_of_that_user(ready: str, vmkit: Run, tmp_path: Path) -> None:
    find_machine(ready).run(
        ["sh", "-c", "echo copier:x:1234:1234::/tmp:/bin/sh >> /etc/passwd; mkdir -m 700 /tmp/roots"], check=True
    )
    (tmp_path / "f").write_text("x")
    done = vmkit("cp", "--user", "copier", str(tmp_path / "f"), f"{ready}:/tmp/roots/f")
    assert done.returncode == 1
    assert b"Permission denied" in done.stderr
    assert vmkit("cp", "--user", "copier", str(tmp_path / "f"), f"{ready}:/tmp/theirs").returncode == 0
    owner = find_machine(ready).run(["stat", "-c", "%u", "/tmp/theirs"], text=True, check=True)
    assert owner.stdout == "1234\n"


@pytest.mark.parametrize("how", ["kill", "SIGINT"])
def test_copy_that_ends_in_the_middle_leaves_nothing(up: Run, vmkit: Run, tmp_path: Path, how: str) -> None:
    assert up("--name", "doomed", "--memory", "512M", "-q").returncode == 0
    machine = find_machine("doomed")
    machine.run(["sh", "-c", "head -c 40000000 /dev/urandom > /tmp/big"], check=True)
    (tmp_path / "big").write_text("old")
    copying = subprocess.Popen([BIN / "vmkit", "cp", "doomed:/tmp/big", str(tmp_path)], stderr=subprocess.PIPE)
    wait_until(lambda: find_temporary(tmp_path), "the copy has begun")
    if how == "kill":
        machine.kill()
    else:
        copying.send_signal(2)
    _, err = copying.communicate(timeout=DEADLINE_S)
    assert copying.returncode == (1 if how == "kill" else 130), err
    assert (b"machine 'doomed' has ended: stopped by the host" if how == "kill" else b"interrupted") in err
    assert [path.name for path in tmp_path.iterdir()] == ["big"]
    assert (tmp_path / "big").read_text() == "old"
