"""docs/explanation/security.md holds the table that the suite's rules make, and names what the suite has."""

from pathlib import Path

import pytest

from tests.guest.wall import expected
from tests.guest.wall.ledger import Ledger
from tests.guest.wall.scene import ALL, Scene, plan_scenes

DOCS = Path(__file__).parents[3] / "docs/explanation"
DOC = DOCS / "security.md"
BEGIN = {"user": "<!-- the wall's table -->\n", "vhost": "<!-- the wall's table, vhost -->\n"}
END = "<!-- the end of the wall's table -->\n"


@pytest.mark.parametrize("backend", BEGIN)
def test_table_is_the_one_the_suite_holds(backend: str) -> None:
    written = DOC.read_text().partition(BEGIN[backend])[2].partition(END)[0]
    assert written == expected.render_table(backend), "put in what `python -m tests.guest.wall.expected` prints"


def test_rules_let_nobody_but_root_through_where_all_layers_are_on() -> None:
    for backend in ("user", "vhost"):
        for text, attempt in expected.ROWS:
            results = expected.expect(Scene(ALL, backend=backend), attempt)
            assert attempt.who == "root" or not results & expected.INTRUSIONS, text


def test_committed_table_of_the_full_matrix_is_whole() -> None:
    """Every image, kernel, set of layers and backend was attacked; with all layers on nobody but root got through."""
    ledger = Ledger()
    ledger.read_table((DOCS / "wall.md").read_text())
    for scene in (*plan_scenes("user", is_full=True), *plan_scenes("vhost", is_full=True)):
        entry = ledger.entries[str(scene)]
        assert entry.attempts > 3000
        assert entry.is_guarded is (scene.layers == ALL)
        assert not (entry.is_guarded and entry.intrusions), entry.where


def test_run_of_a_part_renews_its_rows_alone() -> None:
    first, second, third = Ledger(), Ledger(), Ledger()
    first.add("here", 1200, 3, 4, is_guarded=False)
    first.add("there", 5)
    second.add("there", 7, 1)
    second.read_table(first.render_table())
    third.read_table(second.render_table())
    rows = [(e.where, e.attempts, e.intrusions, e.by_root, e.is_guarded) for e in third.entries.values()]
    assert rows == [("here", 1200, 3, 4, False), ("there", 7, 1, 0, True)]
    assert "with all layers on: 7 attempts, 1 intrusions" in third.render_table()
