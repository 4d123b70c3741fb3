"""The monitor's tests use the machine room's fake QEMU, image and directories."""

from tests.vmkit.machine.conftest import boot, fake_qemu, folders, image

__all__ = ["boot", "fake_qemu", "folders", "image"]
