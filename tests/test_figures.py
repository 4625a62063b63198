"""The figures show what the source says: data of lines, images and texts are compared, never pixels."""

import contextlib
import errno
import importlib.util
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from cbl import config, disk, records, store
from cbl.errors import UserError
from cbl.report import figures, paper, tables, verdict

ROOT = Path(__file__).resolve().parent.parent
MINIATURE = ROOT / "tests" / "miniature" / "runs"
GRIDS = paper.grids()
# The paper's CIFAR-10 and CIFAR-100 at imbalance factor 50: error without class balancing, then β 0.9 to 0.9999.
SOFTMAX_10 = (25.19, [24.54, 23.50, 22.72, 21.95])
SIGMOID_100 = (55.85, [55.27, 54.68, 57.15, 57.72])

PORTS = {"model": {"shortcut": "strided", "init": "kaiming"}, "recipe": {"input_scaling": "mean_std"}}


def run(dataset="cifar10_lt", factor=100.0, kind="softmax", gamma=None, beta=0.0, seed=0, error=30.0, **changes):
    """A row of runs.csv of a done run; `changes` are groups of its configuration, or columns."""
    groups = {key: changes.pop(key) for key in ("model", "recipe", "engine") if key in changes}
    of = {key: changes.pop(key) for key in ("image_size", "root") if key in changes}
    loss = {"kind": kind, "beta": beta} | ({"gamma": gamma} if gamma else {})
    values = {"dataset": {"name": dataset, "imbalance_factor": factor} | of, "loss": loss, "seed": seed, **groups}
    if dataset in config.LARGE:
        for key, value in config.official_large(dataset, kind).items():
            group, name = key.split(".")
            values.setdefault(group, {}).setdefault(name, value)
    made = config.from_mapping(values)
    row = dict.fromkeys(records.COLUMNS) | {
        "run_id": config.run_id(made),
        "cell": config.cell(made),
        "dataset": dataset,
        "imbalance_factor": factor,
        "model": config.model_name(made),
        "loss": kind,
        "gamma": gamma,
        "beta": beta,
        "reduction": "batch",
        "overrides": " ".join(config.overrides(made)),
        "dtype": made.engine.dtype,
        "seed": seed,
        "subset_seed": 0,
        "epochs": made.recipe.epochs,
        "status": "done",
        "error_last": error,
    }
    return row | changes


def frame(rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(records.COLUMNS)).astype(store.RUNS)


def every_run(dataset: str, factors=figures.FACTORS) -> pd.DataFrame:
    """All 25 settings of the paper's grid: its error plus one point, and half a point more or less with the seed."""
    rows = []
    for cell in GRIDS[GRIDS["dataset"].eq(dataset) & GRIDS["imbalance_factor"].isin(factors)].itertuples():
        gamma = None if pd.isna(cell.gamma) else cell.gamma
        for seed in (0, 1):
            error = cell.error + 0.5 + seed
            rows.append(run(dataset, cell.imbalance_factor, cell.loss, gamma, cell.beta, seed, error))
    return frame(rows)


def lines(ax: Axes, style: str = "-") -> dict[str, Line2D]:
    """Lines of that style by colour."""
    return {line.get_color(): line for line in ax.get_lines() if line.get_linestyle() == style}


def titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes]


def suptitles(figure: Figure) -> list[str]:
    return [part.get_suptitle() for part in figure.subfigs]


def colour(loss: str, gamma: float | None = None) -> str:
    return figures.LOSSES[loss, gamma][1]


@pytest.fixture(scope="module")
def miniature() -> store.Store:
    return store.read_folders([MINIATURE])


def drawn(found: store.Store) -> dict[str, Figure | None]:
    return {name: entry.draw(found) for name, entry in script().FIGURES.items()}


def script():
    spec = importlib.util.spec_from_file_location("figures_script", ROOT / "scripts" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- closed form -------------------------------------------------------------------------------------------------------


def test_fig3_is_the_class_balanced_term_on_two_log_axes():
    (ax,) = figures.fig3().axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [line.get_label() for line in ax.get_lines()] == ["β = 0", "β = 0.9", "β = 0.99", "β = 0.999", "β = 0.9999"]
    for line, beta in zip(ax.get_lines(), [0.0, 0.9, 0.99, 0.999, 0.9999], strict=True):
        n, term = line.get_data()
        assert (n[0], n[-1]) == (1, 10_000)
        np.testing.assert_allclose(term, (1 - beta) / (1 - beta**n), rtol=1e-9)


def test_fig4_shows_the_counts_of_long_tailed_cifar_100():
    (ax,) = figures.fig4().axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "linear")
    counts = {line.get_label(): line.get_ydata().tolist() for line in ax.get_lines()}
    assert [(name, len(n), sum(n)) for name, n in counts.items()] == [
        ("10", 100, 19573),
        ("20", 100, 15907),
        ("50", 100, 12608),
        ("100", 100, 10847),
        ("200", 100, 9502),
    ]
    assert counts["200"][:4] + counts["200"][-5:] == [500, 473, 449, 425, 3, 2, 2, 2, 2]


