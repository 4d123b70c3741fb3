"""The guest's own users and its root against every set of layers: each attempt ends as the table says."""

from pathlib import Path

import pytest

from tests.guest.wall.scene import CID, USER_READY_PORT, Scene, open_scene, plan_scenes
from tests.guest.wall.storm import storm


@pytest.mark.parametrize("scene", plan_scenes("user"), ids=str)
def test_every_attempt_ends_as_the_table_says(scene: Scene, folders: Path, tmp_path: Path) -> None:
    with open_scene(scene, tmp_path) as machine:
        storm(machine, scene, CID, USER_READY_PORT)
