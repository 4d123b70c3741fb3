"""A tar archive's members by their headers: where each one's content is, and nothing of the content is read.

Pure: a reader gives bytes at an offset. Reads POSIX's ustar and pax and GNU's extensions, as docker, skopeo, umoci, GNU
tar and bsdtar write them. Python's tarfile is not used: it reads what a header claims into memory, searches it with
patterns that take quadratic time, and differs between versions. Here every size, number and name has a limit.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from vmkit.errors import BuildError
from vmkit.image.formats.tree import PATH_LIMIT_BYTES, decode_name
from vmkit.roots.superblocks import Reader

_BLOCK_BYTES = 512
_END = bytes(_BLOCK_BYTES)
# Headers are small and follow each other: one read gives many.
_WINDOW_BYTES = 64 << 10
# Of one set of extended fields (pax(1)); an attribute has 64 KiB at most (XATTR_SIZE_MAX).
_EXTENSION_LIMIT_BYTES = 1 << 20
# A member has at most a long name, a long link, pax's fields and global ones before it.
_EXTENSIONS_LIMIT = 8
_NAME_LIMIT_BYTES = 255
# No tree is that deep; each path is looked up part by part.
_DEPTH_LIMIT = 256
_SIZE_LIMIT_BYTES = 1 << 62
_RUN_LIMIT = 100_000
# Owners are 32 bits in the kernel, and the highest means none.
_OWNER_LIMIT = (1 << 32) - 1
_DEVICE_LIMIT = 1 << 20
_XATTR_PREFIX = "SCHILY.xattr."
# What is of use in a guest. SELinux's labels and an overlay's own marks are the host's.
_XATTRS = re.compile(r"user\..+|security\.capability|system\.posix_acl_(access|default)")


class MemberKind(StrEnum):
    """What a member is. A hard link is a second name of an earlier member."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    HARD_LINK = "hard link"
    CHARACTER = "character device"
    BLOCK = "block device"
    FIFO = "named pipe"


# A run of a sparse file's content: where it belongs, and its length. The rest is zeros.
Run = tuple[int, int]


@dataclass(frozen=True, slots=True)
class TarMember:
    """One member. path: relative and without dots; empty for the root itself.

    link: a symlink's target or a hard link's path. offset: of the content in the archive. size_bytes: of the file. It
    is larger than the content in the archive where the file has holes (`runs`).
    """

    path: str
    kind: MemberKind
    mode: int
    uid: int
    gid: int
    mtime_s: int
    offset: int
    size_bytes: int
    link: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[str, bytes], ...] = ()
    runs: tuple[Run, ...] | None = None


_TYPES = {
    b"0": MemberKind.FILE,
    b"\0": MemberKind.FILE,
    b"7": MemberKind.FILE,
    b"S": MemberKind.FILE,
    b"1": MemberKind.HARD_LINK,
    b"2": MemberKind.SYMLINK,
    b"3": MemberKind.CHARACTER,
    b"4": MemberKind.BLOCK,
    b"5": MemberKind.DIRECTORY,
    # GNU's, with a list of names as its content.
    b"D": MemberKind.DIRECTORY,
    b"6": MemberKind.FIFO,
}
_WITH_CONTENT = (b"0", b"\0", b"7", b"S", b"D")


def read_members(read: Reader, *, name: str, has_end: bool = False) -> Iterator[TarMember]:
    """Every member, in the archive's order. name: the archive's, for errors.

    has_end: whether an archive without its end mark is cut off; one whose digest is known needs none. Raises BuildError
    for a damaged archive, and for names that lead out of it.
    """
    try:
        yield from _MemberReader(read, has_end=has_end).read()
    except _DamagedError as error:
        raise BuildError(f"{name} is damaged: {error}", hint="make or download it again") from error
    except _UnsafeError as error:
        raise BuildError(
            f"{name} holds {error}", hint="a root archive has relative names inside of the root: tar -C ROOT -cf FILE ."
        ) from error


class _DamagedError(Exception):
    """Bytes that are no tar. read_members makes a BuildError of it."""


class _UnsafeError(Exception):
    """A name that leads out of the root. read_members makes a BuildError of it."""


class _Extensions:
    """What extension headers say of the member that follows them."""

    __slots__ = ("fields", "link", "name")

    def __init__(self) -> None:
        self.name: bytes | None = None
        self.link: bytes | None = None
        self.fields: dict[str, bytes] = {}


