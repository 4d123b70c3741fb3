"""A program's backtrace from its core: gdb on this host, with the program and the libraries from the guest's own files.

The files are those of the machine's image, which its digest names, or of the root that its user gave. A file that the
guest has written after its boot is in neither, and gdb then prints `??` for its functions. gdb runs no script of the
guest's, and asks no server for symbols.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

from vmkit.crashes.notes import read_mapped
from vmkit.crashes.record import DELETED, Crash, CrashKind
from vmkit.crashes.store import KeptCrash
from vmkit.errors import BuildError, CommandError, MachineError
from vmkit.image.cache import find_cache_dir
from vmkit.image.formats.cpio import read_cpio
from vmkit.image.formats.elf import read_section, read_soname
from vmkit.image.formats.lz4 import LZ4_LEGACY_MAGIC, unpack_lz4
from vmkit.image.formats.packed import unpack_gzip, unpack_zstd
from vmkit.image.formats.tree import FileKind, Node
from vmkit.run import open_output, run

GDB_DEADLINE_S = 120.0
DEBUGFS_DEADLINE_S = 60.0
# The names are a guest's, and so is the choice of large files. The copies are in the folder for temporary files, which
# may be memory, and vmkit reads each as a whole.
MAX_FILES, MAX_FILE_BYTES, MAX_COPY_BYTES = 512, 1 << 30, 2 << 30
MIN_FREE_BYTES = 256 << 20
MAX_LINKS = 40
# Of a part of a path (limits.h).
NAME_MAX = 255
# Of one thread. A recursion without end has 100,000 of them and more, and gdb takes minutes for these.
MAX_FRAMES = 1000
_UNPACKED_LIMIT_BYTES = 4 << 30
_PACKED = {b"\x1f\x8b": unpack_gzip, LZ4_LEGACY_MAGIC: unpack_lz4, b"\x28\xb5\x2f\xfd": unpack_zstd}
# debugfs has a syntax of its own, and the names are a guest's.
_PLAIN = re.compile(r"/[A-Za-z0-9._+/@:=~-]{1,4000}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
# What debugfs prints before the answer to a command, and of a file. The list of its blocks is one line of any length.
_ASKED, _SIZE, _REGULAR = b"debugfs: stat ", re.compile(rb"\bSize: (\d{1,19})\b"), re.compile(rb"\bType: regular\b")
_LINE_BYTES = 4096
# By these a program of Debian names its loader and libraries.
_LINKS = ("lib", "lib64", "bin", "sbin")
_QUIET = (
    *("-iex", "set auto-load off", "-iex", "set debuginfod enabled off"),
    *("-iex", "set width 0", "-iex", "set print thread-events off", "-iex", f"set backtrace limit {MAX_FRAMES}"),
)
SYSROOT_HINT = "give gdb a folder with the guest's files: --sysroot DIR"


def print_backtrace(
    kept: KeptCrash,
    *,
    sysroot: Path | None = None,
    program: Path | None = None,
    tell: Callable[[str], None] = lambda _text: None,
) -> bytes:
    """What gdb prints of every thread.

    sysroot: a folder with the guest's files; None: those of its image or root. program: the program's own file, where
    it is in neither. tell: is called with a line for each file that is too large to copy. Raises MachineError,
    HostError, CommandError.
    """
    crash = kept.crash
    if crash is not None and crash.kind is CrashKind.SERVICE:
        raise MachineError(
            f"crash {kept.number} of '{kept.machine}' is a service that failed, and left no core",
            hint=f"vmkit crashes {kept.machine} show {kept.number}",
        )
    if crash is None or crash.program is None:
        raise MachineError(
            f"crash {kept.number} of '{kept.machine}' is of no program",
            hint=f"vmkit crashes {kept.machine} show {kept.number}",
        )
    with tempfile.TemporaryDirectory(prefix="vmkit-gdb-") as work:
        root = sysroot or _find_folder(crash)
        if root is None:
            root = Path(work)
            _take_files(kept, crash, root, tell)
        lines = run(plan_gdb(kept, root, program), timeout_s=GDB_DEADLINE_S, package="gdb")
        # The names of the guest, and not those of copies that are gone by then.
        return lines.replace(os.fsencode(work) + b"/", b"/")


def plan_gdb(kept: KeptCrash, root: Path, program: Path | None = None) -> list[str]:
    """gdb's command."""
    found = program
    if found is None and kept.crash is not None:
        exe = find_program(kept.crash)
        found = _find_within(root, exe) if exe else None
    words = ["gdb", "-nx", "-q", "-batch", *_QUIET, "-iex", f"set sysroot {root}"]
    # The program first: gdb takes the libraries of the core by its list of them.
    words += [] if found is None else [str(found)]
    return [*words, "-ex", f"core-file {kept.core}", "-ex", "thread apply all bt"]


