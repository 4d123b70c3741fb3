"""`vmkit doctor`: checks every need of `up`, and prints the fallback and what to do.

The one thing it starts is the proof of KVM, and only when an image with a kernel has been built; the one thing it makes
is the runtime directory, as the way to know whether that can be made.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from vmkit.architectures import ARCHITECTURES
from vmkit.entries.folder import open_runtime_directory
from vmkit.errors import HostError
from vmkit.image.build import find_built_image
from vmkit.image.cache import find_cache_dir
from vmkit.image.debian.origin import find_keyring
from vmkit.image.recipe.config import load_image
from vmkit.machine import probe
from vmkit.machine.spec import DEFAULT_MEMORY_MIB
from vmkit.machine.vhost import KernelVhostDoor, VhostDoor
from vmkit.run import run
from vsh.errors import VshError

# A build keeps packages, a tree and an image: a few hundred MB.
NEEDED_DISK_MIB = 512
SLOWER = "TCG will be used, some ten times slower"
PROGRAMS = {"apt-get": "apt", "dpkg-deb": "dpkg", "zstd": "zstd"}
# Images with a disk root are made with these; tiny is not.
DISK_PROGRAMS = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "debugfs": "e2fsprogs"}


class Level(StrEnum):
    """ok; fallback: works, in a slower way; broken: `up` cannot work."""

    OK = "ok"
    FALLBACK = "fallback"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at."""

    name: str
    level: Level
    text: str
    hint: str = ""


def examine(image: str = "tiny", door: VhostDoor | None = None) -> list[Check]:
    """Every check, in the order a person would ask. door stands for the kernel's vhost-vsock."""
    looks: dict[str, Callable[[], Iterator[Check]]] = {
        "qemu": _check_qemu,
        "other architectures": _check_architectures,
        "kvm": lambda: _check_kvm(image),
        "vhost-vsock": lambda: _check_vhost(door or KernelVhostDoor()),
        "af_vsock": _check_vsock,
        "memory": _check_memory,
        "disk": _check_disk,
        "storage": _check_storage,
        "runtime directory": _check_runtime_directory,
        "keyring": lambda: _check_keyring(image),
        "programs": lambda: _check_programs(image),
        f"image {image}": lambda: _check_image(image),
    }
    return [check for name, look in looks.items() for check in _guard(name, look)]


def can_start(checks: list[Check]) -> bool:
    """True when nothing stands in the way of `up`."""
    return all(check.level is not Level.BROKEN for check in checks)


