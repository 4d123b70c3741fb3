"""Figures of the race as values: statistics, files, comparison, tables and pages."""

import json
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from vmkit.bench.alternation import WARM_UP_BYTES, Transfer, race, race_transfers
from vmkit.bench.measurements import AIMS, FULL, QUICK, Pace
from vmkit.bench.report import (
    OURS,
    SCALE,
    THEIRS,
    choose_color,
    choose_scale,
    explain_sizes,
    render_changes,
    render_page,
    render_table,
    render_value,
    write_report,
)
from vmkit.bench.series import (
    BYTES_PER_SECOND,
    MIB,
    SECONDS,
    Aim,
    Outcome,
    Series,
    compare,
    read_outcome,
    render_outcome,
)
from vmkit.errors import ConfigError

FACTS = {"processor": "a <fast> one", "accelerator": "tcg"}


def make_outcome(scale: float = 1.0) -> Outcome:
    return Outcome(
        FACTS,
        (
            Series("exec", "vsh", SECONDS, (0.10 * scale, 0.11 * scale, 0.12 * scale, 0.11 * scale, 0.10 * scale)),
            Series("exec", "ssh", SECONDS, (1.0, 1.1, 1.2, 1.1, 1.05)),
            Series("bulk out", "vsh", BYTES_PER_SECOND, (2e8 * scale, 2.1e8 * scale, 1.9e8 * scale)),
            Series("bulk out", "ssh", BYTES_PER_SECOND, (2e7, 2.2e7, 2.1e7), size_bytes=64 << 20),
            Series("memory", "guest: vshd", MIB, (8.9,)),
        ),
        ("many files: scp is not there",),
    )


def test_median_and_spread() -> None:
    series = Series("h", "s", SECONDS, (1.0, 2.0, 3.0, 4.0, 100.0))
    assert series.median == 3.0
    assert series.spread == (2.0, 4.0)
    assert Series("h", "s", SECONDS, (5.0, 1.0)).spread == (1.0, 5.0)


def test_outcome_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(render_outcome(make_outcome()))
    assert read_outcome(path) == make_outcome()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "facts": {}, "series": [{"heat": "x"}]}', "\xff", "[" * 9999],
)
def test_what_is_no_file_of_figures_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json"):
        read_outcome(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_outcome(tmp_path / "nowhere.json")


def test_series_without_values_is_told(tmp_path: Path) -> None:
    data = json.loads(render_outcome(make_outcome()))
    data["series"][0]["values"] = []
    path = tmp_path / "run.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="without values"):
        read_outcome(path)


def test_sides_run_in_turns_after_a_round_that_does_not_count() -> None:
    order: list[str] = []

    def take(side: str, seconds: float) -> float:
        order.append(side)
        return seconds

    found = race("h", {"a": lambda: take("a", 2.0), "b": lambda: take("b", 4.0)}, 3)
    assert order == ["a", "b"] * 4
    assert [(series.side, series.values) for series in found] == [("a", (2.0,) * 3), ("b", (4.0,) * 3)]


def test_throughput_is_each_sides_own_size_by_its_own_seconds() -> None:
    order: list[tuple[str, int]] = []

    def carry(side: str, size: int, seconds: float) -> float:
        order.append((side, size))
        return seconds

    large, small = 8 << 20, 1 << 20
    sides = {
        "fast": Transfer(lambda size: carry("fast", size, 2.0), large),
        "slow": Transfer(lambda size: carry("slow", size, 4.0), small),
    }
    fast, slow = race_transfers("h", sides, 2)
    # What does not count is short, where that is less.
    assert order == [("fast", WARM_UP_BYTES), ("slow", small), *[("fast", large), ("slow", small)] * 2]
    assert (fast.values, fast.size_bytes, fast.unit) == ((large / 2,) * 2, large, BYTES_PER_SECOND)
    assert (slow.values, slow.size_bytes) == ((small / 4,) * 2, small)


@pytest.mark.parametrize(("pace", "limit"), [(FULL, 0.11), (QUICK, 0.14)])
def test_starts_of_sessions_do_not_decide_a_transfer(pace: Pace, limit: float) -> None:
    # The bytes that each could have carried instead, as measured under emulation (Pace).
    for size, start_bytes in ((pace.bulk_bytes, 4e6), (pace.ssh_bulk_bytes, 16e6), (pace.forward_bytes, 6e6)):
        assert start_bytes / (start_bytes + size) < limit


def test_same_figures_are_no_change_and_twice_the_time_is_one() -> None:
    assert not any(change.is_beyond_noise for change in compare(make_outcome(), make_outcome()))
    changes = {(change.heat, change.side): change for change in compare(make_outcome(), make_outcome(2.0))}
    slower = changes["exec", "vsh"]
    assert slower.is_beyond_noise
    assert not slower.is_better
    assert slower.ratio == pytest.approx(2.0)
    assert changes["bulk out", "vsh"].is_better
    assert not changes["exec", "ssh"].is_beyond_noise
    text = render_changes(list(changes.values()))
    assert text.splitlines()[0].startswith("worse")
    assert "within noise exec: ssh" in text
    # One value has no noise that could be known: 8.9 MiB and 8.8 are no change that is told.
    assert not changes["memory", "guest: vshd"].is_beyond_noise
    assert "unknown      memory: guest: vshd: 1.00 times (measured once)" in text


def test_aims_are_ratios_of_medians() -> None:
    outcome = make_outcome()
    aim = Aim("exec", "vsh", "ssh", 0.2, is_ceiling=True)
    ratio = aim.ratio(outcome)
    assert ratio == pytest.approx(0.1)
    assert aim.is_met(0.1)
    assert not aim.is_met(0.3)
    assert Aim("exec", "vsh", "telnet", 1, is_ceiling=True).ratio(outcome) is None
    assert len({(aim.heat, aim.side, aim.against) for aim in AIMS}) == len(AIMS)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.00123, SECONDS, "1.23 ms"),
        (2.5, SECONDS, "2.5 s"),
        (1.7e8, BYTES_PER_SECOND, "170 MB/s"),
        (8.94, MIB, "8.9 MiB"),
    ],
)
def test_figures_have_fitting_units(value: float, unit: str, text: str) -> None:
    assert render_value(value, unit) == text