class _MemberReader:
    def __init__(self, read: Reader, *, has_end: bool) -> None:
        self._read = read
        self._has_end = has_end
        self._window = b""
        self._window_at = 0

    def read(self) -> Iterator[TarMember]:
        at, extensions, count = 0, _Extensions(), 0
        while True:
            block = self._read_at(at, _BLOCK_BYTES)
            if not block and not count and not self._has_end:
                return
            if len(block) < _BLOCK_BYTES:
                raise _DamagedError(f"it ends at byte {at}, without an end mark")
            if block == _END:
                return
            _check_sum(block, at)
            size = _read_number(block[124:136], at)
            if not 0 <= size <= _SIZE_LIMIT_BYTES:
                raise _DamagedError(f"the header at byte {at} claims {size} bytes")
            kind = block[156:157]
            if kind in (b"x", b"g", b"L", b"K", b"X"):
                count += 1
                if size > _EXTENSION_LIMIT_BYTES or count > _EXTENSIONS_LIMIT:
                    raise _DamagedError(f"the extended header at byte {at} is too large")
                self._extend(extensions, kind, self._read_at(at + _BLOCK_BYTES, size), size)
                at += _BLOCK_BYTES + _pad(size)
                continue
            member, at = self._make(block, at, size, extensions)
            yield member
            extensions, count = _Extensions(), 0

    def _read_at(self, at: int, length: int) -> bytes:
        """Bytes through a window, so that neighbouring headers cost one read."""
        start = at - self._window_at
        if start < 0 or start + length > len(self._window):
            if length > _WINDOW_BYTES:
                return self._read(at, length)
            self._window, self._window_at, start = self._read(at, _WINDOW_BYTES), at, 0
        return self._window[start : start + length]

    def _extend(self, extensions: _Extensions, kind: bytes, data: bytes, size: int) -> None:
        if len(data) < size:
            raise _DamagedError("it ends in the middle of an extended header")
        match kind:
            case b"L":
                extensions.name = data.split(b"\0")[0]
            case b"K":
                extensions.link = data.split(b"\0")[0]
            case b"x" | b"X":
                extensions.fields.update(_parse_fields(data))
            case _:
                # Global fields hold comments (git archive); docker and skopeo ignore them, too.
                pass

    def _make(self, block: bytes, at: int, size: int, extensions: _Extensions) -> tuple[TarMember, int]:
        """The member of a header, and the offset of the next header."""
        fields = extensions.fields
        flag = block[156:157]
        kind = _TYPES.get(flag)
        name = _choose_name(block, extensions)
        if kind is None:
            raise _DamagedError(f"'{_show(name)}' has the type {flag!r}, which no file of a root has")
        if "size" in fields:
            size = _read_decimal(fields["size"])
        runs, content, real = None, at + _BLOCK_BYTES, size
        if flag == b"S":
            real, runs, content = self._read_old_runs(block, content)
        elif "GNU.sparse.major" in fields or "GNU.sparse.map" in fields or "GNU.sparse.offset" in fields:
            name = fields.get("GNU.sparse.name", name)
            real, runs, content, size = self._read_runs(fields, content, size, _show(name))
        if runs is not None:
            _check_runs(runs, real, size, _show(name))
        after = content + _pad(size if flag in _WITH_CONTENT else 0)
        if kind is MemberKind.FILE and flag == b"\0" and name.endswith(b"/"):
            kind = MemberKind.DIRECTORY
        link = extensions.link if extensions.link is not None else block[157:257].split(b"\0")[0]
        member = TarMember(
            path=_check_path(name),
            kind=kind,
            mode=_read_number(block[100:108], at) & 0o7777,
            uid=_read_owner(fields.get("uid"), block[108:116], at),
            gid=_read_owner(fields.get("gid"), block[116:124], at),
            mtime_s=_read_time(fields.get("mtime"), block[136:148], at),
            offset=content,
            size_bytes=real if kind is MemberKind.FILE else 0,
            link=_check_link(kind, fields.get("linkpath", link), _show(name)),
            device=_read_device(block, at) if kind in (MemberKind.CHARACTER, MemberKind.BLOCK) else (0, 0),
            xattrs=_find_xattrs(fields),
            runs=runs,
        )
        if kind is MemberKind.FILE and size and not self._read(content + size - 1, 1):
            raise _DamagedError(f"it ends inside of '{member.path}'")
        return member, after

    def _read_old_runs(self, block: bytes, content: int) -> tuple[int, tuple[Run, ...], int]:
        """GNU's first form: four runs in the header, more in blocks behind it."""
        runs = _read_run_fields(block[386:482])
        real, goes_on = _read_number(block[483:495], content), block[482]
        while goes_on:
            more = self._read_at(content, _BLOCK_BYTES)
            if len(more) < _BLOCK_BYTES or len(runs) > _RUN_LIMIT:
                raise _DamagedError("the map of a sparse file has no end")
            runs += _read_run_fields(more[:504])
            goes_on, content = more[504], content + _BLOCK_BYTES
        return real, tuple(runs), content

    def _read_runs(
        self, fields: dict[str, bytes], content: int, size: int, name: str
    ) -> tuple[int, tuple[Run, ...], int, int]:
        """pax's forms 0.1 and 1.0: the map is a field, or stands before the content."""
        if "GNU.sparse.map" in fields:
            numbers = [_read_decimal(word) for word in fields["GNU.sparse.map"].split(b",") if word]
            real = _read_decimal(fields.get("GNU.sparse.size", b""))
        elif fields.get("GNU.sparse.major") == b"1" and fields.get("GNU.sparse.minor") == b"0":
            numbers, map_bytes = self._read_map(content, size)
            content, size = content + map_bytes, size - map_bytes
            real = _read_decimal(fields.get("GNU.sparse.realsize", b""))
        else:
            raise _DamagedError(f"'{name}' is sparse in a form that is too old; pack it with --sparse-version=1.0")
        if len(numbers) % 2 or len(numbers) > 2 * _RUN_LIMIT:
            raise _DamagedError(f"'{name}' has a damaged map of its holes")
        return real, tuple(zip(numbers[::2], numbers[1::2], strict=True)), content, size

    def _read_map(self, content: int, size: int) -> tuple[list[int], int]:
        """Decimal numbers in lines, the count of runs first, in whole blocks. Returns them and the map's length."""
        text, blocks = b"", 0
        count: int | None = None
        while count is None or text.count(b"\n") < 1 + 2 * count:
            more = self._read_at(content + blocks * _BLOCK_BYTES, _BLOCK_BYTES)
            blocks += 1
            if len(more) < _BLOCK_BYTES or blocks * _BLOCK_BYTES > min(size, _EXTENSION_LIMIT_BYTES):
                raise _DamagedError("the map of a sparse file has no end")
            text += more
            if count is None and b"\n" in text:
                count = _read_decimal(text.split(b"\n", 1)[0])
        return [_read_decimal(word) for word in text.split(b"\n")[1 : 1 + 2 * count]], blocks * _BLOCK_BYTES


