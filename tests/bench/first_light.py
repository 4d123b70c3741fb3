"""The figures of first light: `python -m tests.bench.first_light all`.

Prints; judges nothing; medians, alternating within one run.

boot      `vmkit up` of a cached image to READY, beside the same QEMU and kernel booting a busybox initramfs that
          powers off at once (same machine type, CPU, memory, devices, kernel arguments), from fork to exit
build     a build that has nothing to do; a first build with the packages already fetched
vsh       `vsh -- true` as a whole process, beside the same through the warm Python API
dmesg     one read of the kernel's log from a guest's memory, and `vmkit dmesg` as a whole process
memory    resident memory of vshd, of the monitor and of the device
boots     COUNT boots in a row to READY, failures counted
images    COUNT boots of tiny and of debian to READY, alternating
machines  COUNT boots to power-off of each machine type, failures counted
"""

import argparse
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from vmkit.image.build import BuiltImage, build_image
from vmkit.image.formats.cpio import render_cpio
from vmkit.image.formats.tree import Tree, file_node
from vmkit.image.recipe.config import load_image
from vmkit.machine import stop
from vmkit.machine.argv import MEMORY_MARK
from vmkit.machine.choose import Choices, choose, plan_hardware
from vmkit.machine.hardware import Hardware
from vmkit.machine.machine import Machine
from vmkit.machine.probe import find_qemu
from vmkit.machine.qemu import plan_qemu
from vmkit.machine.spec import Accelerator, Backend, MachineSpec
from vmkit.machine.start import start_machine
from vmkit.machine.vhost import KernelVhostDoor
from vmkit.memory.guest import MemoryFile
from vmkit.memory.kernel_log import read_kernel_log
from vsh.errors import VshError
from vsh.registry import read_machines

BIN = Path(sys.executable).parent
# A boot takes 3 to 8 s under TCG; one that has not ended by then has hung.
BOOT_DEADLINE_S = 25.0
POWER_OFF_INIT = b"#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n"

# Boards to choose from; the kernel is the image's, as bzImage's payload (vmlinux, PVH entry) unless the name says else.
BOARDS = {
    "q35": ("-machine", "q35,sata=off,smbus=off,usb=off,hpet=off"),
    "pc": ("-machine", "pc,usb=off,hpet=off"),
    "microvm": ("-machine", "microvm,pcie=on"),
}


def say_series(name: str, values: list[float], unit: str, scale: float = 1.0) -> float:
    scaled = [value * scale for value in values]
    middle = statistics.median(scaled)
    print(
        f"  {name:<44} median {middle:9.2f} {unit}   min {min(scaled):9.2f}   max {max(scaled):9.2f}   n {len(scaled)}"
    )
    return middle


def time_call(work: Callable[[], object]) -> float:
    started_s = time.monotonic()
    work()
    return time.monotonic() - started_s


@contextmanager
def power_off_initrd() -> Iterator[Path]:
    """An initramfs of busybox alone, whose init powers off at once."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise SystemExit("install busybox-static: its static busybox is the baseline's whole guest")
    tree = Tree()
    tree.add("bin/busybox", file_node(Path(busybox).read_bytes(), 0o755))
    tree.add("init", file_node(POWER_OFF_INIT, 0o755))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "initrd"
        path.write_bytes(render_cpio(tree))
        yield path


def baseline_argv(hardware: Hardware, initrd: Path) -> list[str]:
    """The machine's own argv, but running at once, with the console and QMP nowhere and another initramfs."""
    plan = plan_qemu(hardware)
    # There is no monitor that would make the file of the memory.
    plan = replace(plan, argv=tuple(word.replace(MEMORY_MARK, "memfd") for word in plan.argv))
    argv = plan.render_argv(console_fd=0, qmp_fd=0, memory_fd=0, ready_port=0)
    words: list[str] = []
    skip = 0
    for index, word in enumerate(argv):
        if skip:
            skip -= 1
        elif word == "-S":
            continue
        elif word in ("-chardev", "-mon"):
            skip = 1
        elif word == "-serial":
            words += ["-serial", "null"]
            skip = 1
        elif argv[index - 1] == "-initrd":
            words.append(str(initrd))
        else:
            words.append(word)
    return words


def run_to_exit(argv: list[str]) -> None:
    subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=BOOT_DEADLINE_S, check=True)


def find_choices() -> tuple[MachineSpec, Choices]:
    spec = MachineSpec(accelerator=Accelerator.TCG, backend=Backend.USER, boot=True)
    return spec, choose(spec, lambda _text, _fraction: None, KernelVhostDoor())


