"""A run of the race for people: a table, plots, and a page with both. Pure but for writing the files."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from vmkit.bench.measurements import AIMS, BULK_IN, BULK_OUT, EXEC, NETWORK, PLAIN, RAW
from vmkit.bench.series import BYTES_PER_SECOND, HIGHER_IS_BETTER, MIB, SECONDS, Aim, Change, Outcome, Series
from vmkit.errors import HostError

PLOT_DPI = 110
# What plots can be, with the type by which a page shows it.
FORMATS = {"svg": "image/svg+xml", "png": "image/png"}
RIVALS = ("ssh", "paramiko", "scp", "sftp", "socat")
# Ours stand out from theirs; enough contrast on white and in grey.
OURS, THEIRS, SCALE = "#1b6ca8", "#c8803c", "#8a8f98"
SCALES = (PLAIN, RAW, NETWORK)


def render_value(value: float, unit: str) -> str:
    """Returns a figure with the unit that suits its size."""
    if unit == SECONDS:
        return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
    if unit == BYTES_PER_SECOND:
        return f"{value / 1e6:.3g} MB/s"
    return f"{value:.1f} {unit}"


def name_side(series: Series) -> str:
    """Returns a side's name; for a throughput, with the size of each transfer."""
    return f"{series.side} ({series.size_bytes >> 20} MiB)" if series.size_bytes else series.side


def explain_sizes(outcome: Outcome) -> list[str]:
    """Returns sentences on the sizes of transfers: sides may carry different sizes, and each starts a session."""
    if not any(series.size_bytes for series in outcome.series):
        return []
    lines = ["In brackets: what a side carries at a time. Throughput is the size of each side by its own seconds."]
    for heat, sides in _group(outcome):
        shares = []
        for series in sides:
            start = outcome.find(EXEC, series.side)
            if start is not None and series.size_bytes and series.heat in (BULK_OUT, BULK_IN):
                share = start.median * series.median / series.size_bytes
                shares.append(f"{series.side} {share:.0%}")
        if shares:
            lines.append(f"The start of a session (exec) in a transfer of {heat}: {'; '.join(shares)}.")
    return lines


