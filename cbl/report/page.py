"""One HTML page that holds all tables, coloured as the paper's Figs 8 to 10, every cell with its runs behind it.

The page needs nothing but itself: no network, no other file. It is made from tables, figures that are there already
and rows of runs.csv, and says nothing else than they do; the same input gives the same bytes.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from cbl.config import Recipe
from cbl.report.formats import MARKS, common_n, is_lowest, lowest, paper_text, signed, text
from cbl.report.readme import findings, not_run, what_was_run
from cbl.report.tables import TITLES, Cell, Panel, Table, kinds, plural, setting_label
from cbl.report.verdict import interval_name

LARGEST_FIGURE = 400_000  # bytes of an SVG that is taken in


def page(built: Mapping[str, Table], runs: pd.DataFrame, figures: Path | None = None) -> str:
    """The page as text; `figures` is a folder whose *.svg are taken in when they are small, if it is there."""
    links = "".join(f'<a href="#{_anchor(table)}">{escape(table.short)}</a>' for table in built.values())
    drawn = _figures(figures)
    if drawn:
        links += '<a href="#figures">Figures</a>'
    sections = "\n".join(_section(table) for table in built.values())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Class-balanced loss: the paper's tables and ours</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>Class-balanced loss: the paper’s tables and ours</h1>
<p>“Class-Balanced Loss Based on Effective Number of Samples” (Cui, Jia, Lin, Song, Belongie; CVPR 2019), reproduced in
PyTorch. Every number of ours comes from recorded runs; point at a cell, tap it, or walk there with Tab and the arrow
keys to see them.</p>
<nav>{links}</nav>
{_head(built, runs)}
{sections}
{drawn}
</main>
<div id="tip" role="tooltip" hidden></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


# -- the head ----------------------------------------------------------------------------------------------------------


def _head(built: Mapping[str, Table], runs: pd.DataFrame) -> str:
    parts = [f"<h2>What was run</h2>\n<p>{escape(' '.join(what_was_run(runs)))}</p>"]
    if said := findings(built, runs):
        parts.append(f"<h2>What agrees, and what does not</h2>\n{_list(said)}")
    parts.append(f"<h2>What was not run</h2>\n<p>{escape(' '.join(not_run(built)))}</p>")
    recipe = Recipe()
    protocol = {
        "Data": "the long-tailed training sets of the paper's Table 1; which images are kept follows from the subset "
        "seed; the test set is whole and balanced; digits: scikit-learn’s, with 50 test images a class; folder: as "
        "they lie there",
        "Network": "ResNet-32 as in the official code: mean-pool shortcuts, Glorot-uniform weights, last bias "
        "−log(C−1) for sigmoid and focal; digits: ResNet-8",
        "Recipe": f"SGD, momentum {recipe.momentum:g}, weight decay {recipe.weight_decay:g}, batch "
        f"{recipe.batch_size}, {recipe.epochs} epochs, learning rate {recipe.learning_rate:g} after "
        f"{recipe.warmup_epochs:g} epochs of warm-up, ×0.01 at epochs "
        f"{' and '.join(f'{epoch:g}' for epoch in recipe.milestones)} (×0.1 at imbalance factor 1), images in a new "
        "random order every epoch, which is not the official code’s; digits: shorter, as their table says",
        "Headline": "test error after the last step; the lowest of all evaluations is chosen on the test set and "
        "shown apart",
        "Verdict": "the difference of means against two standard errors √(0.7² + s²/n): 0.7 points are the run-to-run "
        "deviation that the authors’ own re-run implies, s that of ours (0.7 when n < 3)",
        "Gain": "of class balancing over the same loss without it, on pairs of runs with the same seed and subset, "
        "with a 95 % bootstrap interval (of up to three pairs it is their whole range)",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(words)}</dd>" for name, words in protocol.items())
    key = (  # how to read the tables, once for all of them
        '<p class="key"><span><span class="scale"></span> low to high error, per column</span> '
        '<span><span class="swatch"><b><u>12.3</u></b></span> lowest of its column</span> '
        '<span><span class="swatch gap">–</span> not run</span> '
        f"<span><b>{MARKS['agrees']}</b> agrees with the paper</span> "
        f'<span><span class="swatch better"><i>{MARKS["better"]}</i></span> better</span> '
        f'<span><span class="swatch worse"><i>{MARKS["worse"]}</i></span> worse</span> '
        '<span><span class="swatch helps">+1.2</span> an interval without zero: lower error</span> '
        '<span><span class="swatch harms">−1.2</span> higher</span></p>'
    )
    head = "\n".join(parts)
    return f'<div class="head"><div>{head}</div>\n<div><h2>Protocol</h2>\n<dl>{rows}</dl>\n{key}</div></div>'


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


# -- tables ------------------------------------------------------------------------------------------------------------


def _anchor(table: Table) -> str:
    return f"table-{table.name}"


def _section(table: Table) -> str:
    parts = [f'<section id="{_anchor(table)}">\n<h2>{escape(table.title)}</h2>']
    parts.append(f"<p><code>{escape(table.command)}</code></p>\n<p>{escape(table.caption)}</p>")
    parts.append(f"<details><summary>How to read it</summary><p>{escape(table.legend)}</p></details>")
    for panel in table.panels:
        if "best" in kinds(panel.cells()):
            parts.append(f"<details><summary>{escape(panel.title)}</summary>\n{_panel(panel)}</details>")
        else:
            parts.append(f"<h3>{escape(panel.title)}</h3>\n{_panel(panel)}")
    if table.notes:
        parts.append(_list(table.notes))
    return "\n".join([*parts, "</section>"])


def _panel(panel: Panel) -> str:
    sides = 2 if panel.with_paper else 1
    n = common_n(panel)  # if there is one, it is said once
    corner = f'<th rowspan="{sides}">{f"n = {n}" if n else ""}</th>'
    head = "".join(f'<th scope="col" colspan="{sides}">{escape(column)}</th>' for column in panel.columns)
    lines = [f"<tr>{corner}{head}</tr>"]
    if panel.with_paper:
        pair = '<th scope="col">paper</th><th scope="col">ours</th>'
        lines.append(f'<tr class="sides">{pair * len(panel.columns)}</tr>')
    scales = [_scale(column) for column in zip(*(cells for _, cells in panel.rows), strict=True)]
    minima = {"paper": lowest(panel, "paper"), "ours": lowest(panel, "ours")}
    groups = [re.split(" β|,", label)[0] for label, _ in panel.rows]  # rows of one loss, or one data set
    grouped = any(before == after for before, after in itertools.pairwise(groups))
    body = []
    for place, (label, cells) in enumerate(panel.rows):
        row = []
        for i, cell in enumerate(cells):
            if cell is None:
                row.append(f'<td colspan="{sides}"></td>')
                continue
            if panel.with_paper:
                low = is_lowest(cell, "paper", minima["paper"][i])
                words = escape(paper_text(cell))
                row.append(_td("paper", f"<b><u>{words}</u></b>" if low else words, _heat(cell.paper, cell, scales[i])))
            words = _ours(cell, is_lowest(cell, "ours", minima["ours"][i]), n is None)
            row.append(_td(_look(cell), words, _heat(cell.mean, cell, scales[i]), _tip(cell, label, panel.columns[i])))
        first = ' class="first"' if grouped and place and groups[place] != groups[place - 1] else ""
        # a Greek letter and its value stay on one line
        words = escape(label).replace(" γ ", "&nbsp;γ&nbsp;").replace("β ", "β&nbsp;")
        body.append(f'<tr{first}><th scope="row">{words}</th>{"".join(row)}</tr>')
    table = f"<table>\n<thead>{''.join(lines)}</thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table>"
    return f'<div class="box">{table}</div>'


def _td(look: str, words: str, heat: str, tip: str = "") -> str:
    title = f' title="{escape(tip)}"' if tip else ""
    return f'<td class="{look}"{heat}{title}>{words}</td>'


def _scale(column: Sequence[Cell | None]) -> tuple[float, float]:
    """Lowest and highest error of a column, the paper's and ours together: equal errors get equal colours."""
    cells = [cell for cell in column if cell is not None and cell.kind in ("error", "best")]
    numbers = [number for cell in cells for number in (cell.paper, cell.mean) if number is not None]
    return (min(numbers), max(numbers)) if numbers else (0.0, 0.0)


