"""What pid 1 does before vshd serves: hooks, the loader of the wall's programs, and what the host is told of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.descriptors import nothing_left_open
from vshd.carry import vsock
from vshd.pid1 import duties
from vshd.pid1.duties import Duties, DutyError, describe_wall, lock_modules, raise_kernel_layer, run_hook, take_duties


def write_script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def wanting(*layers: str, require: bool = False) -> Duties:
    wanted = Duties()
    wanted.layers = list(layers)
    wanted.require_kernel = require
    return wanted


WriteLoader = Callable[[str], None]


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteLoader:
    """loader(script) puts a script where the loader is; the programs it has loaded are asked, if any."""

    def put(text: str) -> None:
        monkeypatch.setattr(duties, "LOADER", write_script(tmp_path / "loader", text))
        monkeypatch.setattr(vsock, "is_loopback_refused", lambda: True)

    return put


def test_duties_are_taken_and_the_rest_is_vshds() -> None:
    words = ["--default_user=root", "--init_hook=/h", "--init_wall=transport,kernel", "--init_lock_modules", "--init_x"]
    found, rest = take_duties([*words, "--init_require_kernel", "--init_log=/l"])
    assert found.log == "/l"
    assert (found.hook, found.layers, found.lock_modules, found.require_kernel) == (
        "/h",
        ["transport", "kernel"],
        True,
        True,
    )
    assert rest == ["--default_user=root", "--init_x"]
    assert take_duties(["--init_service=/a", "--init_service=/b"])[0].services == ["/a", "/b"]
    none, rest = take_duties([])
    assert (none.hook, none.layers, none.lock_modules, none.require_kernel, rest) == ("", [], False, False, [])


def test_hook_has_no_stdin_and_its_end_is_waited_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_hook(write_script(tmp_path / "hook", f"#!/bin/sh\ncat; readlink /proc/self/fd/0 >{out}\n"))
    assert out.read_text() == "/dev/null\n"


def test_hook_without_an_interpreter_is_shs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_hook(write_script(tmp_path / "hook", f"echo ran >{out}\n"))
    assert out.read_text() == "ran\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("#!/bin/sh\nexit 3\n", "hook ended with status 3"),
        ("#!/bin/sh\nkill -9 $$\n", "hook ended with status -9"),
        ("#!/nowhere\n", "hook cannot be run: No such file or directory"),
    ],
)
def test_hook_that_fails_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DutyError, match=said):
        run_hook(write_script(tmp_path / "hook", text))


def test_layer_that_is_not_wanted_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duties, "LOADER", "/nowhere")
    assert raise_kernel_layer(wanting("transport", "daemon")) == "off"


def test_layer_is_on_when_the_loader_is_content(loader: WriteLoader) -> None:
    loader("#!/bin/sh\nexit 0\n")
    assert raise_kernel_layer(wanting("kernel", require=True)) == "on"


@pytest.mark.parametrize(
    ("script", "state"),
    [
        ("printf 'the kernel has no BTF\\002'; exit 1", "missing: the kernel has no BTF (No such file or directory)"),
        ("printf '\\377\\376\\001'; exit 1", "missing: \ufffd\ufffd (Operation not permitted)"),
        ("printf x; exit 1", "missing: {loader} ended with 1"),
        ("kill -11 $$", "missing: {loader} ended with -11"),
        ("yes | head -c 100000; exit 1", "missing: y"),
    ],
)
def test_loaders_complaint_is_the_reason(loader: WriteLoader, script: str, state: str) -> None:
    loader(f"#!/bin/sh\n{script}\n")
    assert raise_kernel_layer(wanting("kernel")).startswith(state.format(loader=duties.LOADER))


def test_image_without_the_program_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duties, "LOADER", "/nowhere/raise-wall")
    assert raise_kernel_layer(wanting("kernel")).startswith("missing: the image was built without its program")
    with pytest.raises(DutyError, match="the image demands the wall's kernel layer, which is missing: the image was"):
        raise_kernel_layer(wanting("kernel", require=True))


def test_programs_that_are_not_asked_are_missing(loader: WriteLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    loader("#!/bin/sh\nexit 0\n")
    monkeypatch.setattr(vsock, "is_loopback_refused", lambda: False)
    assert "not asked: 'bpf' is not in the kernel's list" in raise_kernel_layer(wanting("kernel"))


def test_guest_without_vsock_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VSH_AF_VSOCK=deny stands for it: vshd's own refusal to open one."""
    monkeypatch.setenv("VSH_AF_VSOCK", "deny")
    monkeypatch.setattr(duties, "LOADER", write_script(tmp_path / "loader", "#!/bin/sh\n"))
    assert raise_kernel_layer(wanting("kernel")).startswith("missing: AF_VSOCK is denied")


def test_modules_are_locked_by_a_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "modules_disabled"
    path.write_text("0")
    monkeypatch.setattr(duties, "MODULES_DISABLED", str(path))
    lock_modules()
    assert path.read_text() == "1"
    monkeypatch.setattr(duties, "MODULES_DISABLED", str(tmp_path / "nowhere"))
    with pytest.raises(DutyError, match="cannot lock the kernel's modules: No such file"):
        lock_modules()


@pytest.mark.parametrize(
    ("layers", "cids", "is_loaded", "states"),
    [
        (("transport", "daemon"), {2}, False, ("on", "on")),
        ((), {2}, False, ("off", "off")),
        (("transport",), {2}, True, ("missing: vsock_loopback is loaded", "off")),
        (("transport", "daemon"), {2, 9, 4}, False, ("on", "missing: vshd also serves CID 4, 9")),
        (("daemon",), None, True, ("off", "missing: vshd also serves CID any")),
    ],
)
def test_each_layer_is_told_as_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layers: tuple[str, ...],
    cids: set[int] | None,
    is_loaded: bool,
    states: tuple[str, str],
) -> None:
    monkeypatch.setattr(duties, "LOOPBACK", str(tmp_path if is_loaded else tmp_path / "nowhere"))
    allowed = None if cids is None else frozenset(cids)
    lines = describe_wall(wanting(*layers), "missing: a reason", allowed).decode().splitlines()
    assert lines == [f"WALL_TRANSPORT={states[0]}", f"WALL_DAEMON={states[1]}", "WALL_KERNEL=missing: a reason"]


def test_nothing_is_left_open(loader: WriteLoader) -> None:
    loader("#!/bin/sh\nprintf 'no\\001'; exit 1\n")
    with nothing_left_open():
        raise_kernel_layer(wanting("kernel"))
