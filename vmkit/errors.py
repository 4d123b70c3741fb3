"""vmkit's kinds of errors, all based on vsh.errors."""

from vsh.errors import VshError


class VmkitError(VshError):
    """Any error of vmkit that a person should read."""


class ConfigError(VmkitError):
    """The user's TOML, template or option is wrong; the brief names the file and line or key."""

    status = 64


class TrustError(ConfigError):
    """A recipe's keyring or lock file vouches for packages, and the user has not trusted it yet."""


class BuildError(VmkitError):
    """An image could not be built."""


class CommandError(VmkitError):
    """Another program failed; the details hold its command, ready to paste, and the end of its output."""


class HostError(VmkitError):
    """This host lacks something (a program, a device, memory, a permission)."""


class MachineError(VmkitError):
    """A machine did not start, does not exist, or ended."""


class NameInUseError(MachineError):
    """The requested name belongs to another machine."""
