"""A cache of each test's own, and a workplace in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vmkit.roots.limits import RootLimits
from vmkit.roots.workplace import Workplace, open_workplace


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workplace]:
    folder = tmp_path / "place"
    folder.mkdir()
    with open_workplace(folder, RootLimits()) as place:
        yield place
