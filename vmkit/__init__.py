"""vmkit: build guest images, launch QEMU with a vsock device, tend the machines.

`vmkit.Machine` is the Python API. It is loaded on first use: the monitor and the vsock device are processes of this
package that must stay small.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmkit.machine.machine import Machine as Machine


def __getattr__(name: str) -> object:
    if name == "Machine":
        from vmkit.machine.machine import Machine  # noqa: PLC0415  (see above)

        return Machine
    raise AttributeError(f"module 'vmkit' has no attribute '{name}'")
