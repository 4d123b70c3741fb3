"""Disks and file systems made by the programs that users make them with, sparse and small."""

import os
import shutil
import subprocess
from pathlib import Path

MIB = 1 << 20
# The smallest that each program makes.
SIZES = {"ext4": 4 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB}


def run(*words: str | Path, stdin: str = "") -> None:
    environ = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    argv = [str(word) for word in words]
    subprocess.run(argv, check=True, capture_output=True, input=stdin, text=True, timeout=120, env=environ)


def make_file_system(kind: str, path: Path, label: str = "") -> Path:
    """A file system with one folder and one file, where its program can be told so."""
    content = path.with_name(f"{path.name}.content")
    (content / "etc").mkdir(parents=True)
    (content / "etc/hostname").write_text("guest\n")
    if kind in SIZES:
        with path.open("wb") as file:
            file.truncate(SIZES[kind])
    match kind:
        case "ext4":
            run("mke2fs", "-q", "-F", "-t", "ext4", "-L", label, "-d", content, path)
        case "xfs":
            run("mkfs.xfs", "-q", "-L", label[:12], path)
        case "btrfs":
            run("mkfs.btrfs", "-q", "-L", label, "--rootdir", content, path)
        case "squashfs":
            run("mksquashfs", content, path, "-quiet", "-no-progress")
        case "erofs":
            run("mkfs.erofs", path, content)
    shutil.rmtree(content)
    return path


def make_disk(path: Path, script: str, parts: dict[int, Path], size: int = 64 * MIB) -> Path:
    """A disk partitioned by sfdisk's `script`; parts: the content to put at these MiB."""
    with path.open("wb") as file:
        file.truncate(size)
    run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", path, stdin=script)
    with path.open("r+b") as file:
        for at, part in parts.items():
            file.seek(at * MIB)
            file.write(part.read_bytes())
    return path
