"""What `scripts/benchmark.py` found, as tables and as a picture; reads its report and measures nothing.

A report is what lies in results/bench/*.json: `environment`, `command`, `left_out` and `rows`, each row a measurement
with its `section`, `name`, `dtype` and figures.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from cbl.report import figures
from cbl.report.figures import BLUE, GREEN, ORANGE, PAGE, RED
from cbl.report.tables import plural

BARE, LOADER, EAGER, CAPTURED, LOOP = "bare loop", "DataLoader loop", "step, eager", "step, captured", "training loop"
NCHW, NO_ONEDNN, OUR_COMPILED = "step, NCHW", "step, no oneDNN", "step, torch.compile"
SEARCHED = "step, cuDNN search"
ABOUT = {
    BARE: "forward, loss, backward and torch's SGD on one fixed batch of floats",
    LOADER: "DataLoader, PIL augmentation image by image, NCHW, the loss read at every step, as the ports do",
    EAGER: "ours, called operation by operation: gather, crop and flip of resident uint8 images included",
    CAPTURED: "ours, replayed as one CUDA graph",
    LOOP: "what a run does, but for evaluation and checkpoints: captured on a GPU, eager on the CPU",
    NCHW: "ours with torch's default memory layout in place of channels_last",
    SEARCHED: "ours, captured, with the convolutions that cuDNN finds fastest by trying",
    NO_ONEDNN: "ours with torch's own convolutions on the CPU",
    OUR_COMPILED: "ours with a compiled network, captured on a GPU",
}
KEPT, GIVEN_BACK = "freed memory kept", "freed memory given back"
OURS, REFERENCE, COMPILED = "our step", "torchvision's recipe", ", torch.compile"
ABOUT_LARGE = {
    OURS: "micro-batches of uint8 images on the device, scaled there, the class-balanced focal loss, gradients summed "
    "over the batch, fused SGD; on a CPU one micro-batch",
    REFERENCE: "torchvision's ResNet-50 and the step of its training reference in channels_last, bf16 by autocast on a "
    "GPU: softmax, torch's SGD with Nesterov momentum, a fixed batch of floats, loss and accuracy not read",
}
FUSED_NOT = f"the rows {NCHW}; {SEARCHED}; {OUR_COMPILED}, runs stacked in one network, and the large sets"
OVERHEAD = 5.0  # percent that our loop may cost over the bare one on the CPU
TARGETS = {"one run": ("One run", 120_000), "side by side": ("Many runs together", 300_000)}  # images/s on an H200
TARGETED = {LOOP, "streams, whole runs with evaluation"}
LARGE_RATE = 2800  # images/s of ResNet-50 on an H200
LARGE_RATIO = 0.95  # of the images/s of torchvision's recipe
LARGE_LOSS = 2.0  # percent of our step that the loss may take
LOADER_RATIO = 1.5  # times torchvision's images/s of one core
UNMEASURED = (
    "GPU figures: none in this report. `python scripts/benchmark.py --gpu-report results/bench` on a machine "
    "with a GPU runs the parity tests and measures all of them."
)
DTYPES = {"fp32": BLUE, "tf32": ORANGE, "bf16": GREEN}
Row = dict[str, Any]


class Table(NamedTuple):
    title: str
    columns: list[str]
    rows: list[list[str]]  # the first column is text, the others are figures


def select(report: dict[str, Any], section: str, **values: Any) -> list[Row]:
    """The report's rows of a section that hold `values`."""
    return [
        row
        for row in report["rows"]
        if row["section"] == section and all(row.get(name) == value for name, value in values.items())
    ]


def our_step(report: dict[str, Any], dtype: str) -> Row | None:
    """The fastest form of our step as runs use it."""
    found = select(report, "one run", name=CAPTURED, dtype=dtype) or select(report, "one run", name=EAGER, dtype=dtype)
    return found[0] if found else None


def number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def speed(rate: float) -> str:
    """Images/s, with decimals where they are few."""
    return number(rate, 0 if rate >= 100 else 2)


def tables(report: dict[str, Any]) -> list[Table]:
    """All that was measured, one table per question; empty ones are left out."""
    makers = (one_run, floor, many, growth, classes, others, large, large_loss, loader)
    return [table for make in makers if (table := make(report)).rows]


