"""Images of many layers by umoci: the disk has what umoci itself unpacks, whiteouts and packing whatever."""

import json
import os
import random
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from tests.vmkit.roots.archives import list_ext4, read_ext4
from tests.vmkit.roots.disks import run
from vmkit.roots.prepare import prepare_root

LAYERS = 25
NAMES = ("a", "b", "c", "d e", "\N{SNOWMAN}")


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def change(root: Path, chance: random.Random, number: int) -> None:
    """One layer's changes: files, folders and links come, go, and take each other's places."""
    for _ in range(6):
        path = root / "srv" / chance.choice(NAMES) / chance.choice(NAMES)
        if path.parent.exists() and not path.parent.is_dir():
            remove(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(path)
        match chance.randrange(6):
            case 0:
                path.mkdir(0o700)
                (path / "inner").write_bytes(b"i" * number)
            case 1:
                path.symlink_to(f"../{number}")
            case 2:
                (path.parent / "first").write_bytes(b"f" * number)
                path.hardlink_to(path.parent / "first")
            case 3:
                # Emptied and filled again in one layer.
                remove(path.parent)
                path.parent.mkdir()
                path.write_bytes(b"n" * number)
            case _:
                path.write_bytes(b"x" * (100 + number))
                path.chmod(chance.choice((0o644, 0o755, 0o4755)))
    # Somebody's file is gone at last.
    gone = sorted((root / "srv").iterdir())
    if len(gone) > 2:
        remove(chance.choice(gone))


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("umoci")
    layout, bundle = folder / "layout", folder / "bundle"
    rootless = ["--rootless"] if os.geteuid() else []
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:many")
    run("umoci", "unpack", *rootless, "--image", f"{layout}:many", bundle)
    (bundle / "rootfs/bin").mkdir()
    (bundle / "rootfs/bin/sh").write_bytes(b"#!/bin/sh\n")
    (bundle / "rootfs/srv").mkdir()
    chance = random.Random(15)
    for number in range(1, LAYERS + 1):
        change(bundle / "rootfs", chance, number)
        run("umoci", "repack", "--refresh-bundle", "--image", f"{layout}:many", bundle)
    return layout


def list_folder(root: Path) -> dict[str, tuple[str, int]]:
    """Mode, and the size of a file, of all that is in a folder."""
    found = {}
    for path in root.rglob("*"):
        status = path.lstat()
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        found[f"/{path.relative_to(root)}"] = (f"{status.st_mode:06o}", size)
    return found


def test_disk_has_what_umoci_unpacks(layout: Path, tmp_path: Path) -> None:
    manifests = list((layout / "blobs/sha256").iterdir())
    assert len(manifests) > LAYERS
    rootless = ["--rootless"] if os.geteuid() else []
    run("umoci", "unpack", *rootless, "--image", f"{layout}:many", tmp_path / "bundle")
    expected = list_folder(tmp_path / "bundle/rootfs")
    found = prepare_root(f"oci:{layout}:many")
    listed = {path: text.split() for path, text in list_ext4(found.path).items()}
    sizes = {path: int(words[2]) if words[0].startswith("10") else 0 for path, words in listed.items()}
    assert {path: (words[0], sizes[path]) for path, words in listed.items()} == expected
    for path in list(expected)[:8]:
        if expected[path][0].startswith("10"):
            assert read_ext4(found.path, path) == (tmp_path / f"bundle/rootfs{path}").read_bytes()


@pytest.mark.parametrize("form", ["zstd", "gzip"])
def test_packing_of_the_layers_does_not_matter(layout: Path, tmp_path: Path, form: str) -> None:
    first = prepare_root(f"oci:{layout}:many")
    words = ["--dest-compress", "--dest-compress-format", form]
    run("skopeo", "--insecure-policy", "copy", "-q", *words, f"oci:{layout}:many", f"oci:{tmp_path}/packed:many")
    index = json.loads((tmp_path / "packed/index.json").read_text())
    blobs = tmp_path / "packed/blobs/sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_text())
    assert {layer["mediaType"].rpartition("+")[2] for layer in manifest["layers"]} == {form}
    shutil.rmtree(first.path.parent)
    assert prepare_root(f"oci:{tmp_path}/packed:many") == replace(first, cached=False)
