"""What a user may name as a root, and what a file is by its content alone."""

import gzip
import io
import lzma
import tarfile
from pathlib import Path

import pytest

from vmkit.errors import ConfigError
from vmkit.roots.source import RootSource, Shape, SourceKind, parse_source, recognise


def make_tar(kind: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        member = tarfile.TarInfo("etc/hostname")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"me\n"))
    return out.getvalue()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tiny", RootSource(SourceKind.IMAGE, "tiny")),
        ("root.tar", RootSource(SourceKind.IMAGE, "root.tar")),
        ("./my.toml", RootSource(SourceKind.IMAGE, "./my.toml")),
        ("./root.tar", RootSource(SourceKind.PATH, "./root.tar", Path("root.tar"))),
        ("roots/alpine", RootSource(SourceKind.PATH, "roots/alpine", Path("roots/alpine"))),
        ("/srv/a:b", RootSource(SourceKind.PATH, "/srv/a:b", Path("/srv/a:b"))),
        ("./a:b", RootSource(SourceKind.PATH, "./a:b", Path("a:b"))),
        (".", RootSource(SourceKind.PATH, ".", Path())),
        ("-", RootSource(SourceKind.STREAM, "-")),
        ("oci:layout", RootSource(SourceKind.OCI, "oci:layout", Path("layout"))),
        ("oci:/srv/layout:stable", RootSource(SourceKind.OCI, "oci:/srv/layout:stable", Path("/srv/layout"), "stable")),
        (
            "docker-archive:x.tar:debian:12",
            RootSource(SourceKind.DOCKER_ARCHIVE, "docker-archive:x.tar:debian:12", Path("x.tar"), "debian:12"),
        ),
        (
            "docker://localhost:5000/a/b:c",
            RootSource(SourceKind.REGISTRY, "docker://localhost:5000/a/b:c", reference="localhost:5000/a/b:c"),
        ),
    ],
)
def test_words_say_what_a_root_is(text: str, expected: RootSource) -> None:
    assert parse_source(text) == expected


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("", "the SOURCE is empty"),
        ("a\0b", "holds a NUL byte"),
        ("oci:", "'oci:' names no file"),
        ("docker-archive::tag", "names no file"),
        ("docker:debian", "'docker:debian' names no container image"),
        ("docker://", "names no container image"),
        ("docker://--help", "names no container image"),
        ("docker://a b", "names no container image"),
        ("https://example.org/root.tar", "begins with 'https:', which is no kind of root"),
    ],
)
def test_words_that_name_no_root_get_the_ways_to_name_one(text: str, seen: str) -> None:
    with pytest.raises(ConfigError, match=seen) as caught:
        parse_source(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        (gzip.compress(b"x", mtime=0), Shape.GZIP),
        (lzma.compress(b"x"), Shape.XZ),
        (b"\x28\xb5\x2f\xfd" + bytes(20), Shape.ZSTD),
        (make_tar(), Shape.TAR),
        (make_tar(tarfile.GNU_FORMAT), Shape.TAR),
        (make_tar()[:257] + bytes(8) + make_tar()[265:], Shape.DISK),
        (b"QFI\xfb" + bytes(100), Shape.QCOW2),
        (bytes(4096), Shape.DISK),
    ],
)
def test_content_says_what_a_file_is(head: bytes, shape: Shape) -> None:
    """The last but three is a tar whose checksum is wrong, so it is none."""
    assert recognise(head, "file") is shape


def test_tar_without_a_magic_word_is_known_by_its_checksum() -> None:
    head = bytearray(make_tar(tarfile.USTAR_FORMAT))
    head[257:265] = bytes(8)
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 8 * 32 + sum(head[156:512]))
    assert recognise(bytes(head), "file") is Shape.TAR


@pytest.mark.parametrize(
    ("head", "seen"),
    [
        (b"", "file is empty"),
        (b"KDMV" + bytes(100), r"file is a VMware disk \(vmdk\)"),
        (b"PK\x03\x04", "file is a zip archive, and not a root"),
        (b"\x7fELF\x02", "file is a program, and not a root"),
    ],
)
def test_content_that_is_no_root_is_named(head: bytes, seen: str) -> None:
    with pytest.raises(ConfigError, match=seen) as caught:
        recognise(head, "file")
    assert caught.value.hint