def test_fig6_shows_images_solid_and_effective_numbers_dashed():
    left, right = figures.fig6().axes
    assert left.get_yscale() == right.get_yscale() == "log"
    (images,) = lines(left, "-").values()
    assert images.get_ydata().tolist() == [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
    assert len(lines(right, "-")[figures.BLACK].get_ydata()) == 100
    for ax in (left, right):
        n = lines(ax, "-")[figures.BLACK].get_ydata()
        dashed = lines(ax, "--")
        assert len(dashed) == 4
        for beta in (0.9, 0.99, 0.999, 0.9999):
            np.testing.assert_allclose(dashed[figures.BETAS[beta]].get_ydata(), (1 - beta**n) / (1 - beta), rtol=1e-9)


# -- the paper's figures of runs ---------------------------------------------------------------------------------------


def test_fig5_shows_the_paper_above_and_the_means_of_our_runs_below():
    runs = pd.concat([every_run(name, factors=[50.0]) for name in ("cifar10_lt", "cifar100_lt")])
    figure = figures.fig5(runs, GRIDS)
    above_10, above_100, below_10, below_100 = figure.axes
    for ax, shift in ((above_10, 0), (below_10, 1)):  # of seeds 0 and 1: half a point and one and a half
        plain, balanced = SOFTMAX_10
        solid, dashed = lines(ax, "-")[colour("softmax")], lines(ax, "--")[colour("softmax")]
        np.testing.assert_allclose(solid.get_ydata(), np.add(balanced, shift))
        np.testing.assert_allclose(dashed.get_ydata(), plain + shift)
        assert solid.get_marker() == "o"
        assert np.diff(solid.get_xdata()).tolist() == [1, 1, 1]  # equally spaced
    for ax, shift in ((above_100, 0), (below_100, 1)):
        np.testing.assert_allclose(lines(ax, "-")[colour("sigmoid")].get_ydata(), np.add(SIGMOID_100[1], shift))
        np.testing.assert_allclose(lines(ax, "--")[colour("sigmoid")].get_ydata(), SIGMOID_100[0] + shift)
    assert all(len(ax.get_lines()) == 6 for ax in figure.axes)
    assert titles(figure) == [
        "Long-tailed CIFAR-10, imbalance factor 50: paper",
        "Long-tailed CIFAR-100, imbalance factor 50: paper",
        "Ours: 2 runs each, fp32",
        "Ours: 2 runs each, fp32",
    ]


def test_fig5_leaves_gaps_where_nothing_was_run():
    figure = figures.fig5(frame([run(factor=50.0, kind="sigmoid", beta=0.99, error=23.0)]), GRIDS)
    _, _, below_10, below_100 = figure.axes
    np.testing.assert_array_equal(lines(below_10)[colour("sigmoid")].get_ydata(), [np.nan, 23, np.nan, np.nan])
    assert not lines(below_10, "--")
    assert titles(figure)[2:] == ["Ours: 1 of 15 settings, 1 run each, fp32", "Ours: not run"]
    assert [text.get_text() for text in below_100.texts] == ["not run"]


def large_run(dataset, kind="softmax", seed=0, **changes):
    """One of Table 3's rows for ResNet-50: softmax, or class-balanced focal."""
    gamma, beta = (0.5, 0.999) if kind == "focal" else (None, 0.0)
    groups = {"model": {"depth": 50}, "engine": {"dtype": "bf16"}} | changes
    return run(dataset, None, kind, gamma, beta, seed, **groups)


def over_epochs(rows, error) -> pd.DataFrame:
    """Rows of curves at epochs 1 to 90, of which every second was evaluated; error(row, epoch)."""
    points = [
        (row["run_id"], float(epoch), epoch, 0.1, 1.0, None if epoch % 2 else error(row, epoch))
        for row in rows
        for epoch in range(1, 91)
    ]
    return pd.DataFrame(points, columns=list(store.CURVES))


def test_fig7_shows_top1_error_over_90_epochs():
    runs = [large_run(name, "focal", seed) for name in ("imagenet", "inaturalist2018") for seed in (0, 1)]
    runs += [large_run("inaturalist2018")]
    curves = over_epochs(runs, lambda row, epoch: 100 - epoch / 2 + row["seed"] * 3 - (20 if row["beta"] else 0))
    ilsvrc, inat = figures.fig7(frame(runs), curves, paper.table3()).axes
    assert titles(ilsvrc.figure) == [
        "ILSVRC 2012: 1 of 2 settings, 2 runs each, bf16",
        "iNaturalist 2018: 1 to 2 runs each, bf16",
    ]
    evaluated = np.arange(2, 91, 2)
    for ax in (ilsvrc, inat):
        assert (ax.get_xlim(), ax.get_xlabel()) == ((0, 90), "epoch")
        focal = lines(ax)[colour("focal", 0.5)]
        np.testing.assert_allclose(focal.get_data(), [evaluated, 81.5 - evaluated / 2])
        low, high = band(ax)
        np.testing.assert_allclose(high - low, 2 * np.std([0, 3], ddof=1))
    np.testing.assert_allclose(lines(inat, "--")[colour("softmax")].get_data(), [evaluated, 100 - evaluated / 2])
    assert not lines(ilsvrc, "--")
    assert (ilsvrc.get_ylim(), inat.get_ylim()) == ((20, 60), (35.5, 100))  # the paper's, and down to ours at 36.5
    for ax, printed in ((ilsvrc, {23.92, 22.71}), (inat, {42.86, 38.88})):
        hollow = [line.get_xydata().tolist() for line in ax.get_lines() if line.get_markerfacecolor() == "none"]
        assert {error for ((_, error),) in hollow} == printed
        assert {epoch for ((epoch, _),) in hollow} == {90}


def test_fig7_takes_the_runs_of_table_3_alone():
    others = [
        large_run("imagenet", model={"depth": 101}),
        large_run("imagenet", image_size=320),
        large_run("imagenet", recipe={"epochs": 100}),
        large_run("imagenet", status="failed"),
        large_run("inaturalist2017"),
        run("imagenet", None, "focal", 0.5, 0.0, model={"depth": 50}),
    ]
    curves = over_epochs(others, lambda row, epoch: 50.0)
    assert figures.fig7(frame(others), curves, paper.table3()) is None
    shown = large_run("imagenet", seed=1)
    curves = pd.concat([curves, over_epochs([shown], lambda row, epoch: 30.0)])
    ilsvrc, inat = figures.fig7(frame([*others, shown]), curves, paper.table3()).axes
    assert lines(ilsvrc, "--")[colour("softmax")].get_ydata().tolist() == [30.0] * 45
    assert not ilsvrc.collections and not lines(inat, "--")
    assert inat.get_title() == "iNaturalist 2018: not run"
    assert figures.fig7(frame([shown]), curves.assign(test_error=np.nan), paper.table3()) is None  # no curve of it


def cells(ax: Axes) -> np.ndarray:
    """Numbers written in a heat map, (25, 5), NaN where none is."""
    table = np.full((25, 5), np.nan)
    for text in ax.texts:
        column, row = text.get_position()
        if text.get_text().replace(".", "").isdigit():
            table[row, column] = float(text.get_text())
    return table


def bold(ax: Axes) -> list[float]:
    texts = [text for text in ax.texts if text.get_weight() == "bold"]
    return [float(text.get_text()) for text in sorted(texts, key=lambda text: text.get_position()[0])]


@pytest.mark.parametrize(
    ("dataset", "lowest"),
    [
        ("cifar10_lt", [31.11, 25.43, 20.73, 15.64, 12.51]),
        ("cifar20_lt", [54.82, 48.52, 44.75, 35.12, 30.90]),
        ("cifar100_lt", [63.77, 60.40, 54.68, 47.41, 42.01]),
    ],
)
def test_heat_map_shows_the_paper_beside_ours(dataset, lowest):
    figure = figures.grid(dataset, every_run(dataset), GRIDS)
    left, right = figure.axes
    theirs = cells(left)
    assert theirs[0, 0] == GRIDS[GRIDS["dataset"].eq(dataset)]["error"].iloc[0]  # softmax, β 0, imbalance factor 200
    assert bold(left) == lowest == theirs.min(axis=0).tolist()
    np.testing.assert_allclose(cells(right), theirs + 1, atol=0.006)
    assert bold(right) == pytest.approx([error + 1 for error in lowest])
    low, high = theirs.min(axis=0), cells(right).max(axis=0)  # ours are the higher
    for ax in (left, right):  # shaded from 0, the column's lowest, to 1, its highest
        shades = (cells(ax) - low) / (high - low)
        np.testing.assert_allclose(ax.images[0].get_array(), shades, atol=0.01)
        underlines = sorted(np.mean(line.get_xdata()) for line in ax.get_lines() if line.get_color() == figures.BLACK)
        assert underlines == pytest.approx([0, 1, 2, 3, 4])
        assert [label.get_text() for label in ax.get_xticklabels()] == ["200", "100", "50", "20", "10"]
    assert sum(figures.SHADES(0.0)[:3]) > sum(figures.SHADES(1.0)[:3])  # light is low


def test_heat_map_hatches_what_was_not_run():
    runs = frame([run(error=29.5), run(beta=0.9999, error=27.5), run(factor=50.0, kind="focal", gamma=2.0, error=23.0)])
    _, right = figures.grid("cifar10_lt", runs, GRIDS).axes
    ours = cells(right)
    assert {(i, j): ours[i, j] for i, j in np.argwhere(~np.isnan(ours))} == {(0, 1): 29.5, (4, 1): 27.5, (20, 2): 23.0}
    assert len(right.patches) == 122
    assert all(patch.get_hatch() for patch in right.patches)
    assert bold(right) == [27.5, 23.0]


def test_another_recipe_dtype_or_state_is_never_mixed_in():
    same = [run(seed=seed, error=30.0 + seed) for seed in (0, 1)]
    others = [
        run(seed=2, error=90.0, engine={"dtype": "bf16"}),
        run(seed=2, error=90.0, model={"shortcut": "strided"}),
        run(seed=2, error=90.0, recipe={"epochs": 100}),
        run(seed=2, error=90.0, beta=0.9999, reduction="weight_sum"),
        run(seed=2, error=90.0, status="failed"),
        run(seed=3, error=90.0, status="running"),
    ]
    figure = figures.grid("cifar10_lt", frame(same + others), GRIDS)
    ours = cells(figure.axes[1])
    assert ours[~np.isnan(ours)].tolist() == [30.5]
    assert figure.axes[1].get_title() == "Ours: 1 of 125 settings, 2 runs each, fp32"


# -- what the paper does not show --------------------------------------------------------------------------------------


def band(ax: Axes, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edge of a band, at its points."""
    x, y = ax.collections[index].get_paths()[0].vertices.T
    points = np.unique(x)
    return np.array([y[x == p].min() for p in points]), np.array([y[x == p].max() for p in points])


def test_error_against_beta_shows_mean_and_standard_deviation():
    errors = {0.0: [30.0, 32.0, 31.0], 0.9: [29.0, 29.5, 33.0], 0.99: [28.0], 0.9999: [25.0, 27.0, 26.0]}
    rows = [run(beta=beta, seed=i, error=e) for beta, values in errors.items() for i, e in enumerate(values)]
    rows += [run("cifar100_lt", factor, beta=beta) for factor in (50.0, 200.0) for beta in (0.0, 0.9)]
    rows += [run("cifar100_lt", 10.0)]  # one β alone: no panel
    figure = figures.error_against_beta(frame(rows))
    assert titles(figure) == ["imbalance factor 100", "imbalance factor 200", "imbalance factor 50"]
    assert suptitles(figure) == [
        "Long-tailed CIFAR-10: 1 to 3 runs each, fp32",
        "Long-tailed CIFAR-100: 1 run each, fp32",
    ]
    ax = figure.axes[0]
    (line,) = ax.get_lines()
    np.testing.assert_allclose(line.get_ydata(), [31, 30.5, 28, np.nan, 26])
    low, high = band(ax)
    for beta, at in ((0.0, 0), (0.9, 1)):
        sd = np.std(errors[beta], ddof=1)
        assert (low[at], high[at]) == pytest.approx((np.mean(errors[beta]) - sd, np.mean(errors[beta]) + sd))
    (whisker,) = ax.collections[1].get_segments()  # no band reaches β = 0.9999
    np.testing.assert_allclose(whisker, [[4, 25], [4, 27]])
    assert not figure.axes[1].collections  # one run has no spread


def test_error_against_beta_makes_no_cliff_of_a_small_difference():
    figure = figures.error_against_beta(frame([run(beta=0.0, error=64.5), run(beta=0.9, error=64.8)]))
    (ax,) = figure.axes
    low, high = ax.get_ylim()
    assert (high - low, (high + low) / 2) == pytest.approx((2, 64.65))
    left, right = ax.get_xlim()
    assert left < 0 and right > 4  # all five β, their markers whole


def details(rows, counts, error) -> pd.DataFrame:
    """Rows of per_class; error(beta, seed, class index)."""
    return pd.DataFrame(
        [
            (row["run_id"], index, f"c{index}", n, error(row["beta"], row["seed"], index))
            for row in rows
            for index, n in enumerate(counts)
        ],
        columns=list(store.PER_CLASS),
    )


def test_error_per_class_runs_from_head_to_tail():
    rows = [run(beta=beta, seed=seed) for beta in (0.0, 0.9999) for seed in (0, 1)]
    rows += [run(kind="sigmoid")]  # no class-balanced partner: not shown
    per_class = details(rows, [50, 5000, 500], lambda beta, seed, c: 10 * c + 2 * seed + (1 if beta else 5))
    (ax,) = figures.error_per_class(frame(rows), per_class).axes
    assert ax.get_title() == "Long-tailed CIFAR-10, imbalance factor 100, softmax: 2 runs each, fp32"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["c1\n5000", "c2\n500", "c0\n50"]
    np.testing.assert_allclose(lines(ax)[figures.BETAS[0.0]].get_ydata(), [16, 26, 6])
    np.testing.assert_allclose(lines(ax)[figures.BETAS[0.9999]].get_ydata(), [12, 22, 2])
    low, high = band(ax)
    np.testing.assert_allclose(high - low, 2 * np.sqrt(2))  # of two runs two points apart


def rendered(figure: Figure) -> list[str]:
    """Warnings of drawing it, as they read."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.draw_without_rendering()
    return [str(warning.message) for warning in caught]


def test_names_of_own_classes_are_shown_as_they_are_or_by_their_index():
    names = ["100% $a_$", r"$\frac$", r"a\$b $c", "größe", "中文", "two\nlines"]
    rows = [run("folder", None, beta=beta) for beta in (0.0, 0.9)]
    per_class = details(rows, range(len(names), 0, -1), lambda beta, seed, c: 50.0 + beta)
    per_class["class_name"] = per_class["class_index"].map(names.__getitem__)
    figure = figures.error_per_class(frame(rows), per_class)
    assert rendered(figure) == []
    labels = figure.axes[0].get_xticklabels()
    shown = [label._preprocess_math(label.get_text().partition("\n")[0]) for label in labels]
    assert shown == [*((name, False) for name in names[:4]), ("4", False), ("5", False)]


def folder_run(root: str, beta: float, **more):
    return run("folder", None, beta=beta, root=root, error_many=10.0, error_few=40.0, groups="terciles", **more)


def test_each_own_folder_of_images_is_shown_and_named():
    long = "/home/somebody/long_tailed_image_sets/of_the_department/2024-05/birds_of_the_garden/images_224"
    roots = {  # as given, and as it is to be read
        "my photos/a": "folder my photos/a",
        "my photos/b": "folder my photos/b",
        '$x$ "é" 中': 'folder $x$ "é" \\u4e2d',
        "data": "folder data",
        long: f"folder {long}",
    }
    rows = [folder_run(root, beta, error=30.0) for root in reversed(roots) for beta in (0.0, 0.9)]
    rows += [folder_run("my photos/b", beta, seed=1, error=40.0) for beta in (0.0, 0.9)]
    runs, curves = frame(rows), over_epochs(rows, lambda row, epoch: 50.0)
    per_class = details(rows, [9, 3], lambda beta, seed, c: 50.0)
    against_beta = figures.error_against_beta(runs)
    errors = [ax.get_lines()[0].get_ydata()[0] for ax in against_beta.axes]
    assert errors == [35.0 if root == "my photos/b" else 30.0 for root in sorted(roots)]
    for figure in (
        against_beta,
        figures.error_per_class(runs, per_class),
        figures.training_curves(runs, curves),
        figures.head_against_tail(runs),
    ):
        assert rendered(figure) == []
        texts = [text for text in figure.findobj(Text) if text.get_text().startswith("folder ")]
        words = ["".join(text._preprocess_math(line)[0] for line in text.get_text().split("\n")) for text in texts]
        for said, root in zip(words, sorted(roots), strict=True):
            assert said.startswith((f"{roots[root]}: ", f"{roots[root]}, imbalance as it is")), said
        boxes = [text.get_window_extent() for text in texts]
        page = figure.bbox.padded(1)
        assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and box.y1 <= page.y1 for box in boxes)
        assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])