def _heat(value: float | None, cell: Cell, scale: tuple[float, float]) -> str:
    if value is None or cell.kind not in ("error", "best") or scale[0] == scale[1]:
        return ""
    return f' style="--h:{100 * (value - scale[0]) / (scale[1] - scale[0]):.0f}%"'


def _look(cell: Cell) -> str:
    if cell.mean is None:
        return "ours gap"
    if cell.kind in ("gain", "difference") and cell.interval:
        low, high = cell.interval if cell.kind == "gain" else (-cell.interval[1], -cell.interval[0])
        return "ours helps" if low > 0 else "ours harms" if high < 0 else "ours"
    return f"ours {cell.verdict}" if cell.verdict in ("better", "worse", "differs") else "ours"


def _ours(cell: Cell, low: bool, with_n: bool) -> str:
    if cell.mean is None:
        return "–"
    mean = f"<b><u>{text(cell.mean, cell.kind)}</u></b>" if low else text(cell.mean, cell.kind)
    n = f" ({len(cell.values)})" if with_n and cell.kind != "count" else ""
    if cell.interval:
        low_end, high_end = map(signed, cell.interval)
        return f'{mean}<small>{n}</small><small class="range">{low_end} to {high_end}</small>'
    spread = f" ±{cell.sd:.2f}" if cell.sd is not None and cell.kind != "count" else ""
    mark = f" <i>{MARKS[cell.verdict]}</i>" if MARKS[cell.verdict] else ""
    return f"{mean}<small>{spread}{n}</small>{mark}"


