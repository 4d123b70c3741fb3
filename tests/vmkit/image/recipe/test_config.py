"""Recipes: what is accepted, how they extend one another, and that every error names file and line or key."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vmkit.errors import ConfigError
from vmkit.image.recipe import config
from vmkit.image.recipe.config import ImageSpec, find_mention, list_images, load_image
from vmkit.image.recipe.settings import HOOK_PATH, SETTINGS, ContentKind, FileSpec, find_line
from vmkit.image.wall.spec import KernelLayer, WallSpec

WriteRecipe = Callable[..., Path]


def test_tiny_is_listed_and_loads() -> None:
    assert "tiny" in [image.name for image in list_images()]
    spec = load_image("tiny")
    assert spec.default_user == "root"
    assert "vsock_loopback" not in spec.modules
    assert {file.path for file in spec.files} >= {"/init", "/etc/passwd", "/etc/fstab"}


def test_settings_and_spec_have_the_same_names() -> None:
    extra = {"name", "origin", "recipes", "template_dirs", "architecture"}
    assert set(ImageSpec.__dataclass_fields__) - extra == set(SETTINGS) - {"extends", "templates"}


def test_unknown_image_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"there is no image 'tinny'; the images are: .*tiny") as caught:
        load_image("tinny")
    assert "did you mean 'tiny'" in caught.value.hint


@pytest.mark.parametrize("name", ["web", "tinny", "my web.tar"])
def test_file_of_the_present_directory_needs_its_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_recipe: WriteRecipe
) -> None:
    """It may be a root. A recipe that extends the name means no file here."""
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there is no image") as caught:
        load_image(name)
    path = {"my web.tar": "'./my web.tar'"}.get(name, f"./{name}")
    assert caught.value.hint == f"for the one in this directory, give its path: {path}"
    with pytest.raises(ConfigError, match="there is no image") as caught:
        load_image(str(write_recipe(f'extends = "{name}"\n')))
    assert "this directory" not in (caught.value.hint or "")


def test_name_that_no_file_can_have_is_no_image() -> None:
    with pytest.raises(ConfigError, match="there is no image"):
        load_image("a" * 300)


def test_old_name_of_an_image_goes_on_and_is_named_once(
    write_recipe: WriteRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    config._warn_of_old_name.cache_clear()
    assert load_image("host") == load_image("nested")
    assert load_image(str(write_recipe('extends = "host"\n'))).packages == load_image("nested").packages
    assert caplog.messages == ["the image 'host' is called 'nested' now"]


def test_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no recipe .*nowhere\.toml"):
        load_image(str(tmp_path / "nowhere.toml"))


def test_recipe_extends_and_adds(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("x")
    text = """