def one_run(report: dict[str, Any]) -> Table:
    columns = ["one run", "dtype", "images/s", "lowest", "highest", "turns", "ms a step", "x bare loop", "GPU MiB"]
    rows = []
    for row in sorted(
        select(report, "one run"), key=lambda row: (list(DTYPES).index(row["dtype"]), list(ABOUT).index(row["name"]))
    ):
        bare = select(report, "one run", name=BARE, dtype=row["dtype"])
        rate, turns = row["images_per_second"], row["turns"]
        rows.append([row["name"], row["dtype"], number(rate), number(min(turns)), number(max(turns)), str(len(turns))])
        rows[-1] += [number(row["milliseconds"], 2), ratio(rate, bare), number(row["mebibytes"])]
    sizes = {f"ResNet-{row['depth']}, batch {row['batch_size']}" for row in select(report, "one run")}
    return Table(f"One run at a time, {', '.join(sorted(sizes))}", columns, rows)


def ratio(rate: float, found: list[Row]) -> str:
    """Images/s over those of the first row found."""
    return number(rate / found[0]["images_per_second"], 2) if found else ""


def floor(report: dict[str, Any]) -> Table:
    """Three bounds: bytes and products with and without fusion, and on a GPU the launches."""
    columns = ["floor of a step", "GFLOP", "GB", "at TFLOP/s", "at GB/s", "floor, ms", "our step, ms", "x floor"]
    rows = []
    for row in select(report, "floor"):
        rates = [number(row["flops_per_second"] / 1e12, 2), number(row["bytes_per_second"] / 1e9, 1)]
        bounds: list[tuple[str, list[str], float]] = []
        for name, words in (("fused", "elementwise operations fused"), ("alone", "each operation on its own")):
            counted = [number(row["gigaflop"], 1), number(row[f"gigabytes_{name}"], 2)]
            bounds.append((words, [*counted, *rates], row[f"milliseconds_{name}"]))
        if launch := row.get("launch_microseconds"):
            words = f"{row['operations']} kernels, {launch:.2f} µs apart"
            bounds.append((words, [""] * 4, row["operations"] * launch / 1000))
        step = our_step(report, row["dtype"])
        for words, counted, least in bounds:
            rows.append([f"{row['dtype']}, {words}", *counted, number(least, 2)])
            rows[-1] += [number(step["milliseconds"], 2), number(step["milliseconds"] / least, 1)] if step else ["", ""]
    return Table(
        "Against the roofline: products and bytes counted from the step, at rates measured here", columns, rows
    )


def many(report: dict[str, Any]) -> Table:
    columns = ["side by side", "dtype", "runs", "images/s together", "each", "x one run", "MiB together"]
    rows = []
    for row in select(report, "side by side"):
        alike = [one for one in select(report, "side by side", dtype=row["dtype"]) if one["runs"] == 1]
        one = [one for one in alike if one["name"] == row["name"]] or alike  # one run is stacked on nothing
        rate = row["images_per_second"]
        rows.append([row["name"], row["dtype"], str(row["runs"]), number(rate), number(rate / row["runs"])])
        rows[-1] += [ratio(rate, one), number(row["mebibytes"])]
    return Table("Many runs at once", columns, rows)


def growth(report: dict[str, Any]) -> Table:
    rows = []
    for row in [*select(report, "depth"), *select(report, "batch size")]:
        rows.append([row["section"], row["dtype"], str(row["depth"]), str(row["batch_size"])])
        rows[-1] += [number(row["images_per_second"]), number(row["milliseconds"], 2)]
    return Table("As work grows", ["against", "dtype", "depth", "batch", "images/s", "ms a step"], rows)


def classes(report: dict[str, Any]) -> Table:
    rows = []
    for alone in select(report, "loss alone"):
        whole = select(report, "classes", name=alone["name"], classes=alone["classes"])
        rows.append(
            [alone["name"], f"{alone['classes']:,}", number(alone["milliseconds"], 3)]
            + ([number(whole[0]["milliseconds"], 2), number(share(alone, whole[0]), 1)] if whole else ["", ""])
        )
    columns = ["loss", "classes", "forward and backward, ms", "whole step, ms", "share, %"]
    return Table("Cost of the loss as classes grow", columns, rows)


def share(alone: Row, whole: Row) -> float:
    """Percent of a step that the loss takes."""
    return 100 * alone["milliseconds"] / whole["milliseconds"]


def others(report: dict[str, Any]) -> Table:
    rows = [
        [f"evaluation, batch {row['batch_size']}", row["dtype"], f"{number(row['images_per_second'])} images/s"]
        for row in select(report, "evaluation")
    ]
    rows += [[row["name"], row["dtype"], f"{row['seconds']:.2f} s"] for row in select(report, "first step")]
    return Table("Also", ["what", "dtype", "reached"], rows)


