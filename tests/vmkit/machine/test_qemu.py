"""QEMU's argv as a value: golden lines, and what depends on what."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from vmkit.architectures import ARCHITECTURES, HOST
from vmkit.errors import ConfigError
from vmkit.machine.hardware import Hardware
from vmkit.machine.qemu import plan_qemu, render_kernel_command_line
from vmkit.machine.spec import Accelerator, Backend, DiskMode, DiskSpec, MachineSpec, StoredRoot

HARDWARE = Hardware(
    spec=MachineSpec(),
    name="tiny",
    cid=3,
    directory=Path("/run/tiny"),
    accelerator=Accelerator.TCG,
    backend=Backend.USER,
    qemu="/usr/bin/qemu-system-x86_64",
    kernel=Path("/k"),
    initrd=Path("/i"),
    kernel_args=("quiet", "lsm=bpf"),
    ready_port=7777,
)

GOLDEN_USER = """\
/usr/bin/qemu-system-x86_64 -name guest=tiny,process=vmkit-tiny -nodefaults -no-user-config -display none
-S -action reboot=shutdown -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine q35,sata=off,smbus=off,usb=off,hpet=off,memory-backend=ram -accel tcg -cpu max,cx16=off,erms=off,fsrm=off
-smp 1 -m 256M
-object memory-backend-file,mem-path=/proc/self/fd/13,id=ram,size=256M,share=on
-device pcie-root-port,id=vsock-port,slot=1
-device pcie-root-port,id=folder-port-0,slot=3 -device pcie-root-port,id=folder-port-1,slot=4
-chardev socket,id=console,fd=11 -serial chardev:console -chardev socket,id=qmp,fd=12 -mon chardev=qmp,mode=control
-device vmgenid,guid=auto -kernel /k -initrd /i
-append console=ttyS0 quiet panic=-1 cryptomgr.notests no_timer_check lsm=bpf vmkit.ready=7777 vmkit.name=tiny"""


def test_argv_for_the_user_backend_is_golden() -> None:
    argv = plan_qemu(HARDWARE).render_argv(console_fd=11, qmp_fd=12, memory_fd=13, ready_port=7777)
    assert " ".join(argv) == " ".join(GOLDEN_USER.splitlines())


def test_vhost_backend_plugs_one_device() -> None:
    plan = plan_qemu(replace(HARDWARE, backend=Backend.VHOST, ready_port=None))
    argv = plan.render_argv(console_fd=11, qmp_fd=12, memory_fd=13, ready_port=40123)
    assert argv[-1].endswith("vmkit.ready=40123 vmkit.name=tiny")
    (command,) = plan.plug
    assert command.name == "device_add"
    assert command.arguments == {
        "driver": "vhost-vsock-pci",
        "id": "vsock0",
        "bus": "vsock-port",
        "guest-cid": 3,
        "vhostfd": "vsock-fd",
    }


def test_user_backend_plugs_a_chardev_on_a_passed_descriptor() -> None:
    chardev, device = plan_qemu(HARDWARE).plug
    assert (chardev.name, device.name) == ("chardev-add", "device_add")
    assert device.arguments["driver"] == "vhost-user-vsock-pci"


def test_network_is_there_when_asked_for_alone() -> None:
    argv = plan_qemu(replace(HARDWARE, spec=MachineSpec(netdev="tap,ifname=tap0,script=no"))).argv
    assert argv[argv.index("-netdev") + 1] == "tap,ifname=tap0,script=no,id=net0"
    assert "virtio-net-pci,netdev=net0,romfile=" in argv
    assert "net" not in " ".join(plan_qemu(HARDWARE).argv)


def test_kvm_uses_the_hosts_processor() -> None:
    argv = plan_qemu(replace(HARDWARE, accelerator=Accelerator.KVM)).argv
    assert argv[argv.index("-accel") + 1] == "kvm"
    assert argv[argv.index("-cpu") + 1] == "host"


# What differs from amd64's argv, and from each other's.
GOLDEN_EMULATED = {
    "arm64": (
        "-machine virt,gic-version=3,memory-backend=ram -accel tcg -cpu cortex-a72",
        "-device pcie-root-port,id=vsock-port,slot=1,power_controller_present=off",
        "console=ttyAMA0 ",
        "vsock-port",
    ),
    "riscv64": (
        "-machine virt,memory-backend=ram -accel tcg -cpu rv64",
        "-device pcie-root-port,id=vsock-port,slot=1,power_controller_present=off",
        "console=ttyS0 ",
        "vsock-port",
    ),
    "s390x": ("-machine s390-ccw-virtio,memory-backend=ram -accel tcg -cpu max", "", "console=ttysclp0 ", "pci.0"),
}


@pytest.mark.parametrize("name", GOLDEN_EMULATED)
def test_argv_of_another_architecture_is_its_rows(name: str) -> None:
    board, port, console, bus = GOLDEN_EMULATED[name]
    qemu = ARCHITECTURES[name].qemu
    plan = plan_qemu(replace(HARDWARE, spec=MachineSpec(architecture=name), qemu=qemu))
    argv = plan.render_argv(console_fd=11, qmp_fd=12, memory_fd=13, ready_port=7777)
    text = " ".join(argv)
    assert argv[0] == qemu
    assert f" {board} -smp 1 " in text
    assert port in text and ("pcie-root-port" in text) == bool(port)
    assert argv[-1].startswith(console)
    assert "vmgenid" not in text and "q35" not in text
    assert plan.plug[-1].arguments["bus"] == bus
    vhost = plan_qemu(replace(HARDWARE, spec=MachineSpec(architecture=name), backend=Backend.VHOST))
    assert vhost.plug[0].arguments["bus"] == bus


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_token_is_in_the_firmware_or_in_the_initramfs(name: str) -> None:
    hardware = replace(HARDWARE, spec=MachineSpec(architecture=name, token=True), token=Path("/t"))
    plan = plan_qemu(hardware)
    is_hosts = name == HOST
    assert ("-smbios" in plan.argv) == is_hosts
    word = "vmkit.token=smbios" if is_hosts else "vmkit.token=file:/etc/vmkit/token"
    assert word in plan.argv[plan.argv.index("-append") + 1].split()
    # By hand, there is no token.
    assert "vmkit.token" not in " ".join(plan.render_by_hand())


def test_emulated_machine_takes_the_users_processor() -> None:
    spec = MachineSpec(architecture="arm64", cpu="neoverse-n1")
    argv = plan_qemu(replace(HARDWARE, spec=spec, nested=True)).argv
    assert argv[argv.index("-cpu") + 1] == "neoverse-n1"
    assert argv[argv.index("-accel") + 1] == "tcg,thread=single"


def test_kvm_runs_no_other_architecture() -> None:
    with pytest.raises(ConfigError, match="KVM runs guests of this host's architecture, amd64, and the machine is arm"):
        MachineSpec(architecture="arm64", accelerator=Accelerator.KVM)
    with pytest.raises(ConfigError, match="there is no architecture 'arm'"):
        MachineSpec(architecture="arm")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kernel_command_line_has_the_limit_of_its_architecture(name: str) -> None:
    limit = ARCHITECTURES[name].command_line_bytes
    line = render_kernel_command_line(replace(HARDWARE, spec=MachineSpec(architecture=name, append="a")))
    room = limit - len(line) + 1
    spec = MachineSpec(architecture=name, append="a" * room)
    assert len(render_kernel_command_line(replace(HARDWARE, spec=spec))) == limit
    with pytest.raises(ConfigError, match=f"too long: {limit + 1} bytes of {limit}"):
        render_kernel_command_line(replace(HARDWARE, spec=replace(spec, append="a" * (room + 1))))


def test_users_kernel_arguments_come_last_and_win() -> None:
    line = render_kernel_command_line(replace(HARDWARE, spec=MachineSpec(append="panic=0 loglevel=7")))
    assert line.endswith("vmkit.ready=7777 vmkit.name=tiny panic=0 loglevel=7")


def test_kernel_command_line_over_the_kernels_limit_is_refused() -> None:
    assert len(render_kernel_command_line(replace(HARDWARE, spec=MachineSpec(append="a" * 1900)))) < 2048
    with pytest.raises(ConfigError, match="kernel command line is too long"):
        render_kernel_command_line(replace(HARDWARE, spec=MachineSpec(append="a" * 2048)))


def test_disks_are_read_only_unless_asked_and_in_order() -> None:
    disks = (DiskSpec(Path("/a,b.img")), DiskSpec(Path("/c.qcow2"), DiskMode.READ_WRITE))
    plan = plan_qemu(replace(HARDWARE, root=Path("/root.img"), spec=MachineSpec(disks=disks)))
    blocks = [plan.argv[at + 1] for at, word in enumerate(plan.argv) if word == "-blockdev"]
    assert blocks == [
        "driver=raw,node-name=disk0,read-only=on,file.driver=file,file.filename=/root.img",
        "driver=raw,node-name=disk1,read-only=on,file.driver=file,file.filename=/a,,b.img",
        "driver=qcow2,node-name=disk2,read-only=off,file.driver=file,file.filename=/c.qcow2",
    ]
    devices = [word for word in plan.argv if word.startswith("virtio-blk-pci")]
    assert devices[0] == "virtio-blk-pci,drive=disk0,serial=vmkit-root"
    assert devices[2] == "virtio-blk-pci,drive=disk2,serial=vmkit-1"
    assert "vmkit.disks" in plan.argv[-1].split()
    assert "vmkit.disks" not in plan_qemu(replace(HARDWARE, root=Path("/root.img"))).argv[-1]


def test_base_that_is_a_qcow2_has_no_backing_file_whatever_its_header_says() -> None:
    stored = StoredRoot("web", Path("/web"), Path("/a,b.qcow2"), "qcow2", "ext4")
    plan = plan_qemu(replace(HARDWARE, root=Path("/web/disk.qcow2"), spec=MachineSpec(stored=stored)))
    file, base, disk = (plan.argv[at + 1] for at, word in enumerate(plan.argv) if word == "-blockdev")
    assert file == "driver=file,node-name=base-file,read-only=on,filename=/a,,b.qcow2"
    told = json.loads(base)
    assert (told["node-name"], told["file"], told["read-only"]) == ("base", "base-file", True)
    assert told["backing"] is None
    assert "backing=base" in disk.split(",")


def test_gdb_is_served_on_a_socket_that_the_monitor_makes() -> None:
    plan = plan_qemu(replace(HARDWARE, spec=MachineSpec(gdb=True)))
    assert [socket.file for socket in plan.sockets] == ["gdb.sock"]
    argv = plan.render_argv(console_fd=3, qmp_fd=4, memory_fd=7, ready_port=5, served={"gdb": 6})
    assert argv[argv.index("-gdb") + 1] == "chardev:gdb"
    assert argv[argv.index("-gdb") - 1] == "socket,id=gdb,fd=6,server=on,wait=off"
    assert "socket,id=gdb,path=gdb.sock,server=on,wait=off" in plan.render_by_hand()
    assert not plan_qemu(HARDWARE).sockets


def test_disk_may_have_any_path() -> None:
    """Bytes that are no UTF-8 arrive at QEMU as they are."""
    disks = (DiskSpec(Path(os.fsdecode(b"/\xff\n=.img"))),)
    argv = plan_qemu(replace(HARDWARE, spec=MachineSpec(disks=disks))).argv
    assert os.fsencode(argv[argv.index("-blockdev") + 1]).endswith(b",file.filename=/\xff\n=.img")


def test_gdb_is_served_on_loopback_alone() -> None:
    argv = plan_qemu(replace(HARDWARE, spec=MachineSpec(gdb_port=1234))).argv
    assert argv[argv.index("-gdb") + 1] == "tcp:127.0.0.1:1234"
    assert "-gdb" not in plan_qemu(HARDWARE).argv


@pytest.mark.parametrize(
    ("accelerator", "nested", "asked", "accel", "cpu"),
    [
        (Accelerator.TCG, False, None, "tcg", "max,cx16=off,erms=off,fsrm=off"),
        (Accelerator.TCG, False, "qemu64", "tcg", "qemu64"),
        (Accelerator.TCG, True, None, "tcg,thread=single", "qemu64,-cx16"),
        (Accelerator.TCG, True, "max", "tcg,thread=single", "max"),
        (Accelerator.KVM, True, None, "kvm", "host"),
        (Accelerator.KVM, False, "host,-avx", "kvm", "host,-avx"),
    ],
)
def test_cpu_fits_the_host(accelerator: Accelerator, nested: bool, asked: str | None, accel: str, cpu: str) -> None:
    argv = plan_qemu(replace(HARDWARE, accelerator=accelerator, nested=nested, spec=MachineSpec(cpu=asked))).argv
    assert (argv[argv.index("-accel") + 1], argv[argv.index("-cpu") + 1]) == (accel, cpu)


def test_restored_machine_has_the_same_hardware_and_no_kernel() -> None:
    booted = plan_qemu(HARDWARE).argv
    restored = plan_qemu(replace(HARDWARE, is_restored=True, token=Path("/t"))).argv
    assert restored == (*booted[: booted.index("-kernel")], "-incoming", "defer")
