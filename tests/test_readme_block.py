"""The README's results block is made from data, and is the one that results/ gives."""

import io
import re
from pathlib import Path

import pandas as pd
import pytest
from make_miniature import MINIATURE

from cbl import store
from cbl.errors import UserError
from cbl.report import formats, page, readme, tables, verdict

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def miniature() -> pd.DataFrame:
    return store.read_folders([MINIATURE / "runs"]).runs


@pytest.fixture(scope="module")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return store.load(tmp_path_factory.mktemp("results")).runs


def is_stale(text: str, runs: pd.DataFrame) -> bool:
    return readme.replace_block(text, readme.block(runs)) != text


def test_the_readme_is_not_stale() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not is_stale(text, store.load(ROOT / "results").runs), "run `make tables`"


def test_published_tables_are_not_stale(tmp_path: Path) -> None:
    published = ROOT / "results/tables"
    runs = store.load(ROOT / "results").runs
    built = {name: tables.build(name, runs) for name in tables.NAMES}
    for path in [path for table in built.values() for path in formats.write(table, tmp_path)]:
        assert (published / path.name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), path.name
    shown = (ROOT / "results/index.html").read_text(encoding="utf-8")
    assert shown == page.page(built, runs, ROOT / "results/figures"), "run `make tables`"


def test_block_is_put_between_its_markers(miniature: pd.DataFrame, nothing: pd.DataFrame) -> None:
    text = f"# Title\n\n{readme.BEGIN}\nstale words\n{readme.END}\n\n## Next\n"
    assert is_stale(text, miniature)
    new = readme.replace_block(text, readme.block(miniature))
    assert new.startswith("# Title\n\n") and new.endswith("\n\n## Next\n") and "stale words" not in new
    assert not is_stale(new, miniature)
    assert readme.replace_block(new, readme.block(miniature)) == new
    assert is_stale(new, nothing)
    assert is_stale(new.replace("35.30", "35.31"), miniature)


@pytest.mark.parametrize(
    "text", ["", readme.BEGIN, f"{readme.END} {readme.BEGIN}", f"{readme.BEGIN}{readme.END}{readme.BEGIN}{readme.END}"]
)
def test_missing_markers_are_named(text: str, nothing: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="results:begin"):
        readme.replace_block(text, readme.block(nothing))


def test_without_runs_it_says_so_and_shows_no_number_of_ours(nothing: pd.DataFrame) -> None:
    said = readme.block(nothing)
    assert "Nothing was run yet: no result of ours is published" in said
    assert "±" not in said and "What agrees" not in said
    assert "- Table 2: all of 72 cells.\n" in said


def test_sentences_count_what_is_there(miniature: pd.DataFrame) -> None:
    said = readme.what_was_run(miniature)
    done = miniature[miniature["status"] == "done"]
    assert said[0].startswith(f"{len(done)} runs of {done['cell'].nunique()} settings: ")
    assert f"fp32 ({(done['dtype'] == 'fp32').sum()}), bf16 (1)." in said[1]
    assert f"{done['seconds'].sum() / 3600:.1f} hours on synthetic; code at synthetic." in said
    assert said[-1] == "1 run failed and left no number."

    built = {name: tables.build(name, miniature) for name in tables.NAMES}
    table2 = next(sentence for sentence in readme.findings(built, miniature) if sentence.startswith("Table 2: "))
    run = {cell.setting: cell for cell in built["2"].cells() if cell.values}
    worse = [cell for cell in run.values() if cell.verdict == "worse"]
    assert (
        f"{len(run)} numbers compared, 0 within two standard errors of the paper, 1 better, {len(worse)} worse"
        in table2
    )
    assert "Better: Softmax on CIFAR-100 IF 100 (−6.68)." in table2
    furthest = max(worse, key=lambda cell: cell.difference or 0.0)
    assert f"Worse: Sigmoid on CIFAR-10 IF 1 ({formats.signed(furthest.difference or 0.0)}); " in table2
    assert f"and {len(worse) - readme.NAMED} more." in table2
    assert "a lower error than the same loss without it in 1 of 1 setting," in table2

    gaps = sum(not cell.values for cell in built["2"].cells())
    assert f"Table 2: {gaps} of 72 cells." in readme.not_run(built)
    assert "Figure 9: all of 125 cells." in readme.not_run(built)


