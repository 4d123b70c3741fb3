"""docs/reference/python.md is what the docstrings make, and has every public name."""

import re
import sys

import pytest

import vmkit
from tests.docs import api_page


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="signatures are shown as Python 3.11 has them")
def test_page_is_made_from_the_docstrings_as_they_are() -> None:
    assert api_page.PAGE.read_text() == api_page.render_page(), "run `make api`, and commit the page"


def test_page_has_every_public_name() -> None:
    text = api_page.PAGE.read_text()
    for name in vmkit.__all__:
        assert re.search(rf"^#+ {name}$", text, re.MULTILINE) or f"`{name}`" in text, name


def test_every_public_name_says_what_it_is() -> None:
    for name, value in api_page.VALUES.items():
        assert name.isupper() or value.__doc__, f"{name} has no docstring"