def _tip(cell: Cell, label: str, column: str) -> str:
    """All there is to say of a cell, a fact a line."""
    setting = cell.setting
    lines = [f"{label}, {column}"]
    if setting.loss:
        name = TITLES.get(setting.dataset, setting.dataset)
        factor = "" if setting.imbalance_factor is None else f" at imbalance factor {setting.imbalance_factor:g}"
        lines.append(f"{setting_label(setting)} on {name}{factor}")
    if setting.departures:
        lines.append(setting.departures)
    unit = {"gain": " points", "difference": " points", "count": ""}.get(cell.kind, " %")
    if cell.paper is not None:
        lines.append(f"paper: {text(cell.paper, cell.kind)}{unit}")
    if cell.mean is None:
        return "\n".join([*lines, "ours: not run (n = 0)"])
    mean = text(cell.mean, cell.kind)
    if cell.kind == "count":
        return "\n".join([*lines, f"ours: {mean}", cell.verdict])
    n = plural(len(cell.values), "pair" if cell.kind in ("gain", "difference") else "run")
    spread = "" if cell.sd is None else f" ± {cell.sd:.2f}"
    lines.append(f"ours: {mean}{spread}{unit} ({n})")
    if cell.interval:
        name = interval_name(len(cell.values))
        lines.append(f"{name}: {signed(cell.interval[0])} to {signed(cell.interval[1])}")
    if cell.difference is not None:
        judged = "" if cell.verdict == "–" else f", {cell.verdict}"
        lines.append(f"difference: {signed(cell.difference)} points{judged}")
    values = (f"{seed}: {text(value, cell.kind)}" for seed, value in zip(cell.seeds, cell.values, strict=True))
    lines.append(f"by seed: {'; '.join(values)}")
    if cell.kind == "error" and cell.best:
        lines.append(f"lowest of all evaluations: {sum(cell.best) / len(cell.best):.2f} % (chosen on the test set)")
    lines.append(f"on {', '.join(cell.devices) or 'an unknown device'}; code {', '.join(cell.commits) or 'unknown'}")
    return "\n".join(lines)


# -- figures -----------------------------------------------------------------------------------------------------------


def _place(path: Path) -> tuple[int, str]:
    """The paper's figures first, by their numbers."""
    number = re.match(r"fig(\d+)", path.stem)
    return int(number[1]) if number else 1000, path.stem


