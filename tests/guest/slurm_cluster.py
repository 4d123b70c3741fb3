"""A Slurm cluster of one node: munged, slurmctld and slurmd of Debian, with ports, state and a key of their own.

Its programs run in the foreground as children, and the end of the with-block ends them by their numbers.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

START_LIMIT_S = 60
END_LIMIT_S = 30
# How long a task waits that went back into the queue: as long as the credential of its last start is valid.
CREDENTIAL_S = 5

_CONFIG = """\
ClusterName=vmkit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={credential_s}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
ReturnToService=2
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mib} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True, slots=True)
class Cluster:
    """environ: for sbatch, squeue and scontrol, and for the jobs."""

    folder: Path
    environ: Mapping[str, str]

    def run(self, *argv: str) -> str:
        """Runs a program of Slurm's, and returns what it printed."""
        done = subprocess.run(argv, env=self.environ, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def start_cluster(folder: Path, *, cpus: int = 2, memory_mib: int = 4096) -> Iterator[Cluster]:
    """Starts a cluster whose state is below folder, and yields it when its node is idle."""
    for name in ("state", "spool"):
        (folder / name).mkdir(mode=0o700)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(64))
    key.chmod(0o400)
    config = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    config.write_text(
        _CONFIG.format(
            host=host,
            folder=folder,
            control_port=find_free_port(),
            node_port=find_free_port(),
            credential_s=CREDENTIAL_S,
            cpus=cpus,
            memory_mib=memory_mib,
        )
    )
    environ = {**os.environ, "SLURM_CONF": str(config)}
    munged = [
        "--foreground",
        "--force",
        f"--key-file={key}",
        f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munged.seed",
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_run_daemon("munged", munged, folder, environ))
        _wait_until((folder / "munge.socket").exists, folder)
        stack.enter_context(_run_daemon("slurmctld", ["-D", "-i"], folder, environ))
        stack.enter_context(_run_daemon("slurmd", ["-D", "-N", host], folder, environ))
        cluster = Cluster(folder, environ)
        _wait_until(lambda: _read_node_state(cluster) == "idle", folder)
        try:
            yield cluster
        finally:
            subprocess.run(["scancel", "--full", "--user=root"], env=environ, timeout=60, check=False)
            with contextlib.suppress(AssertionError):
                _wait_until(lambda: not cluster.run("squeue", "--noheader").strip(), folder)


def _read_node_state(cluster: Cluster) -> str:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"],
        env=cluster.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout.strip()


@contextlib.contextmanager
def _run_daemon(name: str, args: list[str], folder: Path, environ: Mapping[str, str]) -> Iterator[None]:
    program = shutil.which(name, path="/usr/sbin:/sbin:/usr/bin")
    assert program is not None, f"{name} is missing: make slow-packages"
    with (
        (folder / f"{name}.out").open("wb") as log,
        subprocess.Popen([program, *args], env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until(has_happened: Callable[[], bool], folder: Path) -> None:
    """Looks again and again, for the programs give no sign of it. Shows their output after START_LIMIT_S."""
    deadline_s = time.monotonic() + START_LIMIT_S
    while not has_happened():
        assert time.monotonic() < deadline_s, "\n".join(
            f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in sorted(folder.glob("*.out"))
        )
        time.sleep(0.1)
