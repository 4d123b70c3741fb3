"""Whatever comes over the engine's connection, or stands in a file, ends in an answer or in an error of ours."""

import contextlib
import io
import json
import tarfile
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from vmkit.docker.results import write_results
from vmkit.docker.stream import Demux
from vmkit.errors import ConfigError, HostError
from vmkit.image.debian.lockfile import read_lock_file
from vmkit.image.debian.packages import Lock
from vmkit.matrix.plan import Matrix, plan_matrix, read_matrix

CHECKOUT = Path(__file__).resolve().parents[3]
LOCK = json.loads((CHECKOUT / "images/tiny.lock").read_text())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
few = settings(max_examples=200, deadline=None, database=None, derandomize=True)


@few
@given(st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=50)), max_size=20), st.integers(1, 30))
def test_demux_gives_back_what_was_framed(pieces: list[tuple[int, bytes]], size: int) -> None:
    wire = b"".join(bytes((stream, 0, 0, 0)) + len(data).to_bytes(4, "big") + data for stream, data in pieces)
    demux, got = Demux(), {0: b"", 1: b"", 2: b""}
    for start in range(0, len(wire), size):
        for stream, data in demux.feed(wire[start : start + size]):
            got[stream] += data
    assert got == {number: b"".join(data for stream, data in pieces if stream == number) for number in got}


@few
@given(st.lists(st.binary(max_size=600), max_size=5))
def test_demux_takes_any_bytes_and_keeps_none(pieces: list[bytes]) -> None:
    demux = Demux()
    given_out = sum(len(data) for piece in pieces for _, data in demux.feed(piece))
    assert given_out <= sum(map(len, pieces))


@few
@given(st.integers(0, 4000), st.binary(max_size=20))
def test_damaged_results_are_an_error_or_files(position: int, damage: bytes) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in ("results/a", "results/b/c"):
            info = tarfile.TarInfo(name)
            info.size = 700
            archive.addfile(info, io.BytesIO(b"x" * 700))
    data = packed.getvalue()[:4096]
    data = data[:position] + damage + data[position + len(damage) :]
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(HostError):
        for path in write_results([data], Path(folder) / "out"):
            assert path.resolve().is_relative_to(Path(folder).resolve())


@few
@given(st.sampled_from(sorted(LOCK)), JSON)
def test_lock_with_any_value_is_refused_or_a_lock(key: str, value: object) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ConfigError):
        path = Path(folder) / "x.lock"
        path.write_text(json.dumps({**LOCK, key: value}))
        assert isinstance(read_lock_file(path), Lock)


@few
@given(
    st.dictionaries(st.sampled_from(["images", "kernels", "backends", "memory", "cpus", "timeout", "commands"]), JSON)
)
def test_matrix_with_any_value_is_refused_or_a_matrix(raw: dict[str, object]) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(plan_matrix({"commands": {"a": "true"}, **raw}, Path("/x.toml")), Matrix)


@few
@given(st.binary(max_size=200) | st.just(b"[" * 100_000) | st.just(b"a = " + b"[" * 100_000))
def test_file_of_any_bytes(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(content)
        for read, kind in ((read_lock_file, Lock), (read_matrix, Matrix)):
            with contextlib.suppress(ConfigError):
                assert isinstance(read(path), kind)