def _figures(folder: Path | None) -> str:
    paths = sorted(folder.glob("*.svg"), key=_place) if folder is not None and folder.is_dir() else []
    paths = [path for path in paths if path.stat().st_size <= LARGEST_FIGURE]
    if not paths:
        return ""
    shown = []
    for path in paths:
        name = escape(re.sub(r"^fig(?=\d)", "Figure ", path.stem).replace("_", " ").capitalize())
        # as an image, not as elements: ids of one figure then cannot meet those of another
        image = f'<img alt="{name}" src="{_address(path.read_text(encoding="utf-8"))}">'
        shown.append(f"<figure>{image}<figcaption>{name}</figcaption></figure>")
    return '<section id="figures">\n<h2>Figures</h2>\n' + "\n".join(shown) + "\n</section>"


def _address(svg: str) -> str:
    """The drawing as an address that holds it. As escaped text: base64 would make it a third longer."""
    svg = re.sub(r"> <", "><", re.sub(r"\s+", " ", re.sub(r"<!--.*?-->", "", svg)))
    if "'" not in svg:
        svg = svg.replace('"', "'")  # or each would take three characters
    return "data:image/svg+xml," + quote(svg, safe=" <>/:;=,.()!?'*@+-_")


# -- style and script --------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #5a6472; --line: #d5dae1; --code: #f1f3f6;
  --low: #f7fbff; --high: #6baed6; --cell: #10161d; --better: #00633f; --worse: #8a2c00;
  --helps: #d9f0e6; --harms: #fbe3d3; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161b; --ink: #e4e8ed; --soft: #9aa5b2; --line: #333b45; --code: #1e252d;
    --low: #c9dcec; --high: #5a93bf; --cell: #0b1219; --better: #004d34; --worse: #8a2c00;
    --helps: #173d31; --harms: #4a2a18; --link: #7fb8f0; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 1rem 1rem 4rem; overflow-wrap: break-word; }
main > p, section > p, section > ul { max-width: 48rem; }
@media (min-width: 64rem) { .head { display: grid; grid-template-columns: 1fr 1fr; gap: 3rem; } }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; }
section { border-top: 1px solid var(--line); margin-top: 2.5rem; }
section > h2 { margin-top: 1.25rem; }
section > p, section > ul, details, .head ul { font-size: .9rem; }
section > p, section > ul, details { color: var(--soft); }
details > p { max-width: 48rem; margin: 0 0 .5rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1rem; }
nav a { padding: .2rem 0; }
ul { padding-left: 1.2rem; }
li { margin: .25rem 0; }
code { background: var(--code); color: var(--ink); padding: .15em .4em; border-radius: 4px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; font-size: .9rem; }
dt { font-weight: 600; }
dd { margin: 0; color: var(--soft); }
summary { cursor: pointer; padding: .4rem 0; }
.box { overflow-x: auto; max-width: 100%; width: fit-content; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: separate; border-spacing: 0; font-size: .85rem; font-variant-numeric: tabular-nums;
  color: var(--ink); }
th, td { padding: .28rem .5rem; text-align: right; white-space: nowrap; }
thead th { text-align: center; font-weight: 600; padding-bottom: .1rem; }
.sides th { font-weight: 400; color: var(--soft); font-size: .75rem; text-align: right; padding-top: 0; }
tbody th { text-align: left; font-weight: 500; }
thead tr:first-child th:first-child, tbody th { position: sticky; left: 0; z-index: 1; background: var(--page);
  border-right: 1px solid var(--line); }
tbody tr:first-child > *, .first > * { border-top: 1px solid var(--line); }
td[style] { background: color-mix(in oklab, var(--high) var(--h), var(--low)); color: var(--cell); }
td.ours { border-right: 3px solid var(--page); cursor: default; }
td.paper { border-right: 1px solid var(--page); }
td small { font-size: .75rem; }
.range { display: block; line-height: 1.2; padding-bottom: .1rem; }
td i { font-style: normal; display: inline-block; width: .8em; text-align: center; }
td:focus-visible { outline: 2px solid var(--link); outline-offset: -2px; }
.gap { color: var(--soft); text-align: center;
  background: repeating-linear-gradient(135deg, transparent 0 5px, var(--line) 5px 6px); }
