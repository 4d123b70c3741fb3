"""Logs with a ceiling: the newest stays, full disks and vanished folders cost log lines and nothing else."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest

from vmkit.monitor.evidence import keep_evidence
from vmkit.monitor.logs import CappedLog, EventLog


def test_log_keeps_the_newest_and_never_more_than_twice_its_ceiling(tmp_path: Path) -> None:
    log = CappedLog(tmp_path / "log", ceiling_bytes=100)
    written = b""
    for number in range(200):
        line = b"line %d\n" % number
        written += line
        log.write(line)
        assert (tmp_path / "log").stat().st_size <= 100
    log.close()
    older, newer = (tmp_path / "log.1").read_bytes(), (tmp_path / "log").read_bytes()
    assert len(older) <= 100
    assert written.endswith(older + newer)
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1"]


def test_log_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 90)
    log = CappedLog(tmp_path / "log", ceiling_bytes=100)
    log.write(b"y" * 20)
    log.close()
    assert (tmp_path / "log.1").read_bytes() == b"x" * 90
    assert (tmp_path / "log").read_bytes() == b"y" * 20


def test_piece_larger_than_the_ceiling_is_cut_to_its_end(tmp_path: Path) -> None:
    log = CappedLog(tmp_path / "log", ceiling_bytes=10)
    log.write(b"0123456789abcdef")
    log.close()
    assert (tmp_path / "log").read_bytes() == b"6789abcdef"


def test_full_disk_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    log = CappedLog(tmp_path / "log", ceiling_bytes=100)
    log.write(b"before\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(b"before\n"), limits[1]))
    try:
        for _ in range(50):
            log.write(b"lost\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write(b"after\n")
    log.close()
    assert (tmp_path / "log").read_bytes() == b"before\nafter\n"
    assert os.listdir(tmp_path) == ["log"]


def test_folder_that_is_gone_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "machine"
    folder.mkdir()
    log = CappedLog(folder / "log", ceiling_bytes=10)
    shutil.rmtree(folder)
    for _ in range(50):
        log.write(b"line\n")
    log.close()
    assert not folder.exists()


def test_ceiling_holds_where_the_older_one_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "log.1").mkdir()
    (tmp_path / "log.1" / "in the way").write_text("")
    log = CappedLog(tmp_path / "log", ceiling_bytes=100)
    for _ in range(100):
        log.write(b"x" * 30)
    log.close()
    assert 0 < (tmp_path / "log").stat().st_size <= 100


def test_closed_log_takes_no_harm(tmp_path: Path) -> None:
    log = CappedLog(tmp_path / "log", ceiling_bytes=4)
    log.close()
    log.write(b"12345678")
    log.close()
    assert (tmp_path / "log").read_bytes() == b""


def test_log_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CappedLog(tmp_path / "nowhere" / "log")


def test_events_are_json_lines_with_times(tmp_path: Path) -> None:
    events = EventLog(tmp_path / "events.jsonl")
    events.add("ready")
    events.add("panic", {"text": "a\nb \u20ac \udc80"})
    events.close()
    first, second = (json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines())
    assert first["event"] == "ready"
    assert first["t"] > 1_600_000_000
    assert 0 <= first["up"] <= second["up"] < 60
    assert second["text"] == "a\nb \u20ac \udc80"


def test_evidence_replaces_the_last_set_and_touches_nothing_else(tmp_path: Path) -> None:
    machine, evidence = tmp_path / "machine", tmp_path / "state" / "m"
    machine.mkdir()
    evidence.mkdir(parents=True)
    (evidence / "console.log.1").write_text("of another boot")
    (evidence / "diary.txt").write_text("somebody named a folder of theirs")
    for name in ("console.log", "qmp.log", "qmp.log.1", "lock", "machine.json"):
        (machine / name).write_text(f"new {name}")
    keep_evidence(machine, evidence)
    assert sorted(os.listdir(evidence)) == ["console.log", "diary.txt", "qmp.log", "qmp.log.1"]
    assert (evidence / "console.log").read_text() == "new console.log"


def test_evidence_that_cannot_be_kept_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "console.log").write_text("x")
    keep_evidence(tmp_path, tmp_path / "file" / "m")
    keep_evidence(tmp_path / "nowhere", tmp_path / "state")
    assert list((tmp_path / "state").iterdir()) == []
