"""docs/SECURITY.md holds the table that the suite's rules make, and names what the suite has."""

from pathlib import Path

import pytest

from tests.guest.wall import expected
from tests.guest.wall.scene import ALL, Scene

DOC = Path(__file__).parents[3] / "docs/SECURITY.md"
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
