"""What stays of a machine that ended badly: one set of logs per name, for `vmkit logs` and bug reports."""

import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from vmkit.machine.launch import Layout
from vmkit.monitor.logs import OLDER_SUFFIX


def keep_evidence(directory: Path, evidence: Path, logs: Iterable[str] = ()) -> None:
    """Copies the logs of a machine's directory in place of the set that was kept before. logs: those of the parts.

    Only files of ours are replaced, whatever folder VMKIT_STATE_DIR names. A full disk loses logs and nothing else.
    """
    with contextlib.suppress(OSError):
        evidence.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in {*Layout.LOGS, *logs}:
        for file in (name, name + OLDER_SUFFIX):
            with contextlib.suppress(OSError):
                (evidence / file).unlink(missing_ok=True)
                if (directory / file).exists():
                    shutil.copyfile(directory / file, evidence / file)
