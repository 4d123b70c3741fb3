"""What the build looks for in the guest's Python on vshd's behalf."""

from vmkit.image.needs import find_needs
from vmkit.image.recipe.resources import find_vshd_dir

SOURCE = b"""
import os
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Never
try:
    from first import choice
except ImportError:
    from second import choice
def late(text: str) -> bytes:
    try:
        import zlib
    except OSError:
        pass
    with open("x", encoding="latin-1") as file:
        return text.encode("unicode_escape") + file.read().encode() + Message().encode(3)
class Thing:
    def later(self):
        from email import message
        return b"".decode(encoding="cp437")
"""


def test_needs_are_late_imports_and_named_codecs() -> None:
    needs = find_needs("thing", {"sub/late.py": SOURCE, "__init__.py": b"", "data.txt": b"import this"})
    assert needs.modules == ("email", "os", "thing", "thing.sub.late", "zlib")
    assert needs.codecs == ("cp437", "idna", "latin-1", "unicode_escape")


def test_needs_of_vshd_hold_every_module_of_it() -> None:
    folder = find_vshd_dir()
    sources = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.py")}
    needs = find_needs("vshd", sources)
    assert {"vshd", "vshd.log", "vshd.wire.proof", "_socket", "fcntl"} <= set(needs.modules)
    assert len([name for name in needs.modules if name.startswith("vshd")]) == len(sources)
    assert "utf-8" in needs.codecs
