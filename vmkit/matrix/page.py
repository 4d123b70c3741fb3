"""A merged result as one HTML page with plots, which needs no other file and no network. Pure.

The plots are SVG of our own: a drawing library is a dependency of the benchmarks alone.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from vmkit.matrix.merge import GOOD, VERDICTS, Merged, MergedCell
from vmkit.matrix.summary import COLUMNS, list_notes, make_row, render_change, render_counts

# A browser shows some thousand rows at once; table.txt has all.
MAX_ROWS = 1000
# Of images and kernels in a plot or a grid.
MAX_GROUPS = 40
BINS = 24
WIDTH, HEIGHT, ROW = 720, 180, 22
LABEL_WIDTH = 240
# Dark enough for white, and told apart by their lightness, too.
COLORS = {
    "passed": "#2e7d4f",
    "failed": "#b3261e",
    "timed out": "#c2571a",
    "machine failed": "#7a4fa3",
    "killed": "#55506b",
    "missing": "#8a8a8a",
    "skipped": "#5b7f95",
}
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .7rem; border-bottom: 1px solid #8884; vertical-align: top; }
td.grid { text-align: center; color: #fff; border: 2px solid Canvas; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: CanvasText; }
.wide { overflow-x: auto; } .mark { color: #fff; border-radius: .3rem; padding: .05rem .45rem; white-space: nowrap; }
"""


def render_page(merged: Merged) -> str:
    """Returns the page. All texts in it are escaped: names and errors may come from a guest."""
    title = f"Matrix: {render_counts(merged.counts)}"
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>",
        _render_share(merged.counts),
        "<h2>Cells that passed, by image and kernel</h2>",
        _render_grid(merged.cells),
        "<h2>Seconds of a cell</h2>",
        _render_histogram([cell.seconds for cell in merged.cells if cell.found is not None]),
        "<h2>Mean and longest seconds, by image and kernel</h2>",
        _render_times(merged.cells),
        *_render_changes(merged),
        *_render_bad(merged.bad),
        *_render_notes(merged),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _render_share(counts: Mapping[str, int]) -> str:
    total, x, bars = sum(counts.values()) or 1, 0.0, []
    for verdict, count in counts.items():
        width = WIDTH * count / total
        title = f"<title>{count} {verdict}</title>"
        bars.append(f'<rect x="{x:.2f}" width="{width:.2f}" height="28" fill="{COLORS[verdict]}">{title}</rect>')
        x += width
    legend = " ".join(_mark(verdict, f"{count} {verdict}") for verdict, count in counts.items())
    return f"{_open_svg(28, 'how many cells have each result')}{''.join(bars)}</svg>\n<p>{legend}</p>"


def _render_grid(cells: Sequence[MergedCell]) -> str:
    found: dict[tuple[str, str], Counter[str]] = {}
    for cell in cells:
        found.setdefault(cell.group, Counter())[cell.verdict] += 1
    images, kernels = (list(dict.fromkeys(group[index] for group in found)) for index in (0, 1))
    head = "".join(f"<th>{escape(kernel)}</th>" for kernel in kernels[:MAX_GROUPS])
    rows = [
        f"<tr><th>{escape(image)}</th>"
        + "".join(_render_square(found.get((image, kernel), Counter())) for kernel in kernels[:MAX_GROUPS])
        + "</tr>"
        for image in images[:MAX_GROUPS]
    ]
    more = _render_more(max(len(images), len(kernels)), MAX_GROUPS)
    return f'<div class="wide"><table><tr><th></th>{head}</tr>\n' + "\n".join(rows) + f"\n</table></div>{more}"


def _render_square(counts: Counter[str]) -> str:
    if not counts:
        return "<td></td>"
    worst = next((verdict for verdict in VERDICTS if counts[verdict] and verdict not in GOOD), "passed")
    title = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    good = sum(counts[verdict] for verdict in GOOD)
    return f'<td class="grid" style="background:{COLORS[worst]}" title="{title}">{good} of {counts.total()}</td>'


