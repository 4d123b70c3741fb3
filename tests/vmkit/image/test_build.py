"""Building from fake packages: the same bytes every time, the cache, and every way a build can be disturbed."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.vshd.test_init import needs_namespace
from vmkit.errors import BuildError, ConfigError, HostError
from vmkit.image.build import (
    BuiltImage,
    build_image,
    fetch_packages,
    find_built_image,
    find_drift,
    plan_image,
    update_lock_file,
)
from vmkit.image.debian.packages import hash_file, make_request
from vmkit.image.formats.cpio import read_cpio
from vmkit.image.formats.tree import FileKind, Node
from vmkit.image.recipe.config import ImageSpec, load_image
from vmkit.image.recipe.inputs import read_inputs

FakeSpec = Callable[..., ImageSpec]
NOBODY = 65534
DEADLINE_S = 20.0


def read_initrd(built: BuiltImage) -> dict[str, Node]:
    return {entry.path: entry.node for entry in read_cpio(built.initrd.read_bytes())}


def test_build_gives_kernel_initrd_and_manifest(cache_dir: Path, fake_spec: FakeSpec) -> None:
    built = build_image(fake_spec('kernel_args = ["quiet"]\ndefault_user = "user"\n'))
    assert (built.name, built.cached, built.kernel_args, built.default_user) == ("my", False, ("quiet",), "user")
    assert built.kernel.read_bytes() == b"not a real kernel"
    manifest = json.loads(built.manifest.read_text())
    assert manifest["digest"] == built.digest
    assert manifest["artifacts"]["initrd"] == {
        "sha256": hash_file(built.initrd),
        "size_bytes": built.initrd.stat().st_size,
    }
    assert manifest["artifacts"]["kernel"]["sha256"] == hash_file(built.kernel)
    assert [(entry["name"], entry["version"], entry["suite"]) for entry in manifest["packages"]] == [
        ("busybox-static", "1.0-1", "stable"),
        ("linux-image-6.12.1-cloud-amd64", "1.0-1", "stable"),
    ]
    assert all(len(entry["sha256"]) == 64 for entry in manifest["packages"])


def test_guest_tree_holds_what_the_recipe_says(cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path) -> None:
    (tmp_path / "tool").write_bytes(b"\0binary")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/init.j2").write_text(
        "#!/bin/sh\n{{ modules | join(' ') }} {{ image }} {{ colour }}\n{{ hook }}\n"
    )
    spec = fake_spec(
        'templates = "templates"\nhook = { content = "#!/bin/sh\\n" }\n',
        """"/init" = { template = "init.j2", mode = 0o755 }
"/usr/bin/tool" = { source = "tool", mode = 0o4755, uid = 5, gid = 6 }
"/etc/link" = { symlink = "/etc/passwd" }
"/srv/x" = { directory = true, mode = 0o1777 }
[variables]
colour = "blue"
""",
    )
    nodes = read_initrd(build_image(spec))
    assert nodes["init"].data.decode() == "#!/bin/sh\nfirst third_part second my blue\n/etc/vmkit/hook\n"
    assert nodes["usr/bin/tool"] == Node(FileKind.FILE, 0o4755, b"\0binary", 5, 6)
    assert nodes["etc/link"].data == b"/etc/passwd"
    assert nodes["srv/x"] == Node(FileKind.DIRECTORY, 0o1777)
    assert nodes["etc/vmkit/hook"].mode == 0o755
    assert nodes["usr/bin/ls"] == Node(FileKind.SYMLINK, 0o777, b"/usr/bin/busybox")
    assert nodes["usr/sbin/insmod"].kind is FileKind.SYMLINK
    assert nodes["dev/console"] == Node(FileKind.CHARACTER, 0o600, device=(5, 1))
    assert {"proc", "sys", "bin", "lib64"} <= set(nodes)
    assert not [path for path in nodes if "unwanted" in path]


def test_two_caches_give_identical_bytes(
    cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_image(fake_spec('packages = ["tool"]\n'))
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(tmp_path / "other"))
    second = build_image(fake_spec('packages = ["tool"]\n'))
    assert first.digest == second.digest
    assert first.initrd.read_bytes() == second.initrd.read_bytes()
    assert first.manifest.read_bytes() == second.manifest.read_bytes()
    assert first.kernel.read_bytes() == second.kernel.read_bytes()


@pytest.mark.parametrize("compression", ["gzip", "lz4", "zstd"])
def test_compressed_initrd_is_reproducible(
    cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    plain = build_image(fake_spec())
    spec = fake_spec(f'compression = "{compression}"\n')
    first = build_image(spec)
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(tmp_path / "other"))
    assert build_image(spec).initrd.read_bytes() == first.initrd.read_bytes()
    unpacked = subprocess.run([compression, "-dc"], input=first.initrd.read_bytes(), capture_output=True, check=True)
    assert unpacked.stdout == plain.initrd.read_bytes()


def test_cached_build_starts_no_program_and_imports_little(
    cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path, child_environ: dict[str, str]
) -> None:
    spec = fake_spec()
    built = build_image(spec)
    script = f"""
