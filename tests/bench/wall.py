"""What the wall costs: `python -m tests.bench.wall [connects|boot|all] [--count N]`.

Prints; judges nothing; medians, the two sides alternating within one run.

connects  a guest's connect() with the kernel layer's programs attached and detached, in blocks; to the host over vsock,
          where nobody listens (the shortest answer there is), and over AF_UNIX, which pays for the hook as well
boot      `vmkit up` to READY, whole process, of tiny and of tiny without the kernel layer
"""

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from tests.bench.first_light import BIN, run_to_exit, say_series, time_call
from vmkit.image.build import build_image
from vmkit.image.recipe.config import load_image
from vmkit.machine import stop
from vmkit.machine.machine import Machine
from vsh.registry import read_machines

BLOCK = 100
GUEST = Path(__file__).with_name("wall_guest.py")
RUN_DEADLINE_S = 600.0
WITHOUT = 'extends = "tiny"\n[wall]\nkernel = false\n'


def bench_connects(count: int) -> None:
    blocks = max(2, -(-count // BLOCK))
    print(f"connect() in the guest, {blocks} blocks of {BLOCK} each with and without the programs, alternating:")
    with Machine("tiny", accelerator="tcg", backend="user", name="bench") as machine:
        words = ["python3", "-I", "-S", "-", str(blocks), str(BLOCK)]
        result = machine.run(words, input=GUEST.read_bytes(), timeout=RUN_DEADLINE_S)
        if result.exit != 0:
            raise SystemExit(result.stderr.decode())
        for kind, series in json.loads(result.stdout).items():
            attached = say_series(f"{kind}, attached", list(chain(*series["attached"])), "us", 1e-3)
            detached = say_series(f"{kind}, detached", list(chain(*series["detached"])), "us", 1e-3)
            pairs = zip(series["attached"], series["detached"], strict=True)
            ratio = statistics.median(statistics.median(one) / statistics.median(other) for one, other in pairs)
            print(f"  {kind}: medians {attached / detached - 1:+.2%}, median of pairs of blocks {ratio - 1:+.2%}")


@contextlib.contextmanager
def lean_recipe() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny-lean.toml"
        path.write_text(WITHOUT)
        build_image(load_image("tiny"))
        build_image(load_image(str(path)))
        yield path


def bench_boot(count: int) -> None:
    print(f"vmkit up to READY, whole process, {count} each, alternating:")
    times: dict[str, list[float]] = {"tiny": [], "lean": []}
    with lean_recipe() as lean:
        for number in range(count + 1):
            for name, image in (("tiny", "tiny"), ("lean", str(lean))):
                words = [
                    BIN / "vmkit",
                    "up",
                    "--boot",
                    "--accel",
                    "tcg",
                    "--backend",
                    "user",
                    "--name",
                    "bench",
                    "--quiet",
                    image,
                ]
                seconds = time_call(partial(run_to_exit, [str(word) for word in words]))
                for machine in read_machines():
                    stop.kill(machine)
                # The first of each warms the caches of files.
                if number:
                    times[name].append(seconds)
    with_it = say_series("with the kernel layer", times["tiny"], "s")
    without = say_series("without", times["lean"], "s")
    pairs = statistics.median(a - b for a, b in zip(times["tiny"], times["lean"], strict=True))
    print(f"  difference of medians {with_it - without:+.3f} s, median of pairs {pairs:+.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["connects", "boot", "all"], default="all")
    parser.add_argument("--connects", type=int, default=5000, help="connects of each side")
    parser.add_argument("--boots", type=int, default=9, help="boots of each side")
    options = parser.parse_args()
    if options.part in ("connects", "all"):
        bench_connects(options.connects)
    if options.part in ("boot", "all"):
        bench_boot(options.boots)


if __name__ == "__main__":
    main()