def _render_histogram(seconds: Sequence[float]) -> str:
    if not seconds:
        return "<p>No cell ran.</p>"
    longest = max(seconds) or 1.0
    counts = Counter(min(BINS - 1, int(one / longest * BINS)) for one in seconds)
    most, step = max(counts.values()), WIDTH / BINS
    bars = []
    for index, count in sorted(counts.items()):
        high = (HEIGHT - 30) * count / most
        title = f"<title>{count} from {longest * index / BINS:.1f} to {longest * (index + 1) / BINS:.1f} s</title>"
        place = f'x="{index * step + 1:.1f}" y="{HEIGHT - 20 - high:.1f}" width="{step - 2:.1f}" height="{high:.1f}"'
        bars.append(f'<rect {place} fill="{COLORS["skipped"]}">{title}</rect>')
    axis = (
        f'<text x="0" y="{HEIGHT - 4}">0 s</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{longest:.1f} s</text>'
        f'<text x="0" y="12">{most} cells</text>'
    )
    return f"{_open_svg(HEIGHT, 'how many cells took how long')}{''.join(bars)}{axis}</svg>"


def _render_times(cells: Sequence[MergedCell]) -> str:
    groups: dict[str, list[float]] = {}
    for cell in cells:
        if cell.found is not None:
            groups.setdefault(" / ".join(cell.group), []).append(cell.seconds)
    if not groups:
        return "<p>No cell ran.</p>"
    longest = max(map(max, groups.values())) or 1.0
    slowest = sorted(groups.items(), key=lambda item: -max(item[1]))[:MAX_GROUPS]
    room = WIDTH - LABEL_WIDTH - 100
    rows = []
    for index, (name, seconds) in enumerate(slowest):
        y, mean, most = index * ROW, sum(seconds) / len(seconds), max(seconds)
        rows.append(
            f'<text x="0" y="{y + 15}">{escape(name[:36])}<title>{escape(name)}</title></text>'
            f'<rect x="{LABEL_WIDTH}" y="{y + 4}" width="{room * most / longest:.1f}" height="14" fill="#8886"/>'
            f'<rect x="{LABEL_WIDTH}" y="{y + 4}" width="{room * mean / longest:.1f}" height="14"'
            f' fill="{COLORS["skipped"]}"/>'
            f'<text x="{WIDTH}" y="{y + 15}" text-anchor="end">{mean:.1f} / {most:.1f} s</text>'
        )
    more = _render_more(len(groups), MAX_GROUPS)
    return f"{_open_svg(ROW * len(slowest), 'mean and longest times')}{''.join(rows)}</svg>{more}"


def _render_changes(merged: Merged) -> Iterator[str]:
    if merged.changes is None:
        return
    yield "<h2>Changes since the run before</h2>"
    yield "<ul>" if merged.changes else "<p>None.</p>"
    for change in merged.changes[:MAX_ROWS]:
        mark = _mark("failed", "worse") + " " if change.is_worse else ""
        yield f"<li>{mark}{escape(render_change(change))}</li>"
    if merged.changes:
        yield f"</ul>{_render_more(len(merged.changes), MAX_ROWS)}"


def _render_bad(cells: Sequence[MergedCell]) -> Iterator[str]:
    if not cells:
        return
    head = "".join(f"<th>{name.lower()}</th>" for name in COLUMNS)
    yield f'<h2>Cells that did not pass</h2>\n<div class="wide"><table><tr>{head}</tr>'
    for cell in cells[:MAX_ROWS]:
        name, verdict, *rest = make_row(cell)
        columns = "".join(f"<td>{escape(text)}</td>" for text in rest)
        yield f"<tr><td>{escape(name)}</td><td>{_mark(verdict, verdict)}</td>{columns}</tr>"
    yield f"</table></div>{_render_more(len(cells), MAX_ROWS)}"


def _render_notes(merged: Merged) -> Iterator[str]:
    notes = list(list_notes(merged))
    if notes:
        yield "<h2>Notes</h2>\n<ul>"
        yield from (f"<li>{escape(note)}</li>" for note in notes[:MAX_ROWS])
        yield f"</ul>{_render_more(len(notes), MAX_ROWS)}"


def _render_more(count: int, limit: int) -> str:
    return f"<p>And {count - limit} more.</p>" if count > limit else ""


def _mark(verdict: str, text: str) -> str:
    return f'<span class="mark" style="background:{COLORS[verdict]}">{escape(text)}</span>'


def _open_svg(height: int, label: str) -> str:
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">'