def large(report: dict[str, Any]) -> Table:
    columns = ["large sets", "dtype", "at a time", "images/s", "lowest", "highest", "turns", "x recipe", "MiB an image"]
    rows = []
    for row in select(report, "resnet50"):
        rate, turns = row["images_per_second"], row["turns"]
        rows.append([row["name"], row["dtype"], str(row["at_once"]), speed(rate), speed(min(turns)), speed(max(turns))])
        rows[-1] += [str(len(turns))]
        ratios = select(report, "resnet50 ratio", name=row["name"])
        rows[-1] += [number(statistics.median(ratios[0]["ratio"]), 3) if ratios else ""]
        rows[-1] += [number(row["mebibytes_per_image"], 1)]
    sizes = {large_size(row) for row in select(report, "resnet50")}
    return Table(f"A training step of the large sets: {'; '.join(sorted(sizes))}", columns, rows)


def large_size(row: Row) -> str:
    return f"ResNet-{row['depth']}, {row['image_size']} pixels, {row['classes']:,} classes"


def large_loss(report: dict[str, Any]) -> Table:
    rows = []
    for row in select(report, "resnet50 loss"):
        rows.append([row["name"], f"{row['classes']:,}", str(row["batch_size"]), number(row["milliseconds"], 3)])
        rows[-1] += [number(row["percent"], 2)]
    columns = ["loss", "classes", "images", "forward and backward, ms", "share of our fastest step, %"]
    return Table("Cost of the loss on the large sets", columns, rows)


def loader(report: dict[str, Any]) -> Table:
    rows = []
    for row in select(report, "loader"):
        rows.append([f"{row['images']} photographs of 500 x 375, {row['turns']} turns", str(row["image_size"])])
        rows[-1] += [speed(row["ours"]), speed(row["torchvision"]), number(row["ratio"], 2)]
    columns = ["images/s of one core", "to pixels", "our loader", "torchvision's pipeline", "ratio"]
    return Table("Preparing training images for the large sets", columns, rows)


def large_verdicts(report: dict[str, Any]) -> list[str]:
    """The targets of the large sets; images/s is one of a GPU's, the others are ratios and hold everywhere."""
    said = []
    for row in select(report, "resnet50 ratio"):
        (ours,) = select(report, "resnet50", name=row["name"])
        what = f"{large_size(ours)}, {ours['dtype']}, made-up images"
        median, turns = statistics.median(row["ratio"]), row["ratio"]
        reached = met(median >= LARGE_RATIO) + undecided(turns, LARGE_RATIO)
        spread = f"{min(turns):.3f} to {max(turns):.3f}, turns: {len(turns)}"
        said.append(
            f"{what}: {row['name']}, {ours['at_once']} images at a time, reaches {median:.3f} ({spread}) of the "
            f"images/s of {row['against']}. Target at least {LARGE_RATIO:g}: {reached}."
        )
        if report["environment"]["kind"] == "cuda":
            rate = ours["images_per_second"]
            target = f"Target on an H200 at least {LARGE_RATE:,}: {met(rate >= LARGE_RATE)}."
            said[-1] += f" It is {number(rate)} images/s. {target}"
    if found := select(report, "resnet50 loss"):
        worst = max(found, key=lambda row: row["percent"])
        said.append(
            f"The loss over {worst['classes']:,} classes takes at most {worst['percent']:.2f} % of our fastest step "
            f"({worst['name']}). Target under {LARGE_LOSS:g} %: {met(worst['percent'] < LARGE_LOSS)}."
        )
    for row in select(report, "loader"):
        said.append(
            f"Loader: {row['ratio']:.2f} times the images/s of one core of torchvision's reference pipeline on the "
            f"same files. Target at least {LOADER_RATIO:g}: {met(row['ratio'] >= LOADER_RATIO)}."
        )
    return said


