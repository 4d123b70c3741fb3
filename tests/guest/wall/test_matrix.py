"""The guest's own users and its root against every set of layers: each attempt ends as the table says."""

from pathlib import Path

import pytest

from tests.guest.wall.scene import ALL, CID, NONE, USER_READY_PORT, Scene, open_scene, plan_scenes
from tests.guest.wall.storm import storm


def plan_cases() -> list[object]:
    """The tiny image with all layers and with none in every run, and debian with all; the others are slow."""
    usual = {Scene(ALL), Scene(NONE), Scene(ALL, image="debian")}
    return [
        pytest.param(scene, id=str(scene), marks=() if scene in usual else pytest.mark.slow)
        for scene in plan_scenes("user")
    ]


@pytest.mark.parametrize("scene", plan_cases())
def test_every_attempt_ends_as_the_table_says(scene: Scene, folders: Path, tmp_path: Path) -> None:
    with open_scene(scene, tmp_path) as machine:
        storm(machine, scene, CID, USER_READY_PORT)
