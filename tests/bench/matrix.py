"""What a merge costs: `python -m tests.bench.matrix [--cells N] [--text BYTES]`.

Writes the results of so many cells, three commands each with some output, and merges them with the program. Prints the
seconds by the clock and the most memory that the program had, and how even shards by time are. Judges nothing.
"""

import argparse
import os
import random
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


def measure_shards(cells: int, shards: int) -> float:
    """The longest shard in the times of the mean, with times as tests have them: many short ones, few long ones."""
    dice = random.Random(1)
    names = [str(number) for number in range(cells)]
    times = {name: min(600.0, dice.lognormvariate(3, 1)) for name in names}
    loads = [sum(times[names[number]] for number in shard) for shard in plan_shards(names, shards, times)]
    return max(loads) * shards / sum(loads)


def main() -> int:
    parser = argparse.ArgumentParser(description="What a merge costs.")
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--text", type=int, default=4096, metavar="BYTES")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vmkit-bench-") as name:
        folder = Path(name) / "results"
        folder.mkdir()
        make_results(folder, options.cells, options.text)
        seconds, busy_seconds, memory_mb = measure_merge(folder, Path(name) / "out")
        size = sum(path.stat().st_size for path in (Path(name) / "out").iterdir())
    print(f"merge of {options.cells} cells with {3 * options.text} bytes of output each:")
    print(f"  {seconds:.1f} s by the clock, {busy_seconds:.1f} s of the processor, {memory_mb:.0f} MB of memory")
    print(f"  {size / 1e6:.0f} MB of reports")
    for shards in (10, 100):
        ratio = measure_shards(options.cells, shards)
        print(f"  {shards} shards by time: the longest takes {ratio:.3f} times the mean")
    return 0


if __name__ == "__main__":
    sys.exit(main())
