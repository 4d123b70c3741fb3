"""`vmkit up` from a recipe to the next command to type, and everything it says when it cannot."""

import json
import os
import shlex
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vmkit.cli.conftest import Done, Program, Vmkit
from vsh.registry import find_machine, read_machines


def started_programs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_up_says_what_it_has_chosen_and_what_to_type_next(up: Vmkit) -> None:
    done = up("ready")
    assert done.status == 0, done.err
    first, *rest = done.out.splitlines()
    assert first.startswith("my is ready: CID 3, accelerator tcg, backend user, ")
    assert first.endswith(" s")
    shell, stop = rest
    assert shell.endswith("vsh --cid 3")
    assert stop.endswith("vmkit down my")
    assert "vmkit: starting QEMU\nvmkit: plugging the vsock device\nvmkit: booting\n" in done.err


def test_up_prints_its_answer_in_one_piece(recipe: str, program: Program, vmkit: Vmkit) -> None:
    """`up | head -1` must not end the machine, also where Python's streams have no buffer."""
    # Each write is a datagram.
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, its:
        for words in ((), ("--reuse",)):
            where = ("--accel", "tcg", "--backend", "user", "--append", "fake=ready")
            environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
            done = program("up", recipe, *where, *words, stdout=its, env=environ)
            assert done.returncode == 0, done.stderr.decode()
            ours.settimeout(0)
            piece = ours.recv(4096)
            assert piece.startswith(b"my is ")
            assert len(piece.splitlines()) == 3
            with pytest.raises(BlockingIOError):
                ours.recv(4096)


def test_up_quietly_says_one_line(up: Vmkit) -> None:
    done = up("ready", "-q")
    assert len(done.out.splitlines()) == 1
    assert done.err == ""


def test_up_in_json_has_what_a_program_needs(up: Vmkit) -> None:
    answer = json.loads(up("ready", "--json", "--name", "m", "--cid", "77").out)
    assert set(answer) == {
        "name", "cid", "image", "accelerator", "accelerator_reason", "backend", "backend_reason", "seconds",
        "directory", "shell", "wall", "gdb", "started_by", "snapshot", "architecture",
    }  # fmt: skip
    assert (answer["name"], answer["cid"], answer["shell"]) == ("m", 77, ["vsh", "--cid", "77"])
    assert Path(answer["directory"]).is_dir()


def test_layer_of_the_wall_that_is_missing_is_told(up: Vmkit, vmkit: Vmkit) -> None:
    lines = up("ready-without-a-kernel-layer").out.splitlines()
    assert [line for line in lines if "wall" in line] == [
        "  the wall's kernel layer is missing: the kernel has no BTF",
    ]
    name = lines[0].split()[0]
    shown = [line.split(None, 2) for line in vmkit("status", name).out.splitlines() if line.startswith("wall ")]
    assert shown == [
        ["wall", "transport", "off"],
        ["wall", "daemon", "on"],
        ["wall", "kernel", "missing: the kernel has no BTF"],
    ]
    assert json.loads(vmkit("status", name, "--json").out)["wall"]["daemon"] == "on"


def test_up_that_fails_tells_cause_console_and_logs(up: Vmkit) -> None:
    done = up("panic", "-q")
    assert done.status == 1
    lines = done.err.splitlines()
    assert lines[0].startswith("vmkit: 'my' did not start: the guest's kernel panicked: VFS: Unable to mount root fs")
    assert "  the console's last lines:" in lines
    assert lines[-1] == "hint: the logs are kept: vmkit logs my"


def test_console_of_a_boot_is_shown_as_it_comes(up: Vmkit) -> None:
    done = up("panic", "--console")
    assert "[    1.0] Kernel panic - not syncing" in done.err
    assert "vmkit: booting" not in done.err


