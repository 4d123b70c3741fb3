"""What a container costs: from `docker run` to an answer of vsh beside the same outside, the image's size, a rebuild.

    python -m tests.bench.docker [--rounds N] [--base IMAGE] [--network NAME]

Needs an engine and the image `vmkit` (`vmkit docker build`). Prints; nothing is judged here.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmkit.docker.context import find_files

CHECKOUT = Path(__file__).resolve().parents[2]
DEADLINE_S = 600
BIN = Path(sys.executable).parent
UP = "vmkit up --quiet --accel tcg --backend user --name in-docker >&2 && vsh --vm_name in-docker -- echo answered"
INSIDE = ["docker", "run", "--rm", "--network=none", "-e", "VSH_AF_VSOCK=deny", "vmkit", "sh", "-c", UP]
OUTSIDE = ["sh", "-c", UP]
# A module that no other stage has; the guest's daemon, which makes another guest image.
CHANGED = ("vmkit/cli/show.py", "vshd/log.py")


def measure_answer_s(words: list[str]) -> float:
    """From the start of a command to the first line of vsh's."""
    started_s = time.monotonic()
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        answered_s = time.monotonic() - started_s
        assert line == b"answered\n", f"{words}: {line!r}"
    return answered_s


def bench_answer(rounds: int) -> None:
    inside, outside = [], []
    # The first of each is not counted: files that are not in memory yet.
    for number in range(rounds + 1):
        times = measure_answer_s(INSIDE), measure_answer_s(OUTSIDE)
        subprocess.run([BIN / "vmkit", "kill", "in-docker"], check=True, capture_output=True)
        if number:
            inside.append(times[0])
            outside.append(times[1])
    ratios = [a / b for a, b in zip(inside, outside, strict=True)]
    print(f"docker run to an answer of vsh: median {statistics.median(inside):.2f} s, min {min(inside):.2f}")
    print(f"the same outside:               median {statistics.median(outside):.2f} s, min {min(outside):.2f}")
    ratio = statistics.median(inside) / statistics.median(outside)
    print(f"ratio of medians {ratio:.2f}, median of pairs {statistics.median(ratios):.2f}, n = {rounds}")


def bench_size() -> None:
    for tag in ("vmkit:latest", "vmkit:test"):
        words = ["docker", "image", "inspect", "-f", "{{.Size}}", tag]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        print(f"{tag}: {int(done.stdout) / 1e6:.0f} MB" if done.returncode == 0 else f"{tag}: not built")


@contextmanager
def copied_context() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmkit-bench-") as folder:
        for name in find_files(CHECKOUT):
            source, target = CHECKOUT / name, Path(folder) / name
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        yield Path(folder)


def bench_rebuild(rounds: int, arguments: list[str]) -> None:
    with copied_context() as context:
        words = [
            sys.executable,
            "-m",
            "vmkit",
            "docker",
            "build",
            str(context),
            "--quiet",
            "--tag",
            "vmkit:bench",
            *arguments,
        ]
        subprocess.run(words, check=True, capture_output=True, timeout=DEADLINE_S)
        for name in CHANGED:
            seconds = []
            for number in range(rounds):
                with (context / name).open("a") as file:
                    file.write(f"# {time.time()} {number}\n")
                started_s = time.monotonic()
                subprocess.run(words, check=True, capture_output=True, timeout=DEADLINE_S)
                seconds.append(time.monotonic() - started_s)
            print(
                f"rebuild after a change of {name}: median {statistics.median(seconds):.1f} s, max {max(seconds):.1f}"
            )
    subprocess.run(["docker", "image", "rm", "-f", "vmkit:bench"], check=False, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--base", default="")
    parser.add_argument("--network", default="")
    options = parser.parse_args()
    arguments = [
        *(["--base", options.base] if options.base else []),
        *(["--network", options.network] if options.network else []),
    ]
    print(f"load {os.getloadavg()[0]:.1f}")
    bench_size()
    bench_rebuild(3, arguments)
    bench_answer(options.rounds)


if __name__ == "__main__":
    main()
