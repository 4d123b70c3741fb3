"""A kernel's build tree."""

from pathlib import Path
from typing import Any

import pytest

from tests.vmkit.trees.trees import MakeTree, build_tree


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """make_tree() is the build tree of a kernel that boots every machine."""

    def make(**options: Any) -> Path:
        return build_tree(tmp_path / "linux", **options)

    return make