@pytest.mark.parametrize("words", [["-q"], ["--console"]])
def test_words_of_a_guest_cannot_steer_the_terminal(up: Vmkit, vmkit: Vmkit, words: list[str]) -> None:
    done = up("hostile-panic", *words)
    shown = done.out + done.err + vmkit("logs", "my").out + vmkit("logs", "my", "--kind", "events").out
    assert "the guest's kernel panicked: why\n" in done.err
    assert "seen\ufffd\n" in done.err
    assert not any(letter in shown for letter in "\x1b\x07\x9b\u202e\r")


def test_gdb_alone_is_a_socket_and_a_port_is_warned_about(up: Vmkit, vmkit: Vmkit) -> None:
    done = up("ready", "--gdb")
    machine = find_machine(name="my")
    assert machine is not None
    assert f"in gdb:   target remote {machine.directory}/gdb.sock\n" in done.out
    assert "warning" not in done.err
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = up("ready", f"--gdb={port}", "--json")
    assert json.loads(done.out)["gdb"] == f"127.0.0.1:{port}"
    assert f"vmkit: warning: every user of this host can control the guest through port {port};" in done.err


@pytest.mark.parametrize(
    ("words", "gdb"),
    [
        (["--gdb", "{recipe}"], "chardev:gdb"),
        (["{recipe}", "--gdb"], "chardev:gdb"),
        (["--gdb", "--name", "x", "{recipe}"], "chardev:gdb"),
        (["--gdb", "1234", "{recipe}"], "tcp:127.0.0.1:1234"),
        (["{recipe}", "--gdb=1234"], "tcp:127.0.0.1:1234"),
    ],
)
def test_word_behind_gdb_is_a_port_or_the_image(vmkit: Vmkit, recipe: str, words: list[str], gdb: str) -> None:
    done = vmkit("up", "--dry-run", "--json", *(word.format(recipe=recipe) for word in words))
    answer = json.loads(done.out)
    assert answer["image"].splitlines()[0] == "image my"
    assert answer["qemu"][answer["qemu"].index("-gdb") + 1] == gdb


@pytest.mark.parametrize(
    ("words", "brief", "hint"),
    [
        (["--name", "m"], "a machine named 'm' is running", "vmkit down m, or choose another --name"),
        (["--cid", "77"], "CID 77 is in use by the machine 'm'", "vmkit down m, or choose another --cid"),
    ],
)
def test_name_or_cid_in_use_is_refused_before_vmkit_builds_or_starts_anything(
    up: Vmkit, words: list[str], brief: str, hint: str
) -> None:
    assert up("ready", "--name", "m", "--cid", "77").status == 0
    done = up("ready", *words)
    assert (done.status, done.out, done.err) == (1, "", f"vmkit: {brief}\nhint: {hint}\n")


def test_reuse_takes_the_machine_that_is_ready(up: Vmkit) -> None:
    assert up("ready").status == 0
    done = up("ready", "--reuse")
    assert done.out.splitlines()[0] == "my is running already: CID 3"
    answer = json.loads(up("ready", "--reuse", "--json").out)
    assert (answer["name"], answer["cid"], answer["state"]) == ("my", 3, "ready")
    assert len(read_machines()) == 1


def test_reuse_starts_when_there_is_none(up: Vmkit) -> None:
    assert "is ready" in up("ready", "--reuse").out


def test_reuse_by_several_at_once_starts_one_machine(program: Program, recipe: str) -> None:
    """As the jobs of `make -j` do: the others wait for the one that starts it."""
    words = ["up", recipe, "--accel", "tcg", "--backend", "user", "--append", "fake=ready", "--reuse"]
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: program(*words), range(4)))
    assert [one.returncode for one in done] == [0] * 4, [one.stderr for one in done]
    first = sorted(one.stdout.decode().splitlines()[0].partition(":")[0] for one in done)
    assert first == ["my is ready", *["my is running already"] * 3]
    assert [machine.name for machine in read_machines()] == ["my"]


def test_second_up_of_an_image_takes_the_next_name(up: Vmkit) -> None:
    up("ready")
    assert up("ready").out.startswith("my-2 is ready: CID 4")


