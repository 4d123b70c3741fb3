"""The wall's in-guest layers on real kernels: what each refuses, and that what is missing is said."""

import json
import struct
from pathlib import Path

import pytest

from tests.guest.conftest import Run
from tests.vmkit.image.wall.btf_maker import make_kernel_btf
from vmkit.image.build import find_built_image
from vmkit.image.formats.vmlinux import find_btf
from vmkit.image.recipe.config import load_image
from vmkit.image.wall.btf import find_functions, parse_btf
from vmkit.image.wall.layer import make_loader
from vsh.registry import find_machine

EPERM, ENODEV, EADDRINUSE = 1, 19, 98
# Runs in the guest: each word is a type and a CID to connect to, or `bind` and a port; prints an errno for each.
TRY = r"""
import socket, sys
for word in sys.argv[1:]:
    kind, _, number = word.partition(":")
    try:
        sock = socket.socket(40, {"stream": 1, "bind": 1, "dgram": 2, "seqpacket": 5}[kind])
        sock.settimeout(3)
        if kind == "bind":
            sock.bind((0xffffffff, int(number)))
        else:
            sock.connect((int(number), 9001))
        print(0)
    except OSError as error:
        print(error.errno or 110)
"""
OTHERS = (0, 1, 3, 4, 40, 1000, 0xFFFFFFFF)


def attempt(vsh: Run, name: str, *words: str, user: str = "root", prefix: tuple[str, ...] = ()) -> list[int]:
    command = [*prefix, "python3", "-I", "-S", "-", *words]
    done = vsh("--vm_name", name, f"--user={user}", "--", *command, stdin=TRY.encode())
    assert done.returncode == 0, done.stderr.decode()
    return [int(word) for word in done.stdout.split()]


