"""The folder of what vmkit keeps between runs and cannot make again: logs of machines that ended, and trust."""

import os
from collections.abc import Mapping
from pathlib import Path


def find_state_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """$VMKIT_STATE_DIR, else $XDG_STATE_HOME/vmkit, else ~/.local/state/vmkit; None where there is no home."""
    named = environ.get("VMKIT_STATE_DIR")
    if named:
        # A monitor's working directory is not ours.
        return Path(named).absolute()
    base = environ.get("XDG_STATE_HOME", "")
    if base.startswith("/"):
        return Path(base) / "vmkit"
    try:
        return Path.home() / ".local" / "state" / "vmkit"
    except RuntimeError:
        return None
