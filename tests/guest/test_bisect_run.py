"""`vmkit bisect-run` with a real kernel."""

import pytest

from tests.guest.conftest import Run


@pytest.mark.parametrize(
    ("line", "status", "why"),
    [
        ("uname -s", 0, b"good: status 0"),
        ("echo c > /proc/sysrq-trigger; sleep 60", 1, b"the guest's kernel panicked: sysrq triggered crash"),
    ],
)
def test_kernel_is_judged_by_what_it_does(built: None, vmkit: Run, line: str, status: int, why: bytes) -> None:
    done = vmkit("bisect-run", "--backend", "user", "--", "sh", "-c", line)
    assert (done.returncode, why in done.stderr) == (status, True), done.stderr.decode()
