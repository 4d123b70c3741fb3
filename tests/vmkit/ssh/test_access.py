"""What ssh is given for a machine, and when its ProxyCommand exchanges keys."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vmkit.errors import ConfigError
from vmkit.machine.registry import reserve
from vmkit.ssh.access import Access, plan_access, render_config
from vmkit.ssh.mark import describe_keys, find_mark, is_current
from vsh.registry import Entry


def make_access(folder: Path, user: str = "root", port: int = 22) -> Access:
    return Access("m", user, folder, folder / "machine", port)


def read_proxy(text: str) -> list[str]:
    lines = dict(line.strip().split(" ", 1) for line in text.splitlines())
    return shlex.split(lines["ProxyCommand"].replace("%%", "%"))


def test_config_names_the_machine_its_key_and_its_host_key() -> None:
    text = render_config(make_access(Path("/run/x y/ssh"), "alice", 2222), runtime="/run/x y")
    lines = dict(line.strip().split(" ", 1) for line in text.splitlines())
    assert lines["Host"] == "m"
    assert lines["User"] == "alice"
    assert lines["IdentityFile"] == '"/run/x y/ssh/key"'
    assert lines["StrictHostKeyChecking"] == "yes"
    words = read_proxy(text)
    assert words[:2] == ["env", "VMKIT_RUNTIME_DIR=/run/x y"]
    assert words[-4:] == ["m", "2222", "/run/x y/ssh", "%r"]


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh to ask")
def test_ssh_understands_the_config(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(render_config(make_access(tmp_path), runtime=str(tmp_path)))
    done = subprocess.run(["ssh", "-G", "-F", str(path), "m"], capture_output=True, text=True, check=True)
    assert "proxyusefdpass yes" in done.stdout
    assert f"identityfile {tmp_path}/key" in done.stdout


@pytest.mark.parametrize("user", ["", "../x", "a/b", "-x", ".", "a b", "x" * 65])
def test_odd_user_is_refused(folders: Path, user: str) -> None:
    entry = Entry(str(folders), {"name": "m", "cid": 3})
    with pytest.raises(ConfigError, match="cannot be the name of a user"):
        plan_access(entry, user=user)


def test_proxy_command_reports_that_no_machine_runs(folders: Path, tmp_path: Path) -> None:
    """Nothing is made for it: no keys, no folder."""
    done = run_proxy(folders, tmp_path / "keys", "root")
    assert done.returncode != 0
    assert "no machine named 'm' is running" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "keys").exists()


def test_proxy_command_refuses_an_odd_user(folders: Path, tmp_path: Path) -> None:
    with reserve("m", 77, "tiny", {}) as reservation:
        record = {"name": "m", "cid": 77, "pid": 1, "state": "ready", "backend": "user", "schema": 1}
        (reservation.directory / "machine.json").write_text(json.dumps(record))
        done = run_proxy(folders, tmp_path / "keys", "../root")
    assert done.returncode != 0
    assert "'../root' cannot be the name of a user" in done.stderr


def test_mark_is_stale_once_a_key_file_changes(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name in ("key", "key.pub", "known_hosts"):
        (tmp_path / name).write_text("x")
    assert not is_current(str(mark), str(tmp_path))
    for name in ("key", "key.pub", "known_hosts"):
        mark.write_text(describe_keys(str(tmp_path)))
        assert is_current(str(mark), str(tmp_path))
        (tmp_path / name).write_text("other")
        assert not is_current(str(mark), str(tmp_path))
    mark.write_text(describe_keys(str(tmp_path)))
    (tmp_path / "key").unlink()
    assert not is_current(str(mark), str(tmp_path))
    mark.write_text("")
    assert not is_current(str(mark), str(tmp_path))


def test_marks_of_users_are_apart() -> None:
    assert find_mark("/m", "root") != find_mark("/m", "alice")


def run_proxy(folders: Path, keys: Path, user: str) -> "subprocess.CompletedProcess[str]":
    """The very words of a block, with the user in place of ssh's %r."""
    words = read_proxy(render_config(make_access(keys), runtime=str(folders / "runtime")))
    assert words[-1] == "%r"
    assert sys.executable in words
    return subprocess.run([*words[:-1], user], capture_output=True, text=True, check=False, timeout=60)