def test_a_change_on_digits_is_named_without_their_own_recipe() -> None:
    setting = tables.Setting("digits_lt", 50.0, "softmax", None, 0.0, *tables.DIGITS)
    changed = tables.changed(setting, "recipe.drop=0.1")
    assert readme._listed([tables.Cell("difference", changed)], [1.5]) == (
        "Softmax on digits IF 50 with recipe.drop=0.1 (+1.50)"
    )


def test_a_change_of_one_pair_of_runs_claims_no_interval() -> None:
    setting = tables.Setting("digits_lt", 50.0, "softmax", None, 0.0, *tables.DIGITS)
    drop, kaiming, not_bn, mean_std = (
        tables.changed(setting, change)
        for change in (
            "recipe.drop=0.1",
            "model.init=kaiming",
            "recipe.decay_scope=not_bn",
            "recipe.input_scaling=mean_std",
        )
    )
    cells = [
        tables.Cell("difference", drop, values=(1.0, 2.0, 3.0), interval=(1.0, 3.0)),
        tables.Cell("difference", kaiming, values=(1.0, -2.0), interval=(-2.0, 1.0)),
        tables.Cell("difference", mean_std, values=(-1.5,)),
        tables.Cell("difference", not_bn),
    ]
    fewest = [tables.Cell("difference", drop, values=(4.0, 5.0, 6.0), interval=(4.0, 6.0))]
    panels = [
        tables.Panel("", [""], [("", [cell]) for cell in shown], apart)
        for shown, apart in ((cells, False), (fewest, True))
    ]
    assert readme._changes(tables.Table("ablation_digits", "", "", "", panels)) == [
        "2 changes tried; in 1 of them the range of the 2 or 3 pairs leaves out zero: Softmax on digits IF 50 with "
        "recipe.drop=0.1 (+2.00, in its classes with the fewest images +5.00).",
        "1 change tried with one pair of runs each, which gives no interval: Softmax on digits IF 50 with "
        "recipe.input_scaling=mean_std (−1.50).",
    ]


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (
            [(1.0, 2.0), (-1.0, -2.0)],
            "1 of 2 settings; the range of the 2 pairs is above zero in 1 and below zero in 1.",
        ),
        (
            [(1.0, 2.0, 3.0, 4.0)],
            "1 of 1 setting; the 95 % interval is above zero in 1 and below zero in 0.",
        ),
        (
            [(1.0, 2.0), (1.0, 2.0, 3.0, 4.0)],
            "2 of 2 settings; the 95 % interval (of 2 pairs their range) is above zero in 2 and below zero in 0.",
        ),
        (
            [(1.0, 2.0), (0.5,)],
            "2 of 2 settings; of the 1 with more than one pair of runs the range of the 2 pairs is above "
            "zero in 1 and below zero in 0.",
        ),
        ([(0.5,)], "1 of 1 setting, from one pair of runs each, which gives no interval."),
    ],
)
def test_a_gain_of_one_pair_of_runs_claims_no_interval(pairs: list[tuple[float, ...]], said: str) -> None:
    setting = tables.Setting("digits_lt", 50.0, "softmax", None, 0.9, *tables.DIGITS)
    cells = [
        tables.Cell("gain", setting, values=values, interval=(min(values), max(values)) if len(values) > 1 else None)
        for values in pairs
    ]
    panel = tables.Panel("", [""], [("", cells)])
    assert readme._gains(tables.Table("digits", "", "", "", [panel])) == [
        f"Class balancing has a lower error than the same loss without it in {said}"
    ]