def render_table(outcome: Outcome) -> str:
    """Every heat and the aims, as Markdown."""
    lines = [
        "| heat | side | median | spread (quartiles) | n | against the best |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for heat, sides in _group(outcome):
        best = _find_best(sides)
        for series in sides:
            low, high = series.spread
            against = "" if series.unit == MIB else _render_ratio(series.median / best if best else 0.0)
            spread = f"{render_value(low, series.unit)} - {render_value(high, series.unit)}"
            median = render_value(series.median, series.unit)
            lines.append(f"| {heat} | {name_side(series)} | {median} | {spread} | {len(series.values)} | {against} |")
    lines += ["", "| aim | ratio | wanted | |", "| --- | --- | --- | --- |"]
    for aim in AIMS:
        ratio = aim.ratio(outcome)
        if ratio is not None:
            verdict = "met" if aim.is_met(ratio) else "**missed**"
            lines.append(f"| {_render_aim(aim)} | {ratio:.2f} | {_render_limit(aim)} | {verdict} |")
    lines += [f"\n{line}" for line in explain_sizes(outcome)]
    lines += [f"\nNot measured: {failure}" for failure in outcome.failures]
    return "\n".join(lines) + "\n"


def render_facts(outcome: Outcome) -> str:
    """Returns the facts about the host and programs of the run, as Markdown."""
    return "".join(f"* {name}: {value}\n" for name, value in outcome.facts.items())


def render_changes(changes: Sequence[Change]) -> str:
    """Returns the changes between two runs; those beyond noise come first."""
    if not changes:
        return "the two runs have nothing in common\n"
    lines = []
    for change in sorted(changes, key=lambda change: not change.is_beyond_noise):
        verdict = ("better" if change.is_better else "worse") if change.is_beyond_noise else "within noise"
        interval = f"{change.low:.2f} to {change.high:.2f}"
        if not change.is_repeated:
            verdict, interval = "unknown", "measured once"
        lines.append(f"{verdict:<12} {change.heat}: {change.side}: {change.ratio:.2f} times ({interval})")
    return "\n".join(lines) + "\n"


def write_report(outcome: Outcome, folder: Path, *, plots_as: str = "svg") -> list[Path]:
    """The table, a plot for each heat, and the page, in `folder`. plots_as: one of FORMATS.

    Raises HostError without matplotlib.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = _draw_plots(outcome, folder, plots_as)
    table = folder / "report.md"
    table.write_text(f"# vsh and ssh over the same vsock\n\n{render_facts(outcome)}\n{render_table(outcome)}")
    page = folder / "report.html"
    page.write_text(render_page(outcome, plots))
    return [page, table, *plots]


def render_page(outcome: Outcome, plots: Sequence[Path]) -> str:
    """Returns one HTML page that needs no other file."""
    escape = html.escape
    facts = "".join(f"<tr><th>{escape(name)}<td>{escape(value)}" for name, value in outcome.facts.items())
    rows, aims = [], []
    for heat, sides in _group(outcome):
        for index, series in enumerate(sides):
            low, high = series.spread
            head = f'<th rowspan="{len(sides)}">{escape(heat)}' if not index else ""
            spread = f"{render_value(low, series.unit)} &ndash; {render_value(high, series.unit)}"
            rows.append(
                f"<tr>{head}<td>{escape(name_side(series))}<td class=n>{render_value(series.median, series.unit)}"
                f"<td class=n>{spread}<td class=n>{len(series.values)}"
            )
    for aim in AIMS:
        ratio = aim.ratio(outcome)
        if ratio is not None:
            verdict = "met" if aim.is_met(ratio) else "missed"
            aims.append(
                f"<tr class={verdict}><td>{escape(_render_aim(aim))}<td class=n>{ratio:.2f}"
                f"<td class=n>{escape(_render_limit(aim))}<td>{verdict}"
            )
    images = "".join(
        f'<img alt="{escape(path.stem)}" src="data:{FORMATS[path.suffix[1:]]};base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path in plots
    )
    sizes = "".join(f"<p>{escape(line)}" for line in explain_sizes(outcome))
    failures = "".join(f"<p>Not measured: {escape(failure)}" for failure in outcome.failures)
    return _PAGE.format(facts=facts, rows="".join(rows), aims="".join(aims), images=images, failures=sizes + failures)


def _group(outcome: Outcome) -> list[tuple[str, list[Series]]]:
    heats = dict.fromkeys(series.heat for series in outcome.series)
    return [(heat, [series for series in outcome.series if series.heat == heat]) for heat in heats]


def _find_best(sides: Sequence[Series]) -> float:
    medians = [series.median for series in sides]
    return max(medians) if sides[0].unit in HIGHER_IS_BETTER else min(medians)


def _render_ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _render_aim(aim: Aim) -> str:
    return f"{aim.heat}: {aim.side} / {aim.against}"


def _render_limit(aim: Aim) -> str:
    return f"at {'most' if aim.is_ceiling else 'least'} {aim.limit:g}"


def _draw_plots(outcome: Outcome, folder: Path, plots_as: str) -> list[Path]:
    try:
        import matplotlib as mpl  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise HostError("plots need matplotlib", hint="pip install 'vmkit-vsh[bench]'") from error
    mpl.use("Agg")
    # The same figures make the same file.
    mpl.rcParams["svg.hashsalt"] = "vmkit"
    paths = []
    for heat, sides in _group(outcome):
        path = folder / f"{heat.replace(' ', '-')}.{plots_as}"
        _draw(heat, sides, path)
        paths.append(path)
    return paths


def _draw(heat: str, sides: Sequence[Series], path: Path) -> None:
    """Draws medians with quartile whiskers, and every value as a dot: bars, or marks on a logarithmic axis."""
    from matplotlib import pyplot  # noqa: PLC0415 - see above
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    unit = sides[0].unit
    factor, label = choose_scale(sides)
    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.5 * len(sides)))
    medians = [series.median * factor for series in sides]
    is_wide = min(medians) > 0 and max(medians) / min(medians) > 12
    for row, series in enumerate(sides):
        low, high = (value * factor for value in series.spread)
        whiskers = [[max(0.0, medians[row] - low)], [max(0.0, high - medians[row])]]
        if is_wide:
            # A bar's length means nothing on a logarithmic axis, which has no zero to begin at.
            axes.plot(medians[row], row, "D", color=choose_color(series.side), ms=9)
        else:
            axes.barh(row, medians[row], color=choose_color(series.side), height=0.62, alpha=0.85)
        axes.errorbar(medians[row], row, xerr=whiskers, color="#222222", capsize=3, linewidth=1)
        axes.plot([value * factor for value in series.values], [row] * len(series.values), ".", color="#222222", ms=3)
        right = max(high, *(value * factor for value in series.values))
        # Behind the mark, however large that is on this axis.
        text = render_value(series.median, unit)
        axes.annotate(text, (right, row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(sides)), [name_side(series) for series in sides], fontsize=9)
    axes.set_ylim(len(sides) - 0.5, -0.5)
    if is_wide:
        axes.set_xscale("log")
        # Several numbers also where the axis spans hardly a power of ten.
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlim(left=min(medians) / 2)
    # Room for the figures behind the bars.
    axes.set_xlim(right=axes.get_xlim()[1] * (2.2 if is_wide else 1.14))
    better = "higher is better" if unit in HIGHER_IS_BETTER else "lower is better"
    axes.set_xlabel(f"{label}, {better}{', logarithmic' if is_wide else ''}", fontsize=9)
    axes.set_title(f"{heat} (n = {', '.join(sorted({str(len(series.values)) for series in sides}))})", fontsize=10)
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=PLOT_DPI, metadata={"Date": None} if path.suffix == ".svg" else {})
    pyplot.close(figure)


def choose_scale(sides: Sequence[Series]) -> tuple[float, str]:
    """Returns the factor for figures on an axis, and their unit after it."""
    unit = sides[0].unit
    if unit == SECONDS:
        return (1.0, "s") if max(series.median for series in sides) >= 1 else (1e3, "ms")
    return (1e-6, "MB/s") if unit == BYTES_PER_SECOND else (1.0, unit)


def choose_color(side: str) -> str:
    """Returns the color for a side of ours, a side of others, or a reference for both."""
    if side in SCALES:
        return SCALE
    return THEIRS if "vsh" not in side and any(word in side for word in RIVALS) else OURS


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>vsh and ssh over the same vsock</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ text-align: left; padding: .15em .7em; border-bottom: 1px solid #ddd; vertical-align: top }}
th {{ font-weight: 600 }} .n {{ text-align: right; font-variant-numeric: tabular-nums }}
.missed td {{ background: #fbe9e7 }} img {{ display: block; max-width: 100%; margin: 1em 0 }}
</style>
<h1>vsh and ssh over the same vsock</h1>
<p>Every heat asks its sides in turns, after a round that does not count. Medians; the spread is from the first to the
third quartile.
<h2>Where and with what</h2><table>{facts}</table>
<h2>Aims</h2><table><tr><th>ratio of medians<th>here<th>wanted<th>{aims}</table>
<h2>Figures</h2><table><tr><th>heat<th>side<th>median<th>spread<th>n{rows}</table>{failures}
<h2>Plots</h2>
<p>Bars, or marks on a logarithmic axis, are medians, whiskers quartiles, dots single rounds. Blue is this project's,
ochre its rivals', grey what both are measured by.{images}
</html>
"""