def _pad(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


def _check_sum(block: bytes, at: int) -> None:
    """Bytes were signed on some systems, so either sum will do."""
    words = block[148:156].strip(b" \0")
    if re.fullmatch(rb"[0-7]{1,7}", words):
        expected = int(words, 8)
        total = sum(block) - sum(block[148:156]) + 8 * 32
        if expected == total or expected == total - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
            return
    raise _DamagedError(f"the header at byte {at} has a wrong checksum")


def _read_number(field: bytes, at: int) -> int:
    """Octal digits, or GNU's binary form."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    words = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]{0,12}", words):
        raise _DamagedError(f"the header at byte {at} has a malformed number: {words!r}")
    return int(words or b"0", 8)


def _read_decimal(field: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,19}", field) or int(field) > _SIZE_LIMIT_BYTES:
        raise _DamagedError(f"an extended header has a malformed number: {field[:40]!r}")
    return int(field)


def _read_owner(field: bytes | None, block: bytes, at: int) -> int:
    number = _read_number(block, at) if field is None else _read_decimal(field)
    if not 0 <= number < _OWNER_LIMIT:
        raise _DamagedError(f"the header at byte {at} has the owner {number}, which no file has")
    return number


def _read_time(field: bytes | None, block: bytes, at: int) -> int:
    """Whole seconds; a fraction and a time before 1970 are not kept."""
    if field is None:
        return max(0, _read_number(block, at))
    match = re.fullmatch(rb"(-?)([0-9]{1,18})(\.[0-9]*)?", field)
    if match is None:
        raise _DamagedError(f"an extended header has a malformed time: {field[:40]!r}")
    return 0 if match[1] else int(match[2])


def _read_device(block: bytes, at: int) -> tuple[int, int]:
    major, minor = _read_number(block[329:337], at), _read_number(block[337:345], at)
    if not (0 <= major < _DEVICE_LIMIT and 0 <= minor < _DEVICE_LIMIT):
        raise _DamagedError(f"the header at byte {at} has a device number that no device has")
    return major, minor


def _parse_fields(data: bytes) -> Iterator[tuple[str, bytes]]:
    """pax's records: a length in decimal, a space, `key=value`, a newline."""
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 8)
        length = data[at:space] if space > at else b""
        end = at + int(length) if re.fullmatch(rb"[0-9]{1,7}", length) else 0
        equals = data.find(b"=", space, end)
        if end > len(data) or equals < 0 or data[end - 1 : end] != b"\n":
            raise _DamagedError("it has a damaged extended header")
        yield decode_name(data[space + 1 : equals]), data[equals + 1 : end - 1]
        at = end