def find_program(crash: Crash) -> str:
    """The path of the program in the guest; "" where the record has no plain one."""
    exe = "" if crash.program is None else crash.program.exe.removesuffix(DELETED)
    return exe if _is_plain(exe) else ""


def _find_folder(crash: Crash) -> Path | None:
    """The folder that is the guest's root, for a machine of --root-from."""
    root = Path(crash.root)
    return root if crash.root and root.is_dir() else None


def _take_files(kept: KeptCrash, crash: Crash, root: Path, tell: Callable[[str], None]) -> None:
    """Copies the files that the core names to a folder. Those that the guest's disk lacks, or that are too large, are
    left out.
    """
    if crash.program is not None and crash.program.is_contained:
        raise MachineError("the program ran in a container, whose files are in no image of vmkit's", hint=SYSROOT_HINT)
    try:
        with kept.core.open("rb") as file:
            names = read_mapped(file)
    except OSError as error:
        raise MachineError(f"cannot read {kept.core}: {error.strerror}") from error
    wanted = [find_program(crash), *(name.decode("ascii", "replace") for name in names)]
    plain = [name for name in dict.fromkeys(wanted) if _is_plain(name)][:MAX_FILES]
    disk = find_disk(crash)
    if disk.name == "initrd":
        _take_from_initramfs(disk, plain, root, tell)
    else:
        _take_from_disk(disk, plain, root, tell)
    _add_links(root)


def find_disk(crash: Crash) -> Path:
    """The disk with the guest's root, or its initramfs. Raises MachineError where it is gone."""
    if crash.root:
        disk = Path(crash.root)
    else:
        folder = find_cache_dir() / "images" / crash.digest
        disk = folder / "root" if (folder / "root").exists() else folder / "initrd"
    if not disk.is_file() or not (crash.root or _DIGEST.fullmatch(crash.digest)):
        what = crash.root or f"the image '{crash.image}' of that time"
        raise MachineError(f"{what} is not there any more", hint=SYSROOT_HINT)
    return disk


def _is_plain(name: str) -> bool:
    parts = PurePosixPath(name).parts[1:]
    return bool(_PLAIN.fullmatch(name) and parts) and ".." not in parts and len(max(parts, key=len)) <= NAME_MAX


def _find_within(root: Path, name: str) -> Path | None:
    """A file of the root; None where a link leads out of it."""
    path = Path(os.path.realpath(root / name.lstrip("/")))
    return path if path.is_file() and path.is_relative_to(os.path.realpath(root)) else None


def _make_place(root: Path, name: str) -> Path:
    target = root / name.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _choose(sizes: Mapping[str, int], root: Path, tell: Callable[[str], None]) -> list[str]:
    """The files that there is room for, in their order: the program is the first."""
    status = os.statvfs(root)
    room_bytes = min(MAX_COPY_BYTES, status.f_bavail * status.f_frsize - MIN_FREE_BYTES)
    chosen = []
    for name, size in sizes.items():
        if size > min(room_bytes, MAX_FILE_BYTES):
            tell(f"left out {name}, which has {size >> 20} MiB: gdb has no names of its functions")
            continue
        room_bytes -= size
        chosen.append(name)
    return chosen


