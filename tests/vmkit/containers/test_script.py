"""The guest's half of containers, in a real shell: crun and mount are scripts, the places are in a folder."""

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from vmkit.containers.containers import Container, parse_line
from vmkit.containers.plan import USER_MARK, plan_container
from vmkit.containers.script import EXPLAINED, render_script
from vmkit.roots.settings import ContainerSettings

# It starts nothing: whether a container runs is what the kernel's file says.
CRUN = """#!/bin/sh
events=$PLACE/cgroup/box/cgroup.events
case "$*" in
*run*) [ ! -e "$PLACE/broken" ] || { echo "no such program" > trouble; exit 1; }
    mkdir -p "${events%/*}"; echo populated 1 > "$events"; echo 77 > pid ;;
kill*TERM) [ -e "$PLACE/deaf" ] || echo populated 0 > "$events" ;;
kill*KILL) echo populated 0 > "$events" ;;
esac
"""
MOUNTED = '#!/bin/sh\n[ -e "$PLACE/mounted.${2##*/}" ]\n'
# Not a second time: the real one would lay a mount upon a mount.
MOUNT = '#!/bin/sh\nset -C\nfor place; do :; done\n: > "$PLACE/mounted.${place##*/}"\n'
UMOUNT = '#!/bin/sh\nrm "$PLACE/mounted.${1##*/}"\n'
SYNC = '#!/bin/sh\ncat "$1" >> "$PLACE/synced"\n'
ROOT = b"the root of a container" * 1000


