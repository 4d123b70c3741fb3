"""What a cell and a merge cost: `python -m tests.bench.matrix [cell|merge]... [--rounds N] [--cells N] [--text BYTES]`.

cell: in turns, `vmkit matrix run --cell 0` with one command in `tiny`, and a program of five lines that does the same
with vmkit.Machine. Prints what each took beyond the start of its machine and the command: the interpreter, the end of
the machine, and for the cell its directory.
merge: writes the results of so many cells, three commands each with some output, and merges them with the program.
Prints the seconds by the clock and the most memory that the program had, and how even shards by time are. Judges
nothing.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from vmkit.junit import CaseVerdict
from vmkit.matrix.cellfolder import PLAN, RECORD, name_folder
from vmkit.matrix.job import make_record
from vmkit.matrix.plan import Matrix, plan_matrix
from vmkit.matrix.results import ENDED, CellFault, CommandRecord, PlanRecord, render_record
from vmkit.matrix.shards import plan_shards

COMMANDS = ("boot", "kselftest", "stress")
LAB = 'images = ["tiny"]\nbackends = ["user"]\nmemory = "128M"\n[commands]\none = ["true"]\n'
PROGRAM = """
import time, vmkit
with vmkit.Machine("tiny", backend="user", memory="128M", boot=True) as machine:
    began = time.perf_counter()
    machine.run(["true"])
    print(machine.started.seconds, time.perf_counter() - began)
"""


def make_results(folder: Path, cells: int, text_bytes: int) -> None:
    """As `vmkit matrix run` leaves them, without waiting for the disk."""
    kernels = [f"bzImage-{number}" for number in range(cells)]
    matrix: Matrix = plan_matrix({"commands": dict.fromkeys(COMMANDS, "true"), "kernels": kernels}, Path("/lab.toml"))
    plan = PlanRecord(matrix.digest, tuple(cell.name for cell in matrix.cells), COMMANDS, is_fresh=False)
    (folder / PLAN).write_bytes(plan.render())
    line = "[   12.345678] something happened in the guest\n"
    text = line * (text_bytes // len(line))
    base = make_record(matrix, 0)
    for number, cell in enumerate(matrix.cells):
        fault = CellFault.TEST if number % 50 == 0 else CellFault.NONE
        verdict = CaseVerdict.FAILED if fault is CellFault.TEST else CaseVerdict.PASSED
        commands = tuple(CommandRecord(name, verdict, fault, 3.0, "status 0", text) for name in COMMANDS)
        record = replace(base, number=number, cell=cell.name, commands=commands, state=ENDED, seconds=10.0)
        place = folder / name_folder(number)
        place.mkdir()
        (place / RECORD).write_bytes(render_record(record))


def measure_merge(folder: Path, to: Path) -> tuple[float, float, float]:
    """Seconds by the clock, those of the processor, and the most memory in MB."""
    argv = [sys.executable, "-m", "vmkit", "matrix", "merge", str(folder), "--to", str(to), "--quiet"]
    started = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = 0
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def measure_cell(folder: Path) -> float:
    """Seconds of the program beyond the start of the machine and the command."""
    matrix, results = folder / "lab.toml", folder / "results"
    matrix.write_text(LAB)
    words = ("matrix", "run", str(matrix), "--cell", "0", "--to", str(results), "--quiet")
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "vmkit", *words], stdout=subprocess.DEVNULL, check=True)
    seconds = time.perf_counter() - started
    record = json.loads((results / name_folder(0) / RECORD).read_text())
    return float(seconds - record["machine"]["seconds"] - record["commands"][0]["seconds"])


def measure_machine() -> float:
    """The same of a program that has no cell."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started - sum(map(float, done.stdout.split()))


def print_cell(rounds: int) -> None:
    seen: list[tuple[float, float]] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="vmkit-bench-") as name:
            seen.append((measure_cell(Path(name)), measure_machine()))
    cell, machine = (statistics.median(column) for column in zip(*seen, strict=True))
    more = statistics.median(one - other for one, other in seen)
    print(f"beyond machine and command, medians of {rounds}, load {os.getloadavg()[0]:.1f}:")
    print(f"  a cell {cell:.2f} s, a program with vmkit.Machine {machine:.2f} s; difference {more:.2f} s")


def measure_shards(cells: int, shards: int) -> float:
    """The longest shard in the times of the mean, with times as tests have them: many short ones, few long ones."""
    dice = random.Random(1)
    names = [str(number) for number in range(cells)]
    times = {name: min(600.0, dice.lognormvariate(3, 1)) for name in names}
    loads = [sum(times[names[number]] for number in shard) for shard in plan_shards(names, shards, times)]
    return max(loads) * shards / sum(loads)


def print_merge(cells: int, text_bytes: int) -> None:
    with tempfile.TemporaryDirectory(prefix="vmkit-bench-") as name:
        folder = Path(name) / "results"
        folder.mkdir()
        make_results(folder, cells, text_bytes)
        seconds, busy_seconds, memory_mb = measure_merge(folder, Path(name) / "out")
        size = sum(path.stat().st_size for path in (Path(name) / "out").iterdir())
    print(f"merge of {cells} cells with {3 * text_bytes} bytes of output each:")
    print(f"  {seconds:.1f} s by the clock, {busy_seconds:.1f} s of the processor, {memory_mb:.0f} MB of memory")
    print(f"  {size / 1e6:.0f} MB of reports")
    for shards in (10, 100):
        ratio = measure_shards(cells, shards)
        print(f"  {shards} shards by time: the longest takes {ratio:.3f} times the mean")


def main() -> int:
    parser = argparse.ArgumentParser(description="What a cell and a merge cost.")
    parser.add_argument("parts", nargs="*", metavar="cell|merge", help="what to measure [default: both]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--text", type=int, default=4096, metavar="BYTES")
    options = parser.parse_args()
    parts = options.parts or ["cell", "merge"]
    if "cell" in parts:
        print_cell(options.rounds)
    if "merge" in parts:
        print_merge(options.cells, options.text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