@pytest.mark.parametrize(
    ("words", "said", "status"),
    [
        (("--cid", "2"), "vmkit: --cid must be between 3 and 4294967294, not 2", 64),
        (("--cid", "4294967295"), "vmkit: --cid must be between 3 and 4294967294, not 4294967295", 64),
        (("--cid", "x"), "vmkit: Invalid value for '--cid'", 64),
        (("--name", "a/b"), "vmkit: 'a/b' cannot be a machine's name", 64),
        (("--memory", "much"), "vmkit: 'much' is not an amount of memory", 64),
        (("--memory", "1M"), "vmkit: --memory must be at least 64 MiB, not 1", 64),
        (("--memory", "900000G"), "vmkit: the machine asks for 921600000 MiB of memory", 1),
        (("--cpus", "0"), "vmkit: --cpus must be between 1 and 255, not 0", 64),
        (
            ("--timeout", "nan"),
            "vmkit: Invalid value for '--timeout': must be between 0 and 604800 seconds, not nan",
            64,
        ),
        (("--timeout", "-1"), "vmkit: Invalid value for '--timeout'", 64),
        (("--timeout", "1e300"), "vmkit: Invalid value for '--timeout'", 64),
        (("--timeout", "0"), "vmkit: --timeout must be above 0 and at most 604800 seconds, not 0", 64),
        (("--kernel", "/nowhere"), "vmkit: cannot read the kernel /nowhere: No such file or directory", 1),
        (("--kernel", "/"), "vmkit: cannot read the kernel /: Is a directory", 1),
        (("--root", "/nowhere"), "vmkit: cannot use the root /nowhere: No such file or directory", 1),
        (("--root", "/"), "vmkit: cannot use the root /: it is a directory", 1),
        (
            ("--root", "/proc/self/exe"),
            "vmkit: vmkit cannot tell what /proc/self/exe is",
            64,
        ),
        (("--disk", "/nowhere"), "vmkit: cannot use the disk /nowhere: No such file or directory", 1),
        (("--rwdisk", "/nowhere"), "vmkit: cannot use the disk /nowhere: No such file or directory", 1),
        (("--disk", "/usr"), "vmkit: cannot use the disk /usr: it is a directory", 1),
        (("--disk", "/dev/zero"), "vmkit: cannot use the disk /dev/zero: it is neither a file nor a block device", 1),
        (("--disk", "/proc/self/cmdline"), "vmkit: cannot use the disk /proc/self/cmdline: it is smaller than one", 1),
        (("--gdb", "0"), "vmkit: --gdb must be a port between 1 and 65535, not 0", 64),
        (("--gdb", "x"), "vmkit: --gdb must be a port, not 'x'", 64),
        (("--cpu", "a b"), "vmkit: 'a b' is not a CPU model", 64),
        (("--append", "a\nb"), "vmkit: --append must not contain a NUL or a newline", 64),
        (("--append", "x" * 3000), "vmkit: the kernel command line is too long", 64),
        (("--accel", "fast"), "vmkit: Invalid value for '--accel'", 64),
        (("--backend", "vhost"), "vmkit: this host cannot run the backend vhost: VSH_AF_VSOCK=deny is set", 1),
        (("--nope",), "vmkit: No such option", 64),
    ],
)
def test_up_refuses_what_cannot_be(up: Vmkit, words: tuple[str, ...], said: str, status: int) -> None:
    done = up("ready", "-q", *words)
    assert done.err.startswith(said)
    assert "Traceback" not in done.err
    assert done.status == status
    assert done.out == ""
    assert read_machines() == []


def test_bytes_that_are_no_text_reach_the_guests_command_line(up: Vmkit) -> None:
    done = up("ready", "--append", "fake=ready x=\udcff")
    assert done.status == 0, done.err
    machine = find_machine(name="my")
    assert machine is not None
    assert b"x=\xff" in Path(f"/proc/{machine.record['qemu_pid']}/cmdline").read_bytes()