class Store:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "lib/vmkit/containers"
        (folder / "lib").mkdir()
        (folder / "bin").mkdir()
        (folder / "controllers").touch()
        programs = {"crun": CRUN, "mountpoint": MOUNTED, "mount": MOUNT, "umount": UMOUNT, "modprobe": "#!/bin/sh\n"}
        programs["sync"] = SYNC
        for name, text in {**programs, "logger": "#!/bin/sh\ncat > /dev/null\n"}.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        places = (
            *(("/run/vmkit/containers", "lib/vmkit/containers"), ("/var/lib", "lib"), ("/run/crun", "crun")),
            *(("/sys/fs/cgroup/vmkit", "cgroup"), ("/sys/fs/cgroup/cgroup.controllers", "controllers")),
        )
        self.script = render_script(USER_MARK)
        for place, name in places:
            assert place in self.script
            self.script = self.script.replace(place, f"{folder}/{name}")

    def run(self, *words: str, data: bytes = b"", **variables: str) -> "subprocess.CompletedProcess[str]":
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        env = {"PATH": path, "PLACE": str(self.folder), "CONTAINER_MACHINE": "ship", **variables}
        argv = ["/bin/sh", "-c", self.script, "vmkit", *words]
        done = subprocess.run(argv, env=env, input=data, capture_output=True, check=False, timeout=30)
        return subprocess.CompletedProcess(argv, done.returncode, done.stdout.decode(), done.stderr.decode())

    def create(self, name: str, size: int = len(ROOT), data: bytes = ROOT) -> "subprocess.CompletedProcess[str]":
        plan = plan_container(name, ContainerSettings(), (), "x86_64")
        variables = {
            "CONTAINER_CONFIG": plan.config,
            "CONTAINER_PROCESS": plan.process,
            "CONTAINER_VARIABLES": plan.env,
            "CONTAINER_CWD": plan.cwd,
            "CONTAINER_USER": plan.user,
            "CONTAINER_ABOUT": '{"source": "./root", "command": null}',
        }
        return self.run("create", name, "key", str(size), data=data, **variables)

    def list_files(self) -> list[str]:
        return sorted(path.name for folder in (self.store, self.store / ".images") for path in folder.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def check(done: "subprocess.CompletedProcess[str]") -> str:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_container_lives_and_leaves_nothing(store: Store) -> None:
    assert check(store.run("look", "box")).split() == [os.uname().machine]
    check(store.create("box"))
    assert (store.store / ".images/key").read_bytes() == ROOT
    assert (store.folder / "synced").read_bytes() == ROOT
    assert check(store.run("look", "other")).split() == [os.uname().machine, "key"]
    # The guest has the root: the second container shares it.
    check(store.create("other", 0, b""))
    check(store.run("start", "box"))
    assert '"user": {"uid":0,"gid":0,"additionalGids":[0]}' in (store.store / "box/config.json").read_text()
    listed = [parse_line(line) for line in check(store.run("list")).splitlines()]
    assert listed == [
        Container("box", "running", 77, "./root", None),
        Container("other", "stopped", 0, "./root", None),
    ]
    check(store.run("stop", "box", "1"))
    check(store.run("stop", "box", "1"))
    check(store.run("remove", "box", ""))
    assert store.list_files() == [".images", "key", "other"]
    check(store.run("remove", "other", ""))
    assert store.list_files() == [".images"]
    assert not list(store.folder.glob("mounted.*"))


def test_first_process_that_ignores_term_is_killed(store: Store) -> None:
    check(store.create("box"))
    check(store.run("start", "box"))
    (store.folder / "deaf").touch()
    refused = store.run("remove", "box", "")
    assert (refused.returncode, refused.stderr.splitlines()[0]) == (EXPLAINED, "the container 'box' is running")
    check(store.run("remove", "box", "force"))
    assert store.list_files() == [".images"]


@pytest.mark.parametrize(("size", "data"), [(len(ROOT), ROOT[:-1]), (len(ROOT), b""), (1, ROOT)])
def test_root_that_does_not_arrive_whole_leaves_nothing(store: Store, size: int, data: bytes) -> None:
    done = store.create("box", size, data)
    assert (done.returncode, done.stderr) == (EXPLAINED, "the container's root did not arrive whole\n")
    assert store.list_files() == [".images"]


def test_name_in_use_is_refused_and_the_container_stays(store: Store) -> None:
    check(store.create("box"))
    for done in (store.run("look", "box"), store.create("box")):
        assert done.returncode == EXPLAINED
        assert done.stderr.startswith("there is a container 'box' already\n")
    assert store.list_files() == [".images", "box", "key"]


def test_what_lost_calls_left_goes_with_the_next_one(store: Store) -> None:
    check(store.create("box"))
    # No process has this number: it is beyond the kernel's largest.
    (store.store / ".new.4194305/root").mkdir(parents=True)
    (store.store / ".images/.new.4194305").touch()
    check(store.run("list"))
    assert store.list_files() == [".images", "box", "key"]


def test_container_that_does_not_start_is_told_with_cruns_words(store: Store) -> None:
    check(store.create("box"))
    (store.folder / "broken").touch()
    done = store.run("start", "box")
    assert (done.returncode, done.stderr) == (
        EXPLAINED,
        "crun could not start the container 'box': no such program\n",
    )
    assert not list(store.folder.glob("mounted.*"))


def test_start_that_fails_early_unmounts_the_root(store: Store) -> None:
    check(store.create("box"))
    (store.store / "box/user").write_text("nobody-knows\n")
    done = store.run("start", "box")
    assert (done.returncode, done.stderr) == (EXPLAINED, "the container 'box' has no user 'nobody-knows'\n")
    assert not list(store.folder.glob("mounted.*"))


def test_start_goes_on_where_a_killed_one_came_to(store: Store) -> None:
    check(store.create("box"))
    # Its root is mounted, and not the overlay. A second mount upon it would stay for ever.
    (store.folder / "mounted.lower").touch()
    check(store.run("start", "box"))
    check(store.run("remove", "box", "force"))
    assert not list(store.folder.glob("mounted.*"))


def test_start_excludes_other_calls_for_its_container(store: Store) -> None:
    check(store.create("box"))
    with (store.store / "box/config.in").open() as held:
        # As a stop does. A second start would end the container that the first one starts.
        fcntl.flock(held, fcntl.LOCK_SH)
        done = store.run("start", "box")
        assert (done.returncode, done.stderr) == (
            EXPLAINED,
            "another call starts, stops or removes the container 'box'\ntry again\n",
        )
        check(store.run("stop", "box", "1"))
    check(store.run("start", "box"))
    # What runs on holds no lock.
    check(store.run("stop", "box", "1"))


def test_root_that_vanished_is_told_in_our_words_alone(store: Store) -> None:
    done = store.create("box", 0, b"")
    assert (done.returncode, done.stderr) == (EXPLAINED, "the container's root has vanished\ntry again\n")
    assert store.list_files() == [".images"]


def test_unknown_container_and_guest_without_crun(store: Store) -> None:
    for words in (("start", "none"), ("stop", "none", "1"), ("remove", "none", "")):
        done = store.run(*words)
        assert (done.returncode, done.stderr.splitlines()[0]) == (EXPLAINED, "there is no container 'none'")
    (store.folder / "bin/crun").unlink()
    done = store.run("list", PATH=f"{store.folder}/bin")
    assert (done.returncode, done.stderr.splitlines()[0]) == (EXPLAINED, "there is no crun in this guest")
