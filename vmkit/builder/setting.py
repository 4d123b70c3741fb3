"""Whether snapshots may be made in the background, as the environment has it."""

import os
from collections.abc import Mapping

from vmkit.errors import ConfigError

VARIABLE = "VMKIT_BACKGROUND_SNAPSHOTS"


def is_allowed(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a builder may be started. Raises ConfigError for an unknown value."""
    value = environ.get(VARIABLE, "") or "on"
    if value not in ("on", "off"):
        raise ConfigError(f"{VARIABLE} must be on or off, not '{value}'")
    # A CI job has most often no second start of the same machine.
    return value == "on" and not environ.get("CI")