def _guard(name: str, look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """A check that fails is itself a finding, after what it found before."""
    try:
        yield from look()
    except VshError as error:
        yield Check(name, Level.BROKEN, error.brief, error.hint)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        yield Check(name, Level.BROKEN, f"{where}{error.strerror or error}")


def _need_for_building(image: str) -> Level:
    """How bad it is to lack what only a build needs: an image that is built starts without."""
    return Level.BROKEN if find_built_image(load_image(image)) is None else Level.FALLBACK


def _check_qemu() -> Iterator[Check]:
    qemu = probe.find_qemu()
    yield Check("qemu", Level.OK, f"{qemu.path}, version {qemu.render_version()}")
    devices = run([qemu.path, "-device", "help"], timeout_s=20.0).decode(errors="replace")
    if "vhost-user-vsock-pci" not in devices:
        yield Check(
            "qemu devices", Level.BROKEN, "this QEMU has no vhost-user-vsock-pci", "install Debian's qemu-system-x86"
        )


def _check_architectures() -> Iterator[Check]:
    """Only --arch needs the other QEMUs, and vmkit works without them."""
    for row in ARCHITECTURES.values():
        if not row.is_emulated:
            continue
        path = shutil.which(row.qemu)
        if path is not None:
            yield Check(row.qemu, Level.OK, path)
        else:
            hint = f"sudo apt-get install {row.package}"
            yield Check(row.qemu, Level.FALLBACK, f"not found; --arch {row.name} needs it", hint)


def _check_kvm(image: str) -> Iterator[Check]:
    refusal = probe.check_kvm_device()
    if refusal is not None:
        hint = "join the group kvm" if "cannot open" in refusal.reason else ""
        yield Check("kvm", Level.FALLBACK, f"{refusal.reason}: {SLOWER}", hint)
        return
    built = find_built_image(load_image(image))
    if built is None:
        yield Check("kvm", Level.OK, f"{probe.KVM_DEVICE} opens; the first `vmkit up` tests whether it works")
        return
    runtime = open_runtime_directory()
    verdict = probe.probe_kvm(probe.find_qemu(runtime), built.kernel, runtime)
    if verdict.works:
        yield Check("kvm", Level.OK, f"{probe.KVM_DEVICE} works: {verdict.reason}")
    else:
        again = f"vmkit tests KVM once per boot of this host; to test it again: rm {runtime / probe.VERDICT_FILE}"
        yield Check("kvm", Level.FALLBACK, f"{verdict.reason}: {SLOWER}", again)


def _check_vhost(door: VhostDoor) -> Iterator[Check]:
    verdict = probe.probe_vhost(door)
    if verdict.works:
        yield Check("vhost-vsock", Level.OK, verdict.reason)
    else:
        yield Check("vhost-vsock", Level.FALLBACK, f"{verdict.reason}: vmkit's own device will be used (backend user)")


def _check_vsock() -> Iterator[Check]:
    """The host's own AF_VSOCK matters to the vhost backend alone. No socket is opened to find out."""
    if os.environ.get("VSH_AF_VSOCK") == "deny":
        yield Check("af_vsock", Level.FALLBACK, "VSH_AF_VSOCK=deny: vsh reaches machines of the user backend only")
    elif Path("/dev/vsock").exists():
        yield Check("af_vsock", Level.OK, "the kernel has vsock sockets")
    else:
        yield Check("af_vsock", Level.FALLBACK, "the kernel has no vsock sockets; the user backend needs none")


def _check_memory() -> Iterator[Check]:
    available_mib = probe.read_available_memory_mib()
    enough = available_mib >= DEFAULT_MEMORY_MIB
    yield Check(
        "memory",
        Level.OK if enough else Level.BROKEN,
        f"{available_mib} MiB available, a machine takes {DEFAULT_MEMORY_MIB} by default",
        "" if enough else "end something, or ask for less with --memory",
    )


def _check_disk() -> Iterator[Check]:
    folder = find_cache_dir()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free_mib = shutil.disk_usage(there).free // (1024 * 1024)
    enough = free_mib >= NEEDED_DISK_MIB
    yield Check(
        "disk",
        Level.OK if enough else Level.BROKEN,
        f"{free_mib} MiB free for the image cache {folder}",
        "" if enough else f"an image needs {NEEDED_DISK_MIB} MiB; set VMKIT_CACHE_DIR to a larger disk",
    )


def _check_storage() -> Iterator[Check]:
    """What vmkit keeps, in bytes, and what of it no machine uses."""
    from vmkit.machine.storage import add_up, choose_unused, list_holdings  # noqa: PLC0415 - it knows every room

    try:
        holdings = list_holdings()
    except (VshError, OSError) as error:
        # Machines start without these figures. What they need of the cache has a check of its own.
        brief, hint = (error.brief, error.hint) if isinstance(error, VshError) else (str(error), "")
        yield Check("storage", Level.FALLBACK, brief, hint)
        return
    totals = add_up(holdings, choose_unused(holdings))
    freed = sum(total.removed_bytes for total in totals)
    text = ", ".join(f"{total.kind} {total.size_bytes >> 20} MiB" for total in totals) or "nothing is kept"
    hint = f"{freed >> 20} MiB ({freed} bytes) are of no machine and were not used for a week: vmkit prune"
    yield Check("storage", Level.OK, text, hint if freed else "")


def _check_runtime_directory() -> Iterator[Check]:
    yield Check("runtime directory", Level.OK, str(open_runtime_directory()))


def _check_keyring(image: str) -> Iterator[Check]:
    try:
        yield Check("keyring", Level.OK, f"{find_keyring()} verifies Debian's packages")
    except HostError as error:
        yield Check("keyring", _need_for_building(image), error.brief, error.hint)


def _check_programs(image: str) -> Iterator[Check]:
    for program, package in PROGRAMS.items():
        path = shutil.which(program)
        if path is None:
            hint = f"sudo apt-get install {package}"
            yield Check(program, _need_for_building(image), "not found; images are built with it", hint)
        else:
            yield Check(program, Level.OK, path)
    for program, package in DISK_PROGRAMS.items():
        # e2fsprogs are in /sbin, which is not on every user's PATH, and are found there.
        path = shutil.which(program) or f"/usr/sbin/{program}"
        if not Path(path).exists():
            hint = f"sudo apt-get install {package}"
            yield Check(program, Level.FALLBACK, "not found; images with a disk root (debian) are built with it", hint)
        else:
            yield Check(program, Level.OK, path)


def _check_image(image: str) -> Iterator[Check]:
    built = find_built_image(load_image(image))
    text = "built, ready to start" if built is not None else "not built yet; `vmkit up` builds it"
    yield Check(f"image {image}", Level.OK, text)
    if built is not None:
        yield _check_wall(image, built.manifest)


def _check_wall(image: str, manifest: Path) -> Check:
    """Which layers the image raises, and whether its kernel can have the one that is the kernel's."""
    name = f"wall of {image}"
    try:
        wall = json.loads(manifest.read_bytes())["wall"]
        wanted = [layer for layer in ("transport", "daemon", "kernel") if wall[layer] not in (False, "off")]
        trouble = wall["kernel_trouble"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Check(name, Level.FALLBACK, f"{manifest} does not tell of it: {error!r}")
    if trouble:
        return Check(
            name, Level.FALLBACK, f"the kernel layer is missing: {trouble}", "the others hold; choose another `kernel`"
        )
    return Check(name, Level.OK, f"layers: {', '.join(wanted) or 'none'}")
