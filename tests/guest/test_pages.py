"""The pages of the documentation on real machines: each command that a page shows prints what the page shows."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import CHECKOUT, Page, find_pages, read_page
from tests.docs.transcript import open_shell, replay
from tests.guest.conftest import BIN, Run
from vmkit.machine import stop
from vsh.registry import read_machines

PAGES = [page for page in map(read_page, find_pages()) if any(block.is_run for block in page.blocks)]
# What a page takes for granted in the folder where a reader is.
PREPARED = {"README.md": {"src/main.c": "int main(void) { return 0; }\n"}}


@pytest.fixture
def no_machines(built: None, folders: Path, vmkit: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry of a page's own: pages start with CID 3, and leave out the name of the only machine."""
    runtime = folders / "pages"
    runtime.mkdir(mode=0o700, exist_ok=True)
    # To prove a broken KVM takes ten seconds.
    for verdict in (folders / "runtime").glob("kvm-*.json"):
        shutil.copy(verdict, runtime)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(runtime))
    yield
    vmkit("forward", "--remove", "all")
    for machine in read_machines():
        stop.kill(machine)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.path.relative_to(CHECKOUT)) for page in PAGES])
def test_page_shows_what_its_commands_print(page: Page, no_machines: None, tmp_path: Path) -> None:
    for name, text in PREPARED.get(page.path.name, {}).items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    with open_shell(tmp_path, {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}) as shell:
        assert replay(page, shell, tmp_path)
    assert read_machines() == [], "the page leaves a machine running"
