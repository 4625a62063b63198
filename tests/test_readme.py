"""The README's example runs as it stands, and its commands name things that exist."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from scipy.stats import chi2, t

from cbl import class_balanced_weights, class_counts, config, data, store
from cbl.report import paper, tables
from cbl.report.bench_plot import EAGER, OUR_COMPILED
from cbl.report.verdict import PAPER_SD, Gain, bootstrap, verdict
from hydra_plugins.cbl_launcher import to_run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DETAILS = (ROOT / "results/details.md").read_text(encoding="utf-8")


def test_the_example_runs() -> None:
    (code,) = re.findall(r"<!-- example:begin -->\n```python\n(.*?)```\n<!-- example:end -->", README, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["loss"].item() > 0 and names["model"].weight.grad.abs().sum() > 0


def test_the_folder_it_shows_is_that_of_its_first_run() -> None:
    (arguments,) = re.findall(r"^python scripts/train\.py (dataset=cifar10_lt .*)$", README, re.MULTILINE)[:1]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        run = to_run(compose("train", arguments.split()))
    assert f"outputs/runs/{config.run_id(run)}/" in README


def test_what_it_says_at_once_was_run() -> None:
    """Its results block, which another test holds, says what was not."""
    [(gaps, cells)] = re.findall(r"^- Table 2: (\d+) of (\d+) cells\.$", README, re.MULTILINE)
    words = " ".join(README.split())
    run = int(cells) - int(gaps)
    assert f"on CPUs alone: all tables on handwritten digits, {run} of the {cells} cells of Table 2" in words
    devices = set(store.load(ROOT / "results").runs["device"])
    assert devices and all(re.match(r"AMD EPYC|Intel\(R\) Xeon", device) for device in devices)


def test_what_came_out_is_what_its_results_say() -> None:
    words = " ".join(README.split())
    [(better, of, surely)] = re.findall(
        r"- Embedded table: .* in (\d+) of (\d+) settings; the range of the 3 pairs is above zero in (\d+) ", README
    )
    assert f"in {better} of {of} settings (five losses, four β); in {surely} of them the range of the three" in words
    [(run, agree)] = re.findall(r"- Table 2: (\d+) numbers compared, (\d+) within two standard errors", README)
    assert run == agree and f"All {run} numbers of [Table 2]" in words
    [band] = re.findall(r"- Table 2: .* The band is wide: (of our .* without balancing)\.", README)
    assert f"That band is wide: {band}, and on CIFAR-100" in words
    [panel] = [p for p in tables.build("2", store.load(ROOT / "results").runs).panels if p.title == "CIFAR-10"]
    rows = dict(panel.rows)
    hundred, two_hundred = panel.columns.index("IF 100"), panel.columns.index("IF 200")
    focal, softmax = rows["Focal γ 1.0"][hundred], rows["Softmax"][two_hundred]
    balanced = rows["Class-balanced"][hundred], rows["Class-balanced"][two_hundred]
    assert [cell.setting.loss for cell in balanced] == ["focal", "softmax"]
    assert [len(cell.values) for cell in (focal, softmax, *balanced)] == [1, 3, 1, 3]
    assert (
        f"focal loss ends at {focal.mean:.2f} % error, class-balanced at {balanced[0].mean:.2f} %, one run each; the "
        f"paper has {focal.paper:.2f} and {balanced[0].paper:.2f}. At imbalance factor 200, softmax: "
        f"{softmax.mean:.2f} % and class-balanced {balanced[1].mean:.2f} %, three runs each; the paper has "
        f"{softmax.paper:.2f} and {balanced[1].paper:.2f}."
    ) in words


def test_the_speeds_are_those_of_the_first_look() -> None:
    page = (ROOT / "results/bench/nvidia-h200-first-look-2026-11-26.md").read_text(encoding="utf-8")

    def images_per_second(*row: str) -> float:
        [value] = re.findall(rf"^\| {re.escape(' | '.join(row))} \| ([\d,]+) \|", page, re.MULTILINE)
        return float(value.replace(",", ""))

    one = images_per_second("step, captured", "bf16", "1")
    many = images_per_second("step, captured, a stream each", "bf16", "8")
    fused = images_per_second("fused kernels, captured", "bf16", "1")
    fused_many = images_per_second("fused kernels, a stream each", "bf16", "8")
    rounded = [f"{value / 1000:.0f},000" for value in (one, many, fused, fused_many)]
    words = " ".join(README.split())
    assert "one run reached {} images/s and 8 together {}; ".format(*rounded[:2]) in words
    assert "(off by default), {} and {}.".format(*rounded[2:]) in words
    compiled = images_per_second("our step", "yes (other processes beside it)") / images_per_second("our step", "no")
    assert f"{compiled:.1f} times as fast through `torch.compile`" in words
    on_cpu = {}
    for path in sorted((ROOT / "results/bench").glob("intel-*.json")):
        rows = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["section"] == "one run"]
        rates = {(row["name"], row["dtype"]): row["images_per_second"] for row in rows}
        for dtype in {dtype for name, dtype in rates if name == OUR_COMPILED}:
            on_cpu[dtype] = f"{rates[OUR_COMPILED, dtype] / rates[EAGER, dtype]:.2f}"
    said = "gives {fp32} times the images/s in fp32 (two threads) and {bf16} in bf16 (one thread;".format(**on_cpu)
    compiled = images_per_second("network through torch.compile, captured", "bf16", "1") / one
    assert said in words and f"first look alone, {compiled:.2f} times in bf16" in words


def test_the_digits_that_are_expected_are_those_published() -> None:
    """The head of configs/experiment/digits.yaml."""
    words = (ROOT / "configs/experiment/digits.yaml").read_text(encoding="utf-8")
    (expected,) = re.findall(r"softmax ([\d.]+) %, ([\d.]+) % at beta 0.9999", words)
    panel = tables.build("digits", store.load(ROOT / "results").runs).panels[0]
    [row] = [cells for label, cells in panel.rows if label == "Softmax"]
    assert expected == (f"{row[0].mean:.2f}", f"{row[-1].mean:.2f}")


def test_the_gains_on_cifar100_are_as_it_says() -> None:
    """Runs added there may end this: then its sentence on them is to be written anew."""
    [panel] = [p for p in tables.build("2", store.load(ROOT / "results").runs).panels if p.title == "CIFAR-100"]
    [gains] = [cells for label, cells in panel.rows if label == "Gain of balancing"]
    at = {factor: gain.values for factor, gain in zip(panel.columns, gains, strict=True) if gain and gain.values}
    assert {factor: len(values) for factor, values in at.items()} == {"IF 200": 3, "IF 100": 1, "IF 50": 1}
    assert sorted(gain > 0 for values in at.values() for gain in values) == [False, False, False, True, True]
    assert max(abs(gain) for values in at.values() for gain in values) < 0.7
    printed = [gain.paper for gain in gains if gain and gain.values]
    assert [round(gain, 1) for gain in sorted(printed)] == [0.6, 1.2, 1.2] and max(at["IF 200"]) < min(printed)


def test_what_it_says_of_the_0_7_points() -> None:
    """The authors' re-run, the paper's cells of β 0.9 against β 0; how many numbers would not agree with half of it."""
    checks = paper.cross_checks().fillna({"gamma": 0})
    theirs = checks[checks.source.str.startswith("richardaecn")]
    again = theirs[theirs.what == "authors' re-run"]
    keys = ["dataset", "imbalance_factor", "loss", "gamma", "beta"]
    printed = again.merge(paper.grids().fillna({"gamma": 0}), on=keys, suffixes=("", "_printed"))
    squares = ((printed.error - printed.error_printed) ** 2 / 2).sum()  # of two runs' difference
    assert len(printed) == 6 and round(np.sqrt(squares / 6), 1) == PAPER_SD
    low, high = np.sqrt(squares / chi2.ppf([0.975, 0.025], 6))
    assert round(low, 2) == 0.45 and round(high, 1) == 1.5
    one = theirs[(theirs.loss == "softmax") & (theirs.beta == 0)].error.tolist()
    assert len(one) == 2 and round(np.std([*one, printed.error_printed[0]], ddof=1), 2) == 1.35
    grid = paper.grids().query("dataset == 'cifar10_lt' and beta <= 0.9").fillna({"gamma": 0})
    pairs = grid.pivot(index=["imbalance_factor", "loss", "gamma"], columns="beta", values="error")
    deviation = ((pairs[0.9] - pairs[0.0]) ** 2).groupby("imbalance_factor").mean().div(2).pow(0.5)
    assert len(deviation) == 5 and deviation.min() > 0.2 and deviation.max() < 0.65
    runs = store.load(ROOT / "results").runs
    compared = {(c.setting, c.paper): c for c in tables.build("2", runs).cells() if c.values and c.paper is not None}
    assert len(compared) == 12
    half = PAPER_SD / 2
    spread = [float(np.std(c.values, ddof=1)) if len(c.values) >= 3 else half for c in compared.values()]
    assert round(max(spread), 2) == 1.24
    errors = [np.sqrt(half**2 + s**2 / len(c.values)) for s, c in zip(spread, compared.values(), strict=True)]
    assert sum(abs(c.difference) > 2 * error for c, error in zip(compared.values(), errors, strict=True)) == 3
    cifar = runs[runs.dataset.str.startswith("cifar") & (runs.status == "done")]
    assert set(cifar.subset_seed) == {0}


def test_the_moved_drop_varies_as_it_says() -> None:
    """And how much of that is a trend: a later drop is a longer training too."""
    rows = tables.build("drop", store.load(ROOT / "results").runs).panels[0].rows
    said = []
    for place in (0, 1):
        errors = np.array([cells[place].mean for _, cells in rows])
        trend = np.polyval(np.polyfit(tables.DROPS, errors, 1), tables.DROPS)
        said += [errors.std(ddof=1), np.sqrt(((errors - trend) ** 2).sum() / (len(errors) - 2))]
    words = " ".join(README.split())
    assert f"standard deviation of {said[0]:.2f} points without weights and {said[2]:.2f} with them" in words
    assert f"without this trend they are {said[1]:.2f} and {said[3]:.2f}." in words


def clear(cell: tables.Cell | Gain) -> bool:
    low, high = cell.interval
    return not low <= 0 <= high


def test_what_matters_on_the_digits_is_as_it_says() -> None:
    """Clear, either way: the prior, the image order, the drop, the division by the weights; less so when slower."""
    runs = store.load(ROOT / "results").runs
    rows = dict(tables.build("ablation_digits", runs).panels[0].rows)
    prior, order = rows["No prior in the last bias"], rows["Image order: official stream"]
    assert round(prior[2].mean, 1) == 8.6 and round(order[0].mean) == 4 and round(order[2].mean) == 3  # without weights
    for cell in (prior[2], order[0], order[2]):
        assert cell.interval[0] > 2
    for cell in (prior[3], order[1], order[3]):  # with them
        assert not clear(cell)
    for cell in rows["Learning rate drops: ×0.1"]:
        assert cell.interval[1] < 0 and -1.35 < cell.mean < -0.45
    division = rows["Loss divided by the sum of the drawn weights"]
    assert [round(division[at].mean) for at in (1, 3)] == [3, 2] and division[1].interval[0] > division[3].interval[
        0
    ] > 0
    alone = [cells for label, cells in rows.items() if "%" not in label and "together" not in label]
    changes = [cell for cells in alone for cell in cells if cell]
    assert len(changes) == 38 and {len(cell.values) for cell in changes} == {40}
    as_it_is, warm_up, small_rate, longer = (
        [cell.mean for cell in cells] for _, cells in tables.build("conditions", runs).panels[0].rows
    )
    left = [[slow / fast for slow, fast in zip(row, as_it_is, strict=True)] for row in (warm_up, small_rate)]
    assert round(as_it_is[0], 1) == 7.0 and 0.45 < left[0][0] < 0.5 and 0.3 < left[0][1] < 0.36
    assert all(0.35 < share < 0.5 for share in left[1][:2])  # of the prior's cost
    assert all(1.5 < cell < 2 for cell in longer[:2]) and round(longer[2]) == 1 and round(longer[3]) == 0
    for cell in tables.build("conditions", runs).panels[0].rows[3][1][:3]:
        assert clear(cell)
    every, few, plain = tables.build("conditions", runs).panels
    for at in (0, 1):  # of ten classes three are the third with the fewest images
        assert round(0.3 * few.rows[0][1][at].mean / every.rows[0][1][at].mean, 1) == 0.9
        at_a_fifth = plain.rows[2][1][at].mean - plain.rows[0][1][at].mean
        assert 3.7 < at_a_fifth < 4
        assert abs(at_a_fifth + every.rows[2][1][at].mean - every.rows[0][1][at].mean) < 1  # without the prior


def test_its_table_of_details_is_what_was_measured() -> None:
    runs = store.load(ROOT / "results").runs
    digits, ten, hundred = (
        dict(panel.rows)
        for name in ("ablation_digits", "ablation")
        for panel in tables.build(name, runs).panels
        if not panel.apart
    )
    [divided] = dict(tables.build("division_cifar", runs).panels[0].rows)[
        "Loss divided by the sum of the drawn weights"
    ]

    def points(cell: tables.Cell | None) -> str:
        assert cell and cell.values
        words = f"{cell.mean:+.1f}".replace("-", "−")
        return f"**{words}**" if cell.interval and clear(cell) else words

    def of(rows: dict, label: str, *places: int) -> list[str]:
        return [points(rows[label][place]) for place in places]

    table = {}
    for row in re.findall(r"^\| (.*`(?:model|loss|recipe)\..*) \|$", README, re.MULTILINE):
        _, key, *said = row.split(" | ")
        table[key] = said
    division, prior, order, drop = (
        "Loss divided by the sum of the drawn weights",
        "No prior in the last bias",
        "Image order: official stream",
        "Learning rate drops: ×0.1",
    )
    [sigmoid, *_] = dict(tables.build("conditions", runs).panels[0].rows)["As in the ablation"]
    assert table["`loss.reduction=weight_sum`"] == [
        "β 0.9999: softmax {}, focal {}".format(*of(digits, division, 1, 3)),
        f"CIFAR-10, β 0.9999: softmax at IF 200 {points(divided)} (two pairs), focal {points(ten[division][3])}",
    ]
    assert len(divided.values) == 2 and min(divided.values) > 0
    assert table["`model.prior_bias=false`"] == [
        "sigmoid {}, focal {}; β 0.9999: focal {}".format(points(sigmoid), *of(digits, prior, 2, 3)),
        "focal: CIFAR-10 {}, with β 0.9999 {}; CIFAR-100 {}".format(*of(ten, prior, 2, 3), *of(hundred, prior, 2)),
    ]
    assert table["`recipe.image_order=official_stream`"] == [
        "softmax {}, focal {}; β 0.9999: {}, {}".format(*of(digits, order, 0, 2, 1, 3)),
        "softmax: CIFAR-10 {}, CIFAR-100 {}; focal with β 0.9: CIFAR-100 {}".format(
            *of(ten, order, 0), *of(hundred, order, 0, 3)
        ),
    ]
    together = tables.TOGETHER
    at_200 = dict(tables.build("ports", runs).panels[0].rows)[together]
    assert {len(cell.values) for cell in at_200} == {2}
    chance = "no more than chance may give"
    assert table["`model.shortcut=strided model.init=kaiming recipe.input_scaling=mean_std`"] == [
        "together: softmax {}, focal {}; β 0.9999: {}, {}; each alone: ".format(*of(digits, together, 0, 2, 1, 3))
        + chance,
        "CIFAR-10, together: softmax at IF 200 {}, with β 0.9999 {} (two pairs each); ".format(*map(points, at_200))
        + "focal with β 0.9999 {} (through torch.compile)".format(*of(ten, together, 3)),
    ]
    assert table["`recipe.decay_scope`"] == [chance, "not run"]
    for label, _ in tables.DETAILS:
        if label.startswith(("Shortcut", "Initial", "Input", "Weight decay")):
            assert not any(cell.values for cell in (*ten[label], *hundred[label]) if cell)
    assert f"torch.compile): {ten[together][3].mean:+.2f}, ".replace("-", "−") in " ".join(DETAILS.split())
    assert [bool(cell.values) for cell in (*ten[together], *hundred[together])] == [False] * 3 + [True] + [False] * 4
    every = sorted(digits[drop], key=lambda cell: cell.mean)
    assert table["`recipe.drop=0.1`"] == [
        f"{points(every[0])} to {points(every[-1])}",
        "focal: CIFAR-100 {}, with β 0.9 {}".format(*of(hundred, drop, 2, 3)),
    ]
    assert all(map(clear, every))
    for label, said in ((prior, "−0.5 to +0.3 points for the prior"), (order, "+0.3 to +1.2 for the order")):
        means = [cell.mean for cell in (*ten[label], *hundred[label]) if cell and cell.values]
        assert said.startswith(f"{min(means):+.1f} to {max(means):+.1f}".replace("-", "−"))
        assert said in " ".join(README.split())


def test_the_division_decides_on_cifar_10_as_it_says() -> None:
    runs = store.load(ROOT / "results").runs.query("status == 'done' and overrides == ''")
    runs = runs[(runs.dataset == "cifar10_lt") & (runs.imbalance_factor == 200) & (runs.loss == "softmax")]

    def of(beta: float, reduction: str, column: str = "error_last") -> list[float]:
        found = runs[(runs.beta == beta) & (runs.reduction == reduction) & (runs.seed < 2)]
        assert found.seed.tolist() == [0, 1]
        return found[column].tolist()

    batch, divided, plain = of(0.9999, "batch"), of(0.9999, "weight_sum"), of(0.0, "batch")
    cost = [f"{after - before:+.2f}" for before, after in zip(batch, divided, strict=True)]
    words = " ".join(DETAILS.split())
    assert f"(seeds 0 and 1: {', '.join(cost)}). Both" in words
    rows = dict(tables.build("division_cifar", store.load(ROOT / "results").runs).panels[0].rows)
    [slower], [undone] = (
        rows["The same at learning rate 0.0105"],
        rows["The same at learning rate 0.0105 and weight decay 0.0019"],
    )
    assert slower.seeds == undone.seeds == ("0", "1") and min(slower.values) > 3
    assert "(seeds 0 and 1: {:+.2f}, {:+.2f}): the weight decay".format(*slower.values) in words
    assert "there too (seeds 0 and 1: {:+.2f}, {:+.2f}):".format(*undone.values).replace("-", "−") in words
    [faster] = rows["Learning rate 0.95 alone"]
    ends = [before + change for before, change in zip(batch, faster.values, strict=True)]
    assert "ends at {:.0f} and {:.0f} % (seeds 0 and 1: {:+.2f}, {:+.2f}):".format(*ends, *faster.values) in words
    assert [round(error) for error in divided] == [37, 37] and min(divided) > max(plain)
    none, left, all_of_it = (
        np.array(of(*asked, "error_few")) for asked in ((0.0, "batch"), (0.9999, "weight_sum"), (0.9999, "batch"))
    )
    assert [round((none - few).mean()) for few in (left, all_of_it)] == [2, 16]
    grids = paper.grids()
    cell = grids.loss.eq("softmax") & grids.dataset.eq("cifar10_lt") & grids.imbalance_factor.eq(200)
    [printed] = grids[cell & grids.beta.eq(0.9999)].error
    assert printed == 31.11 and verdict(printed, divided) == "worse"
    both = [before + change for before, change in zip(batch, undone.values, strict=True)]
    assert verdict(printed, both) == "agrees"
    assert f"): {np.mean(both):.1f} %, where the default has {np.mean(batch):.1f} % with the same" in words
    assert (
        f"it ends at {np.mean(both):.1f} %, as the default does with the same two seeds ({np.mean(batch):.1f} %)."
        in (" ".join(README.split()))
    )
    few = dict(tables.build("division_cifar", store.load(ROOT / "results").runs).panels[1].rows)
    [left], [cost] = (
        few[row]
        for row in (
            "The same at learning rate 0.0105 and weight decay 0.0019",
            "Loss divided by the sum of the drawn weights",
        )
    )
    assert f"{left.mean:.1f} of the {cost.mean:.1f} points that the division costs are left" in words
    counts = np.array(class_counts(10, 200, 5000))
    weights = class_balanced_weights(counts, 0.9999).numpy()
    assert round(weights[-1], 1) == 4.4
    assert round(weights[-1] / (128 * (counts * weights).sum() / counts.sum()), 2) == 0.33
    for factor, weight in ((200, 0.10), (100, 0.17)):
        counts = np.array(class_counts(10, factor, 5000))
        drawn = (counts * class_balanced_weights(counts, 0.9999).numpy()).sum() / counts.sum()
        assert round(drawn, 2) == weight and round(1 / drawn, -1 if factor == 200 else 0) == {200: 10, 100: 6}[factor]


def test_on_the_digits_the_division_is_undone_as_it_says() -> None:
    rows = dict(tables.build("division", store.load(ROOT / "results").runs).panels[0].rows)
    divided = rows["Loss divided by the sum of the drawn weights"]
    slower, undone = (
        rows["The same at learning rate 0.025"],
        rows["The same at learning rate 0.025 and weight decay 0.0008"],
    )
    faster = rows["Learning rate 0.4 alone"]
    assert all(clear(cell) for cell in faster) and not any(clear(cell) for cell in [*slower, *undone])
    seeds = {cell.seeds for cells in (divided, slower, undone, faster) for cell in cells}
    assert len(seeds) == 1 and len(seeds.pop()) == 20
    said = " ".join(DETAILS.split()).replace("−", "-")
    assert "leave {:+.2f} and {:+.2f} of the".format(*(cell.mean for cell in undone)) in said
    assert "the {:+.2f} of softmax and the {:+.2f} of focal loss".format(*(cell.mean for cell in divided)) in said
    taken = [bootstrap(np.subtract(divided[at].values, undone[at].values).tolist()) for at in (0, 1)]
    shown = [f"{gain.mean:+.2f} [{gain.interval[0]:+.2f}, {gain.interval[1]:+.2f}]" for gain in taken]
    assert f"takes away {' and '.join(shown)}; for focal loss neither" in said
    assert "The rate alone leaves {:+.2f} and {:+.2f};".format(*(cell.mean for cell in slower)) in said
    assert "division costs {:+.2f} and {:+.2f}.".format(*(cell.mean for cell in faster)) in said
    counts = np.array(data.load(config.Dataset(name="digits_lt", imbalance_factor=50.0)).counts)
    drawn = (counts * class_balanced_weights(counts, 0.9999).numpy()).sum() / counts.sum()
    assert round(1 / drawn, 1) == 4.6 and round(drawn, 2) == 0.22  # as the table's caption says too
    assert "where k is 4.6" in said


def test_what_the_three_details_do_on_cifar_10_is_as_it_says() -> None:
    errors, few, gains = tables.build("ports", store.load(ROOT / "results").runs).panels
    plain, weighted = dict(errors.rows)[tables.TOGETHER]
    words = " ".join(DETAILS.split()).replace("−", "-")
    assert plain.seeds == weighted.seeds == ("0", "1")
    assert "a point worse ({:+.2f}, {:+.2f}), with".format(*plain.values) in words and clear(plain)
    assert "one worse ({:+.2f}, {:+.2f}). So".format(*weighted.values) in words and not clear(weighted)
    [[default], [ports]] = [cells for _, cells in gains.rows]
    assert f"balancing gains {ports.mean:+.2f} in place of {default.mean:+.2f}:" in words and ports.mean > default.mean
    assert f"{ports.mean:.1f} points in place of {default.mean:.1f}, two pairs each." in " ".join(README.split())
    rare = dict(few.rows)[tables.TOGETHER]
    assert min(value for cell in rare for value in cell.values) > 0
    assert "by {:+.2f} on average without weights and by {:+.2f} with them".format(*(c.mean for c in rare)) in words
    ends = [np.add(usual.values, c.values) for usual, c in zip(errors.rows[0][1], (plain, weighted), strict=True)]
    assert "The means of two, {:.2f} and {:.2f} %,".format(*map(np.mean, ends)) in words
    compared = {cell.setting: cell for cell in tables.build("2", store.load(ROOT / "results").runs).cells()}
    cells = [compared[cell.setting] for cell in errors.rows[0][1]]
    assert "numbers ({:.2f} and {:.2f})".format(*(cell.paper for cell in cells)) in words
    for cell, end in zip(cells, ends, strict=True):
        assert verdict(cell.paper, end.tolist()) == "worse" and cell.verdict == "agrees"
    without, usual = errors.rows[0][1]
    assert f"default's {without.mean:.2f} % without weights and with the same two seeds are not, its" in words
    assert verdict(cells[0].paper, without.values) == "agrees"
    assert f"its {usual.mean:.2f} % with weights are too" in words and verdict(cells[1].paper, usual.values) == "worse"
    said = (
        f"ends at {ends[0].mean():.1f} % without weights, a point worse in both pairs and just outside the band around "
        f"the paper's {cells[0].paper:.2f}, in which the default lies ({without.mean:.1f} % with the same seeds)"
    )
    assert said in " ".join(README.split())


def test_what_bf16_does_is_as_it_says() -> None:
    """On CIFAR one run in fp32, beside runs in bf16 of the same setting."""
    found = store.load(ROOT / "results")
    runs = found.runs[found.runs.status == "done"]
    words = " ".join(DETAILS.split()).replace("−", "-")
    [run] = runs[(runs.dataset.str.startswith("cifar")) & (runs.dtype == "fp32")].to_dict("records")
    others = runs[(runs[store.SETTING] == pd.Series(run)[store.SETTING]).all(axis=1) & (runs.dtype == "bf16")]
    others = others.sort_values("seed")
    assert run["dataset"] == "cifar100_lt" and run["seed"] == 0 and others.seed.tolist() == [0, 1, 2]
    said = "{:.2f} % in fp32; in bf16 the same seed ended at {:.2f} %, seeds 1 and 2 at {:.2f} and {:.2f} %"
    assert said.format(run["error_last"], *others.error_last) in words and run["error_last"] > others.error_last.max()
    plain = runs[(runs.cell.str.startswith("cifar100_lt-if200-focal-g1-b0-")) & (runs.dtype == "bf16")].error_last
    assert len(plain) == 3 and f"apart than that ({plain.min():.2f} to {plain.max():.2f} %)" in words
    assert run["error_last"] - others.error_last.min() < plain.max() - plain.min()
    assert f"one run, {run['error_last'] - others.error_last.iloc[0]:+.2f} points" in " ".join(README.split()).replace(
        "−", "-"
    )
    names = [run["run_id"], *others.run_id]
    curves = found.curves[found.curves.epoch.between(20, 160) & found.curves.run_id.isin(names)]
    losses = curves.pivot(index="step", columns="run_id", values="train_loss")[names]
    assert len(losses) > 30 and losses.notna().all(axis=None)
    apart = [(losses[one] - losses[other]).abs().mean() for one, other in itertools.combinations(losses, 2)]
    said = "from those in bf16 by {:.4f}, {:.4f} and {:.4f} on average, these from one another by {:.4f} to {:.4f}"
    assert said.format(*apart[:3], min(apart[3:]), max(apart[3:])) in words


def test_of_what_twenty_seeds_say_of_the_digits_twenty_more_say_seven_again() -> None:
    runs = store.load(ROOT / "results").runs
    runs = runs[runs.dataset == "digits_lt"]
    both, first, second = (
        tables.build("ablation_digits", part).panels[0].rows[1:]
        for part in (runs, runs[runs.seed < 20], runs[runs.seed >= 20])
    )
    halves = [
        (label, at, cell, again, whole)
        for (label, cells), (_, agains), (_, wholes) in zip(first, second, both, strict=True)
        for at, (cell, again, whole) in enumerate(zip(cells, agains, wholes, strict=True))
        if cell
    ]
    assert {len(half.values) for row in halves for half in row[2:4] if "together" not in row[0]} == {20}
    said = [row for row in halves if "together" not in row[0] and clear(row[2])]
    lost = [row for row in said if not (clear(row[3]) and row[2].mean * row[3].mean > 0)]
    assert len(said) == 10 and len(lost) == 3
    for label, at, before, now in (
        ("Initial weights: Kaiming", 0, "−1.05", "+0.01"),
        ("Weight decay: last bias alone", 3, "−0.88", "+0.02"),
        ("Learning rate drops: ×0.1", 3, "−0.82", "−0.36"),
    ):
        [(_, _, cell, again, _)] = [row for row in lost if row[:2] == (label, at)]
        assert [f"{half.mean:+.2f}".replace("-", "−") for half in (cell, again)] == [before, now]
        assert before in DETAILS and f"now {now}" in DETAILS.replace("\n", " ")
    deciding = ("No prior", "Image order", "Learning rate drops", "Loss divided")
    others = [row for row in halves if not row[0].startswith(deciding) and "together" not in row[0]]
    assert len(others) == 26 and sum(clear(row[4]) for row in others) == 2
    assert not any(clear(row[2]) and clear(row[3]) for row in others if clear(row[4]))
    assert max(abs(row[4].mean) for row in others) < 1.2
    column = [row[4] for row in others if row[1] == 1]  # softmax with beta 0.9999
    assert len(column) == 6 and min(cell.mean for cell in column) > 0
    mean = bootstrap(np.mean([cell.values for cell in column], axis=0).tolist())
    words = f"by {mean.mean:+.2f} on average [{mean.interval[0]:+.2f}, {mean.interval[1]:+.2f}]"
    assert words in " ".join(DETAILS.split())


def test_what_balancing_gains_on_the_digits_depends_on_the_details_as_it_says() -> None:
    runs = store.load(ROOT / "results").runs
    runs = runs[runs.dataset == "digits_lt"]
    gains, first, second = (
        dict(tables.build("ablation_digits", part).panels[-1].rows)
        for part in (runs, runs[runs.seed < 20], runs[runs.seed >= 20])
    )
    assert all(
        clear(cell) and cell.mean > 0 and len(cell.values) == 40 for row in gains.values() for cell in row if cell
    )
    default = gains["Default configuration"]

    def shift(cells: dict, label: str, place: int) -> Gain:
        before, after = cells["Default configuration"][place], cells[label][place]
        assert before.seeds == after.seeds
        return bootstrap(np.subtract(after.values, before.values).tolist())

    prior, order, division, kaiming, drop = (
        "No prior in the last bias",
        "Image order: official stream",
        "Loss divided by the sum of the drawn weights",
        "Initial weights: Kaiming",
        "Learning rate drops: ×0.1",
    )
    said = [
        (prior, 1),
        (order, 0),
        (order, 1),
        (division, 0),
        (division, 1),
        (drop, 0),
        (kaiming, 0),
        (tables.TOGETHER, 0),
    ]
    changed = [(label, at) for label, row in gains.items() for at in (0, 1) if row[at] and row is not default]
    assert [one for one in changed if clear(shift(gains, *one))] == sorted(said, key=changed.index)
    assert len(changed) - len(said) == 14
    assert [one for one in said if not clear(shift(first, *one))] == [(division, 1)]
    assert [one for one in said if not clear(shift(second, *one))] == [(kaiming, 0), (tables.TOGETHER, 0)]
    words = " ".join(DETAILS.split()).replace("−", "-")
    assert "gains {:.2f} points with softmax and {:.2f} with focal".format(*(cell.mean for cell in default)) in words
    shown = [
        f"{gain.mean:+.2f} [{gain.interval[0]:+.2f}, {gain.interval[1]:+.2f}]"
        for gain in (shift(gains, *one) for one in said)
    ]
    assert (
        "by {} without the prior, by {} and {} in the authors' order, by {} and {} with the other division, by {} with "
        "drops by ×0.1, by {} with Kaiming weights and by {} with the three.".format(*shown)
    ) in words
    mean = {one: f"{gains[one[0]][one[1]].mean:.2f}" for one in said}
    for sentence in (
        f"Without the prior focal loss gains {mean[prior, 1]}; in the authors' image order softmax gains "
        f"{mean[order, 0]} and focal loss {mean[order, 1]}.",
        f"softmax gains {mean[division, 0]} and focal loss {mean[division, 1]}.",
        f"With drops by ×0.1 softmax gains {mean[drop, 0]}:",
        f"With Kaiming weights softmax gains {mean[kaiming, 0]}, with all three details of most ports "
        f"{mean[tables.TOGETHER, 0]}.",
    ):
        assert sentence in words
    means = [cell.mean for row in gains.values() for cell in row if cell]
    assert f"goes from {min(means):.0f} points to {max(means):.0f}:" in words
    assert [round(cell.mean) for cell in default] == [5, 5]
    alone = [cell.mean for label, row in gains.items() for cell in row if cell and label != tables.TOGETHER]
    words = " ".join(README.split())
    assert f"5 points by default, {min(alone):.0f} to {max(alone):.0f} with one of them changed" in words
    rounded = {one: f"{gains[one[0]][one[1]].mean:.0f}" for one in said}
    assert rounded[order, 0] == rounded[order, 1]
    assert (
        f"{rounded[prior, 1]} for focal loss without the prior and {rounded[order, 0]} in the authors' order," in words
        and f"; {rounded[division, 0]} and {rounded[division, 1]} with the other division; " in words
    )
    three = gains[tables.TOGETHER]
    assert f"{three[0].mean:.1f} for softmax with the network and input of most ports ({three[1].mean:.1f} for" in words


def test_the_three_details_of_most_ports_do_together_what_it_says() -> None:
    runs = store.load(ROOT / "results").runs
    runs = runs[runs.dataset == "digits_lt"]
    rows, first, second = (
        dict(tables.build("ablation_digits", part).panels[0].rows)
        for part in (runs, runs[runs.seed < 20], runs[runs.seed >= 20])
    )
    [label] = [label for label in rows if "together" in label]
    default, together = rows["Default configuration (%)"], rows[label]
    assert {len(cell.values) for cell in together} == {40} == {len(cell.values) for cell in default}
    said = " ".join(DETAILS.split()).replace("−", "-")

    def points(mean: float, low: float, high: float) -> str:
        return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"

    soft, focal = (points(together[at].mean, *together[at].interval) for at in (1, 3))
    assert f"cost class-balanced softmax {soft} and class-balanced focal loss {focal}, on average" in said
    assert clear(together[1]) and clear(together[3])
    halves = [half[label][at].mean for at in (1, 3) for half in (first, second)]
    assert min(halves) > 1
    assert "({:+.2f} and {:+.2f}, {:+.2f} and {:+.2f}; of these four only the last".format(*halves) in said
    assert [clear(half[label][at]) for at in (1, 3) for half in (first, second)] == [True, True, True, False]
    less = [bootstrap(np.subtract(*(half[label][at].values for at in (0, 1))).tolist()) for half in (first, second)]
    assert (
        "(in the halves {:+.2f} and {:+.2f}, the second with zero inside)".format(*(gain.mean for gain in less)) in said
    )
    assert less[0].interval[1] < 0 < less[1].interval[1]
    assert not clear(together[0]) and not clear(together[2])
    assert f"chance ({together[0].mean:+.2f} and {together[2].mean:+.2f})." in said
    for plain, balanced, words in ((0, 1, "which is"), (2, 3, "but the interval holds zero:")):
        seeds = {cell.seeds for row in (default, together) for cell in (row[plain], row[balanced])}
        assert len(seeds) == 1
        before = default[plain].mean - default[balanced].mean
        less = bootstrap(np.subtract(together[plain].values, together[balanced].values).tolist())
        shown = f"{before + less.mean:.1f}{' points' if plain == 0 else ''} in place of {before:.1f}"
        assert f"{shown}, {words} {points(less.mean, *less.interval)}" in said
        assert (less.interval[0] <= 0 <= less.interval[1]) == ("zero" in words)
    alone = [
        [
            rows[row][at].mean
            for row in ("Shortcut: strided slice", "Initial weights: Kaiming", "Input: per-channel mean and sd")
        ]
        for at in (1, 3)
    ]
    assert f"{min(map(min, alone)):.1f} to {max(map(max, alone)):.1f} points each" in said
    assert "would be {:.1f} and {:.1f}.".format(*map(sum, alone)) in said


def test_intervals_of_forty_pairs_leave_out_zero_once_in_seventeen_by_chance() -> None:
    """A percentile bootstrap of a mean is ±1.96 s/√n with s over n, not n − 1: narrower than Student's interval."""
    assert round(1 / (2 * t.sf(1.96 * np.sqrt(39 / 40), 39))) == 17
    values = np.random.default_rng(0).normal(size=40)
    low, high = bootstrap(values).interval
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(40), rel=0.03)
    assert round(38 / 17) == 2  # of the README's 38


def test_what_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)) <= targets | {"help"}
    for path in re.findall(r"python (scripts/\w+\.py)", README):
        assert (ROOT / path).exists(), path
    for group, option in re.findall(r"\b(dataset|loss|sweep|experiment|tracking)=(\w[\w.]*)(?![\w.(])", README):
        assert (ROOT / f"configs/{group}/{option}.yaml").exists(), f"{group}={option}"
    for table in re.findall(r"TABLE=(\w+)", README):
        assert (ROOT / f"configs/table/{table}.yaml").exists(), table