def sentences(report: dict[str, Any], measured_on_gpu: bool) -> list[str]:
    """What the tables do not say: on what it ran, the verdicts on the targets, what was left out."""
    about = report["environment"]
    said = [f"{about['device']}, {report['date']}, {'in full' if report['full'] else 'in small'}."]
    said[0] += f" torch {about['torch']}, {plural(about['threads'], 'CPU thread')}, commit {about['commit']}."
    if smi := about.get("nvidia_smi"):
        said[0] += f" Power limit {smi['power.limit']}, driver {smi['driver_version']}."
    elif about["kind"] == "cuda":
        said[0] += " Power limit not known: nvidia-smi did not answer."
    said.append(
        f"Load of the machine before: {about['load_average']:.1f}. Medians over turns; the first turn of each, which "
        "warms up, is not among them, unless the time allowed no other."
    )
    for row in select(report, "overhead") if about["kind"] == "cpu" else []:
        percent, target = statistics.median(row["percent"]), ""
        if row["name"] == LOOP:
            reached = met(percent < OVERHEAD) + undecided(row["percent"], OVERHEAD)
            target = f" Target under {OVERHEAD:g} %: {reached}."
        spread = f"{min(row['percent']):+.1f} to {max(row['percent']):+.1f} in {len(row['percent'])} turns"
        said.append(f"{row['name']} against {BARE}, {row['dtype']}: {percent:+.1f} % ({spread}).{target}")
    said += tried_on_cpu(report) if about["kind"] == "cpu" else []
    for section, (label, least) in TARGETS.items() if about["kind"] == "cuda" else ():
        if found := [row for row in select(report, section) if row["name"] in TARGETED]:
            best = max(found, key=lambda row: row["images_per_second"])
            rate = best["images_per_second"]
            target = f"Target on an H200 at least {least:,}: {met(rate >= least)}."
            said.append(f"{label}: {number(rate)} images/s in {best['dtype']}. {target}")
    said += large_verdicts(report)
    if report["parity_tests_passed"] is not None:
        passed = "passed" if report["parity_tests_passed"] else "FAILED"
        said.append(f"Parity tests: {passed}, see {report.get('parity_file', 'parity.txt')}.")
    if report["left_out"]:
        said.append(f"Left out: {'; '.join(report['left_out'])}.")
    return said if measured_on_gpu else [*said, UNMEASURED]


def tried_on_cpu(report: dict[str, Any]) -> list[str]:
    """What else the step could be made of on a CPU, in images/s of what it is made of; and how runs share the cores."""
    said = []
    for ours in select(report, "one run", name=EAGER)[:1]:  # in fp32
        words = {
            NCHW: "torch's default memory layout",
            NO_ONEDNN: "torch's own convolutions in place of oneDNN's",
            OUR_COMPILED: "torch.compile",
        }
        tried = [
            f"{words[row['name']]} {row['images_per_second'] / ours['images_per_second']:.2f}"
            for row in select(report, "one run", dtype=ours["dtype"])
            if row["name"] in words
        ]
        measured = {row["name"] for row in select(report, "one run", dtype=ours["dtype"])}
        left = [what for name, what in words.items() if name not in measured]
        others = [row for row in select(report, "one run", name=EAGER) if row["dtype"] != ours["dtype"]]
        tried += [f"{row['dtype']} {row['images_per_second'] / ours['images_per_second']:.2f}" for row in others]
        said.append(
            f"Tried on the CPU, as a share of the images/s of our step (channels_last, oneDNN, {ours['dtype']}): "
            f"{', '.join(tried)}."
            + (" What gives other numbers than rounding, bf16, is a choice of the user." if others else "")
            + (f" Not measured: {', '.join(left)} (`--full`)." if left else "")
        )
    gained = [
        f"{what} {ours['images_per_second'] / other['images_per_second']:.2f}"
        for section, what in (("freed memory", "steps"), ("freed memory, evaluation", "evaluations"))
        for ours in select(report, section, name=KEPT)
        for other in select(report, section, name=GIVEN_BACK)
    ]
    if gained:
        takes = [number(select(report, "freed memory", name=name)[0]["mebibytes"]) for name in (KEPT, GIVEN_BACK)]
        said.append(
            f"Keeping freed memory, which runs do, gives {' and '.join(gained)} times the images/s of giving it back "
            f"to the system, and takes {takes[0]} MiB in place of {takes[1]}."
        )
    shared = {row["runs"]: row["images_per_second"] for row in select(report, "side by side", name="processes")}
    threads = report["environment"]["threads"]
    if 1 in shared and len(shared) > 1:
        k = max(shared)
        said.append(
            f"One process of {threads} threads {number(shared[1])} images/s, {k} processes of "
            f"{max(1, threads // k)} {number(shared[k])}: a sweep takes a process a core."
        )
    return said


def met(holds: bool) -> str:
    return "met" if holds else "missed"