def test_an_interval_is_called_what_the_bootstrap_gives() -> None:
    for values in ([2.0, 0.0], [2.0, 0.0, 1.0], [2.0, 0.0, 1.0, 1.0]):
        whole = verdict.bootstrap(values).interval == (0.0, 2.0)
        name = f"range of the {len(values)} pairs" if whole else "95 % interval"
        assert verdict.interval_name(len(values)) == name
    assert verdict.interval_name(3, 2, 3) == "range of the 2 or 3 pairs"
    assert verdict.interval_name(20, 3, 2) == "95 % interval (of 2 or 3 pairs their range)"


@pytest.mark.parametrize(
    ("pairs", "name"),
    [((3, 3), "range of the 3 pairs"), ((20, 1), "95 % interval"), ((20, 3), "interval")],
)
def test_the_terminal_calls_the_range_of_few_pairs_no_interval(pairs: tuple[int, ...], name: str) -> None:
    setting = tables.Setting("cifar10_lt", 50.0, "softmax", None, 0.9)
    gains = [tables.Cell("gain", setting, 1.0, (1.0,) * n, interval=(0.5, 1.5) if n > 1 else None) for n in pairs]
    panel = tables.Panel("CIFAR-10", ["IF 50", "IF 20"], [("Gain", gains)])
    formats.show(tables.Table("2", "Table 2", "", "", [panel]), file=(file := io.StringIO()))
    heads = [line[1:].partition("   ")[0].rstrip() for line in file.getvalue().splitlines() if "0.50" in line]
    assert heads == [f"  {name}"]


def test_many_seeds_are_named_by_their_ends() -> None:
    assert readme._numbers(pd.Series([2, 0, 1])) == "0, 1, 2"
    assert readme._numbers(pd.Series(range(20))) == "0 to 19"
    assert readme._numbers(pd.Series([*range(8), 9])) == "0, 1, 2, 3, 4, 5, 6, 7, 9"


def test_top_1_and_top_5_are_two_numbers_of_one_setting() -> None:
    setting = tables.Setting("inaturalist2018", None, "softmax", None, 0.0, "", "resnet50", 90)
    cells = [tables.Cell("error", setting, 42.86, (50.0,)), tables.Cell("error", setting, 21.31, (21.3,))]
    table = tables.Table("3", "Table 3: large data sets", "", "", [tables.Panel("", ["top-1", "top-5"], [("", cells)])])
    said = " ".join(readme._agreement(table))
    assert said.startswith("2 numbers compared, 1 within two standard errors of the paper, 0 better, 1 worse")
    assert "Worse: ResNet-50, Softmax on iNaturalist 2018 (+7.14)." in said


def test_what_the_band_cannot_tell_apart_is_said(nothing: pd.DataFrame) -> None:
    """Of two class-balanced cells that agree with the paper, one would agree with its number without balancing too."""
    plain = tables.Setting("cifar10_lt", 100.0, "softmax", None, 0.0)
    near, far = plain._replace(beta=0.9), plain._replace(beta=0.99)
    errors = [tables.Cell("error", plain, 31.0, (31.0,), run_ids=("a",))]
    errors += [tables.Cell("error", near, 30.0, (30.0,), run_ids=("b",))]
    errors += [tables.Cell("error", far, 27.0, (27.0,), run_ids=("c",))]
    gains = [tables.Cell("gain", near, 1.0, (1.0,)), tables.Cell("gain", far, 4.0, (4.0,))]
    panel = tables.Panel("", ["a", "b", "c"], [("", errors), ("", gains)])
    table = tables.Table("2", "Table 2: long-tailed CIFAR", "", "", [panel])
    wide = "of our 2 class-balanced numbers 1 would also agree with what the paper reports without balancing."
    assert f"The band is wide: {wide}" in readme._agreement(table)
    again = tables.Table("grid10", "Figure 8: the search", "", "", [panel])
    other = tables.Panel("", ["a"], [("", [tables.Cell("error", plain, 31.0, (31.0,), run_ids=("d",))])])
    built = {"2": table, "grid10": again, "grid100": tables.Table("grid100", "Figure 10", "", "", [panel, other])}
    said = readme.findings(built, nothing)
    assert [line.split(":")[0] for line in said] == ["Table 2", "Figure 8 (runs of Table 2)", "Figure 10"]