def test_axes_have_units_that_fit() -> None:
    def scale(unit: str, *medians: float) -> tuple[float, str]:
        return choose_scale([Series("h", "s", unit, (median,)) for median in medians])

    assert scale(SECONDS, 0.05, 0.7) == (1e3, "ms")
    assert scale(SECONDS, 0.6, 76.0) == (1.0, "s")
    assert scale(BYTES_PER_SECOND, 1e6) == (1e-6, "MB/s")
    assert scale(MIB, 8.0) == (1.0, "MiB")


def test_colours_tell_whose_a_side_is() -> None:
    for side in ("vsh", "vsh, Python API", "tar through vsh", "host: monitor", "guest: pid 1", "tiny: vshd"):
        assert choose_color(side) == OURS
    for side in ("ssh", "ssh -L", "tar through ssh", "guest: a session of sshd", "socat pair", "scp"):
        assert choose_color(side) == THEIRS
    for side in ("raw vsock", "virtual network", "plain Python relay"):
        assert choose_color(side) == SCALE


def test_table_has_every_side_and_aim() -> None:
    table = render_table(make_outcome())
    assert "| exec | vsh | 110 ms | 100 ms - 110 ms | 5 | 1.00 |" in table
    assert "| exec | ssh | 1.1 s |" in table
    assert "| bulk out | ssh (64 MiB) | 21 MB/s |" in table
    assert "| bulk out | vsh | 200 MB/s |" in table
    assert "| exec: vsh / ssh | 0.10 | at most 0.2 | met |" in table
    assert "| bulk out: vsh / ssh | 9.52 | at least 3 | met |" in table
    assert "Not measured: many files: scp is not there" in table


def test_report_says_what_is_carried_and_what_of_it_is_a_start() -> None:
    outcome = make_outcome()
    sizes, starts = explain_sizes(outcome)
    assert sizes.startswith("In brackets: what a side carries at a time.")
    # 1.1 s of start, and 64 MiB at 21 MB/s take 3.2 s.
    assert starts == "The start of a session (exec) in a transfer of bulk out: ssh 34%."
    page = render_page(outcome, [])
    for line in (sizes, starts):
        assert line in render_table(outcome)
        assert line in page
    assert "ssh (64 MiB)" in page
    assert explain_sizes(Outcome({}, outcome.series[:2])) == []


@pytest.mark.parametrize(("plots_as", "kind"), [("svg", "svg+xml"), ("png", "png")])
def test_page_needs_no_other_file_and_escapes_facts(tmp_path: Path, plots_as: str, kind: str) -> None:
    pytest.importorskip("matplotlib")
    paths = write_report(make_outcome(), tmp_path / "report", plots_as=plots_as)
    names = {path.name for path in paths}
    plots = {f"{name}.{plots_as}" for name in ("exec", "bulk-out", "memory")}
    assert names == {"report.html", "report.md"} | plots
    assert all(path.stat().st_size > 500 for path in paths)
    page = (tmp_path / "report/report.html").read_text()
    assert "a &lt;fast&gt; one" in page
    assert page.count(f'src="data:image/{kind};base64,') == 3
    assert page.count("src=") == 3
    assert "http" not in page
    assert render_page(make_outcome(), []) != page
    # The same figures make the same plots.
    first = {name: (tmp_path / "report" / name).read_bytes() for name in plots}
    write_report(make_outcome(), tmp_path / "again", plots_as=plots_as)
    assert first == {name: (tmp_path / "again" / name).read_bytes() for name in plots}


def test_plots_as_svg_are_drawings_that_stand_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = write_report(make_outcome(), tmp_path)
    drawings = [path for path in paths if path.suffix == ".svg"]
    assert len(drawings) == 3
    for path in drawings:
        root = Xml.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        links = [value for node in root.iter() for name, value in node.attrib.items() if name.endswith("href")]
        assert all(link.startswith("#") for link in links)
