"""The configuration file, host aliases, and what shells are told for completion."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from tests.vsh.live import DEADLINE_S, ENVIRONMENT, Vshd
from vsh.completion import render_completion
from vsh.config import apply_config, list_hosts
from vsh.errors import VshError
from vsh.flags import Options, parse_flags


class Write(Protocol):
    """The fixture write."""

    def __call__(self, text: str, mode: int = 0o600) -> Path: ...


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("VSH_CONFIG", str(path))

    def write(text: str, mode: int = 0o600) -> Path:
        path.write_text(text)
        path.chmod(mode)
        return path

    return write


def parse(*words: str) -> Options:
    options = parse_flags(list(words))
    apply_config(options)
    return options


HOSTS = """
[default]
keepalive = 60
user = "everybody"

[host.web]
vm_name = "tiny"
user = "alice"
cwd = "/srv"
env = ["LANG=C.UTF-8", "A=b"]
tty = true

[host.cold]
cid = 7

[host.plain]
connect_timeout = 2.5
"""


def test_alias_stands_for_a_machine_and_its_flags(write: Write) -> None:
    write(HOSTS)
    options = parse("--vm_name=web", "--", "ls")
    assert (options.vm_name, options.user, options.cwd, options.tty) == ("tiny", "alice", "/srv", True)
    assert options.env == ["LANG=C.UTF-8", "A=b"]
    assert options.keepalive == 60
    assert options.command == ["ls"]


def test_alias_may_be_a_cid(write: Write) -> None:
    write(HOSTS)
    options = parse("--vm_name", "cold")
    assert (options.vm_name, options.cid, options.user) == ("", 7, "everybody")


def test_table_of_a_machines_own_name_adds_flags(write: Write) -> None:
    write(HOSTS)
    options = parse("--vm_name=plain")
    assert (options.vm_name, options.connect_timeout) == ("plain", 2.5)


def test_command_line_wins(write: Write) -> None:
    write(HOSTS)
    options = parse("--vm_name=web", "--user=bob", "--keepalive=1", "--notty")
    assert (options.user, options.keepalive, options.cwd) == ("bob", 1, "/srv")


def test_default_address_counts_only_without_another(write: Write) -> None:
    write('[default]\nuds = "/run/vm.sock"\n')
    assert parse("--", "ls").uds == "/run/vm.sock"
    options = parse("--cid=9")
    assert (options.cid, options.uds) == (9, "")


def test_no_file_is_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSH_CONFIG", str(tmp_path / "none.toml"))
    assert parse("--cid=3").cid == 3
    assert list_hosts() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[host.web]\nnonsense = 1\n", "host.web.nonsense: no such key"),
        ("[default]\nhelp = true\n", "default.help: no such key"),
        ("[default]\nkeepalive = -1\n", "default.keepalive: ERROR: illegal value '-1'"),
        ("[default]\nkeepalive = [1]\n", "default.keepalive: [1] is no value"),
        ("[hosts]\n", "hosts: no such table"),
        ("host = 1\n", "are tables"),
        ("[host]\nweb = 1\n", "host.web is no table"),
        ("[host.web\n", "config.toml: "),
        ("a = '\x00'\n", "config.toml: "),
    ],
)
def test_mistakes_name_file_and_key(write: Write, text: str, message: str) -> None:
    path = write(text)
    with pytest.raises(VshError) as caught:
        parse("--vm_name=web")
    assert str(path) in caught.value.brief
    assert message in caught.value.brief
    assert caught.value.status == 64


def test_file_that_others_may_write_is_refused(write: Write) -> None:
    write(HOSTS, mode=0o620)
    with pytest.raises(VshError, match="other users can write"):
        parse("--vm_name=web")


@pytest.mark.root
def test_file_of_somebody_else_is_refused(write: Write) -> None:
    os.chown(write(HOSTS), 65534, 65534)
    with pytest.raises(VshError, match="belongs to uid 65534"):
        parse("--vm_name=web")


@pytest.mark.parametrize(
    ("make", "kind"),
    [(os.mkdir, "a directory"), (os.mkfifo, "a FIFO"), (lambda path: os.symlink("/dev/zero", path), "a device")],
)
def test_special_file_is_refused_at_once(vshd: Vshd, tmp_path: Path, make: Callable[[Path], None], kind: str) -> None:
    path = tmp_path / "special"
    make(path)
    done = vshd.run("--", "true", env={**ENVIRONMENT, "VSH_CONFIG": str(path)})
    assert done.returncode == 64
    assert done.stderr.startswith(f"vsh: {path} is {kind}, not a configuration file\n".encode())


def test_dev_null_is_no_configuration(vshd: Vshd) -> None:
    done = vshd.run("--", "echo", "hi", env={**ENVIRONMENT, "VSH_CONFIG": "/dev/null"})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hi\n", b"")
    hosts = subprocess.run(
        [sys.executable, "-m", "vsh", "--list_hosts"], env={**ENVIRONMENT, "VSH_CONFIG": "/dev/null"}, check=True
    )
    assert hosts.returncode == 0


def test_byte_order_mark_is_skipped(write: Write) -> None:
    write("\ufeff" + HOSTS)
    assert parse("--vm_name=web").user == "alice"


def test_alias_works_for_real(vshd: Vshd, write: Write) -> None:
    path = write(f'[host.here]\nunix = "{vshd.path}"\nenv = ["A=from config"]\n')
    argv = [*vshd.argv()[:3], "--vm_name=here", "--", "sh", "-c", "echo $A"]
    env = {**ENVIRONMENT, "VSH_CONFIG": str(path)}
    done = subprocess.run(argv, env=env, capture_output=True, check=False, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout) == (0, b"from config\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_offers_flags_and_names(shell: str) -> None:
    script = render_completion(shell)
    assert script
    assert "vm_name" in script
    assert "list_hosts" in script


def test_completion_of_bash_completes(vshd: Vshd, write: Write, tmp_path: Path) -> None:
    path = write("[host.web]\ncid = 3\n[host.wet]\ncid = 4\n[host.dry]\ncid = 5\n")
    launcher = tmp_path / "bin" / "vsh"
    launcher.parent.mkdir()
    launcher.write_text(f'#!/bin/sh\nexec {vshd.argv()[0]} -m vsh "$@"\n')
    launcher.chmod(0o755)
    vshd.run("--detach=build", "--", "true")
    script = (
        'eval "$(vsh --completion=bash)"; COMP_WORDS=(vsh --vm_name we); COMP_CWORD=2; _vsh; echo "${COMPREPLY[@]}"; '
        'COMP_WORDS=(vsh --vm_name = w); COMP_CWORD=3; _vsh; echo "${COMPREPLY[@]}"; '
        'COMP_WORDS=(vsh --conn); COMP_CWORD=1; _vsh; echo "${COMPREPLY[@]}"; '
        f"COMP_WORDS=(vsh --unix = {vshd.path} --attach = bu); COMP_CWORD=6; "
        '_vsh; echo "${COMPREPLY[@]}"; '
        f"COMP_WORDS=(vsh --unix {vshd.path} --wait bu); COMP_CWORD=4; "
        '_vsh; echo "${COMPREPLY[@]}"'
    )
    env = {
        **ENVIRONMENT,
        "VSH_CONFIG": str(path),
        "VMKIT_RUNTIME_DIR": str(tmp_path / "none"),
        "PATH": f"{launcher.parent}:{ENVIRONMENT['PATH']}",
    }
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, check=True, timeout=DEADLINE_S)
    assert done.stdout == b"web wet\nweb wet\n--connect_timeout\nbuild\nbuild\n", done.stderr


def test_completion_for_an_unknown_shell(vshd: Vshd) -> None:
    done = subprocess.run(
        [*vshd.argv()[:3], "--completion=tcsh"], env=ENVIRONMENT, capture_output=True, check=False, timeout=DEADLINE_S
    )
    assert done.returncode == 65
    assert b"bash, zsh and fish" in done.stderr


def test_alias_is_what_messages_call_it(vshd: Vshd, write: Write) -> None:
    path = write(f'[host.lab]\nunix = "{vshd.path}"\n')
    env = {**ENVIRONMENT, "VSH_CONFIG": str(path)}
    # Input comes once the session runs: only then is its process ended.
    argv = [sys.executable, "-m", "vsh", "--vm_name=lab", "--", "sh", "-c", "read x; kill -9 $PPID; sleep 80"]
    done = subprocess.run(argv, env=env, input=b"x\n", capture_output=True, check=False, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (123, b"vsh: lost the connection to lab: the connection ended\n")


def test_alias_that_was_taken_for_a_command_is_told(write: Write, tmp_path: Path) -> None:
    path = write('[host.lab]\nuser = "root"\n')
    env = {**ENVIRONMENT, "VSH_CONFIG": str(path), "VMKIT_RUNTIME_DIR": str(tmp_path)}
    argv = [sys.executable, "-m", "vsh", "lab"]
    done = subprocess.run(argv, env=env, capture_output=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert b"hint: 'lab' was taken for a command; the machine is vsh --vm_name lab" in done.stderr


def test_wrong_value_names_the_hosts_table(write: Write) -> None:
    write('[host.lab]\nunix = "/x"\nkeepalive = "soon"\n')
    with pytest.raises(VshError, match=r"host\.lab"):
        apply_config(parse_flags(["--vm_name=lab"]))