def test_hours_are_of_the_device_that_runs_share(miniature: pd.DataFrame) -> None:
    shared = miniature.assign(lanes=10, seconds=3600.0)
    assert f"{(shared['status'] == 'done').sum() / 10:.1f} hours on" in " ".join(readme.what_was_run(shared))


def test_every_row_and_table_has_its_command(nothing: pd.DataFrame) -> None:
    said = readme.block(nothing)
    for name in tables.NAMES[1:]:
        assert f"`make reproduce-table TABLE={name}`" in said
    assert "`make reproduce-table`" in said
    rows = re.findall(r"^\| row (.*?) \| `python (scripts/\w+\.py) -m (.*?)` \|", said, re.MULTILINE)
    assert [label for label, _, _ in rows] == list(tables.LABELS.values())
    for _, script, arguments in rows:
        assert (ROOT / script).exists()
        for key, values in re.findall(r"(sweep|dataset|loss)=(\S+)", arguments):
            for value in values.split(","):
                assert (ROOT / f"configs/{key}/{value}.yaml").exists(), arguments
        for pattern in re.findall(r"experiment=glob\((.*?)\)", arguments):
            assert len(list((ROOT / "configs/experiment").glob(f"{pattern}.yaml"))) == 12


def test_tables_of_the_block_have_all_their_columns(miniature: pd.DataFrame) -> None:
    for part in re.findall(r"(?:^\|.*\n)+", readme.block(miniature), re.MULTILINE):
        assert len({line.count("|") for line in part.splitlines()}) == 1


def test_another_dtype_is_held_against_fp32_on_pairs(miniature: pd.DataFrame) -> None:
    done = miniature[(miniature["status"] == "done") & (miniature["dtype"] == "fp32")]
    done = done.sort_values("dataset", key=lambda names: -names.map(names.value_counts())).reset_index(drop=True)
    assert readme._dtypes(done) == []
    shift = pd.Series([0.5 if number % 2 else 1.5 for number in range(len(done))])
    other = done.assign(dtype="bf16", error_last=done["error_last"] + shift.astype("Float64"))
    stranger = other.assign(beta=0.5)  # no run in fp32 is like it
    (said,) = readme._dtypes(pd.concat([done, other, stranger], ignore_index=True))
    assert said.startswith("Arithmetic: the error in bf16 minus that in fp32, in points, of runs that differ in dtype")
    sets = done.groupby("dataset", sort=False).groups
    assert len(sets) > 1
    for name, places in sets.items():
        found = shift[places]
        (mean, interval, pairs) = re.search(
            rf"{tables.TITLES[name]} ([+−][\d.]+)( \[[^]]*\])? \((\d+) pairs?\)", said
        ).groups()
        assert float(mean) == round(found.mean(), 2) and int(pairs) == len(found)
        if len(found) > 3:
            low, high = (float(value) for value in re.search(r"interval \+([\d.]+), \+([\d.]+)\]", interval).groups())
            assert 0.5 <= low < found.mean() < high <= 1.5
    first = tables.TITLES[done["dataset"][0]]
    (said,) = readme._dtypes(pd.concat([done, other.head(1)], ignore_index=True))
    assert said.endswith(f"in dtype alone: {first} +1.50 (1 pair).")
    (said,) = readme._dtypes(pd.concat([done, other.head(3)], ignore_index=True))
    assert said.endswith(f"in dtype alone: {first} +1.17 [range of the 3 pairs +0.50, +1.50] (3 pairs).")