def _choose_name(block: bytes, extensions: _Extensions) -> bytes:
    if "path" in extensions.fields:
        return extensions.fields["path"]
    if extensions.name is not None:
        return extensions.name
    name = block[:100].split(b"\0")[0]
    # GNU's magic ends in two spaces; its headers have other fields where POSIX has the prefix.
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _check_path(name: bytes) -> str:
    """The path as a tree knows it. Names that lead out of the root are refused, and not made harmless."""
    if b"\0" in name or not name:
        raise _UnsafeError("a member without a name" if not name else f"the name '{_show(name)}' with a NUL byte")
    if name.startswith(b"/"):
        raise _UnsafeError(f"the absolute name '{_show(name)}'")
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise _UnsafeError(f"the name '{_show(name)}', which leads out of the root")
    if len(name) > PATH_LIMIT_BYTES or any(len(part) > _NAME_LIMIT_BYTES for part in parts):
        raise _UnsafeError(f"a name that is longer than Linux allows: '{_show(name)}'")
    if len(parts) > _DEPTH_LIMIT:
        raise _UnsafeError(f"a name that is more than {_DEPTH_LIMIT} folders deep: '{_show(name)}'")
    return decode_name(b"/".join(parts))


def _check_link(kind: MemberKind, link: bytes, name: str) -> str:
    """A symlink's target is the guest's business; a hard link names a member."""
    match kind:
        case MemberKind.SYMLINK:
            if not 0 < len(link) <= PATH_LIMIT_BYTES or b"\0" in link:
                raise _DamagedError(f"the symlink '{name}' has a target of {len(link)} bytes")
            return decode_name(link)
        case MemberKind.HARD_LINK:
            # Some tools write the path in the guest.
            return _check_path(link.lstrip(b"/"))
        case _:
            return ""


def _find_xattrs(fields: dict[str, bytes]) -> tuple[tuple[str, bytes], ...]:
    return tuple(
        (key.removeprefix(_XATTR_PREFIX), fields[key])
        for key in sorted(fields)
        if key.startswith(_XATTR_PREFIX) and _XATTRS.fullmatch(key.removeprefix(_XATTR_PREFIX))
    )


def _read_run_fields(data: bytes) -> list[Run]:
    """Pairs of twelve bytes each; the first empty one ends them."""
    runs = []
    for at in range(0, len(data), 24):
        if not data[at]:
            break
        runs.append((_read_number(data[at : at + 12], at), _read_number(data[at + 12 : at + 24], at)))
    return runs


def _check_runs(runs: tuple[Run, ...], real: int, size: int, name: str) -> None:
    end = 0
    for at, length in runs:
        if at < end or length < 0 or at + length > real:
            raise _DamagedError(f"'{name}' has a damaged map of its holes")
        end = at + length
    if sum(length for _, length in runs) != size or not 0 <= real <= _SIZE_LIMIT_BYTES:
        raise _DamagedError(f"'{name}' has a damaged map of its holes")


def _show(name: bytes) -> str:
    return name[:80].decode(errors="replace")
