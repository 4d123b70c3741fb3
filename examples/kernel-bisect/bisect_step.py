#!/usr/bin/env python3
"""One step of `git bisect run`: builds the kernel of the commit that is checked out, boots it, runs a test in it.

The exit status is what git expects: 0 the commit is good, 1 it is bad, 125 it cannot be tested, 255 stop the bisection.
"""

import argparse
import subprocess
import sys
import traceback
from typing import Never

GOOD, BAD, SKIP, ABORT = 0, 1, 125, 255

# Python ends with 1 after an error, and argparse with 2. To git, both would mean that the commit is bad.
try:
    import vmkit
except ImportError as error:
    print(f"abort: {sys.executable} has no vmkit: {error}", file=sys.stderr)
    sys.exit(ABORT)


class Parser(argparse.ArgumentParser):
    """Ends with ABORT after a wrong option."""

    def error(self, message: str) -> Never:
        """Print what is wrong."""
        self.exit(ABORT, f"abort: {message}\n")


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--build", default="make -j$(nproc) bzImage", help="a line for the shell (%(default)s)")
    parser.add_argument("--kernel", default="arch/x86/boot/bzImage", help="what the build makes (%(default)s)")
    parser.add_argument("--append", default="", help="more kernel arguments")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for the test (%(default)s)")
    parser.add_argument("--boot-is-test", action="store_true", help="a kernel that does not boot is bad")
    parser.add_argument("command", nargs="+", help="the test: a command for the guest; status 0 is good")
    return parser.parse_args()


def test_commit(options: argparse.Namespace) -> int:
    if subprocess.run(["/bin/sh", "-c", options.build], check=False).returncode:
        print("skip: the build failed")
        return SKIP
    try:
        with vmkit.Machine("tiny", kernel=options.kernel, append=options.append) as machine:
            result = machine.run(options.command, text=True, timeout=options.timeout)
    except vmkit.TimedOut:
        print(f"bad: the test did not end within {options.timeout:g} s")
        return BAD
    except vmkit.ConnectionLost as error:
        print(f"bad: the machine ended during the test: {error.brief}")
        return BAD
    except vmkit.MachineError as error:
        print(f"{'bad' if options.boot_is_test else 'skip'}: {error.brief}")
        return BAD if options.boot_is_test else SKIP
    print(result.stdout + result.stderr, end="")
    print("good" if result.exit == 0 else f"bad: status {result.exit}")
    return GOOD if result.exit == 0 else BAD


def main() -> int:
    options = parse()
    try:
        return test_commit(options)
    except vmkit.VshError as error:
        print(f"abort: {error.brief}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    return ABORT


if __name__ == "__main__":
    sys.exit(main())
