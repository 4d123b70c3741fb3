"""Every place that listens on TCP is known, and docs/explanation/security.md names what a person sees of it."""

import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
SECURITY = CHECKOUT / "docs" / "explanation" / "security.md"
# What opens a TCP port, or has QEMU open one.
LISTENS = re.compile(
    r"create_server\(|endpoints\.listen(_on_each)?\(|AF_INET\b.*listen|-gdb\", f\"tcp|hostfwd=|bind\(\(LOOPBACK"
    r"|f\"tcp:\{host\}:\{here\}"
)
# Where it is done, and the words of the page that stand for it.
KNOWN = {
    "vmkit/machine/parts/gdb.py": "`vmkit up --gdb=PORT`",
    "vsh/forward/listening.py": "`vsh -L PORT:...`, `vmkit forward -L PORT:...`",
    "vsh/forward/automatic.py": "`vmkit forward --auto`",
    "vmkit/bench/__main__.py": "`vmkit bench`",
    "vmkit/bench/measurements.py": "`vmkit bench`",
    "vmkit/bench/sinks.py": "`vmkit bench`",
    # In the guest.
    "vshd/services/mapped.py": "`vshd --ipv6`",
    "vshd/services/forward.py": "`vsh -R`",
}


def find_listeners() -> set[str]:
    files = (path for package in ("vmkit", "vsh", "vshd") for path in (CHECKOUT / package).rglob("*.py"))
    return {str(path.relative_to(CHECKOUT)) for path in files if LISTENS.search(path.read_text())}


def test_places_that_listen_on_tcp_are_known() -> None:
    assert find_listeners() == set(KNOWN)


@pytest.mark.parametrize("words", sorted(set(KNOWN.values())))
def test_page_on_security_names_what_listens(words: str) -> None:
    page = SECURITY.read_text()
    section = page[page.index("## TCP on a shared host") : page.index("## How it is tested")]
    assert words in section