def _measure(disk: Path, names: Iterable[str]) -> dict[str, int]:
    """The sizes of those that are files of the disk. Raises CommandError."""
    sizes: dict[str, int] = {}
    with tempfile.NamedTemporaryFile(prefix="vmkit-gdb-") as script:
        script.write("".join(f"stat {name}\n" for name in names).encode())
        script.flush()
        argv = ["debugfs", "-f", script.name, str(disk)]
        with open_output(argv, timeout_s=DEBUGFS_DEADLINE_S, package="e2fsprogs") as output:
            name, is_regular = "", False
            for line in iter(lambda: output.readline(_LINE_BYTES), b""):
                if line.startswith(_ASKED):
                    name, is_regular = line.removeprefix(_ASKED).decode("ascii", "replace").strip(), False
                is_regular = is_regular or bool(_REGULAR.search(line))
                size = _SIZE.search(line)
                if name and is_regular and size:
                    sizes.setdefault(name, int(size[1]))
    return sizes


def _take_from_disk(disk: Path, names: Iterable[str], root: Path, tell: Callable[[str], None]) -> None:
    try:
        names = _choose(_measure(disk, names), root, tell)
    except CommandError as error:
        raise MachineError(f"cannot read {disk}", details=error.details, hint=SYSROOT_HINT) from error
    for name in names:
        _make_place(root, name)
    # The folder of the copies may have a name that debugfs cannot take: so it is the working directory.
    script = "".join(f"dump {name} .{name}\n" for name in names)
    try:
        argv = ["debugfs", "-f", "-", str(disk)]
        run(argv, timeout_s=DEBUGFS_DEADLINE_S, stdin=script.encode(), cwd=root, package="e2fsprogs")
    except CommandError as error:
        raise MachineError(f"cannot read {disk}", details=error.details, hint=SYSROOT_HINT) from error
    # debugfs makes an empty file for a name that the disk lacks.
    for path in root.rglob("*"):
        if path.is_file() and not path.stat().st_size:
            path.unlink()


def _take_from_initramfs(initrd: Path, names: Iterable[str], root: Path, tell: Callable[[str], None]) -> None:
    try:
        data = initrd.read_bytes()
        unpack = next((unpack for magic, unpack in _PACKED.items() if data.startswith(magic)), None)
        archive = data if unpack is None else unpack(data, _UNPACKED_LIMIT_BYTES)
        nodes = {entry.path: entry.node for entry in read_cpio(archive)}
    except (BuildError, OSError) as error:
        raise MachineError(f"cannot read {initrd}: {error}", hint=SYSROOT_HINT) from error
    found = {name: node for name in names if (node := find_node(nodes, name)) and node.kind is FileKind.FILE}
    for name in _choose({name: node.size_bytes for name, node in found.items()}, root, tell):
        if found[name].size_bytes:
            _make_place(root, name).write_bytes(b"".join(found[name].chunks()))


def find_node(nodes: Mapping[str, Node], name: str) -> Node | None:
    """The file of a path, through the links of the image; None where there is none."""
    waiting = [part for part in name.split("/") if part]
    path: list[str] = []
    links = 0
    while waiting:
        part = waiting.pop(0)
        if part == ".":
            continue
        if part == "..":
            del path[-1:]
            continue
        node = nodes.get("/".join([*path, part]))
        if node is None:
            return None
        if node.kind is FileKind.SYMLINK:
            links += 1
            if links > MAX_LINKS:
                return None
            target = node.data.decode(errors="replace")
            if target.startswith("/"):
                path = []
            waiting = [*(word for word in target.split("/") if word), *waiting]
            continue
        path.append(part)
    return nodes.get("/".join(path))


def _add_links(root: Path) -> None:
    """Adds the names by which the program's own list of libraries has them: the kernel has those behind the links."""
    for path in [path for path in root.rglob("*") if path.is_file()]:
        data = path.read_bytes()
        soname = read_soname(data)
        if soname and "/" not in soname and soname not in (".", ".."):
            _link(path.parent / soname, path.name)
        loader = read_section(data, ".interp").rstrip(b"\0").decode("ascii", "replace")
        if _is_plain(loader):
            target = next((found for found in root.rglob(PurePosixPath(loader).name) if found.is_file()), None)
            if target is not None:
                _link(root / "usr" / loader.lstrip("/"), str(target))
    for name in _LINKS:
        if (root / "usr" / name).is_dir():
            _link(root / name, f"usr/{name}")


def _link(path: Path, target: str) -> None:
    if not path.exists() and not path.is_symlink():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
