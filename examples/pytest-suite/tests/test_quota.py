"""The program quota mounts a file system, so its tests need root, and a system that they may change."""

from pathlib import Path

import pytest

from vmkit import RunningMachine

QUOTA = Path(__file__).parents[1] / "bin/quota"

# Each machine gets the program.
pytestmark = pytest.mark.vm(files={"/usr/local/bin/quota": QUOTA})


def test_folder_is_made_and_mounted(vm: RunningMachine) -> None:
    vm.run(["quota", "/data", "64k"], check=True)
    assert "quota /data tmpfs" in vm.run(["cat", "/proc/mounts"], text=True).stdout


@pytest.mark.parametrize(("size", "fits"), [(16 << 10, True), (128 << 10, False)])
def test_files_fit_up_to_the_size(vm: RunningMachine, size: int, fits: bool) -> None:
    vm.run(["quota", "/data", "64k"], check=True)
    done = vm.run(["sh", "-c", "cat > /data/file"], input=bytes(size))
    assert (done.exit == 0) == fits


def test_no_other_test_has_left_anything(vm: RunningMachine) -> None:
    assert not vm.exists("/data")
