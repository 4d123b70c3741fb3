"""A Debian archive of our own: small packages, signed by a throw-away key, served from a folder."""

import hashlib
import lzma
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmkit.image.recipe import config
from vmkit.image.recipe.config import ImageSpec
from vmkit.image.trust import make_voucher, remember

KERNEL_VERSION = "6.12.1-cloud-amd64"
MODULES = f"usr/lib/modules/{KERNEL_VERSION}"
# What a busybox is asked at build time.
BUSYBOX = b'#!/bin/sh\n[ "$1" = --list-full ] && printf "bin/ls\\nsbin/insmod\\nusr/bin/[\\nlinuxrc\\n"\n'
BASE_RECIPE = """
description = "an image of fake packages"
suite = "stable"
kernel = "linux-image-cloud-amd64"
kernel_format = "vmlinuz"
modules = ["second"]
[extract]
busybox-static = ["bin/busybox"]
[files]
"/etc/passwd" = { content = "root:x:0:0:root:/root:/bin/sh\\nuser:x:1000:1000::/home/user:/bin/sh\\n" }
"""

MakeDeb = Callable[..., Path]


def make_elf(
    *, modinfo: bytes = b"", needed: tuple[bytes, ...] = (), note: bytes = b"", order: str = "<", machine: int = 62
) -> bytes:
    """The smallest 64-bit ELF file with a .modinfo, a .dynamic or a .notes section (elf.h). order: of its bytes."""
    names = b"\0.modinfo\0.dynamic\0.dynstr\0.shstrtab\0.notes\0"
    strings = b"\0" + b"\0".join(needed) + b"\0"
    dynamic = b"".join(struct.pack(f"{order}qQ", 1, strings.index(name)) for name in needed) + struct.pack(
        f"{order}qQ", 0, 0
    )
    contents = [b"", modinfo, dynamic, strings, names, note]
    labels = ["", ".modinfo", ".dynamic", ".dynstr", ".shstrtab", ".notes"]
    kinds = [0, 1, 6 if needed else 1, 3, 3, 7]
    offset, body, headers = 64, b"", b""
    for label, kind, content in zip(labels, kinds, contents, strict=True):
        name = names.index(label.encode() + b"\0") if label else 0
        link = 3 if label == ".dynamic" else 0
        headers += struct.pack(f"{order}IIQQQQIIQQ", name, kind, 0, 0, offset + len(body), len(content), link, 0, 1, 0)
        body += content
    start = offset + len(body)
    ident = b"\x7fELF\x02" + bytes([1 if order == "<" else 2, 1]) + bytes(9)
    return (
        struct.pack(f"{order}16sHHIQQQIHHHHHH", ident, 1, machine, 1, 0, 0, start, 0, 64, 0, 0, 64, 6, 4)
        + body
        + headers
    )


def make_module(name: str, depends: str = "") -> bytes:
    return make_elf(modinfo=f"license=GPL\0depends={depends}\0name={name}\0".encode())


@pytest.fixture(name="make_elf", scope="session")
def fixture_make_elf() -> Callable[..., bytes]:
    return make_elf


def _make_deb(
    folder: Path,
    name: str,
    files: dict[str, bytes] | None = None,
    *,
    version: str = "1.0-1",
    fields: str = "",
    links: dict[str, str] | None = None,
    executable: tuple[str, ...] = (),
    architecture: str = "amd64",
) -> Path:
    root = Path(tempfile.mkdtemp(dir=folder))
    (root / "DEBIAN").mkdir()
    head = f"Package: {name}\nVersion: {version}\nArchitecture: {architecture}\n"
    control = f"{head}Maintainer: nobody <n@example.org>\n{fields}"
    (root / "DEBIAN/control").write_text(control + "Description: made by a test\n")
    for path, data in (files or {}).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
        (root / path).chmod(0o755 if path in executable else 0o644)
    for path, target in (links or {}).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(target)
    for directory in (root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())):
        directory.chmod(0o755)
    deb = folder / f"{name}_{version}_{architecture}.deb"
    words = ["dpkg-deb", "--build", "--root-owner-group", "-Zgzip", "-z1", str(root), str(deb)]
    subprocess.run(words, check=True, capture_output=True)
    shutil.rmtree(root)
    return deb


@pytest.fixture
def make_deb(tmp_path: Path) -> MakeDeb:
    """make_deb(name, files, version=, fields=, links=, executable=) gives the path of a package."""
    folder = tmp_path / "debs"
    folder.mkdir()
    return lambda *words, **settings: _make_deb(folder, *words, **settings)


@dataclass(frozen=True)
class ArchiveFixture:
    """A signed archive on disk. Anybody may read it, so that a build can be tried as another user."""

    root: Path
    keyring: Path
    stranger_keyring: Path
    sign: Callable[[Path], None]

    def trust(self) -> None:
        """As `vmkit build --trust` does: its keyring is none of Debian's."""
        remember([make_voucher("keyring", path, 1 << 20) for path in (self.keyring, self.stranger_keyring)])

    @property
    def mirror(self) -> str:
        return f"file:{self.root}"

    def copy(self, folder: Path) -> "ArchiveFixture":
        shutil.copytree(self.root, folder)
        return ArchiveFixture(folder, self.keyring, self.stranger_keyring, self.sign)

    def add(self, *debs: Path) -> None:
        """Puts more packages in and signs the index anew."""
        for deb in debs:
            shutil.copy(deb, self.root / "pool")
        _write_index(self.root)
        self.sign(self.root / "dists/stable")

    def add_suite(self, suite: str, *debs: Path) -> None:
        """Puts one more suite in, of these packages alone."""
        pool = self.root / f"pool-{suite}"
        pool.mkdir()
        for deb in debs:
            shutil.copy(deb, pool)
        _write_index(self.root, suite, pool.name)
        self.sign(self.root / "dists" / suite)


