"""What a spec leads to on this host: image, QEMU, accelerator and backend, each with its reason; and then the hardware.

Builds the image where that is needed, and proves KVM where that was not done. Reserves and starts nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmkit.architectures import find_architecture
from vmkit.entries.folder import open_runtime_directory
from vmkit.image.build import BuiltImage, build_image
from vmkit.image.recipe.config import ImageSpec, load_image
from vmkit.machine import probe
from vmkit.machine.hardware import USER_READY_PORT, Hardware
from vmkit.machine.live_root import (
    VIRTIOFS,
    LiveRoot,
    choose_live_root,
    has_image_kernel,
    list_image_ways,
    list_kernel_ways,
)
from vmkit.machine.memory import check_guest_memory
from vmkit.machine.own_kernel import fit_initrd, read_kernel
from vmkit.machine.parts.table import PARTS
from vmkit.machine.registry import check_path_length
from vmkit.machine.source import RootDisk, read_root_of
from vmkit.machine.spec import MAX_NAME_CHARACTERS, Accelerator, Backend, MachineSpec
from vmkit.machine.token import find_initrd_path, find_token_path, needs_token
from vmkit.machine.vhost import VhostDoor
from vsh.registry import MACHINES

if TYPE_CHECKING:
    from vmkit.trees.files import KernelFiles

# A recipe's word for a root that each machine gets.
GIVEN = "given"

Tell = Callable[[str, float | None], None]
Build = Callable[[str, Tell], BuiltImage]


@dataclass(frozen=True, slots=True)
class Choices:
    """What was chosen for a machine, and why where it is the slower way."""

    built: BuiltImage
    qemu: probe.Qemu
    kernel: Path
    initrd: Path
    accelerator: Accelerator
    accelerator_reason: str
    backend: Backend
    backend_reason: str
    # Of the kernel's build tree, for gdb.
    vmlinux: Path | None = None
    root: Path | None = None
    root_type: str = ""
    # Of a root that is a folder of the host.
    live: LiveRoot | None = None
    nested: bool = False


def find_image(spec: MachineSpec) -> ImageSpec:
    """The image of a spec. One that takes any root gets the driver of the root's file system, where it has none.

    The drivers of xfs and btrfs are a third of an initramfs, and most roots need neither. Raises ConfigError,
    BuildError, HostError.
    """
    image = load_image(spec.image, spec.architecture)
    # A kernel of the user's own brings its modules, or has the driver built in.
    if image.root != GIVEN or not has_image_kernel(spec):
        return image
    if spec.root_from is not None:
        driver = choose_live_root(spec, (VIRTIOFS,)).way
        if driver != VIRTIOFS:
            # A recipe names the modules of 9p, which few kernels have.
            return image
    elif spec.root is not None:
        driver = read_root_of(spec).type
    else:
        return image
    if driver in (*image.modules, *image.modules_available):
        return image
    return replace(image, modules_available=(*image.modules_available, driver))


def build_image_of(spec: MachineSpec, tell: Tell) -> BuiltImage:
    """The image of a machine whose root is there already, from the cache or built now. Raises VshError kinds."""
    return build_image(find_image(spec), progress=tell)


def choose(
    spec: MachineSpec, tell: Tell, door: VhostDoor, build: Build | None = None, *, prove: bool = True
) -> Choices:
    """The image, QEMU, accelerator and backend a spec leads to on this host.

    build: stands for the image room. prove: whether KVM may be proven by booting a kernel under it, where that has
    not been done yet.
    """
    own = read_kernel(spec)
    architecture = find_architecture(spec.architecture)
    for part in PARTS:
        part.check_host(spec)
    runtime = open_runtime_directory()
    # What cannot work is refused before anything that takes its time: a build, the proof of KVM.
    check_path_length(runtime / MACHINES / (spec.name or Path(spec.image).stem[:MAX_NAME_CHARACTERS]))
    probe.check_open_files()
    qemu = probe.find_qemu(runtime, architecture.qemu)
    backend, backend_reason = probe.choose_backend(spec.backend, probe.probe_vhost(door))
    probe.check_memory(spec.memory_mib)
    built = build(spec.image, tell) if build else build_image_of(spec, tell)
    for part in PARTS:
        part.check_image(spec, built)
    live = _choose_live_root(spec, own, built) if built.takes_root and spec.root_from is not None else None
    root = RootDisk(live.way) if live is not None else read_root_of(spec) if built.takes_root else None
    kernel, initrd = spec.kernel or built.kernel, built.initrd
    if own is not None:
        kernel, initrd = own.image, fit_initrd(spec, own, built, root.type if root else "", backend)
    check_guest_memory(spec.memory_mib, kernel, initrd)
    kvm = None
    if architecture.is_emulated:
        kvm = probe.Verdict(False, f"this host's processor does not run {architecture.name}")
    elif spec.accelerator is None:
        kvm = probe.probe_kvm(qemu, built.kernel, runtime, prove=prove)
    accelerator, accelerator_reason = probe.choose_accelerator(spec.accelerator, kvm)
    return Choices(
        built,
        qemu,
        kernel,
        initrd,
        accelerator,
        accelerator_reason,
        backend,
        backend_reason,
        vmlinux=None if own is None else own.vmlinux,
        root=spec.root or built.root,
        root_type=root.render() if root else "",
        live=live,
        nested=probe.is_emulated(),
    )


def _choose_live_root(spec: MachineSpec, own: "KernelFiles | None", built: BuiltImage) -> LiveRoot:
    if has_image_kernel(spec):
        return choose_live_root(spec, list_image_ways((*built.modules, *built.modules_available)))
    return choose_live_root(spec, list_kernel_ways(own))


def plan_hardware(
    spec: MachineSpec, choices: Choices, name: str, cid: int, directory: Path, *, is_restored: bool = False
) -> Hardware:
    """Everything that decides QEMU's argv. directory: the machine's. is_restored: it starts from a snapshot."""
    has_token = needs_token(choices.backend, asked=spec.token)
    has_own_initrd = has_token and not find_architecture(spec.architecture).has_oem_strings
    return Hardware(
        spec=spec,
        name=name,
        cid=cid,
        directory=directory,
        accelerator=choices.accelerator,
        backend=choices.backend,
        qemu=choices.qemu.path,
        kernel=choices.kernel,
        initrd=find_initrd_path(directory) if has_own_initrd else choices.initrd,
        kernel_args=choices.built.kernel_args,
        ready_port=USER_READY_PORT if choices.backend is Backend.USER else None,
        token=find_token_path(directory) if has_token else None,
        root=choices.root,
        root_type=choices.root_type,
        virtiofsd=None if choices.live is None else choices.live.virtiofsd,
        nested=choices.nested,
        is_restored=is_restored,
    )