def bench_boot(count: int) -> None:
    """Both sides from fork to exit: for ours that is the process `vmkit up`, which exits when the guest is ready."""
    print(f"boot to READY against boot to power-off, {count} each, alternating:")
    spec, choices = find_choices()
    hardware = plan_hardware(spec, choices, "baseline", 3, Path())
    ours: list[float] = []
    theirs: list[float] = []
    words = [str(BIN / "vmkit"), "up", "--boot", "--accel", "tcg", "--backend", "user", "--name", "bench", "--quiet"]
    with power_off_initrd() as initrd:
        argv = baseline_argv(hardware, initrd)
        run_to_exit(argv)
        for _ in range(count):
            theirs.append(time_call(lambda: run_to_exit(argv)))
            ours.append(time_call(lambda: run_to_exit(words)))
            for machine in read_machines():
                stop.kill(machine)
    baseline = say_series("QEMU, kernel, busybox poweroff -f", theirs, "s")
    ready = say_series("vmkit up, cached image, to READY", ours, "s")
    pairs = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"  ratio of medians {ready / baseline:.2f}, median of pairs {pairs:.2f}")


def bench_build(count: int) -> None:
    print("build of tiny:")
    image = load_image("tiny")
    build_image(image)
    words = [str(BIN / "vmkit"), "build", "tiny", "--quiet"]
    say_series("nothing to do, whole process", [time_call(lambda: run_to_exit(words)) for _ in range(count)], "s")
    cache = Path(os.environ.get("VMKIT_CACHE_DIR") or Path.home() / ".cache" / "vmkit")
    times = []
    for _ in range(max(1, count // 3)):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(cache, folder, dirs_exist_ok=True)
            shutil.rmtree(Path(folder) / "images")
            env = {**os.environ, "VMKIT_CACHE_DIR": folder}
            times.append(time_call(partial(subprocess.run, words, env=env, check=True, capture_output=True)))
    say_series("first build, packages fetched, whole process", times, "s")


def bench_vsh(count: int) -> None:
    print(f"vsh -- true on a warm machine, {count} each, alternating:")
    with Machine("tiny", accelerator="tcg", backend="user", name="bench") as machine:
        words = [str(BIN / "vsh"), "--vm_name", "bench", "--", "true"]
        client = machine.connect()
        whole: list[float] = []
        warm: list[float] = []
        for number in range(count + 2):
            a = time_call(lambda: run_to_exit(words))
            b = time_call(lambda: client.run(["true"]))
            if number >= 2:
                whole.append(a)
                warm.append(b)
        say_series("vsh -- true, whole process", whole, "ms", 1000)
        say_series("the same through the warm API", warm, "ms", 1000)
        difference = statistics.median(a - b for a, b in zip(whole, warm, strict=True)) * 1000
        print(f"  median difference {difference:.1f} ms")


def bench_dmesg(count: int) -> None:
    """One read of a guest's kernel log from its memory: in this process, and as the whole program."""
    with Machine("tiny", name="bench", accelerator="tcg") as machine:
        pid = int(str(machine.find_entry().pid))
        path = next(path for path in Path(f"/proc/{pid}/fd").iterdir() if "guest-memory" in str(path.readlink()))
        fd = os.open(path, os.O_RDONLY)
        memory = MemoryFile(fd, os.fstat(fd).st_size)
        words = [str(BIN / "vmkit"), "dmesg", "bench"]
        series: dict[str, list[float]] = {"one read": [], "vmkit dmesg": []}
        for _ in range(count):
            series["one read"].append(time_call(lambda: read_kernel_log(memory)))
            series["vmkit dmesg"].append(time_call(lambda: subprocess.run(words, check=True, capture_output=True)))
        print(f"{len(read_kernel_log(memory))} records, {count} times each, alternating:")
        os.close(fd)
        for name, values in series.items():
            say_series(name, values, "ms", 1000)


def bench_memory(_count: int) -> None:
    print("resident memory (VmRSS):")
    with Machine("tiny", accelerator="tcg", backend="user", name="bench") as machine:
        look = "grep -E 'VmRSS|^Pid|^PPid' ${p%cmdline}status"
        script = f"for p in $(grep -l vshd.pid1.init /proc/[0-9]*/cmdline); do {look}; done"
        words = machine.run(["sh", "-c", script]).stdout.decode().split()
        for at in range(0, len(words) - 6, 7):
            print(f"  guest: {int(words[at + 5]) / 1024:7.1f} MiB  pid {words[at + 1]}, parent {words[at + 3]}")
        entry = next(item for item in read_machines() if item.name == "bench")
        children = Path(f"/proc/{entry.pid}/task/{entry.pid}/children").read_text().split()
        for pid in [str(entry.pid), *children]:
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            size = Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]
            print(f"  host:  {int(size) / 1024:7.1f} MiB  {b' '.join(argv[:4]).decode()}")


def bench_boots(count: int) -> None:
    print(f"{count} boots in a row to READY:")
    times: list[float] = []
    failures: list[str] = []
    for _ in range(count):
        try:
            started = start_machine(
                MachineSpec(accelerator=Accelerator.TCG, backend=Backend.USER, name="bench", boot=True)
            )
        except VshError as error:
            failures.append(error.render("vmkit"))
            continue
        times.append(started.seconds)
        started.monitor.terminate()
        started.monitor.wait()
    say_series("to READY", times, "s")
    print(f"  failures {len(failures)} of {count}")
    for failure in failures:
        print(failure)


def bench_images(count: int) -> None:
    print(f"tiny and debian to READY, {count} each, alternating:")
    times: dict[str, list[float]] = {"tiny": [], "debian": []}
    for name in times:
        build_image(load_image(name))
    for number in range(count + 1):
        for name, series in times.items():
            spec = MachineSpec(name, "bench", accelerator=Accelerator.TCG, backend=Backend.USER, boot=True)
            started = start_machine(spec)
            started.monitor.terminate()
            started.monitor.wait()
            # The first of each fills the page cache.
            if number:
                series.append(started.seconds)
    tiny, debian = (say_series(name, series, "s") for name, series in times.items())
    print(f"  ratio of medians {debian / tiny:.2f}")


def bench_machines(count: int) -> None:
    """Boards by reliability and time, each with the kernel as vmlinux and, where it differs, as bzImage."""
    print(f"{count} boots to power-off of each board, alternating:")
    spec, choices = find_choices()
    with power_off_initrd() as initrd:
        plans: dict[str, list[str]] = {}
        for name, words in BOARDS.items():
            argv = baseline_argv(plan_hardware(spec, choices, "baseline", 3, Path()), initrd)
            at = argv.index("-machine")
            argv[at : at + 2] = [words[0], f"{words[1]},memory-backend=ram"]
            if name != "q35":
                at = argv.index("-device")
                del argv[at : at + 2]
            plans[name] = argv
        series: dict[str, list[float]] = {name: [] for name in plans}
        failures: dict[str, list[str]] = {name: [] for name in plans}
        for _ in range(count):
            for name, argv in plans.items():
                outcome, seconds = boot_once(argv)
                if outcome:
                    failures[name].append(outcome)
                else:
                    series[name].append(seconds)
    for name in plans:
        if series[name]:
            say_series(name, series[name], "s")
        kinds = ", ".join(f"{failures[name].count(kind)} {kind}" for kind in sorted(set(failures[name])))
        print(f"  {name:<44} failures {len(failures[name])} of {count} {kinds}")


def boot_once(argv: list[str]) -> tuple[str, float]:
    """('', seconds) for a boot that powered off; the kind of failure otherwise."""
    started_s = time.monotonic()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        while True:
            left_s = started_s + BOOT_DEADLINE_S - time.monotonic()
            if not select.select([process.stdout], [], [], max(0.0, left_s))[0]:
                process.kill()
                return "hung", 0.0
            if not os.read(process.stdout.fileno(), 65536):
                break
    # A reset (panic=-1) ends QEMU as cleanly as a power-off does: only the time tells an early death.
    seconds = time.monotonic() - started_s
    return ("exit status", 0.0) if process.returncode else ("", seconds)


PARTS: dict[str, tuple[Callable[[int], None], int]] = {
    "boot": (bench_boot, 7),
    "build": (bench_build, 9),
    "vsh": (bench_vsh, 15),
    "dmesg": (bench_dmesg, 15),
    "memory": (bench_memory, 1),
    "boots": (bench_boots, 50),
    "images": (bench_images, 7),
    "machines": (bench_machines, 50),
}


def print_host(built: BuiltImage) -> None:
    qemu = find_qemu().render_version()
    print(f"QEMU {qemu}; Python {sys.version.split()[0]}; {os.cpu_count()} cores; image {built.digest[:12]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"], help="what to measure")
    parser.add_argument("--count", type=int, default=0, help="runs of each [default: the part's own]")
    args = parser.parse_args()
    os.environ.setdefault("VSH_AF_VSOCK", "deny")
    os.environ["VMKIT_BACKGROUND_SNAPSHOTS"] = "off"
    print_host(build_image(load_image("tiny")))
    for name, (work, count) in PARTS.items():
        if args.part in (name, "all") and (args.part != "all" or name not in ("boots", "machines")):
            work(args.count or count)


if __name__ == "__main__":
    main()
