"""A machine room without a VM: a fake QEMU on PATH, an image of two empty files, directories of its own."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmkit.image.build import BuiltImage
from vmkit.machine import stop
from vmkit.machine.spec import Accelerator, Backend, MachineSpec
from vmkit.machine.start import Started, start_machine
from vsh.registry import read_machines

FAKES = Path(__file__).parents[2] / "fakes"


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Runtime, state, data and cache directories below one short path: a socket's path may have 107 bytes only."""
    root = Path(tempfile.mkdtemp(prefix="vmkit-"))
    for name in ("runtime", "state", "data", "cache"):
        (root / name).mkdir(mode=0o700)
        monkeypatch.setenv(f"VMKIT_{name.upper()}_DIR", str(root / name))
    monkeypatch.delenv("VMKIT_SNAPSHOTS_DIR", raising=False)
    yield root
    # Wherever the test has pointed it since.
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(root / "runtime"))
    for machine in read_machines():
        stop.kill(machine)
    remove(root)


def remove(root: Path) -> None:
    """A monitor whose `up` was killed may still be removing its own part."""
    end_s = time.monotonic() + 10
    while root.exists():
        shutil.rmtree(root, ignore_errors=True)
        assert time.monotonic() < end_s, f"{root} is still written to"


@pytest.fixture
def fake_qemu(monkeypatch: pytest.MonkeyPatch, folders: Path) -> Path:
    # The fake's interpreter is ours: another python3 on PATH may be a script that takes its time.
    monkeypatch.setenv("PATH", f"{FAKES}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    return folders


Boot = Callable[..., Started]


@pytest.fixture
def image(fake_qemu: Path) -> BuiltImage:
    """An image of empty files."""
    for name in ("kernel", "initrd", "manifest.json"):
        (fake_qemu / "cache" / name).write_bytes(b"")
    return BuiltImage(
        name="tiny",
        kernel=fake_qemu / "cache" / "kernel",
        initrd=fake_qemu / "cache" / "initrd",
        manifest=fake_qemu / "cache" / "manifest.json",
        kernel_args=("quiet",),
        default_user="root",
        digest="0" * 64,
        cached=True,
    )


@pytest.fixture
def boot(image: BuiltImage) -> Iterator[Boot]:
    """boot(scenario, **spec) starts a machine whose QEMU plays that scenario."""
    started: list[Started] = []

    def start(scenario: str, *, accelerator: Accelerator | None = Accelerator.TCG, **fields: Any) -> Started:
        spec = MachineSpec(
            append=f"fake={scenario}",
            accelerator=accelerator,
            backend=fields.pop("backend", Backend.USER),
            timeout_s=fields.pop("timeout_s", 20.0),
            **fields,
        )
        machine = start_machine(spec, build=lambda _image, _tell: image)
        started.append(machine)
        return machine

    yield start
    for machine in read_machines():
        stop.kill(machine)
    for one in started:
        one.monitor.wait(10)