def undecided(turns: Sequence[float], target: float) -> str:
    """Said after a verdict that rests on the median of `turns` where these fall on both sides of the target."""
    return " by the median, with turns on both sides of it" if min(turns) < target <= max(turns) else ""


def show(report: dict[str, Any], measured_on_gpu: bool, file: IO[str] | None = None) -> None:
    """Prints all of it: ruled on a terminal, plain aligned text elsewhere."""
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, width=160)  # a file has no width of its own
    for table in tables(report):
        grid = RichTable(title=f"\n{table.title}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for place, column in enumerate(table.columns):
            grid.add_column(column, justify="right" if place else "left")
        for row in table.rows:
            grid.add_row(*row)
        console.print(grid)
    console.print()
    for sentence in sentences(report, measured_on_gpu):
        console.print(sentence, markup=False, soft_wrap=True)


def markdown(report: dict[str, Any], measured_on_gpu: bool) -> str:
    """The same as a page."""
    lines = [f"# Speed on {report['environment']['device']}", "", f"`{report['command']}`"]
    for sentence in sentences(report, measured_on_gpu):
        lines += ["", sentence]
    if report.get("fused"):  # older reports do not say
        lines += ["", f"Our steps and runs are in the Triton kernels of `engine.fused=true`, but for {FUSED_NOT}."]
    for table in tables(report):
        lines += ["", f"## {table.title}", "", f"| {' | '.join(table.columns)} |"]
        lines.append(f"| --- |{' ---: |' * (len(table.columns) - 1)}")
        lines += [f"| {' | '.join(row)} |" for row in table.rows]
    for title, section, about in (("one run", "one run", ABOUT), ("the large sets", "resnet50", ABOUT_LARGE)):
        shown = {row["name"] for row in select(report, section)}
        if said := [f"- {name}: {text}" for name, text in about.items() if name in shown]:
            lines += ["", f"What the rows of the table of {title} are:", "", *said]
    return "\n".join(lines) + "\n"


# -- the picture -------------------------------------------------------------------------------------------------------


def save(report: dict[str, Any], stem: Path) -> list[Path]:
    """Writes `stem`.svg and `stem`.png."""
    return figures.save(draw(report), stem)


@figures.styled
def draw(report: dict[str, Any]) -> Figure:
    """Bars of one run; many runs, depth, batch size, the loss's share, the large sets. What there is of them."""
    together = {row["runs"] for row in select(report, "side by side")}
    panels = [_runs] if len(together) > 1 else []
    panels += [panel for panel, section in _PANELS.items() if select(report, section)]
    bars = [*(name for name in ABOUT if select(report, "one run", name=name)), "floor"]
    dtypes = {row["dtype"] for row in select(report, "one run")}
    top = [0.6 + (0.08 + 0.11 * len(dtypes)) * len(bars)] if dtypes else []
    heights = [*top, *[2.2] * -(-len(panels) // 2)] or [0.2]  # a report cut short may have nothing to draw
    figure = Figure((PAGE, 0.4 + sum(heights)))
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    if top:
        _bars(figure.add_subplot(grid[0, :]), report, bars)
    for place, panel in enumerate(panels):
        panel(figure.add_subplot(grid[len(top) + place // 2, place % 2]), report)
    figure.suptitle(f"Training speed on {report['environment']['device']}, {report['date']}", fontsize=9)
    return figure


def _bars(ax: Axes, report: dict[str, Any], names: Sequence[str]) -> None:
    """One group a loop, one bar a dtype; the last group is what the counted bytes and products allow."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in select(report, "one run")))
    high = 0.8 / len(dtypes)
    for place, dtype in enumerate(dtypes):
        found = {row["name"]: row["images_per_second"] for row in select(report, "one run", dtype=dtype)}
        for row in select(report, "floor", dtype=dtype):
            found["floor"] = 1000 * row["batch_size"] / row["milliseconds_fused"]
        for y, name in enumerate(names):
            if name in found:
                at = y + (place - (len(dtypes) - 1) / 2) * high
                colour = "white" if name == "floor" else DTYPES[dtype]
                ax.barh(at, found[name], 0.9 * high, color=colour, edgecolor=DTYPES[dtype])
                ax.annotate(f" {number(found[name])} {dtype}", (found[name], at), va="center", fontsize=6)
    ax.set_yticks(range(len(names)), [*names[:-1], "roofline: at most"])
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    one = select(report, "one run")[0]
    ax.set(xlabel="images/s", title=f"One run at a time: ResNet-{one['depth']}, batch {one['batch_size']}")
    ax.xaxis.set_major_formatter(_thousands)


def _runs(ax: Axes, report: dict[str, Any]) -> None:
    """A colour a dtype, a line a way of sharing the device."""
    ways = list(dict.fromkeys(row["name"] for row in select(report, "side by side")))
    styles = dict(zip(ways, ("-o", "--s", ":^", "-.v"), strict=False))
    for name, dtype in dict.fromkeys((row["name"], row["dtype"]) for row in select(report, "side by side")):
        rows = select(report, "side by side", name=name, dtype=dtype)
        ax.plot([r["runs"] for r in rows], [r["images_per_second"] for r in rows], styles[name], color=DTYPES[dtype])
    dtypes = dict.fromkeys(row["dtype"] for row in select(report, "side by side"))
    legend = [Line2D([], [], color=DTYPES[dtype], lw=3, label=dtype) for dtype in dtypes]
    legend += [Line2D([], [], color="black", marker=styles[way][-1], ls=styles[way][:-1], label=way) for way in ways]
    _axes(ax, "runs at once", "images/s together", "Many runs side by side", select(report, "side by side"), "runs")
    ax.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=5.5)  # below the axis


def _depth(ax: Axes, report: dict[str, Any]) -> None:
    _growth(ax, report, "depth", "depth", "layers")


def _batch(ax: Axes, report: dict[str, Any]) -> None:
    _growth(ax, report, "batch size", "batch_size", "images in a batch")


def _growth(ax: Axes, report: dict[str, Any], section: str, field: str, label: str) -> None:
    for dtype in dict.fromkeys(row["dtype"] for row in select(report, section)):
        rows = select(report, section, dtype=dtype)
        x, y = [row[field] for row in rows], [row["images_per_second"] for row in rows]
        ax.plot(x, y, "-o", color=DTYPES[dtype], label=dtype)
    _axes(ax, label, "images/s", f"Our step against {section}", select(report, section), field)
    ax.legend()


def _share(ax: Axes, report: dict[str, Any]) -> None:
    for name, colour, style in (("softmax", BLUE, "-o"), ("sigmoid", RED, "-s")):
        pairs = [
            (alone, whole)
            for whole in select(report, "classes", name=name)
            for alone in select(report, "loss alone", name=name, classes=whole["classes"])
        ]
        shares = [share(alone, whole) for alone, whole in pairs]
        ax.plot([whole["classes"] for _, whole in pairs], shares, style, color=colour, label=name)
    _axes(ax, "classes", "% of a training step", "What the loss takes", select(report, "classes"), "classes")
    ax.legend()


def _large(ax: Axes, report: dict[str, Any]) -> None:
    rows = select(report, "resnet50")
    names = [f"{row['name'].replace(', ', chr(10))}\n{row['at_once']} at a time" for row in rows]
    _ours_and_theirs(ax, names, [row["images_per_second"] for row in rows])
    ax.set(xlabel="images/s", title=f"Large sets: ResNet-{rows[0]['depth']}, {rows[0]['dtype']}")


def _loader(ax: Axes, report: dict[str, Any]) -> None:
    (row,) = select(report, "loader")
    _ours_and_theirs(ax, ["our loader", "torchvision's\npipeline"], [row["ours"], row["torchvision"]])
    ax.set(xlabel="images/s of one core", title=f"Large sets: photographs to {row['image_size']} pixels")


def _ours_and_theirs(ax: Axes, names: list[str], rates: list[float]) -> None:
    ax.barh(names, rates, 0.7, color=[BLUE if name.startswith("our") else ORANGE for name in names])
    for place, rate in enumerate(rates):
        ax.annotate(f" {speed(rate)}", (rate, place), va="center", fontsize=6)
    ax.tick_params(axis="y", labelsize=5.5)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_formatter(_thousands)


_PANELS = {_depth: "depth", _batch: "batch size", _share: "classes", _large: "resnet50", _loader: "loader"}
_thousands = FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 10_000 else f"{value:,.10g}")


def _axes(ax: Axes, x: str, y: str, title: str, rows: list[Row], field: str) -> None:
    """Doublings are equal steps, and nothing starts above 0."""
    ticks = sorted({row[field] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(0, 1.08 * ax.dataLim.ymax)
    ax.yaxis.set_major_formatter(_thousands)
    ax.set(xlabel=x, ylabel=y, title=title)
