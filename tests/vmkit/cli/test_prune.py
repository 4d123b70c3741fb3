"""`vmkit prune`: the bytes of each kind, what goes, and that a dry run removes nothing."""

import json
import os
from pathlib import Path

from tests.docs.schemas import check_form
from tests.vmkit.cli.conftest import Vmkit


def make_image(folders: Path) -> Path:
    path = folders / "cache/images" / ("0" * 64)
    path.mkdir(parents=True)
    (path / "kernel").write_bytes(b"x" * 100_000)
    os.utime(path, (0, 0))
    return path


def test_bytes_are_printed_and_nothing_is_removed_in_a_dry_run(folders: Path, vmkit: Vmkit) -> None:
    path = make_image(folders)
    done = vmkit("prune", "--dry-run")
    assert done.status == 0, done.err
    header, row, last = done.out.splitlines()
    assert header.split() == ["KIND", "COUNT", "SIZE", "UNUSED", "SIZE"]
    assert row.split()[:3] == ["images", "1", "0.1"]
    size = int(last.removesuffix(" bytes would be free"))
    assert size >= 100_000
    assert path.is_dir()
    value = json.loads(vmkit("prune", "--json").out)
    check_form("prune", value)
    assert (value["dry_run"], value["freed_bytes"]) == (False, size)
    assert not path.exists()
    assert vmkit("prune").out == "0 bytes are free now\n"


def test_doctor_counts_and_names_the_remedy(folders: Path, vmkit: Vmkit) -> None:
    make_image(folders)
    checks = {check["name"]: check for check in json.loads(vmkit("doctor", "--json").out)["checks"]}
    assert checks["storage"]["text"] == "images 0 MiB"
    assert checks["storage"]["hint"].endswith(" bytes) are of no machine and were not used for a week: vmkit prune")