def test_error_per_class_takes_many_classes_in_tenths():
    rows = [run("cifar100_lt", beta=beta) for beta in (0.0, 0.9)]
    per_class = details(rows, range(500, 400, -1), lambda beta, seed, c: c + 100 * beta)
    (ax,) = figures.error_per_class(frame(rows), per_class).axes
    assert [label.get_text() for label in ax.get_xticklabels()][::9] == ["0–9\n500–491", "90–99\n410–401"]
    np.testing.assert_allclose(lines(ax)[figures.BETAS[0.0]].get_ydata(), np.arange(4.5, 100, 10))


def test_error_per_class_numbers_8142_classes_by_their_size():
    rows = [run("inaturalist2018", None, beta=beta, model={"depth": 50}) for beta in (0.0, 0.999)]
    counts = np.random.default_rng(0).permutation(np.arange(8142) // 8 + 2)
    per_class = details(rows, counts, lambda beta, seed, c: counts[c] / 20 - (2 if beta else 0))
    (ax,) = figures.error_per_class(frame(rows), per_class.astype(store.PER_CLASS)).axes
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels[::9] == ["0–814\n1019–917", "7328–8141\n103–2"]
    tenths = [group.mean() / 20 for group in np.array_split(np.sort(counts)[::-1], 10)]
    np.testing.assert_allclose(lines(ax)[figures.BETAS[0.0]].get_ydata(), tenths)
    np.testing.assert_allclose(lines(ax)[figures.BETAS[0.999]].get_ydata(), np.subtract(tenths, 2))


def test_training_curves_show_evaluated_epochs():
    rows = [run(beta=beta, seed=seed) for beta in (0.0, 0.99) for seed in (0, 1)]
    curves = pd.DataFrame(
        [
            (row["run_id"], epoch, 0, 0.1, 2 / epoch + 9 * row["seed"], None if epoch == 3 else 60 / epoch)
            for row in rows
            for epoch in (1.0, 2.0, 3.0, 4.0)
        ],
        columns=list(store.CURVES),
    )
    figure = figures.training_curves(frame(rows), curves)
    loss, error = figure.axes
    assert (loss.get_yscale(), error.get_yscale()) == ("log", "linear")
    logs = np.log([[2, 1, 0.5], [11, 10, 9.5]])  # on its axis mean and band are of the logarithm: none reaches zero
    mean, sd = logs.mean(axis=0), logs.std(axis=0, ddof=1)
    np.testing.assert_allclose(lines(loss)[figures.BETAS[0.0]].get_data(), [[1, 2, 4], np.exp(mean)])
    np.testing.assert_allclose(band(loss), np.exp([mean - sd, mean + sd]))
    assert "geometric mean and sd" in loss.get_ylabel()
    np.testing.assert_allclose(lines(error)[figures.BETAS[0.99]].get_data(), [[1, 2, 4], [60, 30, 15]])


def test_three_seeds_are_shown_rather_than_one_at_imbalance_factor_100():
    rows = [run(beta=beta) for beta in (0.0, 0.99)]
    rows += [run(beta=beta, factor=200.0, seed=seed) for beta in (0.0, 0.99) for seed in (0, 1, 2)]
    curves = pd.DataFrame({"run_id": [row["run_id"] for row in rows]})
    assert [base.imbalance_factor for base, _ in figures._shown(frame(rows), curves)] == [200]
    alike = [row for row in rows if row["seed"] == 0]
    assert [base.imbalance_factor for base, _ in figures._shown(frame(alike), curves)] == [100]


def test_the_published_training_curves_are_those_that_the_readme_speaks_of():
    published = store.load(ROOT / "results")
    shown = {base.dataset: base for base, _ in figures._shown(published.runs, published.curves)}
    assert (shown["cifar10_lt"].imbalance_factor, shown["cifar10_lt"].loss) == (200, "softmax")
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "CIFAR-10 at imbalance factor 200 shows why" in said and "`results/figures/training_curves.png`" in said


def test_what_no_figure_shows_is_counted():
    runs = [run(beta=0.5), run(kind="focal", gamma=3.0), run(seed=1), run(beta=0.9)]
    assert figures.passed_over(frame(runs)) == 2 and figures.passed_over(store.load(ROOT / "results").runs) == 0


def test_a_single_evaluation_is_a_mark():
    curves = pd.DataFrame([("a", 1.0, 30.0), ("b", 1.0, 32.0)], columns=["run_id", "epoch", "test_error"])
    (ax,) = [Figure().subplots()]
    figures._over_epochs(ax, curves, [{"run_id": "a"}, {"run_id": "b"}], "test_error", color=figures.RED)
    assert ax.get_lines()[0].get_marker() == "o"
    later = pd.concat([curves, curves.assign(epoch=2.0)])
    figures._over_epochs(ax, later, [{"run_id": "a"}], "test_error", color=figures.RED)
    assert ax.get_lines()[-1].get_marker() == "None"


def test_detail_curves_compare_pairs_of_runs_alone():
    focal = {"kind": "focal", "gamma": 1.0}
    rows = [run(seed=seed, **focal) for seed in (0, 1, 2)]  # the last one has no partner
    rows += [run(seed=seed, **focal, model={"prior_bias": False}) for seed in (0, 1)]
    rows.append(run("cifar100_lt", **focal, model={"prior_bias": False}))  # neither has this one
    curves = pd.DataFrame(
        [
            (row["run_id"], epoch, 0, 0.1, 1.0, 10.0 * (row["overrides"] != "") + row["seed"] + 40 / epoch)
            for row in rows
            for epoch in (4.0, 8.0)
        ],
        columns=list(store.CURVES),
    )
    figure = figures.detail_curves(frame(rows), curves)
    assert suptitles(figure) == ["Long-tailed CIFAR-10, imbalance factor 100, 200 epochs: 2 runs each, fp32"]
    prior, order = figure.axes
    np.testing.assert_allclose(lines(prior)[figures.BLACK].get_data(), [[4, 8], [10.5, 5.5]])
    np.testing.assert_allclose(lines(prior)[figures.RED].get_data(), [[4, 8], [20.5, 15.5]])
    assert not order.get_lines() and [text.get_text() for text in order.texts] == ["not run"]
    assert figures.detail_curves(frame(rows[2:]), curves) is None


def test_the_published_runs_are_as_the_readme_says_of_the_two_costliest_details_on_cifar():
    """Of one pair each. Runs added there may end this: then the README's sentences are to be written anew."""
    published = store.load(ROOT / "results")
    done, curves = tables.done_runs(published.runs), published.curves[published.curves["test_error"].notna()]

    def worse(dataset, loss, gamma, beta, word, first, last):
        """Points of mean test error from epoch `first` to `last` that the changed runs have more."""
        default = tables.ABLATED_CIFAR[dataset]._replace(loss=loss, gamma=gamma, beta=beta)
        means = []
        for setting in (tables.changed(default, word), default):
            names = [row["run_id"] for row in done[setting]]
            found = curves[curves["run_id"].isin(names) & curves["epoch"].between(first, last)]
            means.append(found["test_error"].mean())
        return means[0] - means[1]

    assert abs(worse("cifar10_lt", "focal", 1.0, 0.0, tables.NO_PRIOR, 199, 200) + 0.54) < 0.005
    assert 0 < worse("cifar100_lt", "focal", 1.0, 0.0, tables.NO_PRIOR, 199, 200) < 1
    assert abs(worse("cifar10_lt", "focal", 1.0, 0.9999, tables.NO_PRIOR, 199, 200) - 0.04) < 0.005
    weight_sum = 'loss.reduction="weight_sum"'
    assert abs(worse("cifar10_lt", "focal", 1.0, 0.9999, weight_sum, 199, 200) - 0.68) < 0.005
    for beta, points in ((0.0, -0.07), (0.9, 0.13)):
        assert abs(worse("cifar100_lt", "focal", 1.0, beta, "recipe.drop=0.1", 199, 200) - points) < 0.005
    [*panels] = [panel for panel in tables.build("ablation", published.runs).panels if not panel.apart]
    changes = [c.mean for p in panels for _, row in p.rows[1:] for c in row if c and c.mean is not None]
    assert len(changes) == 10 and max(map(abs, changes)) < 1.3
    assert worse("cifar100_lt", "focal", 1.0, 0.0, tables.NO_PRIOR, 0, 30) > 1
    assert abs(worse("cifar100_lt", "focal", 1.0, 0.0, tables.NO_PRIOR, 30, 160)) < 1
    for loss, gamma, beta in (("softmax", None, 0.0), ("focal", 1.0, 0.9)):
        asked = "cifar100_lt", loss, gamma, beta, tables.AUTHORS_ORDER
        assert 12.5 < worse(*asked, 20, 60) < 14 and round(worse(*asked, 120, 160)) == 8
        assert 1 < worse(*asked, 199, 200) < 1.5
        default = tables.ABLATED_CIFAR["cifar100_lt"]._replace(loss=loss, gamma=gamma, beta=beta)
        [printed] = [c.paper for c in tables.build("grid100", published.runs).cells() if c.setting == default]
        [shuffled], [streamed] = (
            [row["error_last"] for row in done[setting]]
            for setting in (default, tables.changed(default, tables.AUTHORS_ORDER))
        )
        assert abs(shuffled - printed) < abs(streamed - printed)
        assert verdict.verdict(printed, [streamed]) == "agrees"
    asked = "cifar10_lt", "softmax", None, 0.0, tables.AUTHORS_ORDER
    assert round(worse(*asked, 0, 60), 1) == 4.5 and abs(worse(*asked, 61, 160)) < 0.5 > worse(*asked, 199, 200)


def test_moved_drops_part_from_the_official_run():
    def moved(epoch, seed, **changes):
        recipe = {"milestones": [float(epoch)], "epochs": epoch + 20}
        return run(factor=200.0, beta=0.9999, seed=seed, error=epoch / 4, recipe=recipe, **changes)

    rows = [moved(100, 1), moved(140, 1), moved(110, 0), run(factor=200.0, beta=0.9999, seed=1)]
    rows.append(run(factor=200.0, beta=0.9999, seed=1, engine={"dtype": "bf16"}))
    curves = pd.DataFrame(
        [
            (row["run_id"], epoch - 0.01, 0, 0.1, 1.0, 40.0 if epoch % 20 else row["error_last"])
            for row in rows
            for epoch in range(4, row["epochs"] + 1, 4)
        ],
        columns=list(store.CURVES),
    )
    figure = figures.moved_drop(frame(rows), curves)
    (ax,) = figure.axes
    assert titles(figure) == ["CIFAR-10, IF 200, Softmax β 0.9999, seed 1, fp32"]
    ends = [(line.get_xdata()[0], line.get_xdata()[-1], line.get_ydata()[-1]) for line in ax.get_lines()]
    assert ends == [(99.99, 119.99, 25.0), (139.99, 159.99, 35.0), (63.99, 199.99, 30.0)]  # from the last one before
    assert [text.get_text() for text in ax.texts] == ["25.0", "35.0"]
    official = figure.legends[0].get_texts()[0].get_text()
    assert official == "official run, ×0.01 at epoch 160; a point every 4 epochs"
    assert figures.moved_drop(frame(rows[3:]), curves) is None


def test_ablation_calls_the_range_of_few_pairs_no_interval():
    def entries(pairs, **more):
        """Of the legend, with so many pairs of one changed run; `more` with one of another."""
        rows = [run(seed=seed) for seed in range(pairs)]
        rows += [run(seed=seed, recipe={"drop": 0.1}) for seed in range(pairs)]
        rows += [run(seed=seed, **more) for seed in range(3)] if more else []
        figure = figures.ablation(frame(rows))
        assert figure.legends[0].get_window_extent().width < figure.bbox.width
        return [text.get_text() for text in figure.legends[0].get_texts()[2:]]

    assert entries(3) == ["range of the 3 pairs holds zero"]
    assert entries(4) == ["95 % interval holds zero"]
    assert entries(1) == ["one pair of runs"]
    assert entries(4, model={"init": "kaiming"}) == ["95 % interval (of 3 pairs their range) holds zero"]


def test_ablation_has_a_mark_for_each_change_coloured_where_the_interval_leaves_out_zero():
    errors = {"": (30.0, 31.0), 'model.init="kaiming"': (32.0, 34.0), "recipe.drop=0.1": (31.0, 30.0)}
    rows = [
        run(seed=seed, error=error, **{"model": {"init": "kaiming"}} if "init" in word else {"recipe": {"drop": 0.1}})
        if word
        else run(seed=seed, error=error)
        for word, pair in errors.items()
        for seed, error in enumerate(pair)
    ]
    rows.append(run(kind="focal", gamma=1.0, error=25.0))
    rows.append(run(kind="focal", gamma=1.0, error=24.0, recipe={"drop": 0.1}))
    figure = figures.ablation(frame(rows))
    softmax, balanced, focal, _ = figure.axes
    assert suptitles(figure) == ["Long-tailed CIFAR-10, imbalance factor 100"]
    assert titles(figure)[0] == "Softmax\n30.50 ± 0.71 (2)" and len(titles(figure)) == 4
    assert [label.get_text() for label in softmax.get_yticklabels()] == [
        "Initial weights: Kaiming",
        "Learning rate drops: ×0.1",
    ]
    zero, init, mean, drop, _ = softmax.get_lines()
    assert list(init.get_xdata()) == [2.0, 3.0] and init.get_color() == mean.get_color() == figures.RED
    assert list(mean.get_xdata()) == [2.5] and list(mean.get_ydata()) == [0]
    assert list(drop.get_xdata()) == [-1.0, 1.0] and drop.get_color() == zero.get_color()  # undecided
    assert len(balanced.get_lines()) == 1  # nothing but the line at zero
    (single,) = [line for line in focal.get_lines() if line.get_marker() == "o"]
    assert (single.get_xdata()[0], single.get_markerfacecolor()) == (-1.0, "none")
    left, right = focal.get_xlim()  # the panels' own: two standard deviations of a difference of single runs at least
    assert (left, right) == softmax.get_xlim() and left == pytest.approx(-1.98, abs=0.01) and right > 3
    assert figures.ablation(frame(rows[:2])) is None
    ports = [run(factor=200.0, beta=0.9999, error=error, **changed) for error, changed in ((32.0, {}), (34.0, PORTS))]
    assert suptitles(figures.ablation(frame([*rows, *ports])))[1:] == ["Long-tailed CIFAR-10, imbalance factor 200"]


def test_gain_by_detail_is_in_colour_where_it_differs_from_the_defaults():
    def four(gain, less):
        """For seed 0 and 1: the default gains `gain`, changed it gains so much `less`."""
        ends = [(beta, seed, changed) for beta in (0.0, 0.9999) for seed in (0, 1) for changed in ({}, PORTS)]
        return [
            run(factor=200.0, beta=b, seed=seed, error=35 - (b > 0) * (gain[seed] - bool(c) * less[seed]), **c)
            for b, seed, c in ends
        ]

    rows = four((4.0, 2.0), (1.0, 1.5))
    figure = figures.gain_by_detail(frame(rows))
    (ax,) = figure.axes
    assert suptitles(figure) == ["Long-tailed CIFAR-10, imbalance factor 200"]
    assert titles(figure) == ["Softmax β 0.9999"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["Default configuration", tables.TOGETHER]
    before, mean, after, changed, line, zero = ax.get_lines()
    assert list(before.get_xdata()) == [2.0, 4.0] and mean.get_xdata()[0] == line.get_xdata()[0] == 3.0
    assert list(after.get_xdata()) == [0.5, 3.0] and changed.get_xdata()[0] == 1.75 and zero.get_xdata()[0] == 0
    assert changed.get_color() == figures.BLUE != mean.get_color()  # the intervals overlap, the pairs agree
    figure = figures.gain_by_detail(frame(four((4.0, 2.0), (1.0, -0.5))))
    assert figure.axes[0].get_lines()[3].get_color() == zero.get_color()
    alone = figures.gain_by_detail(frame([row for row in rows if row["seed"] == 0])).axes[0].get_lines()[3]
    assert (alone.get_color(), alone.get_markerfacecolor()) == (zero.get_color(), "none")  # one pair tells nothing
    assert figures.gain_by_detail(frame([row for row in rows if not row["overrides"]])) is None


def test_head_against_tail_has_a_point_for_each_setting():
    groups = {"error_many": 10.0, "error_few": 40.0, "groups": "shots"}
    rows = [run("cifar100_lt", **groups), run("cifar100_lt", seed=1, **groups | {"error_few": 50.0})]
    rows += [run("cifar100_lt", kind="focal", gamma=2.0, beta=0.99, **groups | {"error_many": 20.0})]
    rows += [run("cifar100_lt", 10.0, error_many=1.0, error_medium=2.0, groups="shots")]  # fewer settings
    no_few = {"error_many": 5.0, "error_medium": 6.0, "groups": "shots"}
    rows += [run("cifar20_lt", 10.0, beta=beta, **no_few) for beta in (0.0, 0.9)]
    medium, few = figures.head_against_tail(frame(rows)).axes
    points = {(*line.get_xdata(), *line.get_ydata(), line.get_color(), line.get_marker()) for line in few.get_lines()}
    assert points == {(10.0, 45.0, figures.BETAS[0.0], "o"), (20.0, 40.0, figures.BETAS[0.99], "v")}
    assert few.get_ylabel() == "error on classes of < 20 images, %"
    assert medium.get_ylabel() == "error on classes of 20 to 100 images, %"
    assert [line.get_ydata()[0] for line in medium.get_lines()] == [6.0, 6.0]


def test_cifar_is_shown_in_the_official_recipe_and_other_data_in_the_commonest():
    small = {"model": {"depth": 8}, "recipe": {"epochs": 60}}
    rows = []
    for beta in (0.0, 0.9):
        for seed in (0, 1):
            rows += [
                run(beta=beta, seed=seed, error=50.0, **small),
                run("digits_lt", 100.0, beta=beta, seed=seed, **small),
            ]
        rows += [run(beta=beta, error=20.0), run("digits_lt", beta=beta, error=50.0, model={"depth": 14})]
    figure = figures.error_against_beta(frame(rows))
    assert suptitles(figure) == ["Long-tailed digits: 2 runs each, fp32", "Long-tailed CIFAR-10: 1 run each, fp32"]
    assert [ax.get_lines()[0].get_ydata()[:2].tolist() for ax in figure.axes] == [[30.0, 30.0], [20.0, 20.0]]


# -- all of them -------------------------------------------------------------------------------------------------------


def test_without_runs_only_closed_forms_are_drawn(tmp_path):
    empty = store.load(tmp_path)
    assert [name for name, figure in drawn(empty).items() if figure] == ["fig3", "fig4", "fig6"]


def test_miniature_draws_all_that_it_has_runs_for(miniature):
    assert [name for name, figure in drawn(miniature).items() if not figure] == [
        "fig7",
        "fig9",
        "gain_by_detail",
        "detail_curves",
        "moved_drop",
    ]


@pytest.mark.parametrize("published", [False, True], ids=["miniature", "published"])
def test_figures_fit_a_paper_and_legends_cover_no_data(miniature, published):
    for name, figure in drawn(store.load(ROOT / "results") if published else miniature).items():
        if figure is None:
            continue
        assert figure.get_figwidth() in (3.3, 6.9), name
        figure.draw_without_rendering()
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
        assert min(text.get_fontsize() for text in texts) >= 7, name
        boxes = [part.get_tightbbox() for part in (*figure.axes, *figure.legends)]
        boxes += [part.get_window_extent() for part in figure.findobj(Text) if part.get_text() in suptitles(figure)]
        page = figure.bbox.padded(1)
        assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes), name
        assert all(page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes), name
        for legend in figure.legends:
            assert not any(legend.get_window_extent().overlaps(ax.get_tightbbox()) for ax in figure.axes), name
        for ax in figure.axes:
            if ax.get_legend():
                box = ax.get_legend().get_window_extent()
                for line in ax.get_lines():
                    points = ax.transData.transform(np.transpose(line.get_data()))
                    assert not any(box.contains(*point) for point in points), name


def test_colours_and_markers_are_distinct():
    _, colours, markers = zip(*figures.LOSSES.values(), strict=True)
    for looks in (colours, markers, figures.BETAS.values(), figures.FACTOR_COLOURS.values()):
        assert len(set(looks)) == 5


def test_drawn_again_the_files_are_the_same_byte_by_byte(miniature, tmp_path):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        figures.save(figures.fig5(miniature.runs, GRIDS), tmp_path / folder / "fig5")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("first", "second"))
    assert set(first) == {"fig5.svg", "fig5.png"}
    assert first == second
    assert b"date" not in first["fig5.svg"].split(b"<defs>")[0]


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_on_a_full_disk_a_figure_stays_as_it_was(tmp_path, kind, monkeypatch):
    kept = {path.name: path.read_bytes() for path in figures.save(figures.fig4(), tmp_path / "fig")}
    whole = disk.whole

    @contextlib.contextmanager
    def full(path):
        with whole(path) as file:
            if path.suffix == f".{kind}":
                file.write = lambda *given: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
            yield file

    monkeypatch.setattr(disk, "whole", full)
    with pytest.raises(UserError, match=rf"^{tmp_path} cannot be written to \(No space left on device\): make room"):
        figures.save(figures.fig3(), tmp_path / "fig")
    now = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert now.keys() == kept.keys() and now[f"fig.{kind}"] == kept[f"fig.{kind}"]


