"""What a module needs is shipped, and stands in the order in which modprobe loads it."""

import lzma
from collections.abc import Callable

import pytest

from vmkit.errors import BuildError
from vmkit.image.formats.tree import Node, Tree, file_node
from vmkit.image.modules import ModuleSet

VERSION = "6.12.1-test"
ROOT = f"usr/lib/modules/{VERSION}"
BUILTIN = b"kernel/drivers/built-in.ko\n"
Modules = dict[str, tuple[str, Node]]
MakeElf = Callable[..., bytes]


@pytest.fixture
def make_modules(make_elf: MakeElf) -> Callable[..., ModuleSet]:
    """make_modules(path=".modinfo") gives a kernel of these modules, with `built_in` in it."""

    def make(modules: dict[str, str]) -> ModuleSet:
        files: Modules = {}
        for path, info in modules.items():
            data = make_elf(modinfo=info.replace(" | ", "\0").encode() + b"\0")
            full = f"{ROOT}/kernel/{path}.ko.xz"
            files[path.rpartition("/")[2].replace("-", "_")] = (full, file_node(lzma.compress(data)))
        return ModuleSet(VERSION, files, BUILTIN)

    return make


def read(modules: ModuleSet, name: str, barred: tuple[str, ...] = ()) -> list[str]:
    tree = Tree()
    modules.write(tree, barred)
    node = tree.find(f"{ROOT}/{name}")
    return node.data.decode().splitlines() if node else []


def load_as_busybox(lines: list[str], name: str) -> list[str]:
    """What busybox's modprobe loads, in its order: a line of modules.dep from right to left, then the module."""
    needed = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    path = next(path for path in needed if path.endswith(f"/{name}.ko"))
    return [entry.rpartition("/")[2].removesuffix(".ko") for entry in (*reversed(needed[path]), path)]


def test_modprobe_loads_each_module_after_all_it_needs(make_modules: Callable[..., ModuleSet]) -> None:
    # As with bochs: what it names first is what the others it names need.
    depends = {"bochs": "drm,helper,shmem", "shmem": "helper,drm", "helper": "drm", "drm": "i2c", "i2c": ""}
    modules = make_modules({name: f"depends={needs}" for name, needs in depends.items()})
    assert modules.choose(("bochs",)) == (("i2c", "drm", "helper", "shmem", "bochs"), ())
    lines = read(modules, "modules.dep")
    for name in depends:
        order = load_as_busybox(lines, name)
        for place, loaded in enumerate(order):
            needs = {word for word in depends[loaded].split(",") if word}
            assert needs <= set(order[:place]), (name, order)


def test_soft_dependency_is_shipped_and_tried_first(make_modules: Callable[..., ModuleSet]) -> None:
    modules = make_modules(
        {
            "fs/ext4": "depends=jbd2 | softdep=pre: crypto-crc32c | softdep=post: fancy built-in gone",
            "fs/jbd2": "depends= | softdep=pre: crypto-crc32c",
            "crypto/crc32c_generic": "alias=crypto-crc32c | alias=crc32c",
            "arch/x86/crypto/crc32c-intel": "depends=helper | alias=crypto-crc32c",
            "arch/x86/crypto/aes": "alias=crypto-aes",
            "lib/helper": "",
            "net/fancy": "softdep=pre: platform:board-led",
            "drivers/board-led": "alias=platform:board-led",
        }
    )
    loaded, soft = modules.choose(("ext4",))
    assert loaded == ("jbd2", "ext4")
    assert soft == ("crc32c_generic", "crc32c_intel", "board_led", "fancy")
    dep = read(modules, "modules.dep")
    assert load_as_busybox(dep, "crc32c-intel") == ["helper", "crc32c-intel"]
    assert not [line for line in dep if "aes" in line]
    # The kernel asks for a cipher by its alias when it needs one.
    assert read(modules, "modules.alias") == [
        "alias crypto-crc32c crc32c_generic",
        "alias crypto-crc32c crc32c_intel",
        "alias platform:board-led board_led",
    ]


def test_barred_module_is_in_no_list(make_modules: Callable[..., ModuleSet]) -> None:
    modules = make_modules({"a": "softdep=pre: platform:b", "b": ""})
    modules.choose(("a",))
    assert read(modules, "modules.dep", ("b",)) == ["kernel/a.ko:"]
    assert read(modules, "modules.alias", ("b",)) == []


def test_module_that_is_built_in_is_known_to_modprobe(make_modules: Callable[..., ModuleSet]) -> None:
    modules = make_modules({"a": "depends=built-in"})
    assert modules.choose(("built_in", "a")) == (("a",), ())
    assert read(modules, "modules.dep") == ["kernel/a.ko:"]
    assert read(modules, "modules.builtin") == ["kernel/drivers/built-in.ko"]


def test_what_another_module_loads_is_not_tried_as_a_soft_dependency(make_modules: Callable[..., ModuleSet]) -> None:
    modules = make_modules({"a": "softdep=pre: b", "b": "", "c": "softdep=post: a"})
    assert modules.choose(("a", "b")) == (("a", "b"), ())
    assert modules.choose(("c",)) == (("c",), ("a",))


def test_modules_that_need_each_other_are_an_error(make_modules: Callable[..., ModuleSet]) -> None:
    modules = make_modules({"a": "depends=b", "b": "depends=a", "c": "softdep=pre: d", "d": "softdep=pre: c"})
    with pytest.raises(BuildError, match=r"the module a of the kernel 6\.12\.1-test depends on itself"):
        modules.choose(("a",))
    assert modules.choose(("c",)) == (("c",), ("d",))


@pytest.mark.parametrize("info", ["depends=m{}", "depends= | softdep=pre: m{}"], ids=["hard", "soft"])
def test_modules_that_need_each_other_too_deep_are_an_error(make_modules: Callable[..., ModuleSet], info: str) -> None:
    """A few hundred more would be too many calls of Python within each other."""
    modules = make_modules({f"m{number}": info.format(number + 1) for number in range(200)} | {"m200": ""})
    with pytest.raises(BuildError, match=r"the module m\d+ of the kernel .* more than 64 deep"):
        modules.choose(("m0",))
