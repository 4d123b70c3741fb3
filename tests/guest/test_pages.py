"""The pages of the documentation on real machines: each command that a page shows prints what the page shows."""

import os
from pathlib import Path

import pytest

from tests.docs.pages import CHECKOUT, Page, find_pages, read_page
from tests.docs.transcript import open_shell, replay
from tests.guest.conftest import BIN
from vsh.registry import read_machines

PAGES = [page for page in map(read_page, find_pages()) if any(block.is_run for block in page.blocks)]
# What a page takes for granted in the folder where a reader is.
PREPARED = {"README.md": {"src/main.c": "int main(void) { return 0; }\n"}}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.path.relative_to(CHECKOUT)) for page in PAGES])
def test_page_shows_what_its_commands_print(page: Page, own_registry: None, tmp_path: Path) -> None:
    for name, text in PREPARED.get(page.path.name, {}).items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    with open_shell(tmp_path, {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}) as shell:
        assert replay(page, shell, tmp_path)
    assert read_machines() == [], "the page leaves a machine running"