import subprocess, sys
from vmkit.image.build import build_image
from vmkit.image.recipe.config import load_image
def refuse(*words, **settings):
    raise SystemExit("a program was started: %r" % (words,))
opened = []
sys.addaudithook(lambda event, words: opened.append(str(words[0])) if event == "open" else None)
subprocess.Popen.__init__ = refuse
built = build_image(load_image({str(spec.origin)!r}))
assert built.cached, built
rooms = {{"vmkit.image." + name for name in ("assemble", "recipe.sandbox", "debian.deb")}}
late = ({{"jinja2", "tarfile"}} | rooms) & set(sys.modules)
assert not late, late
assert not [path for path in opened if path.endswith(("/kernel", "/initrd"))], "files of the image were read"
print(built.digest)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=child_environ, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == (built.digest, "")


@needs_namespace
def test_read_only_cache_serves_what_is_in_it(
    cache_dir: Path, fake_spec: FakeSpec, child_environ: dict[str, str]
) -> None:
    """As in a container whose root is read-only."""
    spec = fake_spec()
    built = build_image(spec)
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    script = f"""
from vmkit.image.build import build_image
from vmkit.image.recipe.config import load_image
print(build_image(load_image({str(spec.origin)!r})).digest)
"""
    argv = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(cache_dir)]
    argv += [sys.executable, "-c", script]
    done = subprocess.run(argv, env=child_environ, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout.strip(), done.stderr) == (built.digest, "")


@pytest.mark.parametrize(
    "change",
    [
        'kernel_args = ["other"]\n',
        'modules = ["first"]\n#',
        'default_user = "user"\n',
        'hook = { content = "#!/bin/sh" }\n',
    ],
)
def test_a_changed_recipe_is_another_image(cache_dir: Path, fake_spec: FakeSpec, change: str) -> None:
    before = build_image(fake_spec()).digest
    spec = fake_spec() if change.startswith("modules") else fake_spec(change)
    if change.startswith("modules"):
        spec = replace(spec, modules=("first",))
    assert build_image(spec).digest != before


