"""A recipe and what it resolves to become a list of steps and a digest: values to print, compare and hash.

Pure. The digest is the image's identity: it covers every package's hash, every input's hash and every setting that
reaches the guest, and nothing of the host (its mirror, paths, user, time).
"""

import hashlib
import json
from dataclasses import asdict, dataclass

from vmkit.image.debian.packages import Lock, Request
from vmkit.image.recipe.config import ImageSpec
from vmkit.image.recipe.inputs import Inputs
from vmkit.image.recipe.settings import ContentKind, FileSpec


@dataclass(frozen=True, slots=True)
class Unpack:
    """Take files of a package: those that match, or all but documentation when patterns is empty."""

    package: str
    patterns: tuple[str, ...]

    def __str__(self) -> str:
        return f"unpack {self.package}: {' '.join(self.patterns) if self.patterns else 'everything but documentation'}"


@dataclass(frozen=True, slots=True)
class Install:
    """Install Debian from packages, with all that their scripts do."""

    packages: tuple[str, ...]

    def __str__(self) -> str:
        return f"install {len(self.packages)} packages with mmdebstrap"


@dataclass(frozen=True, slots=True)
class TakeKernel:
    """Take the boot image and the listed modules: to be loaded at boot, and to be there for modprobe."""

    package: str
    kernel_format: str
    modules: tuple[str, ...]
    available: tuple[str, ...]

    def __str__(self) -> str:
        modules = " ".join(self.modules) or "none"
        available = f"; for modprobe: {' '.join(self.available)}" if self.available else ""
        return f"take the kernel ({self.kernel_format}) of {self.package} and its modules: {modules}{available}"


@dataclass(frozen=True, slots=True)
class TakePython:
    """Take the interpreter, the listed library modules and vshd, and compile them."""

    version: str
    modules: tuple[str, ...]

    def __str__(self) -> str:
        return f"take Python {self.version} with {len(self.modules)} library modules and vshd, and compile them"


@dataclass(frozen=True, slots=True)
class TakeDaemon:
    """Take vshd for the Python that is installed, and see that it finds the listed modules."""

    version: str
    modules: tuple[str, ...]

    def __str__(self) -> str:
        return f"take vshd for the installed Python {self.version}, which must have {len(self.modules)} modules"


@dataclass(frozen=True, slots=True)
class TakeHostPython:
    """Take packages of the Python that runs this."""

    packages: tuple[str, ...]

    def __str__(self) -> str:
        return f"take the Python packages {' '.join(self.packages)} of this host, and compile them"


@dataclass(frozen=True, slots=True)
class TakeServices:
    """Take services of vmkit that run beside vshd."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"take the services {' '.join(self.names)}, and compile them"


@dataclass(frozen=True, slots=True)
class ShipImages:
    """Put built images into the guest's own cache."""

    digests: tuple[str, ...]

    def __str__(self) -> str:
        return f"ship the built images {' '.join(digest[:12] for digest in self.digests)}"


@dataclass(frozen=True, slots=True)
class LinkApplets:
    """Link busybox's applets where no other file is."""

    def __str__(self) -> str:
        return "link the applets of busybox"


@dataclass(frozen=True, slots=True)
class PutFile:
    """Put one file of the recipe."""

    file: FileSpec

    def __str__(self) -> str:
        file = self.file
        shown = repr(file.value[:40]) if file.source is ContentKind.CONTENT else file.value
        return f"put {file.path} ({file.mode:#o} {file.uid}:{file.gid}) from {file.source} {shown}".rstrip()


@dataclass(frozen=True, slots=True)
class WriteRoot:
    """Write the root file system, and make the initramfs one that mounts it."""

    def __str__(self) -> str:
        return "write the root file system (ext4), and an initramfs that mounts it below an overlay"


@dataclass(frozen=True, slots=True)
class Pack:
    """Write the initramfs."""

    compression: str

    def __str__(self) -> str:
        return f"pack the initramfs (compression: {self.compression})"


Step = (
    Unpack
    | Install
    | TakeKernel
    | TakePython
    | TakeDaemon
    | TakeHostPython
    | TakeServices
    | ShipImages
    | LinkApplets
    | PutFile
    | WriteRoot
    | Pack
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a build does. digest is empty while package versions are not resolved yet."""

    name: str
    steps: tuple[Step, ...]
    digest: str
    lock: Lock | None
    request: Request

    def render(self) -> str:
        """The plan as lines for a person."""
        request = self.request
        lines = [f"image {self.name}", f"digest {self.digest or '(known when the packages are resolved)'}"]
        if self.lock is None:
            where = f"{' or '.join(request.suites)} ({' '.join(request.components)}) at {request.host_mirror}"
            lines.append(f"resolve packages in {where}")
        else:
            lines += [
                f"package {record.name} {record.version} ({self.lock.suite_of(record)})" for record in self.lock.records
            ]
        return "\n".join([*lines, *map(str, self.steps)])


def make_plan(spec: ImageSpec, request: Request, inputs: Inputs, lock: Lock | None) -> Plan:
    """The steps for a recipe; without a lock, as far as they are known."""
    packages = lock.closure if lock else spec.packages
    steps: list[Step] = [Install(packages)] if spec.bootstrap else [Unpack(name, ()) for name in packages]
    steps += [Unpack(name, patterns) for name, patterns in spec.extract]
    kernel = lock.kernel if lock else spec.kernel
    steps.append(TakeKernel(kernel, spec.kernel_format, spec.modules, spec.modules_available))
    if spec.python_modules:
        take = TakeDaemon if spec.bootstrap else TakePython
        steps.append(take(lock.python if lock else "3", spec.python_modules))
    if spec.host_python:
        steps.append(TakeHostPython(spec.host_python))
    if spec.services:
        steps.append(TakeServices(spec.services))
    if inputs.prebuilt:
        steps.append(ShipImages(tuple(image.digest for image in inputs.prebuilt)))
    if not spec.bootstrap:
        steps.append(LinkApplets())
    steps += [PutFile(file) for file in (*spec.files, *((spec.hook,) if spec.hook else ()))]
    if spec.root == "disk":
        steps.append(WriteRoot())
    steps.append(Pack(spec.compression))
    return Plan(spec.name, tuple(steps), _digest(spec, inputs, lock) if lock else "", lock, request)


def _digest(spec: ImageSpec, inputs: Inputs, lock: Lock) -> str:
    covered = {
        "name": spec.name,
        "architecture": spec.architecture,
        "kernel_format": spec.kernel_format,
        "kernel_args": spec.kernel_args,
        "modules": spec.modules,
        "modules_available": spec.modules_available,
        "wall": asdict(spec.wall),
        "extract": spec.extract,
        "python_modules": spec.python_modules,
        "files": [_describe(file) for file in spec.files],
        "hook": _describe(spec.hook) if spec.hook else None,
        "services": spec.services,
        "variables": spec.variables,
        "root": spec.root,
        "init": spec.init,
        "bootstrap": spec.bootstrap,
        "default_user": spec.default_user,
        "compression": spec.compression,
        "inputs": inputs.hashes,
        "suite": lock.suite,
        "kernel_suite": lock.kernel_suite,
        "packages": [(record.name, record.version, record.sha256) for record in lock.records],
        "twins": [(record.name, record.version, record.sha256) for record in lock.twins],
        "closure": lock.closure,
    }
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _describe(file: FileSpec) -> dict[str, object]:
    """Returns the digest's view of a file: without its path on the host, as its content is among the inputs."""
    return asdict(file) | ({"value": ""} if file.source is ContentKind.SOURCE else {})