@pytest.mark.parametrize("image", ["nonsense", "./nothing.toml", "/", ""])
def test_unknown_image_is_told(vmkit: Vmkit, image: str) -> None:
    done = vmkit("up", image)
    assert done.status in (1, 64)
    assert done.err.startswith("vmkit: ")
    assert "Traceback" not in done.err


def plan(up: Vmkit, *words: str) -> Done:
    return up("ready", "--dry-run", *words)


def test_dry_run_prints_a_command_for_a_shell_and_starts_nothing(
    up: Vmkit, folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "qemu-system-x86_64").write_text(
        '#!/bin/sh\ncase "$1" in --version) echo "QEMU emulator version 9.0.0";;\n*) touch "$0.started.$$";; esac\n'
    )
    (tmp_path / "qemu-system-x86_64").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = plan(up, "--accel", "auto", "--name", "two words"[:3], "--memory", "1G")
    assert done.status == 0, done.err
    assert "digest " in done.out
    (command,) = [line for line in done.out.splitlines() if "qemu-system-x86_64" in line]
    argv = shlex.split(command)
    assert "-S" not in argv
    assert "{" not in command
    assert argv[argv.index("-m") + 1] == "1024M"
    assert argv[argv.index("-chardev") + 1] == "stdio,id=console,mux=on,signal=off"
    assert Path(argv[argv.index("-kernel") + 1]).is_file()
    assert started_programs(tmp_path) == ["qemu-system-x86_64"]
    assert read_machines() == []
    # And a shell takes it as it is.
    subprocess.run(["sh", "-c", command], check=True, timeout=30)
    assert len(started_programs(tmp_path)) == 2


def test_dry_run_comments_are_comments_for_a_shell(up: Vmkit) -> None:
    text = plan(up).out
    tail = text[text.index("# accelerator") :]
    script = "\n".join(line for line in tail.splitlines() if line.startswith("#"))
    assert subprocess.run(["sh", "-c", script], check=True, capture_output=True, timeout=30).stdout == b""
    assert "device_add" in script


def test_dry_run_in_json(up: Vmkit) -> None:
    answer = json.loads(plan(up, "--json").out)
    assert answer["qemu"][0].endswith("qemu-system-x86_64")
    assert [command["execute"] for command in answer["plug"]] == ["chardev-add", "device_add"]


def test_dry_run_of_an_image_that_is_not_built_says_so(
    up: Vmkit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(tmp_path / "empty"))
    done = plan(up)
    assert done.status == 0, done.err
    assert done.out.endswith("# QEMU's command is known when the image is built: vmkit build\n")
    assert json.loads(plan(up, "--json").out)["qemu"] is None


@pytest.mark.parametrize("verb", ["up", "build"])
def test_old_name_of_an_image_works_and_prints_the_new_one(program: Program, recipe: str, verb: str) -> None:
    old, new = program(verb, "host", "--dry-run"), program(verb, "nested", "--dry-run")
    assert (old.returncode, new.returncode) == (0, 0), old.stderr
    assert old.stdout == new.stdout
    assert old.stdout.startswith(b"image nested\n")
    assert new.stderr == b""
    assert old.stderr == b"vmkit: warning: the image 'host' is called 'nested' now\n"


def test_next_command_is_the_path_where_the_name_is_not_found(
    up: Vmkit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_qemu: Path
) -> None:
    """The fake QEMU needs its Python, and nothing else."""
    up("ready", "-q")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "bin").mkdir()
    for name in ("vmkit", "vsh"):
        (tmp_path / "bin" / name).write_text("")
    monkeypatch.chdir(tmp_path)
    from vmkit.cli import boot as module  # noqa: PLC0415

    monkeypatch.setattr("sys.argv", [str(tmp_path / "bin" / "vmkit")])
    assert module._find_command("vsh") == "bin/vsh"
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert module._find_command("vsh") == str(tmp_path / "bin" / "vsh")
    assert module._find_command("unknown") == "unknown"