.better { box-shadow: inset 3px 0 var(--better); }
.worse, .differs { box-shadow: inset 3px 0 var(--worse); }
.better i { color: var(--better); font-weight: 700; }
.worse i, .differs i { color: var(--worse); font-weight: 700; }
.helps { background: var(--helps); }
.harms { background: var(--harms); }
.key { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; font-size: .85rem; color: var(--soft); margin-top: 1.5rem; }
.scale { display: inline-block; width: 5rem; height: .9rem; vertical-align: -.1rem; border-radius: 3px;
  background: linear-gradient(90deg, var(--low), var(--high)); }
.swatch { display: inline-block; min-width: 2rem; padding: 0 .4rem; text-align: center; border-radius: 3px;
  background-color: var(--low); color: var(--cell); }
.swatch i { font-style: normal; }
.swatch.gap { background-color: transparent; color: var(--soft); }
.swatch.helps { background-color: var(--helps); color: var(--ink); }
.swatch.harms { background-color: var(--harms); color: var(--ink); }
figure { margin: 1.5rem 0; }
img { max-width: 100%; background: #fff; padding: .5rem; border-radius: 6px; }
figcaption { font-size: .85rem; color: var(--soft); }
#tip { position: fixed; z-index: 9; max-width: min(24rem, calc(100vw - 1rem)); padding: .5rem .75rem;
  border-radius: 6px; background: var(--ink); color: var(--page); font-size: .8rem; line-height: 1.45;
  white-space: pre-line; pointer-events: none; box-shadow: 0 2px 10px #0006; }
#tip::first-line { font-weight: 700; }
@media (max-width: 40rem) {
  body { font-size: 15px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .4rem; }
  tbody th { white-space: normal; min-width: 5.2rem; max-width: 7rem; }
  th, td { padding: .28rem .4rem; }
}
"""

# Titles become tooltips that also answer to touch and keyboard; without scripts they stay plain titles.
SCRIPT = """
const tip = document.getElementById('tip');
const cells = document.querySelectorAll('td[title]');
for (const cell of cells) { cell.dataset.tip = cell.title; cell.removeAttribute('title'); cell.tabIndex = -1; }
for (const table of document.querySelectorAll('table')) {
  const first = table.querySelector('td[data-tip]');
  if (first) first.tabIndex = 0;  // one stop of Tab a table, arrows inside
}
const owner = target => {
  const cell = target.closest?.('td');
  return cell && (cell.dataset.tip ? cell : cell.nextElementSibling?.dataset?.tip ? cell.nextElementSibling : null);
};
let shown = null;
function show(cell) {
  hide();
  shown = cell;
  tip.textContent = cell.dataset.tip;
  tip.hidden = false;
  cell.setAttribute('aria-describedby', 'tip');
  const at = cell.getBoundingClientRect();
  const x = Math.min(Math.max(4, at.left), innerWidth - tip.offsetWidth - 4);
  const below = at.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = x + 'px';
  tip.style.top = Math.max(4, below ? at.bottom + 6 : at.top - tip.offsetHeight - 6) + 'px';
}
function hide() {
  shown?.removeAttribute('aria-describedby');
  shown = null;
  tip.hidden = true;
}
document.addEventListener('pointerover', event => {
  if (event.pointerType !== 'mouse') return;
  const cell = owner(event.target);
  cell ? show(cell) : hide();
});
document.addEventListener('click', event => {
  const cell = owner(event.target);
  cell ? (cell.focus({ preventScroll: true }), show(cell)) : hide();
});
document.addEventListener('focusin', event => { const cell = owner(event.target); if (cell) show(cell); });
document.addEventListener('focusout', hide);
document.addEventListener('scroll', hide, true);
document.addEventListener('keydown', event => {
  if (event.key === 'Escape') return hide();
  const cell = document.activeElement.closest('td[data-tip]');
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!cell || !step) return;
  const rows = [...cell.closest('tbody').rows].map(row => [...row.querySelectorAll('td[data-tip]')]);
  const y = rows.findIndex(row => row.includes(cell));
  const next = rows[y + step[0]]?.[rows[y].indexOf(cell) + step[1]];
  if (!next) return;
  event.preventDefault();
  cell.tabIndex = -1;
  next.tabIndex = 0;
  next.scrollIntoView({ block: 'nearest', inline: 'nearest' });
  next.focus({ preventScroll: true });
});
"""
