"""The pure parts: which devices are passed, the stream's framing, the seccomp profile."""

import json

import pytest

from vmkit.docker.container import RunSpec, plan_container
from vmkit.docker.devices import Passed, choose_devices
from vmkit.docker.seccomp import render_profile
from vmkit.docker.stream import Demux
from vmkit.machine.doctor import Check, Level

ALL = {"/dev/kvm": 104, "/dev/vhost-vsock": 104, "/dev/vsock": 0}


def checks(kvm: Level = Level.OK, vhost: Level = Level.OK, vsock: Level = Level.OK) -> list[Check]:
    return [Check("kvm", kvm, "k"), Check("vhost-vsock", vhost, "v"), Check("af_vsock", vsock, "a")]


def test_everything_that_works_is_passed() -> None:
    passed = choose_devices(checks(), local=True, owners=ALL)
    assert passed.devices == ("/dev/kvm", "/dev/vhost-vsock", "/dev/vsock")
    assert passed.groups == (104,)
    assert passed.vsock and passed.environment() == {}


def test_kvm_that_kernels_die_on_is_not() -> None:
    passed = choose_devices(checks(kvm=Level.FALLBACK), local=True, owners=ALL)
    assert "/dev/kvm" not in passed.devices
    assert "not passed /dev/kvm: k" in passed.lines


def test_kvm_that_nobody_could_prove_is() -> None:
    """A host without QEMU is what containers are for: the vmkit inside proves it."""
    passed = choose_devices(checks(kvm=Level.BROKEN), local=True, owners=ALL)
    assert "passed /dev/kvm: to be proven inside" in passed.lines


@pytest.mark.parametrize("missing", ["/dev/vhost-vsock", "/dev/vsock"])
def test_vhost_needs_both_its_devices(missing: str) -> None:
    passed = choose_devices(checks(), local=True, owners={path: 0 for path in ALL if path != missing})
    assert passed.devices == ("/dev/kvm",)
    assert passed.environment() == {"VSH_AF_VSOCK": "deny"}


def test_vhost_needs_vsock_sockets() -> None:
    assert not choose_devices(checks(vsock=Level.FALLBACK), local=True, owners=ALL).vsock


def test_engine_elsewhere_gets_no_devices() -> None:
    assert choose_devices(checks(), local=False).devices == ()


def test_profile_comes_with_vhost_alone() -> None:
    with_vhost = plan_container(RunSpec("i", ("c",), Passed(("/dev/vhost-vsock",), (), True, ())), "me")
    without = plan_container(RunSpec("i", ("c",), Passed((), (), False, ())), "me")
    (option,) = with_vhost["HostConfig"]["SecurityOpt"]
    assert json.loads(option.removeprefix("seccomp="))["defaultAction"] == "SCMP_ACT_ERRNO"
    assert "SecurityOpt" not in without["HostConfig"]
    for config in (with_vhost, without):
        assert not {"Privileged", "CapAdd"} & set(config["HostConfig"])


def test_profile_allows_vsock_and_refuses_what_reaches_beyond() -> None:
    profile = json.loads(render_profile())
    freely = {
        name
        for rule in profile["syscalls"]
        if rule["action"] == "SCMP_ACT_ALLOW" and not rule["args"]
        for name in rule["names"]
    }
    assert {"socket", "execve", "openat", "ioctl", "eventfd2", "memfd_create"} <= freely
    refused = {"mount", "unshare", "setns", "bpf", "keyctl", "init_module", "kexec_load", "clone", "userfaultfd"}
    assert not refused & freely


@pytest.mark.parametrize("size", [1, 3, 8, 1000])
def test_demux_takes_any_pieces(size: int) -> None:
    wire = b"\x01\0\0\0\0\0\0\x03out" + b"\x02\0\0\0\0\0\0\x03err" + b"\x01\0\0\0\0\0\0\0" + b"\x01\0\0\0\0\0\0\x01."
    demux = Demux()
    got = {1: b"", 2: b""}
    for start in range(0, len(wire), size):
        for stream, data in demux.feed(wire[start : start + size]):
            got[stream] += data
    assert got == {1: b"out.", 2: b"err"}
