"""A machine's token on the host: made for its owner alone, told to nobody, gone with the machine."""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.vmkit.machine.test_qemu import HARDWARE
from vmkit.errors import HostError, MachineError
from vmkit.image.formats.cpio import read_cpio, render_cpio
from vmkit.image.formats.tree import Tree, file_node
from vmkit.machine import stop
from vmkit.machine.launch import Layout
from vmkit.machine.qemu import plan_qemu, render_kernel_command_line
from vmkit.machine.registry import find_state_directory
from vmkit.machine.spec import Backend, MachineSpec
from vmkit.machine.start import Started
from vmkit.machine.token import (
    TOKEN_PATH,
    append_token,
    find_initrd_path,
    find_token_path,
    make_token,
    needs_token,
)
from vsh.address import address_of
from vsh.registry import find_machine
from vsh.token import read_token

Boot = Callable[..., Started]


@pytest.fixture
def any_umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0o022)

    def change(mask: int) -> None:
        os.umask(mask)

    yield change
    os.umask(before)


@pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o377])
def test_token_is_its_owners_alone_whatever_the_umask(
    tmp_path: Path, any_umask: Callable[[int], None], mask: int
) -> None:
    any_umask(mask)
    make_token(tmp_path)
    status = find_token_path(tmp_path).lstat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == os.geteuid()
    assert len(read_token(str(find_token_path(tmp_path)))) == 32


def test_every_machine_has_another_token(tmp_path: Path) -> None:
    tokens = set()
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        make_token(tmp_path / name)
        tokens.add(read_token(str(tmp_path / name / "token")))
    assert len(tokens) == 3


