"""A session in a root of its user's against vshd beside it: what is a boundary, and what is none.

docs/explanation/security.md has the table that these tests hold.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vmkit as vmkit_package
from tests.guest.conftest import BIN
from vmkit.image.build import build_image
from vmkit.image.recipe.config import load_image
from vshd.pid1.collector import HANDED

ATTACKER = Path(__file__).parent / "inside/root_attacker.py"
SCRIPT = "/usr/local/lib/attacker.py"
USER = "1000:1000"
# What a login gives a session, and the shell's or the program's own.
NAMES = {"HOME", "LANG", "LC_CTYPE", "LOGNAME", "OLDPWD", "PATH", "PWD", "SHELL", "SHLVL", "TERM", "USER", "_"}


@pytest.fixture(scope="module")
def machine(folders: Path) -> Iterator[vmkit_package.Machine]:
    """A Debian as a root that its user gave, in a machine with a token; and sessions of the user's that stay."""
    built = build_image(load_image("debian"))
    assert built.root is not None
    with vmkit_package.Machine(str(built.root), name="attacked", token=True, accelerator="tcg") as machine:
        machine.push(ATTACKER, SCRIPT)
        vsh = [str(BIN / "vsh"), "--vm_name", "attacked", "--user", USER]
        subprocess.run([*vsh, "--detach=stays", "--", "sleep", "inf"], check=True, capture_output=True, timeout=60)
        sftp = [*vsh, "--subsystem", "sftp"]
        with subprocess.Popen(sftp, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as files:
            assert files.stdin is not None
            assert files.stdout is not None
            # SSH_FXP_INIT, and the server's SSH_FXP_VERSION: it is there.
            files.stdin.write(b"\0\0\0\5\1\0\0\0\3")
            files.stdin.flush()
            assert files.stdout.read(5)[4:] == b"\2"
            yield machine
            files.stdin.close()
            files.stdout.read()


def report(machine: vmkit_package.Machine, *words: str, user: str) -> dict[str, Any]:
    done = machine.run([*words, "python3", SCRIPT], user=user)
    assert done.exit == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("words", "user"), [((), USER), (("unshare", "-Ur"), USER), ((), "root")], ids=["user", "namespace", "root"]
)
def test_session_has_nothing_of_vshd(machine: vmkit_package.Machine, words: tuple[str, ...], user: str) -> None:
    found = report(machine, *words, user=user)
    assert set(found["environment"]) <= NAMES
    assert set(found["descriptors"]) == {"0", "1", "2"}
    # Each mount's root and place, without what holds it.
    places = [line.split()[3:5] for line in found["mounts"].splitlines()]
    assert not [place for place in places if "vmkit" in " ".join(place)]
    assert ["/", "/"] in places
    # The token is in no word that everybody may read.
    token = (machine.directory / "token").read_text().strip()
    assert len(token) >= 32
    assert token not in json.dumps(found)
    # The kernel lists the sockets of all mount namespaces. The one of vshd's has its path in another one.
    ours = [line.split()[-1] for line in found["sockets"].splitlines() if "vshd" in line or "@vmkit" in line]
    assert set(ours) <= {HANDED}
    assert machine.run(["test", "-e", HANDED], user=user).exit == 1


@pytest.mark.parametrize("words", [(), ("unshare", "-Ur")], ids=["user", "namespace"])
def test_user_does_not_reach_vshd(machine: vmkit_package.Machine, words: tuple[str, ...]) -> None:
    """Not pid 1, not the one that listens, and none of the user's own sessions."""
    found = report(machine, *words, user=USER)
    # pid 1, vshd, this session, the one that lasts, and SFTP.
    assert len(found["daemons"]) >= 5
    reached = {
        (pid, what): outcome
        for pid, attempts in found["daemons"].items()
        for what, outcome in attempts.items()
        if outcome not in ("denied", "gone")
    }
    assert reached == {}
    assert set(found["secrets"].values()) <= {"denied", "missing"}
    assert found["secrets"]["/sys/firmware/dmi/tables/DMI"] == "denied"


def test_root_reaches_vshd_which_is_no_boundary(machine: vmkit_package.Machine) -> None:
    found = report(machine, user="root")
    for what in ("root/etc", "fd", "environ", "maps", "enter"):
        assert found["daemons"]["1"][what] == "reached", what
    assert found["secrets"]["/sys/firmware/dmi/tables/DMI"] == "reached"


PLANT = """
set -e
cp /usr/lib/x86_64-linux-gnu/libz.so.1 /usr/lib/libplanted.so
echo /usr/lib/libplanted.so > /etc/ld.so.preload
echo 'open("/planted", "a").write("x")' > /usr/lib/python3/dist-packages/sitecustomize.py
mkdir -p /vshd /usr/lib/python3/dist-packages/vshd
echo 'open("/planted", "a").write("x")' | tee /vshd/__init__.py > /usr/lib/python3/dist-packages/vshd/__init__.py
printf 'passwd: planted\\ngroup: planted\\n' > /etc/nsswitch.conf
mount -t tmpfs planted /mnt
kill -9 $(pgrep -P 1 -f "vsh[d][.]")
"""
LOOK = """
grep -c libplanted /proc/self/maps
for pid in $(pgrep -f "vsh[d][.]"); do grep -l libplanted /proc/$pid/maps; done
grep planted /proc/1/mountinfo
grep -c planted /proc/self/mountinfo
ls /planted
"""


def test_nothing_that_root_plants_runs_in_vshd_or_changes_it(folders: Path) -> None:
    """Libraries, modules, users and mounts of the root, when vshd begins anew."""
    built = build_image(load_image("debian"))
    with vmkit_package.Machine(str(built.root), accelerator="tcg") as machine:
        machine.run(["sh", "-c", PLANT])
        done = machine.run(["sh", "-c", LOOK])
        lines = done.stdout.decode().splitlines()
        # The shell has the library and the mount, and no process of vshd has.
        assert len(lines) == 2, lines
        assert int(lines[0]) > 0
        assert int(lines[1]) == 1
        # What is broken breaks the root's programs at most, and no session.
        machine.run(["sh", "-c", "echo /nowhere.so > /etc/ld.so.preload; rm /etc/passwd; mkfifo /etc/passwd"])
        done = machine.run(["sh", "-c", "echo alive"])
        assert done.stdout == b"alive\n"
        assert b"/nowhere.so" in done.stderr
        machine.run(["mount", "-t", "tmpfs", "tmpfs", "/etc"])
        assert machine.run(["id", "-u"]).stdout == b"0\n"
        assert machine.run(["id", "-u"], user=USER).stdout == b"1000\n"
