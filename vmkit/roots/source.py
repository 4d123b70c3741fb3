"""What a user may name as a root: reads the words, and tells from the first bytes of a file what the file is.

Pure. A name is never enough: `root.tar.gz` may hold a disk, and a disk may be called anything.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from vmkit.errors import ConfigError

# As far as btrfs, whose superblock is the last of those that are looked for.
HEAD_BYTES = (64 << 10) + 4096

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):(.*)", re.DOTALL)
# What registries take (distribution's reference grammar, loosely): never white space, never an option's dash first.
_REFERENCE = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9._:/@+\[\]-]{0,511}")
_WAYS = "give a path with a slash, oci:PATH[:TAG], docker-archive:PATH[:TAG], docker://REF, or - for standard input"


class SourceKind(StrEnum):
    """How a root is named. IMAGE is a recipe of vmkit's, and not this room's business."""

    IMAGE = "image"
    PATH = "path"
    OCI = "oci"
    DOCKER_ARCHIVE = "docker-archive"
    STREAM = "-"
    REGISTRY = "docker"


class Shape(StrEnum):
    """What a file is by its first bytes."""

    TAR = "tar"
    GZIP = "gzip"
    XZ = "xz"
    ZSTD = "zstd"
    QCOW2 = "qcow2"
    # Any other file may be a disk: partition tables and file systems are looked for in it.
    DISK = "disk"


# These become something else when they are unpacked.
PACKED = (Shape.GZIP, Shape.XZ, Shape.ZSTD)


@dataclass(frozen=True, slots=True)
class RootSource:
    """A named root. path: of a file or folder. reference: the tag in a layout or archive, or a registry's name."""

    kind: SourceKind
    text: str
    path: Path | None = None
    reference: str = ""


def parse_source(text: str) -> RootSource:
    """Reads a SOURCE. With a slash or a scheme it is a root, otherwise the name of an image. Raises ConfigError."""
    if not text or "\0" in text:
        raise ConfigError("the SOURCE is empty" if not text else "the SOURCE holds a NUL byte", hint=_WAYS)
    if text == "-":
        return RootSource(SourceKind.STREAM, text)
    if text in (".", "..") or text.startswith(("/", "./", "../")):
        return _parse_path(text)
    match = _SCHEME.fullmatch(text)
    if match is not None:
        return _parse_scheme(text, match[1], match[2])
    return _parse_path(text) if "/" in text else RootSource(SourceKind.IMAGE, text)


def _parse_path(text: str) -> RootSource:
    # A recipe beside the user's files is named by its path, too.
    if text.endswith(".toml"):
        return RootSource(SourceKind.IMAGE, text)
    return RootSource(SourceKind.PATH, text, Path(text))


def _parse_scheme(text: str, scheme: str, rest: str) -> RootSource:
    match scheme:
        case "oci" | "oci-archive" | "docker-archive":
            # As skopeo has it: the path ends at the first colon.
            path, _, reference = rest.partition(":")
            if not path:
                raise ConfigError(f"'{text}' names no file", hint=f"give its path: {scheme}:PATH[:TAG]")
            kind = SourceKind.DOCKER_ARCHIVE if scheme == "docker-archive" else SourceKind.OCI
            return RootSource(kind, text, Path(path), reference)
        case "docker":
            reference = rest.removeprefix("//")
            if reference == rest or not _REFERENCE.fullmatch(reference):
                raise ConfigError(
                    f"'{text}' names no container image", hint="give its name in a registry: docker://debian:stable"
                )
            return RootSource(SourceKind.REGISTRY, text, reference=reference)
        case _:
            raise ConfigError(f"'{text}' begins with '{scheme}:', which is no kind of root", hint=_WAYS)


# Offset, bytes, shape.
_MAGIC = (
    (0, b"\x1f\x8b\x08", Shape.GZIP),
    (0, b"\xfd7zXZ\0", Shape.XZ),
    (0, b"\x28\xb5\x2f\xfd", Shape.ZSTD),
    (0, b"QFI\xfb", Shape.QCOW2),
    # POSIX's and GNU's have this in common (tar(5)).
    (257, b"ustar", Shape.TAR),
)
# Kinds of disks that QEMU reads and this room does not.
_FOREIGN = (
    (0, b"KDMV", "a VMware disk (vmdk)"),
    (0, b"# Disk DescriptorFile", "a VMware disk (vmdk)"),
    (0, b"vhdxfile", "a Hyper-V disk (vhdx)"),
    (0, b"conectix", "a Virtual PC disk (vhd)"),
    (64, b"\x7f\x10\xda\xbe", "a VirtualBox disk (vdi)"),
    (0, b"QED\0", "a QED disk"),
)
_NO_ROOT = (
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (0, b"BZh", "packed with bzip2"),
    (0, b"070701", "a cpio archive"),
    (0, b"\x7fELF", "a program"),
    (0, b"!<arch>\n", "an ar archive, such as a Debian package"),
    (0, b"\xed\xab\xee\xdb", "an RPM package"),
)


def recognise(head: bytes, name: str) -> Shape:
    """Tells what a file is from its first HEAD_BYTES. name is for errors. Raises ConfigError for what is no root."""
    if not head:
        raise ConfigError(f"{name} is empty", hint="give a file that holds a root file system")
    for at, magic, shape in _MAGIC:
        if head.startswith(magic, at):
            return shape
    for at, magic, what in _FOREIGN:
        if head.startswith(magic, at):
            raise ConfigError(f"{name} is {what}", hint=f"convert it: qemu-img convert -O qcow2 {name} root.qcow2")
    for at, magic, what in _NO_ROOT:
        if head.startswith(magic, at):
            raise ConfigError(
                f"{name} is {what}, and not a root file system", hint="pack a root as a tar, or make a disk image of it"
            )
    return Shape.TAR if _is_old_tar(head) else Shape.DISK


def _is_old_tar(head: bytes) -> bool:
    """Whether a header without a magic word (V7) has a checksum that is right."""
    block = head[:512]
    if len(block) < 512 or not block[0] or not re.fullmatch(rb" *[0-7]{1,7}[ \0]+", block[148:156]):
        return False
    return int(block[148:156].strip(b" \0"), 8) == sum(block[:148]) + 8 * 32 + sum(block[156:])
