"""Tables written out: `markdown`, `latex`, `tidy` (for CSV) and `show` (for a terminal); `write` makes the files.

HTML is the affair of `cbl.report.page`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Literal

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from cbl import disk
from cbl.report.tables import BOLD, Cell, Kind, Panel, Table, kinds, plural
from cbl.report.verdict import interval_name

Side = Literal["paper", "ours"]

GAP = "–"
MARKS = {"agrees": "≈", "better": "↓", "worse": "↑", "equal": "=", "differs": "≠", "–": ""}  # of a verdict


def signed(value: float) -> str:
    """`+0.50`, `−0.50` with a true minus."""
    return f"{value:+.2f}".replace("-", "−")


def text(value: float, kind: Kind) -> str:
    if kind == "count":
        return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"
    return signed(value) if kind in ("gain", "difference") else f"{value:.2f}"


def paper_text(cell: Cell) -> str:
    return GAP if cell.paper is None else text(cell.paper, cell.kind)


def ours_text(cell: Cell) -> str:
    """`29.40 ± 0.31 (3) ≈`, `+1.20 [+0.80, +1.60] (3)`, or the gap."""
    if cell.mean is None:
        return GAP
    if cell.kind == "count":
        return f"{text(cell.mean, cell.kind)} {MARKS[cell.verdict]}".strip()
    words = [text(cell.mean, cell.kind)]
    if cell.interval:
        words.append(f"[{signed(cell.interval[0])}, {signed(cell.interval[1])}]")
    elif cell.sd is not None:
        words.append(f"± {cell.sd:.2f}")
    return " ".join([*words, f"({len(cell.values)})", MARKS[cell.verdict]]).strip()


def common_n(panel: Panel) -> int | None:
    """The number of runs, or pairs of them, behind every cell that has any, if it is the same."""
    found = {len(cell.values) for cell in panel.cells() if cell.values and cell.kind != "count"}
    return found.pop() if len(found) == 1 else None


def lowest(panel: Panel, side: Side) -> list[float | None]:
    """Per column the lowest error, rounded as printed; None where fewer than two rows have a number."""
    found = []
    for column in zip(*(cells for _, cells in panel.rows), strict=True):
        cells = [cell for cell in column if cell is not None and cell.kind in ("error", "best")]
        numbers = [cell.paper if side == "paper" else cell.mean for cell in cells]
        numbers = [round(number, 2) for number in numbers if number is not None]
        found.append(min(numbers) if len(numbers) > 1 else None)
    return found


def is_lowest(cell: Cell, side: Side, minimum: float | None) -> bool:
    value = cell.paper if side == "paper" else cell.mean
    return minimum is not None and cell.kind in ("error", "best") and value is not None and round(value, 2) == minimum


# -- files and terminal ------------------------------------------------------------------------------------------------


def write(table: Table, folder: Path) -> list[Path]:
    """Writes `folder`/table2.md, .csv and .tex, or grid10 and the like; returns the three paths."""
    stem = f"table{table.name}" if table.name.isdigit() else table.name
    forms = {"md": markdown(table), "csv": tidy(table).to_csv(index=False), "tex": latex(table)}
    folder.mkdir(parents=True, exist_ok=True)
    for ending, words in forms.items():
        disk.write(folder / f"{stem}.{ending}", words)
    return [folder / f"{stem}.{ending}" for ending in forms]


def tidy(table: Table) -> pd.DataFrame:
    """One line per cell, for CSV and pandas: labels, settings, the paper, ours in full, and the runs behind it."""
    lines = []
    for panel in table.panels:
        if panel.apart and "best" in kinds(panel.cells()):
            continue  # it is a column of the same lines
        for label, cells in panel.rows:
            for column, cell in zip(panel.columns, cells, strict=True):
                if cell is not None:
                    lines.append(_line(table, panel, label, column, cell))
    return pd.DataFrame(lines)


def _line(table: Table, panel: Panel, label: str, column: str, cell: Cell) -> dict:
    low, high = cell.interval or (None, None)
    best = float(np.mean(cell.best)) if cell.best else None
    numbers = {
        "paper": cell.paper,
        "mean": cell.mean,
        "sd": cell.sd,
        "low": low,
        "high": high,
        "difference": cell.difference,
        "best_on_test_mean": best,
    }
    numbers = {name: None if value is None else round(value, 4) for name, value in numbers.items()}
    return {
        "table": table.name,
        "panel": panel.title,
        "row": label,
        "column": column,
        "kind": cell.kind,
        "dataset": cell.setting.dataset,
        "imbalance_factor": cell.setting.imbalance_factor,
        "loss": cell.setting.loss,
        "gamma": cell.setting.gamma,
        "beta": cell.setting.beta,
        "departures": " ".join([cell.setting.departures, *table.changed]).strip(),
        **numbers,
        "verdict": cell.verdict,
        "n": len(cell.values),
        "seeds": " ".join(cell.seeds),
        "values": " ".join(f"{value:.4f}" for value in cell.values),
        "run_ids": " ".join(cell.run_ids),
    }


def markdown(table: Table) -> str:
    lines = [f"# {table.title}", "", f"{table.caption} {table.legend}", "", f"`{table.command}`", ""]
    for panel in table.panels:
        lines += [f"## {panel.title}", "", *panel_markdown(panel), ""]
    lines += [f"- {note}" for note in table.notes]
    return "\n".join(lines).rstrip() + "\n"


def panel_markdown(panel: Panel) -> list[str]:
    """The lines of one panel; with the paper's numbers each column is two."""
    sides = _sides(panel)
    names = [f"{column} {side}" if len(sides) > 1 else column for column in panel.columns for side in sides]
    lines = [f"|  | {' | '.join(names)} |", f"|:--|{'--:|' * len(names)}"]
    for label, cells in _printed(panel):
        words = [f"**{word}**" if low else word for word, low in cells]
        lines.append(f"| {label.replace('|', chr(92) + '|')} | {' | '.join(words)} |")
    return lines


