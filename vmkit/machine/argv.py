"""QEMU's argv as it travels to the monitor: with marks in the places of what only the monitor knows. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vmkit.machine.hardware import USER_READY_PORT
from vmkit.machine.parts.part import Fitting, QmpCommand, ServedSocket

# Stand in the argv for what only the monitor knows: its descriptors, and the port of its READY listener on `vhost`.
CONSOLE_CHARDEV = "{console}"
QMP_CHARDEV = "{qmp}"
READY_PORT_MARK = "{ready_port}"
# Of the guest's memory: a file that the monitor makes, so that it is still there when QEMU is gone.
MEMORY_MARK = "{memory}"
# Announces the token to the guest. A guest that cannot find it must not serve without.
TOKEN_WORD = "vmkit.token="  # noqa: S105  (a word, not a secret)
QMP_MONITOR = "chardev=qmp,mode=control"
NO_SOCKETS: Mapping[str, int] = MappingProxyType({})
BY_HAND_NOTE = "# by hand, with the console in your terminal (Ctrl-a x ends it) and without the vsock device:"


@dataclass(frozen=True, slots=True)
class QemuPlan:
    """What to start, and what the monitor does for each part. The argv holds marks where the monitor puts numbers."""

    argv: tuple[str, ...]
    fittings: tuple[Fitting, ...] = ()

    @property
    def plug(self) -> tuple[QmpCommand, ...]:
        """The commands that plug every part."""
        return tuple(command for fitting in self.fittings for command in fitting.plug)

    @property
    def sockets(self) -> tuple[ServedSocket, ...]:
        """The sockets that the monitor makes for QEMU to serve."""
        return tuple(socket for fitting in self.fittings for socket in fitting.sockets)

    def render_argv(
        self, *, console_fd: int, qmp_fd: int, memory_fd: int, ready_port: int, served: Mapping[str, int] = NO_SOCKETS
    ) -> list[str]:
        """The argv with the descriptors and the port filled in. served: a listening socket for each chardev."""
        memory = f"file,mem-path=/proc/self/fd/{memory_fd}"
        numbers = {
            CONSOLE_CHARDEV: f"socket,id=console,fd={console_fd}",
            QMP_CHARDEV: f"socket,id=qmp,fd={qmp_fd}",
            **{socket.mark: socket.render(served[socket.chardev]) for socket in self.sockets},
        }
        words = [numbers.get(word, word) for word in self.argv]
        return [word.replace(READY_PORT_MARK, str(ready_port)).replace(MEMORY_MARK, memory) for word in words]

    def render_by_hand(self) -> list[str]:
        """The argv for a person's shell: not paused, the console in the terminal, nothing that needs vmkit."""
        left_out = (("-S",), ("-chardev", QMP_CHARDEV), ("-mon", QMP_MONITOR))
        words = list(self.argv)
        if "-smbios" in words:
            # The token lives and dies with a machine of vmkit's.
            at = words.index("-smbios")
            del words[at : at + 2]
        for option in left_out:
            at = words.index(option[-1]) - len(option) + 1
            del words[at : at + len(option)]
        for socket in self.sockets:
            words[words.index(socket.mark)] = socket.render_by_hand()
        words[words.index(CONSOLE_CHARDEV)] = "stdio,id=console,mux=on,signal=off"
        words = [word.replace(READY_PORT_MARK, str(USER_READY_PORT)).replace(MEMORY_MARK, "memfd") for word in words]
        return [re.sub(rf" {re.escape(TOKEN_WORD)}\S+", "", word) for word in words]