# -- the script --------------------------------------------------------------------------------------------------------


def test_script_draws_what_it_can_and_says_what_makes_the_rest(tmp_path, monkeypatch, capsys):
    stale = tmp_path / "figures" / "fig8.png"
    stale.parent.mkdir()
    stale.touch()
    store.publish(store.read_folders([]), tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures.py", "--results", str(tmp_path), "fig3", "fig8"])
    script().main()
    assert sorted(path.name for path in stale.parent.iterdir()) == ["fig3.png", "fig3.svg"]
    assert "fig8: not drawn, for want of runs; make reproduce-table TABLE=grid10" in capsys.readouterr().out


def test_script_says_so_when_it_cannot_delete_a_stale_figure(tmp_path, monkeypatch):
    (tmp_path / "figures" / "fig8.svg").mkdir(parents=True)
    store.publish(store.read_folders([]), tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures.py", "--results", str(tmp_path), "fig8"])
    with pytest.raises(UserError, match=rf"^{tmp_path / 'figures'} cannot be written to \(Is a directory\)"):
        script().main()


def test_script_draws_unpublished_runs_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["figures.py", "--runs", str(MINIATURE), "--out", str(tmp_path), "fig5"])
    script().main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fig5.png", "fig5.svg"]


def test_script_leaves_published_figures_alone_when_it_draws_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published = tmp_path / "results" / "figures" / "fig7.png"
    published.parent.mkdir(parents=True)
    published.touch()
    monkeypatch.setattr(sys, "argv", ["figures.py", "--runs", str(MINIATURE), "fig3", "fig7"])
    script().main()
    assert list(published.parent.iterdir()) == [published]
    assert sorted(path.name for path in (tmp_path / "outputs/figures").iterdir()) == ["fig3.png", "fig3.svg"]


def test_script_refuses_folders_that_will_not_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for words, sentence in (
        (
            ["--results", "typo"],
            "^typo has no runs.csv: give --results the folder that scripts/collect.py publishes into",
        ),
        (["--runs", str(MINIATURE), "--out", "file"], r"^file cannot be a folder \(File exists\): choose another"),
    ):
        monkeypatch.setattr(sys, "argv", ["figures.py", *words, "fig3"])
        with pytest.raises(UserError, match=sentence):
            script().main()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_script_names_the_nearest_figure(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["figures.py", "fig55"])
    with pytest.raises(UserError, match="There is no figure 'fig55'; did you mean 'fig5'"):
        script().main()