def write_recipe(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.toml"
    path.write_text(f'extends = "tiny"\n{text}')
    return str(path)


def read_wall(vmkit: Run, name: str) -> dict[str, str]:
    wall: dict[str, str] = json.loads(vmkit("status", name, "--json").stdout)["wall"]
    return wall


@pytest.mark.parametrize("user", ["root", "user"])
def test_every_connect_but_to_the_host_is_refused(ready: str, vsh: Run, user: str) -> None:
    words = [f"{kind}:{cid}" for kind in ("stream", "seqpacket") for cid in OTHERS]
    assert attempt(vsh, ready, *words, user=user) == [EPERM] * len(words)
    assert EPERM not in attempt(vsh, ready, "stream:2", user=user)
    assert attempt(vsh, ready, *(f"dgram:{cid}" for cid in (1, 2, 3)), user=user) == [ENODEV] * 3


def test_nobody_else_binds_vshds_port(ready: str, vsh: Run) -> None:
    assert attempt(vsh, ready, "bind:9001", "bind:9002") == [EADDRINUSE, 0]
    assert attempt(vsh, ready, "bind:9001", "bind:9002", user="user") == [EPERM, 0]
    # A root of a user namespace of one's own is still who made it.
    namespace = ("unshare", "-U", "-r")
    assert vsh("--vm_name", ready, "--user=user", "--", *namespace, "id", "-u").stdout == b"0\n"
    assert attempt(vsh, ready, "bind:9001", "stream:1", user="user", prefix=namespace) == [EPERM, EPERM]


def test_programs_have_outlived_their_loader_and_are_roots_alone(ready: str, vsh: Run, vmkit: Run) -> None:
    assert read_wall(vmkit, ready) == {"transport": "on", "daemon": "on", "kernel": "on"}
    assert b"raise-wall" not in vsh("--vm_name", ready, "--", "ps").stdout
    assert vsh("--vm_name", ready, "--", "ls", "/sys/fs/bpf").stdout.split() == [b"vshd_bind", b"vshd_connect"]
    assert vsh("--vm_name", ready, "--user=user", "--", "ls", "/sys/fs/bpf").returncode != 0


def test_port_is_held_while_vshd_is_started_again(ready: str, vsh: Run) -> None:
    script = "kill -9 $(cat /proc/1/task/1/children); echo killed"
    vsh("--vm_name", ready, "--", "sh", "-c", script)
    assert vsh("--vm_name", ready, "--", "echo", "again").stdout == b"again\n"


def test_recipe_opens_cids_ships_the_loopback_and_locks_modules(up: Run, vsh: Run, vmkit: Run, tmp_path: Path) -> None:
    text = 'modules_available = ["vsock_loopback"]\n[wall]\nconnect_cids = [7]\nlock_modules = true\n'
    done = up(write_recipe(tmp_path, "opened", text))
    assert done.returncode == 0, done.stderr.decode()
    assert EPERM not in attempt(vsh, "opened", "stream:7")
    assert attempt(vsh, "opened", "stream:8", "stream:1") == [EPERM, EPERM]
    find = "find /lib/modules/ -name vsock_loopback.ko"
    assert vsh("--vm_name", "opened", "--", "sh", "-c", find).stdout.strip()
    for load in ("modprobe vsock_loopback", "modprobe net-pf-40", f"insmod $({find})"):
        assert vsh("--vm_name", "opened", "--", "sh", "-c", load).returncode != 0, load
    assert b"vsock_loopback" not in vsh("--vm_name", "opened", "--", "cat", "/proc/modules").stdout


def test_loopback_that_root_loads_is_refused_by_the_kernel_layer(up: Run, vsh: Run, tmp_path: Path) -> None:
    done = up(write_recipe(tmp_path, "loaded", 'modules_available = ["vsock_loopback"]\n'))
    assert done.returncode == 0, done.stderr.decode()
    assert vsh("--vm_name", "loaded", "--", "modprobe", "vsock_loopback").returncode != 0
    insmod = "insmod $(find /lib/modules/ -name vsock_loopback.ko)"
    assert vsh("--vm_name", "loaded", "--", "sh", "-c", insmod).returncode == 0
    assert attempt(vsh, "loaded", "stream:1", "seqpacket:1", "stream:3", user="user") == [EPERM] * 3
    # Root can take the layer away again; that is seen: nothing pinned, and the connect goes through to vshd.
    vsh("--vm_name", "loaded", "--", "sh", "-c", "rm /sys/fs/bpf/*; sleep 1")
    assert attempt(vsh, "loaded", "stream:1") == [0]


def test_wall_that_is_off_is_off_and_said_to_be(up: Run, vsh: Run, vmkit: Run, tmp_path: Path) -> None:
    text = 'modules = ["vsock_loopback"]\n[wall]\ntransport = false\ndaemon = false\nkernel = false\n'
    done = up(write_recipe(tmp_path, "open", text))
    assert done.returncode == 0, done.stderr.decode()
    assert read_wall(vmkit, "open") == {"transport": "off", "daemon": "off", "kernel": "off"}
    assert attempt(vsh, "open", "stream:1", user="user") == [0]


def test_kernel_that_does_not_ask_bpf_is_told_and_the_other_layers_hold(up: Run, vmkit: Run, vsh: Run) -> None:
    done = up("--name", "deaf", "--append", "lsm=capability,landlock")
    assert done.returncode == 0, done.stderr.decode()
    said = "the wall's kernel layer is missing: its programs are attached, but not asked: 'bpf' is not in the kernel's"
    assert said in done.stdout.decode()
    wall = read_wall(vmkit, "deaf")
    assert (wall["transport"], wall["daemon"]) == ("on", "on")
    assert wall["kernel"].startswith("missing: its programs are attached, but not asked")
    assert attempt(vsh, "deaf", "bind:9001", user="user") == [EADDRINUSE]


def test_loader_of_another_kernel_is_told_and_changes_nothing(up: Run, vmkit: Run, vsh: Run, tmp_path: Path) -> None:
    (tmp_path / "raise-wall").write_bytes(make_loader(make_kernel_btf(), (), 9001))
    text = '[files]\n"/usr/lib/vmkit/raise-wall" = { source = "raise-wall", mode = 0o700 }\n'
    done = up(write_recipe(tmp_path, "stranger", text))
    said = "  the wall's kernel layer is missing: this is not the kernel that the image was built with"
    assert said in done.stdout.decode()
    assert b"the wall's kernel layer is missing" in vmkit("logs", "stranger").stdout
    assert vsh("--vm_name", "stranger", "--", "ls", "/sys/fs/bpf").stdout == b""


def test_ids_of_a_real_kernels_btf_are_those_of_its_hooks(built: None) -> None:
    """Read once more, by counting alone: each id is a function of the right name and three parameters."""
    image = find_built_image(load_image("tiny"))
    assert image is not None
    data = find_btf(image.kernel.read_bytes())
    types, names = list_types(data)
    hooks = ("bpf_lsm_socket_connect", "bpf_lsm_socket_bind")
    for name, function in find_functions(parse_btf(data), hooks).items():
        kind, name_off, prototype, _ = types[function.type_id - 1]
        assert (kind, names[name_off : names.index(b"\0", name_off)]) == (12, name.encode())
        kind, _, returns, members = types[prototype - 1]
        assert (kind, len(members) // 8) == (13, 3)
        said = [names[at : names.index(b"\0", at)] for at, _ in struct.iter_unpack("<II", members)]
        assert said == [b"sock", b"address", b"addrlen"]
        assert types[returns - 1][0] == 1


def list_types(data: bytes) -> tuple[list[tuple[int, int, int, bytes]], bytes]:
    """(kind, name, type, what follows) of every type, and the names."""
    header, type_off, type_len, str_off, str_len = struct.unpack_from("<IIIII", data, 4)
    each = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
    fixed = {1: 4, 3: 12, 14: 4, 17: 4}
    found, at = [], header + type_off
    while at < header + type_off + type_len:
        name, info, kind_of = struct.unpack_from("<III", data, at)
        kind = info >> 24 & 31
        size = fixed.get(kind, 0) + each.get(kind, 0) * (info & 0xFFFF)
        found.append((kind, name, kind_of, data[at + 12 : at + 12 + size]))
        at += 12 + size
    return found, data[header + str_off : header + str_off + str_len]


def test_image_that_demands_the_layer_does_not_come_up_without(up: Run, tmp_path: Path) -> None:
    image = write_recipe(tmp_path, "strict", '[wall]\nkernel = "required"\n')
    done = up(image, "--append", "lsm=capability")
    assert done.returncode != 0
    assert "the image demands the wall's kernel layer, which is missing" in done.stderr.decode()
    assert find_machine(name="strict") is None


def test_debian_12s_kernel_has_the_layer_too(up: Run, vsh: Run, vmkit: Run, tmp_path: Path) -> None:
    done = up(write_recipe(tmp_path, "older", 'suite = "trixie"\nkernel_suite = "bookworm"\n'))
    assert done.returncode == 0, done.stderr.decode()
    assert vsh("--vm_name", "older", "--", "uname", "-r").stdout.startswith(b"6.1.")
    assert read_wall(vmkit, "older") == {"transport": "on", "daemon": "on", "kernel": "on"}
    words = [f"{kind}:{cid}" for kind in ("stream", "seqpacket") for cid in OTHERS]
    assert attempt(vsh, "older", *words, user="user") == [EPERM] * len(words)
    assert attempt(vsh, "older", "bind:9001", user="user") == [EPERM]