def test_what_stands_in_the_tokens_place_is_not_written_to(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    find_token_path(tmp_path).symlink_to(target)
    with pytest.raises(HostError, match="cannot write the machine's token"):
        make_token(tmp_path)
    assert not target.exists()
    find_token_path(tmp_path).unlink()
    find_token_path(tmp_path).write_text("there")
    with pytest.raises(HostError, match="File exists"):
        make_token(tmp_path)
    assert find_token_path(tmp_path).read_text() == "there"


@pytest.mark.parametrize(
    ("backend", "asked", "needed"),
    [
        (Backend.VHOST, False, True),
        (Backend.VHOST, True, True),
        (Backend.USER, False, False),
        (Backend.USER, True, True),
    ],
)
def test_vhost_always_has_a_token(backend: Backend, asked: bool, needed: bool) -> None:
    assert needs_token(backend, asked=asked) is needed


def test_logs_that_are_kept_are_never_the_token() -> None:
    assert Layout.TOKEN not in Layout.LOGS


# What QEMU is told.


def test_qemu_gets_a_path_and_the_guest_a_word() -> None:
    plan = plan_qemu(replace(HARDWARE, token=Path("/run/m,x/token")))
    argv = plan.render_argv(console_fd=11, qmp_fd=12, memory_fd=13, ready_port=7777)
    assert argv[argv.index("-smbios") + 1] == "type=11,path=/run/m,,x/token"
    assert argv[argv.index("-append") + 1].endswith("vmkit.ready=7777 vmkit.name=tiny vmkit.token=smbios")


def test_machine_without_a_token_has_no_word_of_it() -> None:
    argv = plan_qemu(HARDWARE).argv
    assert "-smbios" not in argv
    assert "token" not in " ".join(argv)


def test_users_kernel_arguments_still_come_last() -> None:
    line = render_kernel_command_line(replace(HARDWARE, token=Path("/t"), spec=MachineSpec(append="mine")))
    assert line.endswith("vmkit.token=smbios mine")


def test_command_by_hand_needs_no_machines_token() -> None:
    by_hand = plan_qemu(replace(HARDWARE, token=Path("/run/m/token"))).render_by_hand()
    assert by_hand == plan_qemu(HARDWARE).render_by_hand()


# The life of a machine, with a QEMU that plays.


def read_everything(pids: list[int]) -> dict[str, bytes]:
    """Command lines and environments of these processes and all others that can be read."""
    seen = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            for name in ("cmdline", "environ"):
                try:
                    seen[f"{folder.name}/{name}"] = (folder / name).read_bytes()
                except OSError:
                    continue
    assert all(f"{pid}/cmdline" in seen for pid in pids)
    return seen


def assert_hidden(token: bytes, texts: dict[str, bytes]) -> None:
    for name, text in texts.items():
        for form in (token, token.hex().encode(), token.hex().upper().encode()):
            assert form not in text, f"the token is in {name}"


def test_token_is_in_one_file_and_nowhere_else(boot: Boot, folders: Path) -> None:
    started = boot("ready", token=True)
    entry = find_machine(name="tiny")
    assert entry is not None
    token = read_token(str(started.directory / "token"))
    assert address_of(entry).token_file == str(started.directory / "token")
    assert entry.record["token"] == "demanded"
    assert_hidden(token, read_everything([started.monitor.pid, int(str(entry.record["qemu_pid"]))]))
    files = {str(path): path.read_bytes() for path in folders.rglob("*") if path.is_file() and path.name != "token"}
    assert str(started.directory / "argv.txt") in files
    assert str(started.directory / "qmp.log") in files
    assert_hidden(token, files)
    stop.kill(entry)
    started.monitor.wait(10)
    assert not started.directory.exists()


def test_evidence_of_a_bad_end_holds_no_token(boot: Boot, folders: Path) -> None:
    started = boot("ready", token=True)
    token = read_token(str(started.directory / "token"))
    entry = find_machine(name="tiny")
    assert entry is not None
    os.kill(int(str(entry.record["qemu_pid"])), 9)
    started.monitor.wait(10)
    kept = {path.name: path.read_bytes() for path in (find_state_directory() / "tiny").iterdir()}
    assert "qmp.log" in kept
    assert "token" not in kept
    assert_hidden(token, kept)


def test_start_that_fails_leaves_no_token(boot: Boot, folders: Path) -> None:
    with pytest.raises(MachineError):
        boot("panic", token=True)
    assert list((folders / "runtime").rglob("token*")) == []


def test_machine_without_a_token_works_as_before(boot: Boot) -> None:
    started = boot("ready")
    entry = find_machine(name="tiny")
    assert entry is not None
    assert entry.record["token"] is None
    assert address_of(entry).token_file == ""
    assert not (started.directory / "token").exists()


# The sockets of the `user` backend, which need no token.


def test_sockets_are_their_owners_alone_in_a_directory_that_is(
    boot: Boot, folders: Path, any_umask: Callable[[int], None]
) -> None:
    any_umask(0)
    started = boot("ready", token=True)
    folder = started.directory
    sockets = [path for path in folder.iterdir() if stat.S_ISSOCK(path.lstat().st_mode)]
    assert {path.name for path in sockets} >= {"vsock.sock", "vsock.sock_7777", "monitor.sock", "console.sock"}
    for path in sockets:
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600, path
    while folder != folders:
        assert stat.S_IMODE(folder.lstat().st_mode) == 0o700, folder
        folder = folder.parent
    for path in started.directory.iterdir():
        assert not path.lstat().st_mode & 0o077, path


def test_guest_without_such_firmware_has_the_token_in_its_initramfs(tmp_path: Path) -> None:
    """Behind the image's own archive, at a multiple of four bytes, for root alone."""
    image = tmp_path / "image"
    tree = Tree()
    tree.add("init", file_node(b"#!/bin/sh\n", 0o755))
    image.write_bytes(render_cpio(tree) + b"\0")
    make_token(tmp_path)
    append_token(tmp_path, image)
    path = find_initrd_path(tmp_path)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    data = path.read_bytes()
    assert data.startswith(image.read_bytes())
    start = image.stat().st_size + -image.stat().st_size % 4
    node = {entry.path: entry.node for entry in read_cpio(data[start:])}[TOKEN_PATH]
    assert node.data == find_token_path(tmp_path).read_bytes()
    assert (node.mode, node.uid, node.gid) == (0o600, 0, 0)
    with pytest.raises(HostError, match="cannot write the machine's initramfs"):
        append_token(tmp_path, image)