extends = "tiny"
description = "mine"
packages = ["strace"]
kernel_args = ["loglevel=7"]
modules = ["virtio-net"]
hook = "setup.sh"
default_user = "user"
[variables]
hostname = "lab"
ports = [1, 2]
[files]
"/usr/bin/tool" = { source = "tool", mode = 0o755 }
"/etc/motd" = { content = "hello" }
"""
    tiny, mine = load_image("tiny"), load_image(str(write_recipe(text)))
    assert (mine.name, mine.description, mine.default_user) == ("my", "mine", "user")
    assert mine.packages == ("strace",)
    assert mine.kernel_args == (*tiny.kernel_args, "loglevel=7")
    assert mine.modules == (*tiny.modules, "virtio_net")
    assert dict(mine.variables) == dict(tiny.variables) | {"hostname": "lab", "ports": (1, 2)}
    assert set(mine.files) - set(tiny.files) == {
        FileSpec("/usr/bin/tool", ContentKind.SOURCE, str(tmp_path / "tool"), 0o755, 0, 0),
        FileSpec("/etc/motd", ContentKind.CONTENT, "hello", 0o644, 0, 0),
    }
    assert mine.hook == FileSpec(HOOK_PATH, ContentKind.SOURCE, str(tmp_path / "setup.sh"), 0o755, 0, 0)


def test_service_brings_its_packages_and_needs_debians_python(write_recipe: WriteRecipe) -> None:
    spec = load_image(str(write_recipe('extends = "debian"\nservices = ["maitred"]\npackages = ["strace"]\n')))
    assert spec.services == ("maitred",)
    assert set(spec.packages) == {*load_image("debian").packages, "strace", "python3-grpclib"}
    with pytest.raises(ConfigError, match=r"my.toml:2: services: maitred needs Debian's own Python") as caught:
        load_image(str(write_recipe('extends = "tiny"\nservices = ["maitred"]\n')))
    assert "debian" in caught.value.hint
    with pytest.raises(ConfigError, match=r"'garcon' is not a service: maitred"):
        load_image(str(write_recipe('extends = "debian"\nservices = ["garcon"]\n')))


def test_wall_is_up_unless_told_and_its_keys_join(write_recipe: WriteRecipe) -> None:
    assert load_image("tiny").wall == WallSpec(
        transport=True, daemon=True, kernel=KernelLayer.ON, lock_modules=False, connect_cids=(), legacy_clients=False
    )
    write_recipe('extends = "tiny"\n[wall]\ndaemon = false\nconnect_cids = [5]\nkernel = false\n', "base")
    text = 'extends = "./base.toml"\nmodules_available = ["vsock-loopback"]\n[wall]\nconnect_cids = [4, 3, 4]\n'
    mine = load_image(str(write_recipe(text + 'kernel = "required"\nlock_modules = true\n')))
    assert mine.modules_available == ("virtio_blk", "vsock_loopback")
    assert mine.wall == WallSpec(daemon=False, kernel=KernelLayer.REQUIRED, lock_modules=True, connect_cids=(4, 3))


def test_loopback_may_be_loaded_where_the_transport_layer_is_off(write_recipe: WriteRecipe) -> None:
    text = 'extends = "tiny"\nmodules = ["vsock_loopback"]\n[wall]\ntransport = false\n'
    assert load_image(str(write_recipe(text))).modules[-1] == "vsock_loopback"


def test_recipe_extends_a_file_beside_it(write_recipe: WriteRecipe) -> None:
    write_recipe('extends = "tiny"\nkernel_args = ["a"]\ntemplates = "one"\n', "base")
    mine = load_image(str(write_recipe('extends = "./base.toml"\nkernel_args = ["b"]\ntemplates = "two"\n')))
    assert mine.kernel_args[-2:] == ("a", "b")
    assert [folder.name for folder in mine.template_dirs] == ["two", "one", "templates"]


def test_recipe_that_extends_itself_is_refused(write_recipe: WriteRecipe) -> None:
    with pytest.raises(ConfigError, match="extends itself"):
        load_image(str(write_recipe('extends = "./my.toml"\n')))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "tiny"\npakages = ["strace"]\n', r"my\.toml:2: unknown key 'pakages'"),
        ('extends = "tiny"\n\npackages = "strace"\n', r"my\.toml:3: packages: must be a list, not text"),
        ('extends = "tiny"\npackages = [1]\n', r"my\.toml:2: packages: must be text, not a number"),
        ('extends = "tiny"\npackages = ["Strace"]\n', r"packages: 'Strace' is not a Debian package's name"),
        ('extends = "tiny"\nsuite = true\n', r"my\.toml:2: suite: must be text, not true/false"),
        ('extends = "tiny"\nmirror = "ftp://x"\n', r"mirror: 'ftp://x' is not an http, https or file URL"),
        ('extends = "tiny"\nkernel_args = ["a b"]\n', r"kernel_args: 'a b' is not one word"),
        ('extends = "tiny"\nkernel_args = ["vmkit.ready=1"]\n', r"kernel_args: words that begin with 'vmkit\.'"),
        (
            'extends = "tiny"\nmodules = ["vsock-loopback"]\n',
            r"my\.toml:2: modules: the guest does not load vsock_loopback",
        ),
        ('extends = "tiny"\n[wall]\nkernal = true\n', r"my\.toml:3: unknown key 'wall\.kernal'"),
        ('extends = "tiny"\n[wall]\ndaemon = 1\n', r"my\.toml:3: wall\.daemon: must be true/false, not a number"),
        ('extends = "tiny"\n[wall]\nkernel = "no"\n', r'wall\.kernel: must be true, false or "required"'),
        ('extends = "tiny"\n[wall]\nconnect_cids = 4\n', r"wall\.connect_cids: must be a list of numbers"),
        ('extends = "tiny"\n[wall]\nconnect_cids = [1]\n', r"wall\.connect_cids: 1 is not a guest's CID"),
        ('extends = "tiny"\n[wall]\nconnect_cids = [true]\n', r"wall\.connect_cids: must be a list of numbers"),
        (f'extends = "tiny"\n[wall]\nconnect_cids = {list(range(3, 68))}\n', r"more than 64 CIDs"),
        ('extends = "tiny"\ncompression = "xz"\n', r"compression: 'xz' is not one of none, gzip, lz4, zstd"),
        ('extends = "tiny"\nhook = { symlink = "/x" }\n', r"hook: a hook is a script"),
        ('extends = "tiny"\n[variables]\na = 1\n"b-c" = 1\n', r"my\.toml:4: variables\.b-c: "),
        ('extends = "tiny"\n[variables]\na = { b = 1 }\n', r"my\.toml:3: variables\.a: must be text, .* not a table"),
        ('extends = "tiny"\n[files]\n"etc/x" = { content = "" }\n', r"my\.toml:3: files\.etc/x: a guest path begins"),
        ('extends = "tiny"\n[files]\n"/a/../b" = { content = "" }\n', r"has no empty part, '\.' or '\.\.'"),
        ('extends = "tiny"\n[files]\n"/dev/x" = { content = "" }\n', r"/dev is the kernel's"),
        ('extends = "tiny"\n[files]\n"/x" = { contents = "" }\n', r"my\.toml:3: unknown key 'files\./x\.contents'"),
        ('extends = "tiny"\n[files]\n"/x" = { mode = 1 }\n', r"files\./x: needs exactly one of: template, content"),
        ('extends = "tiny"\n[files]\n"/x" = { content = "", mode = "755" }\n', r"files\./x\.mode: must be a number"),
        ('extends = "tiny"\n[files."/x"]\ncontent = 1\n', r"my\.toml:3: files\./x\.content: must be text"),
        ('extends = "tiny"\n[files]\n"/x" = { template = "../x" }\n', r"'\.\./x' is not a template's name"),
        ('extends = "tyni"\n', r"my\.toml: extends: there is no image 'tyni'"),
        ('extends = "./gone.toml"\n', r"my\.toml: extends: there is no recipe .*gone\.toml"),
        ('description = "no kernel"\n', r"the recipe names no kernel"),
        ('extends = "tiny"\nbroken =\n', r"my\.toml: not valid TOML: .*line 2"),
    ],
)
def test_wrong_recipe_names_file_and_key(write_recipe: WriteRecipe, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_image(str(write_recipe(text)))


def test_unknown_key_suggests_the_near_one(write_recipe: WriteRecipe) -> None:
    with pytest.raises(ConfigError) as caught:
        load_image(str(write_recipe('extends = "tiny"\npakages = []\n')))
    assert caught.value.hint == "did you mean 'packages'?"


def test_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(b'extends = "tiny"\n# \xff\n')
    with pytest.raises(ConfigError, match=r"my\.toml:2: a recipe is UTF-8 text"):
        load_image(str(path))


def test_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text('\ufeffextends = "tiny"\n')
    assert load_image(str(path)).default_user == "root"


def test_recipe_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_image(str(path))


def test_recipe_file_name_must_be_an_image_name(write_recipe: WriteRecipe) -> None:
    with pytest.raises(ConfigError, match="'My Image' cannot be an image's name"):
        load_image(str(write_recipe('extends = "tiny"\n', "My Image")))


def test_mention_is_found_in_the_recipe_or_its_base(write_recipe: WriteRecipe) -> None:
    write_recipe('extends = "tiny"\npackages = ["strce"]\n', "base")
    spec = load_image(str(write_recipe('extends = "./base.toml"\npackages = [\n  "gdbb",\n]\n')))
    assert find_mention(spec, "gdbb").endswith("my.toml:3")
    assert find_mention(spec, "strce").endswith("base.toml:2")


@pytest.mark.parametrize(
    ("text", "keys", "line"),
    [
        ("a = 1\nb = 2\n", ("b",), 2),
        ("[files]\n'/x' = { mode = 1 }\n", ("files", "/x", "mode"), 2),
        ('[files."/x"]\nmode = 1\n', ("files", "/x"), 1),
        ("# b\nab = 1\n[b]\n", ("b",), 3),
        ("a = 1\n", ("zz",), 1),
    ],
)
def test_find_line_finds_the_key(text: str, keys: tuple[str, ...], line: int) -> None:
    assert find_line(text, keys) == line
