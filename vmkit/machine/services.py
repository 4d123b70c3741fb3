"""What a machine of this host and its guest do for each other beside sessions, in Python: shared folders, maitred.

The rooms behind it are loaded when they are asked for.
"""

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from vsh.address import address_of
from vsh.registry import Entry

if TYPE_CHECKING:
    from vmkit.maitred.client import Maitred


class ServicedMachine(ABC):
    """A machine of the registry. Subclasses know which entry is theirs."""

    @abstractmethod
    def find_entry(self) -> Entry:
        """The machine's entry in the registry. Raises MachineError once it has ended."""

    def share(self, host: str | os.PathLike[str], guest: str = "", *, read_only: bool = False, by: str = "") -> str:
        """Gives the guest a folder of this host; returns its place there: `guest`, else /mnt and the folder's name.

        read_only: the guest cannot write to it. by: the transport, "virtiofs", "fuse" or "9p"; "" takes the first that
        this host and the guest have. The share lasts until unshare(), or until the machine ends, also when this process
        has ended. It is `vmkit share`. Raises VshError kinds.
        """
        from vmkit.shares.place import make_place  # noqa: PLC0415  (most programs share nothing)
        from vmkit.shares.start import start_share  # noqa: PLC0415

        place = make_place(os.fspath(host), guest, read_only=read_only)
        return start_share(self.find_entry().name, place, by).guest

    def unshare(self, folder: str | os.PathLike[str]) -> None:
        """Ends a share: what uses it in the guest gets an error. folder: its place in the guest, or that of this host.

        Raises MachineError where there is none, or several.
        """
        from vmkit.shares.registry import find_share, read_shares  # noqa: PLC0415  (see share)
        from vmkit.shares.start import end_share  # noqa: PLC0415

        name = self.find_entry().name
        end_share(find_share(read_shares(name), name, os.fspath(folder)))

    def maitred(self, *, timeout_s: float = 20.0) -> "Maitred":
        """A client for ChromeOS's agent, which the guest has where its recipe says `services = ["maitred"]`.

        Each call has timeout_s. Raises HostError where this host lacks the Python package grpclib.
        """
        from vmkit.maitred.client import Maitred  # noqa: PLC0415  (few guests have it)

        return Maitred(address_of(self.find_entry()), timeout_s=timeout_s)
