#!/usr/bin/env python3
"""judge.py PROGRAM...: runs each untrusted Python program in a machine of its own, and prints a line of JSON for it.

A machine has no network, no disk and a fixed amount of memory. The program runs as an ordinary user, for a few seconds
at most. The machine ends with it, so that no process or file of one program meets another.
"""

import json
import sys
from pathlib import Path

import vmkit

TIMEOUT_S = 5
OUTPUT_LIMIT_BYTES = 64 * 1024


def judge(program: str) -> dict[str, object]:
    """Run one program."""
    code = Path(program).read_text()
    try:
        with vmkit.Machine("tiny", memory="256M") as machine:
            result = machine.run(
                ["python3", "-"],
                input=code,
                text=True,
                user="user",
                cwd="/tmp",  # noqa: S108  (the guest's)
                timeout=TIMEOUT_S,
                output_limit_bytes=OUTPUT_LIMIT_BYTES,
            )
    except vmkit.TimedOut:
        return {"program": program, "verdict": "too slow"}
    except vmkit.ConnectionLost as error:
        return {"program": program, "verdict": "the machine failed", "reason": error.brief}
    except vmkit.VshError as error:
        return {"program": program, "verdict": "stopped", "reason": error.brief}
    verdict = "passed" if result.exit == 0 else f"signal {result.signal}" if result.signal else f"status {result.exit}"
    return {"program": program, "verdict": verdict, "stdout": result.stdout, "stderr": result.stderr[-500:]}


def main() -> int:
    programs = sys.argv[1:]
    if not programs:
        print(__doc__, file=sys.stderr)
        return 64
    all_passed = True
    for program in programs:
        verdict = judge(program)
        print(json.dumps(verdict), flush=True)
        all_passed &= verdict["verdict"] == "passed"
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
