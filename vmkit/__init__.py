"""vmkit: build guest images, launch QEMU with a vsock device, tend the machines.

    import vmkit

    with vmkit.Machine("tiny") as machine:
        result = machine.run(["uname", "-a"], text=True, check=True)
        print(result.stdout)

Machines
    Machine          one virtual machine as a with-block: started on entry, gone on exit
    MachineSpec      the options of a machine as a value
    Disk             a file of the host that the guest has as a disk
    RunningMachine   a running machine that find_machine or list_machines returns
    Pool             machines that are ready before they are needed, as a with-block; take() gives one
    find_pool        a running pool
    list_machines    the running machines
    find_machine     the running machine of a name or CID
    wait             block until a machine ends; returns an Ended: the reason, and whether it was expected
    BootState        how far a guest with systemd has booted; Machine.wait_booted returns it
    Maitred          a client for ChromeOS's agent in a guest, as a with-block; Machine.maitred returns it
    logs             a log of a machine, running or ended
    dmesg            the kernel's log of a machine, from the guest's memory; a list of KernelLine

    Containers       the containers of a running machine: create, start, stop, remove; connect() gives a Client
    Container        one of them, as Containers.list_all returns it

Commands and files in a guest
    Client           runs commands in one guest: run, popen, start, attach, push, pull, exists
    LastingProcess   a session that outlives its program; Client.start and attach return it
    LastingOutput    a part of its output
    Session          one session that you drive by hand
    Process          a running command with file-like streams, as subprocess.Popen
    Result           the output and the exit status of a command
    PIPE, STDOUT, DEVNULL   the targets of a process's streams

Images and this host
    build            build an image, or take it from the cache
    find_image       an image that is in the cache
    images           the shipped recipes
    Image            a built image: kernel, initramfs, manifest
    doctor           a list of checks of this host

Errors
    VshError and its kinds; see vmkit.errors and docs/reference/python.md.

Python loads each name on first use, so that the monitor and the vsock device, processes of this package, stay small.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmkit.api import build, doctor, find_image, images
    from vmkit.containers.containers import Container, Containers
    from vmkit.errors import BuildError, CommandError, ConfigError, HostError, MachineError, TrustError, VmkitError
    from vmkit.image.build import BuiltImage as Image
    from vmkit.machine.booted import BootState
    from vmkit.machine.doctor import Check
    from vmkit.machine.machine import Machine
    from vmkit.machine.running import RunningMachine, dmesg, find_machine, list_machines, logs, wait
    from vmkit.machine.spec import DiskSpec as Disk
    from vmkit.machine.spec import MachineSpec
    from vmkit.machine.words import Ended
    from vmkit.maitred.client import Maitred
    from vmkit.memory.lines import KernelLine
    from vmkit.pool.pool import Pool, find_pool
    from vsh.client import Client, Result
    from vsh.errors import CommandFailed, ConnectionLost, ExecError, UsageError, VshError
    from vsh.lasting.handle import LastingOutput, LastingProcess
    from vsh.process import DEVNULL, PIPE, STDOUT, Process
    from vsh.pump import TimedOut
    from vsh.session import Session

# Where each public name is: its module and its name there.
_PUBLIC = {
    "BootState": ("vmkit.machine.booted", "BootState"),
    "BuildError": ("vmkit.errors", "BuildError"),
    "Check": ("vmkit.machine.doctor", "Check"),
    "Client": ("vsh.client", "Client"),
    "CommandError": ("vmkit.errors", "CommandError"),
    "CommandFailed": ("vsh.errors", "CommandFailed"),
    "ConfigError": ("vmkit.errors", "ConfigError"),
    "ConnectionLost": ("vsh.errors", "ConnectionLost"),
    "Container": ("vmkit.containers.containers", "Container"),
    "Containers": ("vmkit.containers.containers", "Containers"),
    "DEVNULL": ("vsh.process", "DEVNULL"),
    "Disk": ("vmkit.machine.spec", "DiskSpec"),
    "Ended": ("vmkit.machine.words", "Ended"),
    "ExecError": ("vsh.errors", "ExecError"),
    "HostError": ("vmkit.errors", "HostError"),
    "Image": ("vmkit.image.build", "BuiltImage"),
    "KernelLine": ("vmkit.memory.lines", "KernelLine"),
    "LastingOutput": ("vsh.lasting.handle", "LastingOutput"),
    "LastingProcess": ("vsh.lasting.handle", "LastingProcess"),
    "Machine": ("vmkit.machine.machine", "Machine"),
    "MachineError": ("vmkit.errors", "MachineError"),
    "MachineSpec": ("vmkit.machine.spec", "MachineSpec"),
    "Maitred": ("vmkit.maitred.client", "Maitred"),
    "PIPE": ("vsh.process", "PIPE"),
    "Pool": ("vmkit.pool.pool", "Pool"),
    "Process": ("vsh.process", "Process"),
    "Result": ("vsh.client", "Result"),
    "RunningMachine": ("vmkit.machine.running", "RunningMachine"),
    "STDOUT": ("vsh.process", "STDOUT"),
    "Session": ("vsh.session", "Session"),
    "TimedOut": ("vsh.pump", "TimedOut"),
    "TrustError": ("vmkit.errors", "TrustError"),
    "UsageError": ("vsh.errors", "UsageError"),
    "VmkitError": ("vmkit.errors", "VmkitError"),
    "VshError": ("vsh.errors", "VshError"),
    "build": ("vmkit.api", "build"),
    "dmesg": ("vmkit.machine.running", "dmesg"),
    "doctor": ("vmkit.api", "doctor"),
    "find_image": ("vmkit.api", "find_image"),
    "find_machine": ("vmkit.machine.running", "find_machine"),
    "find_pool": ("vmkit.pool.pool", "find_pool"),
    "images": ("vmkit.api", "images"),
    "list_machines": ("vmkit.machine.running", "list_machines"),
    "logs": ("vmkit.machine.running", "logs"),
    "wait": ("vmkit.machine.running", "wait"),
}

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "BootState",
    "BuildError",
    "Check",
    "Client",
    "CommandError",
    "CommandFailed",
    "ConfigError",
    "ConnectionLost",
    "Container",
    "Containers",
    "Disk",
    "Ended",
    "ExecError",
    "HostError",
    "Image",
    "KernelLine",
    "LastingOutput",
    "LastingProcess",
    "Machine",
    "MachineError",
    "MachineSpec",
    "Maitred",
    "Pool",
    "Process",
    "Result",
    "RunningMachine",
    "Session",
    "TimedOut",
    "TrustError",
    "UsageError",
    "VmkitError",
    "VshError",
    "build",
    "dmesg",
    "doctor",
    "find_image",
    "find_machine",
    "find_pool",
    "images",
    "list_machines",
    "logs",
    "wait",
]


def __getattr__(name: str) -> object:
    from importlib import import_module  # noqa: PLC0415  (the small processes need none of this)

    if name not in _PUBLIC:
        raise AttributeError(f"module 'vmkit' has no attribute '{name}'")
    module, inner = _PUBLIC[name]
    value = getattr(import_module(module), inner)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
