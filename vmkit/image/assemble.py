"""Runs a plan's steps over fetched packages: a Tree for the guest and a kernel for QEMU, in memory.

Knows nothing of the cache or of where packages come from. Deterministic: the same plan and files give the same tree,
byte for byte.
"""

import posixpath
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import assert_never

from vmkit.architectures import find_architecture
from vmkit.errors import BuildError, ConfigError
from vmkit.image.debian.bootstrap import bootstrap
from vmkit.image.debian.deb import extract_deb, extract_patterns
from vmkit.image.debian.packages import python_packages
from vmkit.image.formats.elf import is_elf, read_needed
from vmkit.image.formats.tree import COMPLETE_PATH, FileKind, Node, Tree, directory_node, file_node, symlink_node
from vmkit.image.formats.vmlinux import find_btf
from vmkit.image.interpreter import find_release
from vmkit.image.kernel import Kernel, take_kernel
from vmkit.image.modules import UnknownModuleError
from vmkit.image.needs import find_needs
from vmkit.image.plan import (
    Install,
    LinkApplets,
    Pack,
    Plan,
    PutFile,
    ShipImages,
    Step,
    TakeDaemon,
    TakeHostPython,
    TakeKernel,
    TakePython,
    TakeServices,
    Unpack,
    WriteRoot,
)
from vmkit.image.python import DEBIAN_PACKAGES, GuestPython
from vmkit.image.recipe.config import ImageSpec, find_mention
from vmkit.image.recipe.inputs import Inputs
from vmkit.image.recipe.settings import HOOK_PATH, ContentKind
from vmkit.image.recipe.template import render_templates
from vmkit.image.services import SERVICES
from vmkit.image.twins import Twins
from vmkit.image.wall.btf import BtfError
from vmkit.image.wall.layer import LOADER_PATH, find_vshd_port, make_loader
from vmkit.image.wall.spec import LOOPBACK_MODULE, MODPROBE_RULE, MODPROBE_RULE_PATH, KernelLayer, plan_init_words
from vmkit.run import run

_BUSYBOX = "usr/bin/busybox"
_BUSYBOX_TIMEOUT_S = 10.0
# Documentation/admin-guide/devices.txt: the devices that the kernel opens for pid 1 before anything is mounted.
_CONSOLE, _NULL = (5, 1), (1, 3)
# The modules that mount a root on a disk. Most kernels have most of these built in.
_DISK_MODULES = ("virtio_pci", "virtio_blk", "ext4", "overlay")
_DISK_APPLETS = ("cat", "mkdir", "modprobe", "mount", "umount", "uname")
_GUEST_CACHE = "root/.cache/vmkit"
_DISK_INIT = "disk/init.j2"


@dataclass(frozen=True, slots=True)
class Assembled:
    """A guest's initramfs, its kernel and, where its root is a disk, the tree of that, ready to be written.

    wall_trouble: why the kernel layer is missing; empty when it is there.
    """

    initramfs: Tree
    kernel: Kernel
    wall_trouble: str
    root: Tree | None


def assemble(
    spec: ImageSpec, plan: Plan, inputs: Inputs, debs: dict[str, Path], work: Path, tell: Callable[[str], None]
) -> Assembled:
    """Runs the plan. work is an empty folder for programs that need files on disk."""
    return _Assembly(spec, plan, inputs, debs, work).run(tell)


