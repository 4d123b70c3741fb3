"""Archives of roots: tars with any member, image layouts by umoci, and what is in the ext4 that becomes of them."""

import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

from tests.vmkit.roots.disks import run

# The least that is a root.
SHELL = b"#!/bin/sh\n"


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    """A header with any field: size, linkname, mode, uid, pax_headers, ..."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def folder(name: str, **fields: object) -> tarfile.TarInfo:
    return member(name, tarfile.DIRTYPE, **fields)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    return member(name, kind, linkname=target)


Piece = tarfile.TarInfo | tuple[str | tarfile.TarInfo, bytes]


def make_tar(pieces: Iterable[Piece], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of headers, and of pairs of a name or header and a content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for piece in pieces:
            info, data = piece if isinstance(piece, tuple) else (piece, b"")
            info = member(info) if isinstance(info, str) else info
            info.size = len(data) or info.size
            tar.addfile(info, io.BytesIO(data) if data else None)
    return out.getvalue()


def make_layout(path: Path, layers: Iterable[bytes], config: dict[str, object] | None = None) -> Path:
    """An OCI layout by hand, with layers as they are given."""
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True)
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def add(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    found = [add(layer, "layer.v1.tar") for layer in layers]
    document: dict[str, object] = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in found]},
        **(config or {}),
    }
    manifest = {"schemaVersion": 2, "config": add(json.dumps(document).encode(), "config.v1+json"), "layers": found}
    index = {"schemaVersion": 2, "manifests": [add(json.dumps(manifest).encode(), "manifest.v1+json")]}
    (path / "index.json").write_text(json.dumps(index))
    return path


def make_umoci_layout(path: Path, work: Path) -> Path:
    """Two images by umoci: `one` has a file that `two` takes away, and a configuration."""
    image = f"{path}:one"
    # Without root, umoci neither sets owners nor needs to.
    rootless = ["--rootless"] if os.geteuid() else []
    run("umoci", "init", "--layout", path)
    run("umoci", "new", "--image", image)
    run("umoci", "unpack", *rootless, "--image", image, work)
    for name in ("bin/sh", "etc/passwd", "etc/gone", "srv/old/a", "srv/old/b"):
        (work / "rootfs" / name).parent.mkdir(parents=True, exist_ok=True)
        (work / "rootfs" / name).write_bytes(SHELL)
    (work / "rootfs/bin/sh").chmod(0o4755)
    (work / "rootfs/bin/ash").hardlink_to(work / "rootfs/bin/sh")
    (work / "rootfs/bin/bash").symlink_to("/bin/sh")
    run("umoci", "repack", "--image", image, work)
    words = ["--config.env", "A=b", "--config.env", "PATH=/bin", "--config.user", "5:6", "--config.workingdir", "/srv"]
    run("umoci", "config", "--image", image, *words, "--config.cmd", "sh", "--config.entrypoint", "/bin/sh")
    second = work.with_name(f"{work.name}-2")
    run("umoci", "unpack", *rootless, "--image", image, second)
    (second / "rootfs/etc/gone").unlink()
    for name in "ab":
        (second / "rootfs/srv/old" / name).unlink()
    (second / "rootfs/srv/old").rmdir()
    (second / "rootfs/srv/old").write_bytes(b"now a file")
    (second / "rootfs/srv/new").mkdir()
    run("umoci", "repack", "--image", f"{path}:two", second)
    return path


def list_ext4(image: Path) -> dict[str, str]:
    """Path to mode, owner and size, of all that is in a file system: `100755 0:0 12`."""
    found: dict[str, str] = {}
    waiting = [""]
    while waiting:
        at = waiting.pop()
        words = ["/usr/sbin/debugfs", "-R", f'ls -p "{at or "/"}"', str(image)]
        listed = subprocess.run(words, capture_output=True, check=True).stdout.decode(errors="surrogateescape")
        for line in listed.splitlines():
            parts = line.split("/")
            if len(parts) < 7 or parts[5] in (".", "..", "lost+found"):
                continue
            path = f"{at}/{parts[5]}"
            found[path] = f"{parts[2]} {parts[3]}:{parts[4]} {parts[6]}".strip()
            if parts[2].startswith("04"):
                waiting.append(path)
    return found


def read_ext4(image: Path, path: str) -> bytes:
    words = ["/usr/sbin/debugfs", "-R", f'cat "{path}"', str(image)]
    return subprocess.run(words, capture_output=True, check=True).stdout