def test_a_changed_template_or_source_is_another_image(cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/a.j2").write_text("{% include 'b.j2' %}")
    tables = '"/a" = { template = "a.j2" }\n"/s" = { source = "s" }\n'
    digests = set()
    for template, source in (("1", "1"), ("2", "1"), ("2", "2")):
        (tmp_path / "templates/b.j2").write_text(template)
        (tmp_path / "s").write_text(source)
        digests.add(build_image(fake_spec('templates = "templates"\n', tables)).digest)
    assert len(digests) == 3


def test_where_a_source_lies_does_not_matter(cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).write_text("same")
    one = build_image(fake_spec(tables='"/s" = { source = "here" }\n'))
    two = build_image(fake_spec(tables='"/s" = { source = "there" }\n'))
    assert one.digest == two.digest


def test_missing_source_names_recipe_and_file(cache_dir: Path, fake_spec: FakeSpec) -> None:
    with pytest.raises(ConfigError, match=r"my\.toml: cannot read .*/gone, the source of /s: No such file"):
        build_image(fake_spec(tables='"/s" = { source = "gone" }\n'))


@pytest.mark.parametrize(
    ("name", "kind"), [("fifo", "a FIFO"), ("folder", "a directory"), ("socket", "a socket"), ("zero", "a device")]
)
def test_source_that_is_no_regular_file_is_refused(
    cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path, name: str, kind: str
) -> None:
    """A FIFO would keep the build waiting for ever."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        # The path of a socket is short, that of a test's folder may not be.
        descriptor = os.open(tmp_path, os.O_PATH)
        listener.bind(f"/proc/self/fd/{descriptor}/socket")
        os.close(descriptor)
        with pytest.raises(ConfigError, match=f"the source of /s: it is {kind}, not a regular file"):
            build_image(fake_spec(tables=f'"/s" = {{ source = "{name}" }}\n'))
    with pytest.raises(ConfigError, match=r"cannot read the recipe .*fifo\.toml: it is a FIFO, not a regular file"):
        os.mkfifo(tmp_path / "fifo.toml")
        fake_spec('extends = "./fifo.toml"\n')


def test_what_lies_outside_the_recipe_s_folder_is_told(
    cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path, tmp_path_factory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "secret").write_text("s")
    (tmp_path / "link").symlink_to(elsewhere / "secret")
    (tmp_path / "inside").write_text("i")
    (tmp_path / "templates").symlink_to(elsewhere)
    files = {"/a": "inside", "/b": "link", "/c": str(elsewhere / "secret")}
    tables = "".join(f'"{path}" = {{ source = "{source}" }}\n' for path, source in files.items())
    spec = fake_spec('templates = "templates"\n', tables)
    build_image(spec)
    assert [record.message for record in caplog.records] == [
        f"{spec.origin} takes the source of /b from outside its folder: {elsewhere}/secret",
        f"{spec.origin} takes the source of /c from outside its folder: {elsewhere}/secret",
        f"{spec.origin} takes a template folder from outside its folder: {elsewhere}",
    ]
    # Once it is built there is nothing new to tell; and what a recipe extends has a folder of its own.
    caplog.clear()
    build_image(spec)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/inner.toml").write_text('extends = "../base.toml"\n')
    fake_spec(tables='"/a" = { source = "inside" }\n', name="base")
    build_image(load_image(str(tmp_path / "deep/inner.toml")))
    assert not caplog.records


def test_host_python_imports_nothing(
    cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trap/inner").mkdir(parents=True)
    (tmp_path / "trap/__init__.py").write_text("raise SystemExit('it ran')\n")
    (tmp_path / "trap/inner/__init__.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "package trap.inner __init__.py" in dict(read_inputs(fake_spec('host_python = ["trap.inner"]\n')).hashes)
    for name in ("trap.gone", "trap.inner.gone.deeper", "__main__", "json.decoder.x"):
        with pytest.raises(ConfigError, match="this Python has no package"):
            read_inputs(fake_spec(f'host_python = ["{name}"]\n'))


def test_missing_variable_in_a_build_names_template_and_line(
    cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path
) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/a.j2").write_text("\n\n{{ hostnam }}\n")
    with pytest.raises(ConfigError, match=r"templates/a\.j2:3: template variable: 'hostnam' is undefined"):
        build_image(fake_spec('templates = "templates"\n', '"/a" = { template = "a.j2" }\n'))


def test_packages_are_fetched_and_locked_without_the_files_of_the_recipe(
    cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path
) -> None:
    spec = fake_spec(tables='"/a" = { source = "gone" }\n')
    fetch_packages(spec, lambda _text, _part: None)
    assert update_lock_file(spec, tmp_path / "my.lock") == [f"{tmp_path / 'my.lock'} is new: 2 packages"]
    assert find_drift(spec, tmp_path / "my.lock") == []


def test_cached_build_reads_the_templates_of_each_image_once(
    cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path
) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/a.j2").write_text("a")
    fake_spec('templates = "templates"\n', name="inner")
    spec = fake_spec('prebuilt = ["./inner.toml"]\ntemplates = "templates"\n')
    build_image(spec)
    opened: list[str] = []
    is_watching = True

    def watch(event: str, words: tuple[object, ...]) -> None:
        if is_watching and event == "open" and str(words[0]).endswith("a.j2"):
            opened.append(str(words[0]))

    sys.addaudithook(watch)
    assert build_image(spec).cached
    is_watching = False
    assert len(opened) == 2


def test_image_ships_another_that_a_guest_finds_in_its_cache(cache_dir: Path, fake_spec: FakeSpec) -> None:
    inner = fake_spec(name="inner")
    spec = fake_spec('prebuilt = ["./inner.toml"]\n')
    assert find_built_image(spec) is None
    assert plan_image(spec).digest == ""
    nodes = read_initrd(build_image(spec))
    built = build_image(inner)
    assert built.cached
    folder = "root/.cache/vmkit"
    assert nodes[f"{folder}/images/{built.digest}/initrd"].data == built.initrd.read_bytes()
    assert f"{folder}/resolved/{make_request(inner).key()}.json" in nodes
    # A change of the one is a change of the other.
    fake_spec('kernel_args = ["more"]\n', name="inner")
    assert find_built_image(spec) is None


def test_image_that_ships_images_is_not_shipped(cache_dir: Path, fake_spec: FakeSpec) -> None:
    fake_spec(name="inner")
    fake_spec('prebuilt = ["./inner.toml"]\n', name="middle")
    with pytest.raises(ConfigError, match="prebuilt: middle ships images itself"):
        build_image(fake_spec('prebuilt = ["./middle.toml"]\n'))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ('host_python = ["no_such_package"]\n', "this Python has no package 'no_such_package'"),
        ('host_python = ["vsh"]\n', "the image has no Python"),
    ],
)
def test_python_package_that_cannot_be_shipped_is_named(
    cache_dir: Path, fake_spec: FakeSpec, recipe: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"my\.toml: host_python: {message}"):
        build_image(fake_spec(recipe))


def test_user_that_the_image_lacks_is_named(cache_dir: Path, fake_spec: FakeSpec) -> None:
    with pytest.raises(ConfigError, match=r"my\.toml: default_user: the image has no user 'chronos'") as caught:
        build_image(fake_spec('default_user = "chronos"\n'))
    assert "root, user" in caught.value.hint


@pytest.mark.parametrize(
    ("base", "recipe", "message"),
    [
        ("", 'modules = [\n  "first",\n  "gone-too",\n]\n', r"over\.toml:4: modules: .* has no module 'gone_too'"),
        ("", 'modules_available = ["gone"]\n', r"over\.toml:2: modules_available: .* has no module 'gone'"),
        ("", 'root = "disk"\n', r"over\.toml:2: root: .* has no module 'virtio_blk'"),
        # The first mention is not where the recipe asks for the module.
        ('# No "gone".\nmodules_available = ["gone"]\n', "", r"my\.toml:4: modules_available: .* has no module 'gone'"),
    ],
)
def test_module_that_the_kernel_lacks_is_named_with_its_recipe_and_key(
    cache_dir: Path, fake_spec: FakeSpec, write_recipe: Callable[..., Path], base: str, recipe: str, message: str
) -> None:
    fake_spec(base, name="my")
    with pytest.raises(ConfigError, match=message) as caught:
        build_image(load_image(str(write_recipe('extends = "./my.toml"\n' + recipe, "over"))))
    assert "`kernel`" in caught.value.hint


def test_missing_library_is_named(
    cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path, make_elf: Callable[..., bytes]
) -> None:
    (tmp_path / "prog").write_bytes(make_elf(needed=(b"libgone.so.1",)))
    with pytest.raises(BuildError, match=r"'/usr/bin/prog' needs the library libgone\.so\.1"):
        build_image(fake_spec(tables='"/usr/bin/prog" = { source = "prog", mode = 0o755 }\n'))


def test_plan_prints_before_and_after_resolving(cache_dir: Path, fake_spec: FakeSpec) -> None:
    spec = fake_spec('packages = ["tool"]\n')
    before = plan_image(spec)
    assert (before.digest, "resolve packages in stable (main)" in before.render()) == ("", True)
    assert not cache_dir.exists()
    built = build_image(spec)
    after = plan_image(spec)
    assert after.digest == built.digest
    assert "package libtool1 1.0-1 (stable)" in after.render()
    assert "unpack libtool1: everything but documentation" in after.render()


def test_progress_ends_at_one(cache_dir: Path, fake_spec: FakeSpec) -> None:
    told: list[tuple[str, float | None]] = []
    build_image(fake_spec(), progress=lambda text, part: told.append((text, part)))
    parts = [part for _, part in told if part is not None]
    assert parts == sorted(parts)
    assert told[-1] == ("built the image my", 1.0)


def test_damaged_artifact_is_built_again(cache_dir: Path, fake_spec: FakeSpec) -> None:
    built = build_image(fake_spec())
    whole = built.initrd.read_bytes()
    built.initrd.write_bytes(whole[:-1])
    again = build_image(fake_spec())
    assert (again.cached, again.initrd.read_bytes()) == (False, whole)


@pytest.mark.parametrize("name", ["kernel", "initrd"])
def test_artifact_with_other_bytes_is_built_again_and_that_is_told(
    cache_dir: Path, fake_spec: FakeSpec, name: str
) -> None:
    """Of the same size, with the same mtime: a bad disk, or a program that wrote there."""
    built = build_image(fake_spec())
    path = built.kernel.parent / name
    whole, before = path.read_bytes(), path.stat()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert find_built_image(fake_spec()) is None
    told: list[str] = []
    again = build_image(fake_spec(), progress=lambda text, _: told.append(text))
    assert (again.cached, path.read_bytes()) == (False, whole)
    assert "the image my was damaged in the cache, and is replaced" in told
    assert build_image(fake_spec()).cached


def test_artifact_that_was_only_touched_is_served(cache_dir: Path, fake_spec: FakeSpec) -> None:
    built = build_image(fake_spec())
    copy = built.initrd.with_name("copy")
    copy.write_bytes(built.initrd.read_bytes())
    copy.rename(built.initrd)
    assert build_image(fake_spec()).cached
    note = json.loads((cache_dir / "compared" / f"{built.digest}.json").read_bytes())
    assert note["initrd"][1] == built.initrd.stat().st_ino


def test_cache_that_takes_no_notes_still_serves(cache_dir: Path, fake_spec: FakeSpec) -> None:
    built = build_image(fake_spec())
    note = cache_dir / "compared" / f"{built.digest}.json"
    for content in (b"", b"[]", b'{"initrd": 7}', b"\xff"):
        note.write_bytes(content)
        assert build_image(fake_spec()).cached
    note.unlink()
    note.mkdir()
    assert build_image(fake_spec()).cached


def test_notes_of_images_that_are_gone_are_swept(cache_dir: Path, fake_spec: FakeSpec) -> None:
    built = build_image(fake_spec())
    shutil.rmtree(built.kernel.parent)
    build_image(fake_spec('default_user = "user"\n'))
    assert built.digest not in {path.stem for path in (cache_dir / "compared").iterdir()}


def fake_tool(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("script", ["exec cat >/dev/null", "cat >/dev/null; echo packed", "PACK | head -c 200"])
def test_packer_that_fails_without_a_word_makes_no_image(
    cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, script: str
) -> None:
    spec = fake_spec(f'compression = "{compression}"\n')
    real = f'{shutil.which(compression)} "$@"'
    fake_tool(tmp_path / "bin", compression, script.replace("PACK", real), monkeypatch)
    with pytest.raises(BuildError, match=f"'{compression}' ended with success, and did not pack the initramfs"):
        build_image(spec)
    monkeypatch.undo()
    monkeypatch.setenv("VMKIT_CACHE_DIR", str(cache_dir))
    assert find_built_image(spec) is None


def test_failed_packer_makes_no_image_where_children_are_not_waited_for(
    cache_dir: Path, fake_spec: FakeSpec, tmp_path: Path, child_environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_image(fake_spec())
    spec = fake_spec('compression = "zstd"\n')
    fake_tool(tmp_path / "bin", "zstd", "exit 7", monkeypatch)
    ignore = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    child = _start_child(spec, child_environ | {"PATH": os.environ["PATH"]}, before=ignore)
    output, errors = child.communicate()
    assert child.returncode == 1, output
    assert "SIGCHLD" in errors
    assert find_built_image(spec) is None


# A build in a process of its own. It says what it does, line by line, and waits at STOP_AT until a line comes in.
CHILD = """
import os, sys
from vmkit.errors import VmkitError
from vmkit.image.build import build_image
from vmkit.image.recipe.config import load_image
def progress(text, part):
    print(text, flush=True)
    if STOP_AT and text.startswith(STOP_AT):
        sys.stdin.readline()
try:
    built = build_image(load_image(RECIPE), progress=progress, trust=True)
except VmkitError as error:
    sys.exit(error.render("vmkit"))
print("RESULT", built.cached, built.digest, flush=True)
"""


def _start_child(
    spec: ImageSpec, environ: dict[str, str], *, stop_at: str = "", before: str = ""
) -> subprocess.Popen[str]:
    script = f"STOP_AT = {stop_at!r}\nRECIPE = {str(spec.origin)!r}\n{before}\n{CHILD}"
    words = [sys.executable, "-c", script]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=environ, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def _read_until(child: subprocess.Popen[str], start: str) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(start):
            return
    raise AssertionError(f"the child ended before it said '{start}': {child.communicate()[1]}")


@pytest.mark.parametrize("stage", ["fetching the package index", "fetching 2 packages", "unpack busybox", "pack"])
def test_killed_build_leaves_nothing_that_is_taken(
    cache_dir: Path, fake_spec: FakeSpec, child_environ: dict[str, str], stage: str
) -> None:
    spec = fake_spec()
    child = _start_child(spec, child_environ, stop_at=stage)
    _read_until(child, stage)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not list(cache_dir.glob("images/*"))
    built = build_image(spec)
    assert not built.cached
    assert not list((cache_dir / "tmp").iterdir())
    assert build_image(spec).cached


@pytest.mark.parametrize("stage", ["fetching the package index", "fetching 2 packages", "unpack busybox", "pack"])
def test_interrupted_build_leaves_nothing_behind(
    cache_dir: Path, fake_spec: FakeSpec, child_environ: dict[str, str], stage: str
) -> None:
    child = _start_child(fake_spec(), child_environ, stop_at=stage)
    _read_until(child, stage)
    child.send_signal(signal.SIGINT)
    child.communicate()
    assert not list(cache_dir.glob("images/*"))
    assert not list(cache_dir.glob("tmp/*"))


def test_killed_build_takes_apt_along(
    cache_dir: Path, write_recipe: Callable[..., Path], archive: Any, child_environ: dict[str, str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mirror:
        mirror.settimeout(DEADLINE_S)
        text = f'suite = "stable"\nmirror = "http://127.0.0.1:{mirror.getsockname()[1]}/debian"\n'
        spec = load_image(str(write_recipe(text + f'keyring = "{archive.keyring}"\nkernel = "linux"\n')))
        child = _start_child(spec, child_environ | {"no_proxy": "*"})
        connection, _ = mirror.accept()
        with connection:
            connection.settimeout(DEADLINE_S)
            child.kill()
            child.communicate()
            # The request is there, and then the end: apt is gone without having got its answer.
            while connection.recv(4096):
                pass


def test_two_builds_at_once_share_one_result(
    cache_dir: Path, fake_spec: FakeSpec, child_environ: dict[str, str]
) -> None:
    spec = fake_spec()
    first = _start_child(spec, child_environ, stop_at="pack")
    _read_until(first, "pack")
    second = _start_child(spec, child_environ)
    _read_until(second, "waiting for another build")
    first_output, _ = first.communicate("\n")
    second_output, _ = second.communicate()
    digest = build_image(spec).digest
    assert f"RESULT False {digest}" in first_output
    assert f"RESULT True {digest}" in second_output


def test_full_disk_is_told_and_leaves_nothing(
    cache_dir: Path, fake_spec: FakeSpec, child_environ: dict[str, str]
) -> None:
    build_image(fake_spec())
    spec = fake_spec(tables=f'"/big" = {{ content = "{"x" * 300_000}" }}\n')
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    child = _start_child(spec, {**child_environ, "PYTHONDONTWRITEBYTECODE": "1"}, before=limit)
    _, errors = child.communicate()
    assert child.returncode == 1
    assert errors.startswith("vmkit: a file would be too large while writing to ")
    assert "VMKIT_CACHE_DIR" in errors
    assert not list((cache_dir / "tmp").iterdir())
    assert not build_image(spec).cached


def test_cache_of_another_user_is_refused(
    cache_dir: Path, fake_spec: FakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() == 0:
        cache_dir.mkdir()
        os.chown(cache_dir, NOBODY, NOBODY)
    else:
        monkeypatch.setenv("VMKIT_CACHE_DIR", "/")
    with pytest.raises(HostError, match=r"the cache folder .* belongs to another user \(uid \d+\)") as caught:
        build_image(fake_spec())
    assert "VMKIT_CACHE_DIR" in caught.value.hint


def test_cache_that_is_a_file_is_refused(cache_dir: Path, fake_spec: FakeSpec) -> None:
    cache_dir.write_text("")
    with pytest.raises(BuildError, match="cache"):
        build_image(fake_spec())


@pytest.fixture
def nobody_dir(archive: Any) -> Path:
    """A folder that belongs to nobody, beside the archive, removed with it."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    folder: Path = archive.root.parent / f"nobody-{os.urandom(4).hex()}"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    return folder


def _run_as_nobody(
    folder: Path, spec: ImageSpec, environ: dict[str, str], cache: Path
) -> subprocess.CompletedProcess[str]:
    recipe = folder / "my.toml"
    recipe.write_bytes(spec.origin.read_bytes())
    recipe.chmod(0o644)
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", sys.executable, "-c"]
    script = f"STOP_AT = ''\nRECIPE = {str(recipe)!r}\n{CHILD}"
    environ = environ | {"VMKIT_CACHE_DIR": str(cache), "HOME": str(folder), "TMPDIR": str(folder)}
    environ["VMKIT_STATE_DIR"] = str(folder / "state")
    return subprocess.run([*words, script], env=environ, capture_output=True, text=True, check=False, cwd="/")


def test_build_needs_no_root(
    nobody_dir: Path, cache_dir: Path, fake_spec: FakeSpec, child_environ: dict[str, str]
) -> None:
    spec = fake_spec('packages = ["tool"]\n')
    done = _run_as_nobody(nobody_dir, spec, child_environ, nobody_dir / "cache")
    if "Permission denied" in done.stderr and "python" in done.stderr:
        pytest.skip("this checkout is not readable for others")
    built = build_image(spec)
    assert done.stderr == ""
    assert f"RESULT False {built.digest}" in done.stdout
    made = nobody_dir / "cache/images" / built.digest
    assert (made / "initrd").read_bytes() == built.initrd.read_bytes()
    assert stat.S_IMODE((nobody_dir / "cache").stat().st_mode) == 0o700


def test_unusable_cache_folder_is_told(nobody_dir: Path, fake_spec: FakeSpec, child_environ: dict[str, str]) -> None:
    done = _run_as_nobody(nobody_dir, fake_spec(), child_environ, Path("/root-only-nowhere/cache"))
    assert done.stderr.startswith("vmkit: cannot use the cache folder: ")
    done = _run_as_nobody(nobody_dir, fake_spec(), child_environ, Path("/proc/nowhere/cache"))
    assert done.stderr.startswith("vmkit: cannot use the cache folder: ")
    locked = nobody_dir / "cache"
    locked.mkdir(mode=0o500)
    os.chown(locked, NOBODY, NOBODY)
    done = _run_as_nobody(nobody_dir, fake_spec(), child_environ, locked)
    assert done.stderr.startswith("vmkit: cannot use the cache folder: ")
