"""Limits of this process and of a socket's path: a start names them before it builds or proves anything."""

import subprocess
import sys
from pathlib import Path

import pytest

from vmkit.errors import HostError
from vmkit.image.build import BuiltImage
from vmkit.machine.spec import MachineSpec
from vmkit.machine.start import start_machine

START = """
import resource, sys
from pathlib import Path
from vmkit.image.build import BuiltImage
from vmkit.machine import stop
from vmkit.machine.spec import Accelerator, Backend, MachineSpec
from vmkit.machine.start import start_machine
from vsh.errors import VshError
from vsh.limits import add_remedy
from vsh.registry import find_machine
kernel = Path(sys.argv[1])
image = BuiltImage("tiny", kernel, kernel, kernel, (), "root", "0" * 64, True)
spec = MachineSpec(append="fake=ready", accelerator=Accelerator.TCG, backend=Backend.USER, timeout_s=30)
soft, hard = int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    start_machine(spec, build=lambda i, t: image)
    print(find_machine(name="tiny").state)
    stop.kill(find_machine(name="tiny"))
except VshError as error:
    print(add_remedy(error).render("vmkit"))
"""


def start_with_limit(image: BuiltImage, soft: int, hard: int) -> list[str]:
    argv = [sys.executable, "-c", START, str(image.kernel), str(soft), str(hard)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()


def test_too_few_open_files_are_refused_with_the_remedy(image: BuiltImage) -> None:
    first, hint = start_with_limit(image, 64, 64)
    assert first == "vmkit: this process may open 64 files, and a machine needs 128"
    assert "ulimit -n 1024" in hint


def test_start_that_runs_out_of_files_itself_names_the_limit(image: BuiltImage) -> None:
    """The monitor has the hard limit; this process keeps its soft one."""
    *_, hint = start_with_limit(image, 8, 1024)
    assert hint == "hint: this process may open 8 files; raise the limit: ulimit -n 1024"


def test_monitor_raises_a_soft_limit_that_is_too_low(image: BuiltImage) -> None:
    assert start_with_limit(image, 24, 128) == ["ready"]


def test_socket_path_that_is_too_long_is_refused_before_anything_is_built(
    folders: Path, image: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = folders / ("x" * 80)
    long.mkdir(mode=0o700)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(long))
    built: list[str] = []

    def build(name: str, _tell: object) -> BuiltImage:
        built.append(name)
        return image

    with pytest.raises(HostError, match="the kernel takes 107"):
        start_machine(MachineSpec(), build=build)
    assert built == []
    assert not (long / "kvm-verdict.json").exists()
