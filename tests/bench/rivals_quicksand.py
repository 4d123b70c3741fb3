"""quicksand's side of tests.bench.rivals: runs in quicksand's own environment, and imports nothing of ours.

boot   boots, prints the output of `echo hello`
serve  boots; then reads the name of a measure from stdin, and writes seconds, null for a failure, or a finding, as JSON
"""

import asyncio
import base64
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable

from quicksand import Accelerator, Sandbox

BULK_BYTES = 64 << 20
MIB = bytes(range(256)) * 4096
AT_ONCE = 20
DEADLINE_S = 120
# Its own is 600 s, twice: a boot that hangs is a finding, and not worth twenty minutes.
BOOT_DEADLINE_S = 90


def open_sandbox() -> Sandbox:
    return Sandbox(image="alpine", accel=Accelerator.TCG, boot_timeout=BOOT_DEADLINE_S)


async def boot() -> None:
    async with open_sandbox() as sandbox:
        print((await sandbox.execute("echo hello")).stdout, end="", flush=True)


def plan_measures(sandbox: Sandbox) -> dict[str, Callable[[], Awaitable[object]]]:
    async def at_once(command: str) -> None:
        await asyncio.gather(*(sandbox.execute(command, timeout=DEADLINE_S) for _ in range(AT_ONCE)))

    async def bulk_out() -> None:
        # Its stdout is text: bytes need an encoding.
        command = f"dd if=/dev/zero bs=65536 count={BULK_BYTES >> 16} | base64 -w 0"
        result = await sandbox.execute(command, timeout=DEADLINE_S)
        assert len(base64.b64decode(result.stdout)) == BULK_BYTES

    bulk = os.urandom(1 << 20) * (BULK_BYTES >> 20)
    return {
        "true": lambda: sandbox.execute("true"),
        "sh -c true": lambda: sandbox.execute("sh -c true"),
        f"{AT_ONCE} short commands at once": lambda: at_once("echo out; exit 3"),
        f"{AT_ONCE} times sleep 1 at once": lambda: at_once("sleep 1"),
        "64 MiB in by stdin": lambda: sandbox.execute("cat >/dev/null", stdin=bulk, timeout=DEADLINE_S),
        "64 MiB out by stdout": bulk_out,
    }


async def find_contract(sandbox: Sandbox, name: str) -> str:
    result = None
    match name:
        case "exit 7":
            return str((await sandbox.execute("exit 7")).exit_code)
        case "killed by signal 9":
            return str((await sandbox.execute("kill -9 $$")).exit_code)
        case "no such command":
            return str((await sandbox.execute("no-such-command")).exit_code)
        case "stdout and stderr apart":
            result = await sandbox.execute("echo o; echo e >&2")
            return "yes" if (result.stdout, result.stderr) == ("o\n", "e\n") else "no"
        case "bytes ff fe 00 from stdout":
            return str((await sandbox.execute(r"printf '\377\376\000'")).stdout.encode().hex(" "))
        case "1 MiB of bytes through cat":
            result = await sandbox.execute("base64 -w 0", stdin=MIB)
            return "exact (stdin; stdout as base64)" if base64.b64decode(result.stdout) == MIB else "changed"
        case "5 MB of output":
            return f"{len((await sandbox.execute('head -c 5000000 /dev/zero')).stdout)} characters"
        case "a limit of 3 s":
            begin_s = time.monotonic()
            result = await sandbox.execute("sleep 30", timeout=3)
            took_s = time.monotonic() - begin_s
            begin_s = time.monotonic()
            await sandbox.execute("true", timeout=60)
            return f"{result.exit_code} after {took_s:.1f} s; the next command waits {time.monotonic() - begin_s:.1f} s"
    raise ValueError(name)


async def answer(sandbox: Sandbox, measures: dict[str, Callable[[], Awaitable[object]]], name: str) -> object:
    if name == "ready":
        return True
    if name.startswith("contract "):
        try:
            return await find_contract(sandbox, name.removeprefix("contract "))
        except Exception as error:  # whatever it raises is the finding
            return f"{type(error).__name__}: {error}"[:80]
    begin_s = time.monotonic()
    try:
        await measures[name]()
    except Exception:
        return None
    return time.monotonic() - begin_s


async def serve() -> None:
    async with open_sandbox() as sandbox:
        measures = plan_measures(sandbox)
        # Its own tasks go on while we wait for a line.
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await answer(sandbox, measures, line.strip())), flush=True)


if __name__ == "__main__":
    asyncio.run({"boot": boot, "serve": serve}[sys.argv[1]]())
