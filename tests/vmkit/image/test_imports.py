"""What a guest's Python lacks is found in the sources, without running anything of the guest."""

import pytest

from vmkit.image.imports import Library, find_built_in, find_missing

MODULES = ("a", "p", "p.q", "p.r", "encodings.latin_1", "_native")


def find(sources: dict[str, str], listed: tuple[str, ...], packaged: tuple[str, ...] = ()) -> list[str]:
    modules = frozenset({*MODULES, *sources, *find_built_in(b"\0PyInit_gc\0PyInit__io\0other\0")})
    return find_missing(Library(sources, modules, frozenset({*packaged, *modules})), listed, {})


def test_listed_module_must_be_there_unless_it_is_optional() -> None:
    assert find({}, ("a", "p.q", "_native", "sys", "builtins", "gc", "_io", "gone?")) == []
    assert find({}, ("a", "gone", "_gone")) == ["_gone: No module named '_gone'", "gone: No module named 'gone'"]


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("import b", ["b"]),
        ("import a, b as c, p.b", ["b", "p.b"]),
        ("from b import x", ["b"]),
        ("from p import q, b, value", ["p.b"]),
        ("class C:\n    import b", ["b"]),
        ("with x:\n    from b import *", ["b"]),
        ("try:\n    import b\nexcept ValueError:\n    pass", ["b"]),
        ("try:\n    x\nfinally:\n    import b", ["b"]),
        # These may fail, run later, or not at all.
        ("try:\n    import b\nexcept ImportError:\n    pass", []),
        ("try:\n    import b\nexcept (ValueError, ModuleNotFoundError):\n    pass", []),
        ("try:\n    import b\nexcept:\n    pass", []),
        ("def f():\n    import b", []),
        ("if x:\n    import b", []),
        # No package of Debian's has it: it is another system's, or the interpreter's.
        ("import unheard_of", []),
    ],
)
def test_what_a_module_imports_at_once_must_be_there(text: str, missing: list[str]) -> None:
    told = find({"m": text}, ("m",), packaged=("b", "p.b"))
    assert told == [f"m: No module named '{name}'" for name in missing]


def test_imports_are_followed_and_a_circle_ends() -> None:
    sources = {"m": "import p.r", "p": "from . import r", "p.r": "from .deep import x\nimport m", "p.deep": "import b"}
    assert find(sources, ("m",), packaged=("b",)) == ["p.deep: No module named 'b'"]
    assert find({"p": "", "p.r": "from .. import x\nfrom . import b"}, ("p.r",), packaged=("p.b",)) == [
        "p.r: No module named 'p.b'"
    ]


def test_codec_must_be_there() -> None:
    library = Library({}, frozenset(MODULES), frozenset(MODULES))
    codecs = {"latin-1": "encodings.latin_1", "idna": "encodings.idna"}
    assert find_missing(library, (), codecs) == ["codec:idna: no module encodings.idna"]