class _Assembly:
    def __init__(self, spec: ImageSpec, plan: Plan, inputs: Inputs, debs: dict[str, Path], work: Path) -> None:
        self._spec = spec
        self._plan = plan
        self._inputs = inputs
        self._debs = debs
        self._work = work
        self._tree = Tree()
        self._kernel: Kernel | None = None
        self._python: GuestPython | None = None
        self._texts: dict[str, str] | None = None
        self._whole: dict[str, Node] = {}
        self._wall_trouble = ""
        self._initramfs: Tree | None = None
        self._architecture = find_architecture(spec.architecture)
        self._twins = Twins(debs, work / "twins") if self._architecture.is_emulated else None

    def run(self, tell: Callable[[str], None]) -> Assembled:
        _add_kernel_folders(self._tree)
        for step in self._plan.steps:
            tell(str(step))
            self._do(step)
        self._tree.add(COMPLETE_PATH, file_node(b""))
        assert self._kernel is not None
        self._check_libraries()
        _check_user(self._spec, self._tree)
        if self._initramfs is not None:
            return Assembled(self._initramfs, self._kernel, self._wall_trouble, self._tree)
        return Assembled(self._tree, self._kernel, self._wall_trouble, None)

    def _do(self, step: Step) -> None:
        match step:
            case Unpack():
                self._unpack(step)
            case TakeKernel():
                self._take_kernel(step)
            case Install():
                self._install()
            case TakePython() | TakeDaemon():
                self._take_python(step) if isinstance(step, TakePython) else self._take_daemon(step)
                self._raise_kernel_layer(self._kernel)
            case TakeHostPython():
                self._take_host_python(step)
            case TakeServices():
                self._take_services(step)
            case ShipImages():
                self._ship_images()
            case LinkApplets():
                self._link_applets()
            case PutFile():
                self._put_file(step)
            case WriteRoot():
                self._initramfs = self._make_disk_initramfs()
            case Pack():
                pass
            case _:
                assert_never(step)

    def _check_libraries(self) -> None:
        """Checks that every program's libraries are in the tree. Otherwise only a boot would show a missing one.

        Packages that are unpacked whole are left out: apt resolved their needs, and their plug-ins may need more.
        """
        present = {posixpath.basename(path) for path, _ in self._tree.walk() if ".so" in path}
        for path, node in self._tree.walk():
            if node.kind is not FileKind.FILE or self._whole.get(path) is node or not is_elf(node.data):
                continue
            for soname in read_needed(node.data):
                if soname not in present:
                    raise BuildError(
                        f"'/{path}' needs the library {soname}, which is not in the image",
                        hint="add it to the recipe's [extract], or name its package in `packages`",
                    )

    def _unpack(self, step: Unpack) -> None:
        deb = self._debs[step.package]
        if step.patterns:
            extract_patterns(deb, self._tree, step.patterns)
        else:
            extract_deb(deb, self._tree)
            self._whole = dict(self._tree.walk())

    def _take_kernel(self, step: TakeKernel) -> None:
        barred = self._bar_loopback()
        try:
            self._kernel = take_kernel(
                self._debs[step.package], self._tree, step.modules, step.kernel_format, step.available, barred
            )
        except UnknownModuleError as error:
            key = "modules" if error.wanted in step.modules else "modules_available"
            where = find_mention(self._spec, error.wanted, error.wanted.replace("_", "-"), key=key)
            raise ConfigError(
                f"{where}: {key}: {error.brief}", hint="remove it from the recipe, or choose another `kernel`"
            ) from error

    def _install(self) -> None:
        lock = self._plan.lock
        assert lock is not None
        work = self._work / "bootstrap"
        work.mkdir()
        bootstrap(self._tree, lock, self._debs, work)
        self._whole = dict(self._tree.walk())

    def _take_daemon(self, step: TakeDaemon) -> None:
        python = self._open_python(step.version)
        if self._tree.find(python.program) is None:
            raise ConfigError(
                f"{self._spec.origin}: packages: the image installs no Python for vshd", hint='add "python3"'
            )
        python.take_package("vshd", self._inputs.vshd)
        python.add_command("vshd")
        python.compile()
        python.check_imports(step.modules, find_needs("vshd", self._inputs.vshd))
        self._python = python

    def _open_python(self, version: str) -> GuestPython:
        assert self._plan.lock is not None
        program, *_ = python_packages(version)
        work = self._work / "python"
        work.mkdir()
        release = find_release(self._plan.lock.find(program).version)
        make_twin = self._twins.make_interpreter if self._twins else None
        return GuestPython(self._tree, version, release, work, self._architecture, make_twin)

    def _take_host_python(self, step: TakeHostPython) -> None:
        python = self._python
        if python is None:
            raise ConfigError(
                f"{self._spec.origin}: host_python: the image has no Python", hint="list `python_modules`"
            )
        for name in step.packages:
            python.take_package(name.replace(".", "/"), self._inputs.packages[name], of_debian=True)
        python.compile()

    def _take_services(self, step: TakeServices) -> None:
        python = self._python
        if python is None:
            raise ConfigError(f"{self._spec.origin}: services: the image has no vshd", hint="list `python_modules`")
        for name in step.names:
            service = SERVICES[name]
            python.take_package(f"vmkit/{service.folder}", self._inputs.services[name], of_debian=True)
            text = service.render_program(python.program, DEBIAN_PACKAGES)
            self._tree.add(service.program, file_node(text.encode(), 0o755))
        python.compile()

    def _ship_images(self) -> None:
        """Puts images, and the locks by which a build finds them, into the cache of the guest's root."""
        for image in self._inputs.prebuilt:
            for path in sorted(image.folder.iterdir()):
                self._tree.add(f"{_GUEST_CACHE}/images/{image.digest}/{path.name}", file_node(path.read_bytes()))
            self._tree.add(f"{_GUEST_CACHE}/resolved/{image.lock.name}", file_node(image.lock.read_bytes()))

    def _make_disk_initramfs(self) -> Tree:
        """Makes the initramfs that mounts the root's disk below an overlay: busybox, four modules, a script."""
        busybox = self._tree.find(_BUSYBOX)
        if busybox is None:
            raise ConfigError(
                f"{self._spec.origin}: packages: busybox mounts the disk root, and this recipe lacks it",
                hint='add "busybox-static"',
            )
        tree = Tree()
        _add_kernel_folders(tree)
        tree.add(_BUSYBOX, busybox)
        for applet in _DISK_APPLETS:
            tree.add(f"bin/{applet}", symlink_node("busybox"))
        assert self._kernel is not None
        assert self._plan.lock is not None
        try:
            kernel = take_kernel(self._debs[self._plan.lock.kernel], tree, _DISK_MODULES, "vmlinuz")
        except UnknownModuleError as error:
            raise ConfigError(
                f"{find_mention(self._spec, 'disk', key='root')}: root: {error.brief}",
                hint="choose another `kernel`: the guest mounts its disk with this module",
            ) from error
        variables = self._variables() | {"disk_modules": (*kernel.soft_modules, *kernel.modules)}
        texts = render_templates(self._inputs.templates, [_DISK_INIT], variables)
        tree.add("init", file_node(texts[_DISK_INIT].encode(), 0o755))
        tree.add(COMPLETE_PATH, file_node(b""))
        return tree

    def _take_python(self, step: TakePython) -> None:
        program, *libraries = python_packages(step.version)
        python = self._open_python(step.version)
        python.take_program(self._debs[program])
        python.take_library([self._debs[name] for name in libraries], step.modules)
        python.take_package("vshd", self._inputs.vshd)
        python.add_command("vshd")
        python.compile()
        python.check_imports(step.modules, find_needs("vshd", self._inputs.vshd))
        self._python = python

    def _bar_loopback(self) -> tuple[str, ...]:
        """Raises the wall's transport layer for both modprobes. kmod reads the rule, busybox only modules.dep."""
        if not self._spec.wall.transport:
            return ()
        self._tree.add(MODPROBE_RULE_PATH, file_node(MODPROBE_RULE.encode()))
        return (LOOPBACK_MODULE,)

    def _raise_kernel_layer(self, kernel: Kernel | None) -> None:
        """Ships the loader of the wall's programs, made for this kernel."""
        wall = self._spec.wall
        if wall.kernel is KernelLayer.OFF or kernel is None:
            return
        try:
            if not self._architecture.has_kernel_layer:
                raise BtfError(f"vmkit has no program for {self._architecture.name}")
            port = find_vshd_port(dict(self._spec.variables).get("vshd_flags"))
            loader = make_loader(find_btf(kernel.image), wall.connect_cids, port)
        except BtfError as error:
            if wall.kernel is KernelLayer.REQUIRED:
                raise BuildError(
                    f"cannot make the wall's kernel layer for the kernel {kernel.version}: {error.brief}",
                    hint="`[wall] kernel = true` builds the image without it",
                ) from error
            self._wall_trouble = error.brief
        else:
            self._tree.add(LOADER_PATH, file_node(loader, 0o700))

    def _link_applets(self) -> None:
        node = self._tree.find(_BUSYBOX)
        if node is None:
            return
        busybox = self._work / "busybox"
        busybox.write_bytes(self._twins.read_busybox() if self._twins else node.data)
        busybox.chmod(0o700)
        listed = run([busybox, "--list-full"], timeout_s=_BUSYBOX_TIMEOUT_S).decode().split()
        taken = {posixpath.basename(path) for folder in ("bin", "sbin") for path in self._tree.glob(f"usr/{folder}/*")}
        for applet in listed:
            name = posixpath.basename(applet)
            # Its twin may be of another version.
            is_there = not self._twins or f"\0{name}\0".encode() in node.data
            if "/" in applet and name not in taken and is_there:
                self._tree.add(applet, symlink_node(f"/{_BUSYBOX}"))

    def _put_file(self, step: PutFile) -> None:
        file = step.file
        match file.source:
            case ContentKind.DIRECTORY:
                node = Node(FileKind.DIRECTORY, file.mode, uid=file.uid, gid=file.gid)
            case ContentKind.SYMLINK:
                node = Node(FileKind.SYMLINK, 0o777, file.value.encode(), file.uid, file.gid)
            case ContentKind.CONTENT:
                node = Node(FileKind.FILE, file.mode, file.value.encode(), file.uid, file.gid)
            case ContentKind.SOURCE:
                node = Node(FileKind.FILE, file.mode, self._inputs.sources[file.path], file.uid, file.gid)
            case ContentKind.TEMPLATE:
                node = Node(FileKind.FILE, file.mode, self._render(file.value).encode(), file.uid, file.gid)
        self._tree.add(file.path, node)
        if self._python is not None:
            self._python.forget_compiled(file.path)

    def _render(self, template: str) -> str:
        """Returns the text of a file's template. Renders all at once: each rendering takes a process."""
        if self._texts is None:
            files = [step.file for step in self._plan.steps if isinstance(step, PutFile)]
            names = [file.value for file in files if file.source is ContentKind.TEMPLATE]
            self._texts = render_templates(self._inputs.templates, names, self._variables())
        return self._texts[template]

    def _variables(self) -> dict[str, object]:
        """Returns the variables of every template (docs/reference/recipes.md lists them), and the recipe's own."""
        assert self._kernel is not None
        known: dict[str, object] = {
            "image": self._spec.name,
            "suite": self._plan.lock.suite if self._plan.lock else "",
            "kernel_version": self._kernel.version,
            "modules": self._kernel.modules,
            "soft_modules": self._kernel.soft_modules,
            "python": f"/{self._python.program}" if self._python else "",
            "hook": HOOK_PATH if self._spec.hook else "",
            "default_user": self._spec.default_user,
            "wall": asdict(self._spec.wall),
            "init_words": plan_init_words(
                self._spec.wall,
                HOOK_PATH if self._spec.hook else "",
                self._spec.init if self._spec.root == "given" else "",
                "" if self._architecture.has_kernel_layer else self._wall_trouble,
                tuple(f"/{SERVICES[name].program}" for name in self._spec.services),
            ),
        }
        return known | dict(self._spec.variables)


def _add_kernel_folders(tree: Tree) -> None:
    for path, device, mode in (("dev/console", _CONSOLE, 0o600), ("dev/null", _NULL, 0o666)):
        tree.add(path, Node(FileKind.CHARACTER, mode, device=device))
    for path in ("proc", "sys"):
        tree.add(path, directory_node(0o555))


def _check_user(spec: ImageSpec, tree: Tree) -> None:
    passwd = tree.find("etc/passwd")
    users = [line.partition(":")[0] for line in passwd.data.decode(errors="replace").splitlines()] if passwd else []
    if spec.default_user not in users:
        raise ConfigError(
            f"{spec.origin}: default_user: the image has no user '{spec.default_user}'",
            hint=f"the users in its /etc/passwd: {', '.join(users) or 'none'}",
        )
