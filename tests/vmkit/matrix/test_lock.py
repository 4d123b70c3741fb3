"""The lock of a matrix: what a node must have, and how it is told what is another there."""

import json
import os
from pathlib import Path

import pytest

from vmkit.errors import ConfigError, HostError
from vmkit.matrix.lock import MatrixLock, check_lock, describe_lock, find_matrix_lock, write_lock
from vmkit.matrix.plan import Matrix, read_matrix

IMAGES = {"tiny/amd64": "a" * 64}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "bzImage").write_bytes(b"kernel")
    (tmp_path / "lab.toml").write_text('kernels = ["", "./bzImage"]\n[commands]\na = "true"\n')
    return tmp_path / "lab.toml"


def lock(file: Path) -> Matrix:
    matrix = read_matrix(file)
    write_lock(find_matrix_lock(file), describe_lock(matrix, [0, 1], IMAGES))
    return matrix


def test_same_images_and_kernels_pass_and_without_a_lock_all_do(file: Path) -> None:
    matrix = read_matrix(file)
    check_lock(file, describe_lock(matrix, [0, 1], {"tiny/amd64": "other"}))
    lock(file)
    assert json.loads((file.with_name("lab.lock")).read_text())["images"] == IMAGES
    check_lock(file, describe_lock(matrix, [0, 1], IMAGES))
    # A job looks at its own cells alone.
    file.with_name("bzImage").unlink()
    check_lock(file, describe_lock(matrix, [0], IMAGES))


def test_another_image_kernel_or_matrix_is_refused(file: Path) -> None:
    matrix = lock(file)
    with pytest.raises(ConfigError, match=r"the image tiny/amd64 is another than .*lab.lock has") as failure:
        check_lock(file, describe_lock(matrix, [0], {"tiny/amd64": "b" * 64}))
    assert failure.value.details == f"locked: {'a' * 64}\nhere:   {'b' * 64}"
    assert "vmkit image import" in failure.value.hint
    file.with_name("bzImage").write_bytes(b"another")
    with pytest.raises(ConfigError, match=r"the kernel bzImage is another than .*lab.lock has"):
        check_lock(file, describe_lock(matrix, [1], IMAGES))
    file.with_name("bzImage").unlink()
    with pytest.raises(ConfigError, match=r"cannot read the kernel .*bzImage"):
        describe_lock(matrix, [1], IMAGES)
    file.write_text(file.read_text().replace("true", "false"))
    with pytest.raises(ConfigError, match=r"lab.toml was changed after .*lab.lock was written"):
        check_lock(file, describe_lock(read_matrix(file), [0], IMAGES))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1, "matrix": "x", "images": [], "kernels": {}}', "\xff"])
def test_damaged_lock_is_named(file: Path, text: str) -> None:
    found = describe_lock(read_matrix(file), [0], IMAGES)
    file.with_name("lab.lock").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"the lock .*lab.lock is damaged") as failure:
        check_lock(file, found)
    assert failure.value.hint == f"lock what is here: vmkit matrix lock {file}"


def test_lock_that_cannot_be_written_is_an_error(file: Path) -> None:
    found = describe_lock(read_matrix(file), [0], IMAGES)
    with pytest.raises(HostError, match=r"cannot write to .*nowhere: No such file"):
        write_lock(file.parent / "nowhere" / "lab.lock", found)


@pytest.mark.parametrize("content", ["version = 1\n[[package]]\n", 'images = ["tiny"]\n'])
def test_file_of_another_kind_is_not_replaced(tmp_path: Path, content: str) -> None:
    """Such as uv's lock, or a matrix that has the name of a lock."""
    path = tmp_path / "lab.lock"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"lab\.lock is no lock of a matrix, and vmkit does not replace it"):
        write_lock(path, MatrixLock("0" * 64, {}, {}))
    assert path.read_text() == content
    path.write_bytes(b"")
    write_lock(path, MatrixLock("0" * 64, {}, {}))
    write_lock(path, MatrixLock("1" * 64, {}, {}))


@pytest.mark.parametrize("name", ["bzImage", "lab.lock"])
def test_fifo_in_the_place_of_a_file_is_an_error_and_stays(file: Path, name: str) -> None:
    """Its open would wait for a writer for ever."""
    found = describe_lock(read_matrix(file), [0, 1], IMAGES)
    path = file.with_name(name)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=f"cannot .*{name}: it is no regular file"):
        describe_lock(read_matrix(file), [0, 1], IMAGES)
        check_lock(file, found)
    with pytest.raises(ConfigError, match=f"cannot .*{name}: it is no regular file"):
        describe_lock(read_matrix(file), [0, 1], IMAGES)
        write_lock(find_matrix_lock(file), found)
    assert path.is_fifo()


def test_lock_that_cannot_be_read_is_not_replaced(file: Path) -> None:
    """A link in a ring stands for whatever cannot be opened: root reads every file."""
    found = describe_lock(read_matrix(file), [0], IMAGES)
    path = find_matrix_lock(file)
    path.symlink_to(path.name)
    with pytest.raises(ConfigError, match=r"cannot replace .*lab\.lock: Too many levels of symbolic links"):
        write_lock(path, found)
    assert path.is_symlink()