def _sides(panel: Panel) -> list[Side]:
    return ["paper", "ours"] if panel.with_paper else ["ours"]


def _printed(panel: Panel) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Rows of (text, is the lowest of its column), one per column and side."""
    sides = _sides(panel)
    minima = {side: lowest(panel, side) for side in sides}
    rows = []
    for label, cells in panel.rows:
        row = []
        for i, cell in enumerate(cells):
            for side in sides:
                if cell is None:
                    row.append(("", False))
                else:
                    words = paper_text(cell) if side == "paper" else ours_text(cell)
                    row.append((words, is_lowest(cell, side, minima[side][i])))
        rows.append((label, row))
    return rows


_MATHS = {"−": "-", "±": r"\pm", "≈": r"\approx", "↓": r"\downarrow", "↑": r"\uparrow", "β": r"\beta", "γ": r"\gamma"}
_MATHS |= {"≠": r"\neq", "×": r"\times", "√": r"\surd", "²": "^2"}
_LATEX = {symbol: f"${command}$" for symbol, command in _MATHS.items()} | {c: f"\\{c}" for c in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", '"': "''", "–": "--"}


def escape(words: str) -> str:
    """For LaTeX, in ASCII."""
    return "".join(_LATEX.get(c, c) for c in words)


def latex(table: Table) -> str:
    r"""One table environment per panel, for \input in a document with booktabs and graphicx."""
    lines = [f"% {escape(table.title)}", "% needs the packages booktabs and graphicx"]
    for panel in table.panels:
        sides = _sides(panel)
        columns = len(panel.columns) * len(sides)
        n = common_n(panel)
        compared = [kind in ("gain", "difference") for kind in kinds(panel.cells())]
        counted = "pair" if all(compared) else "run"
        more = " or pairs" if any(compared) and not all(compared) else ""
        said = f" {plural(n, counted)}{more} in each cell." if n else ""
        caption = f"{table.title}. {panel.title}.{said} {table.caption} {table.legend}"
        lines += ["", r"\begin{table}", r"\centering", rf"\caption{{{escape(caption)}}}"]
        lines.append(r"\resizebox{\ifdim\width>\linewidth \linewidth\else\width\fi}{!}{%")  # wide ones shrink
        lines += [rf"\begin{{tabular}}{{l{'r' * columns}}}", r"\toprule"]
        heads = [rf"\multicolumn{{{len(sides)}}}{{c}}{{{escape(column)}}}" for column in panel.columns]
        lines.append(f" & {' & '.join(heads)} \\\\")
        if len(sides) > 1:
            lines.append("".join(rf"\cmidrule(lr){{{2 * i + 2}-{2 * i + 3}}}" for i in range(len(panel.columns))))
            lines.append(f" & {' & '.join(sides * len(panel.columns))} \\\\")
        lines.append(r"\midrule")
        for label, cells in _printed(panel):
            lines.append(f"{escape(label)} & {' & '.join(_latex_cell(word, low, n) for word, low in cells)} \\\\")
        lines += [r"\bottomrule", r"\end{tabular}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _latex_cell(words: str, low: bool, n: int | None) -> str:
    mean, _, interval = escape(words.replace(f" ({n})", "")).partition(" [")
    if interval:
        return rf"\shortstack[r]{{{mean}\\\scriptsize [{interval}}}"
    return rf"\textbf{{{mean}}}" if low else mean


def show(table: Table, file: IO[str] | None = None) -> None:
    """Prints the headline panels: bold and ruled on a terminal, plain aligned text elsewhere."""
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, width=200)  # a file has no width of its own
    console.print(table.title, style="bold")
    for panel in table.panels:
        if panel.apart and ("best" in kinds(panel.cells()) or not any(cell.values for cell in panel.cells())):
            continue
        rows = [_row(label, cells, panel.with_paper) for label, cells in panel.rows]
        widest = max(len(line) for _, cells in rows for cell in cells for line in cell)
        head = max(len(line) for heads, _ in rows for line in heads.split("\n"))
        fitting = (console.width - 2 - head) // (max(widest, *map(len, panel.columns)) + 2)
        for first in range(0, len(panel.columns), max(1, fitting)):  # what does not fit goes below
            shown = slice(first, first + max(1, fitting))
            grid = RichTable(title=f"\n{panel.title}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
            grid.add_column("")
            for column in panel.columns[shown]:
                grid.add_column(column, justify="right", no_wrap=True)
            for label, cells in rows:
                grid.add_row(label, *("\n".join(cell) for cell in cells[shown]))
            console.print(grid)
    for note in (table.caption, table.legend.replace(f"{BOLD} ", ""), *table.notes):
        console.print(note, style="dim", width=min(console.width, 100))


def _row(label: str, cells: Sequence[Cell | None], with_paper: bool) -> tuple[str, list[list[str]]]:
    lines = [_lines(cell, with_paper) for cell in cells]
    heads = [label]
    if with_paper:
        names = {interval_name(len(cell.values)) for cell in cells if cell and cell.interval}
        apart = names.pop() if len(names) == 1 else "interval"  # of several the legend says which is which
        heads += ["  ours", f"  {apart}" if "gain" in kinds(cells) else "  difference"]
    return "\n".join(heads[: max(map(len, lines))]), lines


def _lines(cell: Cell | None, with_paper: bool) -> list[str]:
    """A cell on the terminal, one number under the other to keep columns narrow: the paper, ours, how they differ."""
    if cell is None:
        return []
    lines = [paper_text(cell)] if with_paper else []
    if cell.mean is None or cell.kind == "count":
        return [*lines, ours_text(cell)]
    mean, n = text(cell.mean, cell.kind), f"({len(cell.values)})"
    if cell.kind in ("gain", "difference"):
        lines.append(f"{mean} {n}")
        return [*lines, f"{signed(cell.interval[0])}…{signed(cell.interval[1])}"] if cell.interval else lines
    spread = "" if cell.sd is None else f"±{cell.sd:.2f}"
    if cell.difference is None:
        return [*lines, f"{mean}{spread} {n}"]
    return [*lines, f"{mean}{spread}", f"{signed(cell.difference)} {MARKS[cell.verdict]} {n}"]
