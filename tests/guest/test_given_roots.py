"""Roots of a user's in the places of images: matrix files and pools."""

import json
import tarfile
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from tests.guest.conftest import Run
from vmkit.image.build import build_image
from vmkit.image.formats.cpio import read_cpio
from vmkit.image.recipe.config import load_image
from vmkit.pool.pool import Pool
from vsh.registry import read_machines

BOOT_ID = "/proc/sys/kernel/random/boot_id"


@pytest.fixture(scope="module")
def root(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of busybox alone, without the program `true`."""
    place = tmp_path_factory.mktemp("roots")
    folder = place / "small"
    entries = read_cpio(build_image(load_image("tiny")).initrd.read_bytes())
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/busybox").write_bytes(next(entry.node.data for entry in entries if entry.path == "usr/bin/busybox"))
    (folder / "bin/busybox").chmod(0o755)
    for applet in ("cat", "sh"):
        (folder / "bin" / applet).symlink_to("busybox")
    (folder / "mark").write_text("it is the root\n")
    with tarfile.open(place / "small.tar", "w") as tar:
        tar.add(folder, ".")
    return place / "small.tar"


def test_matrix_runs_its_commands_in_a_root(root: Path, vmkit: Run) -> None:
    lab = root.with_name("lab.toml")
    lab.write_text('images = ["./small.tar"]\nbackends = ["user"]\n[commands]\nmark = "cat /mark"\n')
    done = vmkit("matrix", str(lab), "--junit", str(root.with_name("junit.xml")))
    assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()
    (case,) = Xml.parse(root.with_name("junit.xml")).getroot()[0]
    assert case.get("classname") == "small.own.user"
    assert str(case[0].text).strip() == "it is the root"


def test_machines_of_a_root_start_from_its_snapshot(root: Path, vmkit: Run) -> None:
    """The pool makes it, and `vmkit run` takes it. Each machine has a boot id of its own, which its sessions see."""
    known = {machine.name for machine in read_machines()}
    ids = set()
    with Pool(str(root), size=1, accelerator="tcg", backend="user") as pool, pool.take(120) as machine:
        assert pool.name.startswith("small-pool")
        assert machine.run(["cat", "/mark"], check=True).stdout == b"it is the root\n"
        entry = machine.find_entry()
        assert entry.record["started_by"] == "snapshot"
        ids.add(machine.run(["cat", BOOT_ID], check=True).stdout)
    options = ("--accel", "tcg", "--backend", "user")
    for _ in range(2):
        done = vmkit("--debug", "run", *options, str(root), "cat", BOOT_ID)
        assert done.returncode == 0, done.stderr.decode()
        ids.add(done.stdout)
    assert len(ids) == 3
    made = json.loads(vmkit("snapshot", "list", "--json").stdout)
    assert [one["named"] for one in made if one["image"] == str(root)] == [False]
    assert {machine.name for machine in read_machines()} == known