def _write_index(root: Path, suite: str = "stable", pool: str = "pool") -> None:
    stanzas: dict[str, list[str]] = {"amd64": []}
    for deb in sorted((root / pool).glob("*.deb")):
        control = subprocess.run(["dpkg-deb", "-f", str(deb)], check=True, capture_output=True, text=True).stdout
        digest = hashlib.sha256(deb.read_bytes()).hexdigest()
        stanzas.setdefault(deb.stem.rpartition("_")[2], []).append(
            f"{control.strip()}\nFilename: {pool}/{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {digest}\n"
        )
    dist = root / "dists" / suite
    lines = ""
    for architecture, texts in stanzas.items():
        index = "\n".join(texts).encode()
        (dist / f"main/binary-{architecture}").mkdir(parents=True, exist_ok=True)
        (dist / f"main/binary-{architecture}/Packages").write_bytes(index)
        lines += f" {hashlib.sha256(index).hexdigest()} {len(index)} main/binary-{architecture}/Packages\n"
    head = f"Origin: Test\nSuite: {suite}\nCodename: {suite}\nComponents: main\nArchitectures: {' '.join(stanzas)}\n"
    (dist / "Release").write_text(f"{head}Date: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n{lines}")


@contextmanager
def _agent(home: Path) -> Iterator[None]:
    """gpg starts an agent in its home. It ends here at once, so that a run that is killed leaves none."""
    try:
        yield
    finally:
        subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False, capture_output=True)


def _make_key(home: Path, name: str) -> bytes:
    words = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
    owner = f"{name} <{name}@example.org>"
    with _agent(home):
        subprocess.run([*words, "--quick-gen-key", owner, "ed25519", "sign", "never"], check=True)
        return subprocess.run([*words, "--export", name], check=True, capture_output=True).stdout


@pytest.fixture(scope="session")
def archive() -> Iterator[ArchiveFixture]:
    """The archive every build test starts from; tests that change it copy it first."""
    if not shutil.which("gpg") or not shutil.which("apt-get"):
        pytest.skip("needs gpg and apt-get")
    base = Path(tempfile.mkdtemp(prefix="vmkit-test-archive-"))
    base.chmod(0o755)
    home = base / "gnupg"
    home.mkdir(mode=0o700)
    try:
        keyring, stranger = base / "keyring.gpg", base / "stranger.gpg"
        keyring.write_bytes(_make_key(home, "archive"))
        stranger.write_bytes(_make_key(home, "stranger"))

        def sign(dist: Path) -> None:
            (dist / "InRelease").unlink(missing_ok=True)
            words = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--local-user", "archive", "--clearsign"]
            with _agent(home):
                subprocess.run([*words, "--output", str(dist / "InRelease"), str(dist / "Release")], check=True)

        _fill_pool(base / "archive/pool")
        _write_index(base / "archive")
        sign(base / "archive/dists/stable")
        yield ArchiveFixture(base / "archive", keyring, stranger, sign)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _fill_pool(pool: Path) -> None:
    pool.mkdir(parents=True)
    kernel = f"linux-image-{KERNEL_VERSION}"
    _make_deb(pool, "linux-image-cloud-amd64", fields=f"Depends: {kernel} (= 1.0-1)\n")
    modules = {
        f"{MODULES}/kernel/first.ko.xz": lzma.compress(make_module("first")),
        f"{MODULES}/kernel/net/second.ko.xz": lzma.compress(make_module("second", "first,third-part")),
        f"{MODULES}/kernel/third-part.ko": make_module("third_part", "first"),
        f"{MODULES}/kernel/unwanted.ko.xz": lzma.compress(make_module("unwanted")),
        f"{MODULES}/modules.builtin": b"kernel/drivers/virtio/virtio-pci.ko\n",
    }
    _make_deb(pool, kernel, {f"boot/vmlinuz-{KERNEL_VERSION}": b"not a real kernel", **modules})
    _make_deb(pool, "busybox-static", {"bin/busybox": BUSYBOX}, executable=("bin/busybox",))
    _make_deb(
        pool, "tool", {"usr/bin/tool": b"#!/bin/sh\n", "usr/share/doc/tool/x": b"x"}, fields="Depends: libtool1\n"
    )
    _make_deb(pool, "libtool1", {"lib/libtool.so.1": b"data"}, fields="Recommends: unwanted-recommendation\n")


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, named by VMKIT_CACHE_DIR; a state folder, in which nothing is trusted."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("VMKIT_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(folder))
    monkeypatch.delenv("VMKIT_MIRROR", raising=False)
    return folder


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """write_recipe(text, name="my") gives the path of a recipe file."""

    def write(text: str, name: str = "my") -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def fake_spec(cache_dir: Path, archive: ArchiveFixture, write_recipe: Callable[..., Path]) -> Callable[..., ImageSpec]:
    """fake_spec(more TOML, tables="") gives an image of the archive's fake packages; its keyring is trusted."""
    archive.trust()

    def load(
        top: str = "",
        tables: str = "",
        *,
        at: ArchiveFixture = archive,
        name: str = "my",
        base: str = BASE_RECIPE,
        architecture: str = "amd64",
    ) -> ImageSpec:
        head = f'mirror = "{at.mirror}"\nkeyring = "{at.keyring}"\n'
        return config.load_image(str(write_recipe(head + top + base + tables, name)), architecture)

    return load


@pytest.fixture
def child_environ() -> dict[str, str]:
    """The environment for a Python child that imports what this one does."""
    root = Path(config.__file__).parents[3]
    return os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
