"""What crun is asked to run: the documents of a container, from the settings of its image."""

import json

import pytest

from vmkit.containers.containers import Container, parse_line
from vmkit.containers.plan import BUSYBOX, DOCUMENT_BYTES_MAX, choose_command, plan_container
from vmkit.errors import ConfigError
from vmkit.roots.settings import ContainerSettings

NONE = ContainerSettings()


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "asked", "expected"),
    [
        ((), (), (), None),
        # A shell without a terminal ends at once.
        ((), ("bash",), (), None),
        ((), ("/bin/sh", "-l"), (), None),
        ((), ("sh", "-c", "serve"), (), ("sh", "-c", "serve")),
        (("/entry",), ("sh",), (), ("/entry", "sh")),
        ((), ("nginx", "-g", "daemon off;"), (), ("nginx", "-g", "daemon off;")),
        # The user's own words count as they are.
        ((), ("nginx",), ("sh",), ("sh",)),
        (("/entry",), ("serve",), ("test", "-v"), ("/entry", "test", "-v")),
    ],
)
def test_first_process_is_the_images_command(
    entrypoint: tuple[str, ...], cmd: tuple[str, ...], asked: tuple[str, ...], expected: tuple[str, ...] | None
) -> None:
    assert choose_command(ContainerSettings(entrypoint=entrypoint, cmd=cmd), asked) == expected


def test_settings_of_the_image_become_the_process() -> None:
    settings = ContainerSettings(env=("PATH=/opt/bin", "A=1"), working_dir="/srv", user="ann", cmd=("serve",))
    plan = plan_container("web", settings, (), "x86_64")
    config = json.loads(plan.config)
    assert config["process"]["args"] == ["serve"]
    assert config["process"]["cwd"] == "/srv"
    assert config["process"]["env"] == ["PATH=/opt/bin", "A=1"]
    assert config["hostname"] == "web"
    # Commands beside it have the same variables and limits.
    assert json.loads(f"[{plan.env}]") == ["PATH=/opt/bin", "A=1"]
    assert json.loads(f"{{{plan.process}}}")["capabilities"] == config["process"]["capabilities"]
    assert (plan.cwd, plan.user) == ('"/srv"', "ann")


def test_directory_of_an_image_begins_at_its_root() -> None:
    plan = plan_container("web", ContainerSettings(working_dir="srv/app"), (), "x86_64")
    # crun's own rule: cwd is an absolute path.
    assert (json.loads(plan.config)["process"]["cwd"], plan.cwd) == ("/srv/app", '"/srv/app"')


def test_container_without_a_command_waits_by_a_program_of_the_guest() -> None:
    plan = plan_container("web", NONE, (), "x86_64")
    config = json.loads(plan.config)
    assert plan.command is None
    assert config["process"]["args"][0] == BUSYBOX
    assert [mount["source"] for mount in config["mounts"] if mount["destination"] == BUSYBOX] == ["/bin/busybox"]
    assert config["process"]["cwd"] == "/"
    assert config["process"]["env"][0].startswith("PATH=")


def test_container_is_walled_in_but_for_the_network() -> None:
    config = json.loads(plan_container("web", NONE, (), "x86_64").config)
    # The guest's network: ports of containers are the guest's.
    kinds = {space["type"] for space in config["linux"]["namespaces"]}
    assert kinds == {"pid", "ipc", "uts", "mount", "cgroup"}
    assert not {"CAP_SYS_ADMIN", "CAP_MKNOD", "CAP_SYS_MODULE"} & set(config["process"]["capabilities"]["bounding"])
    rules = config["linux"]["seccomp"]["syscalls"]
    assert {"mount", "bpf", "kexec_load", "init_module"} <= set(rules[0]["names"])
    # AF_VSOCK leads to the host.
    assert {"index": 0, "value": 40, "op": "SCMP_CMP_EQ"} in [rule["args"][0] for rule in rules if "args" in rule]


def test_container_of_s390x_has_sockets() -> None:
    # A rule for one family would deny each socketcall(2) there that makes a socket.
    config = json.loads(plan_container("web", NONE, (), "s390x").config)
    assert [rule for rule in config["linux"]["seccomp"]["syscalls"] if "socket" in rule["names"]] == []


def test_image_with_too_many_variables_is_refused() -> None:
    settings = ContainerSettings(env=("A=" + "x" * DOCUMENT_BYTES_MAX,))
    with pytest.raises(ConfigError, match="more than"):
        plan_container("web", settings, (), "x86_64")


@pytest.mark.parametrize("user", ["a\nb", "\n"])
def test_user_of_two_lines_is_refused(user: str) -> None:
    with pytest.raises(ConfigError):
        plan_container("web", ContainerSettings(user=user), (), "x86_64")


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match="'m68k'"):
        plan_container("web", NONE, (), "m68k")


def test_guests_list_is_read() -> None:
    line = 'web\trunning\t77\t{"source": "oci:./web", "command": ["serve"]}'
    assert parse_line(line) == Container("web", "running", 77, "oci:./web", ("serve",))
    line = 'web\tstopped\t0\t{"source": "./root", "command": null}'
    assert parse_line(line) == Container("web", "stopped", 0, "./root", None)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "web",
        "web\trunning\t1",
        "web\tasleep\t1\t{}",
        "../web\trunning\t1\t{}",
        "web\trunning\tone\t{}",
        "web\trunning\t1\t[",
        "web\trunning\t1\t" + "[" * 100_000,
        'web\trunning\t1\t{"source": "a", "command": 5}',
        "web\trunning\t1\tnull",
    ],
)
def test_line_of_a_lying_guest_is_no_container(line: str) -> None:
    assert parse_line(line) is None
