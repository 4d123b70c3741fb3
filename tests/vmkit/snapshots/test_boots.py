"""The counts of boots: when a snapshot is due, what is forgotten, and what a broken file is."""

from pathlib import Path

import pytest

from vmkit.snapshots.boots import (
    BOOTS,
    IDLE_S,
    MAX_ERROR_CHARACTERS,
    MAX_KEYS,
    RETRY_S,
    Boots,
    count_boot,
    note_failure,
    read_boots,
    write_boots,
)

NOW = 1_000_000_000.0


def count(times: int) -> dict[str, Boots]:
    known: dict[str, Boots] = {}
    for _ in range(times):
        known = count_boot(known, "key", "tiny", 256, NOW)
    return known


def test_snapshot_is_due_from_the_second_boot_on() -> None:
    assert [count(times)["key"].is_due(NOW) for times in (1, 2, 3)] == [False, True, True]


def test_failure_counts_for_a_day_and_not_before_its_time() -> None:
    failed = note_failure(count(2), "key", "why" * MAX_ERROR_CHARACTERS, NOW)["key"]
    assert len(failed.error) == MAX_ERROR_CHARACTERS
    # The last: the host's time was set back.
    assert [failed.is_due(NOW + late_s) for late_s in (0, RETRY_S - 1, RETRY_S, -1)] == [False, False, True, True]
    assert note_failure(count(2), "another", "why", NOW) == count(2)


def test_old_keys_are_forgotten_and_there_are_never_too_many() -> None:
    known = count_boot(count(1), "new", "tiny", 256, NOW + IDLE_S + 1)
    assert set(known) == {"new"}
    for number in range(2 * MAX_KEYS):
        known = count_boot(known, str(number), "tiny", 256, NOW + IDLE_S + 2 + number)
    assert set(known) == {str(number) for number in range(MAX_KEYS, 2 * MAX_KEYS)}


def test_file_has_what_was_written_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    known = note_failure(count(2), "key", "why", NOW)
    write_boots(tmp_path, known)
    assert read_boots(tmp_path) == known
    assert [(path.name, path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == [(BOOTS, 0o600)]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"schema": 1}', '{"schema": 2, "keys": {}}', '{"schema": 1, "keys": {"a": 1}}', "[" * 100_000],
)
def test_broken_file_is_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / BOOTS).write_text(text)
    assert read_boots(tmp_path) == {}
