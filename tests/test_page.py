"""The HTML page: self-contained, well-formed, every cell with its runs; and the script that writes it."""

import html
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree.ElementTree import canonicalize

import pandas as pd
import pytest
from make_miniature import MINIATURE

from cbl import store
from cbl.report import page, tables
from cbl.report.tables import Table

ROOT = Path(__file__).parents[1]
VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def miniature() -> pd.DataFrame:
    return store.read_folders([MINIATURE / "runs"]).runs


@pytest.fixture(scope="module")
def built(miniature: pd.DataFrame) -> dict[str, Table]:
    return {name: tables.build(name, miniature) for name in tables.NAMES}


@pytest.fixture(scope="module")
def written(built: dict[str, Table], miniature: pd.DataFrame) -> str:
    return page.page(built, miniature)


class Elements(HTMLParser):
    """All elements with their attributes; fails on a tag that is not closed, or closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def cells(text: str, look: str) -> list[dict[str, str | None]]:
    return [a for tag, a in Elements(text).found if tag == "td" and look in (a.get("class") or "").split()]


def test_needs_nothing_but_itself(written: str) -> None:
    elements = Elements(written).found
    assert not {tag for tag, _ in elements} & {"link", "iframe", "object", "base"}
    addresses = [a[key] or "" for _, a in elements for key in ("src", "href", "srcset", "action") if key in a]
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)
    assert "@import" not in written and "url(" not in written and "fetch(" not in written
    targets = {a.get("id") for _, a in elements}
    assert all(address[1:] in targets for address in addresses if address.startswith("#"))


def test_every_cell_is_there_with_its_runs(written: str, built: dict[str, Table]) -> None:
    all_cells = [cell for table in built.values() for panel in table.panels for cell in panel.cells()]
    ours = cells(written, "ours")
    assert len(ours) == len(all_cells) and all(cell["title"] for cell in ours)
    assert len(cells(written, "gap")) == sum(not cell.values for cell in all_cells)
    tip = next(cell["title"] or "" for cell in ours if "Softmax, IF 100\nSoftmax on CIFAR-10" in (cell["title"] or ""))
    assert tip.split("\n")[2:] == [
        "paper: 29.64 %",
        "ours: 35.30 ± 0.30 % (3 runs)",
        "difference: +5.66 points, worse",
        "by seed: 0: 35.00; 1: 35.30; 2: 35.60",
        "lowest of all evaluations: 34.80 % (chosen on the test set)",
        "on synthetic; code synthetic",
    ]
    assert sum("not run (n = 0)" in (cell["title"] or "") for cell in ours) == len(cells(written, "gap"))


@pytest.mark.parametrize(("n", "name"), [(3, "range of the 3 pairs"), (4, "95 % interval")])
def test_the_range_of_few_pairs_is_called_no_interval(n: int, name: str) -> None:
    setting = tables.Setting("digits_lt", 50.0, "softmax", None, 0.9, *tables.DIGITS)
    gain = tables.Cell("gain", setting, values=(1.0,) * n, seeds=("0",) * n, interval=(0.5, 1.5))
    assert page._tip(gain, "Softmax", "β 0.9").split("\n")[4] == f"{name}: +0.50 to +1.50"


def test_colours_run_from_lowest_to_highest_of_a_column(built: dict[str, Table]) -> None:
    panel = built["grid10"].panels[0]
    found = [a for tag, a in Elements(page._panel(panel)).found if tag == "td"]
    rows = [found[i : i + 10] for i in range(0, 250, 10)]
    for column in range(5):
        numbers, shades = [], []
        for (_, row), elements in zip(panel.rows, rows, strict=True):
            for value, element in zip((row[column].paper, row[column].mean), elements[2 * column :][:2], strict=True):
                if value is not None:
                    numbers.append(value)
                    shades.append(int(re.fullmatch(r"--h:(\d+)%", element["style"] or "")[1]))
        order = sorted(range(len(numbers)), key=lambda i: numbers[i])
        assert [shades[i] for i in order] == sorted(shades)
        assert (min(shades), max(shades)) == (0, 100)


def test_lowest_of_a_column_is_bold_and_underlined(built: dict[str, Table]) -> None:
    text = page._panel(built["grid20"].panels[0])  # nothing was run there: the paper's five minima
    assert sorted(re.findall(r"<b><u>([\d.]+)</u></b>", text)) == ["30.90", "35.12", "44.75", "48.52", "54.82"]


def test_texts_of_a_record_are_escaped(miniature: pd.DataFrame) -> None:
    strange = '<script>alert("1")</script> & co'
    runs = miniature.assign(device=strange)
    text = page.page({name: tables.build(name, runs) for name in tables.NAMES}, runs)
    assert strange not in text and html.escape(strange) in text
    assert sum(tag == "script" for tag, _ in Elements(text).found) == 1


def test_without_runs_the_page_says_so(tmp_path: Path) -> None:
    runs = store.load(tmp_path).runs
    text = page.page({name: tables.build(name, runs) for name in tables.NAMES}, runs)
    assert "Nothing was run yet" in text and "What agrees" not in text
    assert len(cells(text, "gap")) == len(cells(text, "ours")) - 17 * 5  # Table 1 is computed


def test_same_input_gives_the_same_bytes(written: str, built: dict[str, Table], miniature: pd.DataFrame) -> None:
    assert page.page(built, miniature) == written


def test_small_figures_are_taken_in(built: dict[str, Table], miniature: pd.DataFrame, tmp_path: Path) -> None:
    small = '<svg xmlns="http://www.w3.org/2000/svg">\n  <!-- a --><path d="M 0 1\nL 2 3" style="fill: #fff"/>\n</svg>'
    (tmp_path / "fig3.svg").write_text(small)
    (tmp_path / "fig4.svg").write_text(f"<svg>{' ' * page.LARGEST_FIGURE}</svg>")
    (tmp_path / "fig3.png").write_bytes(b"")
    images = [a for tag, a in Elements(page.page(built, miniature, tmp_path)).found if tag == "img"]
    assert [image["alt"] for image in images] == ["Figure 3"]
    kind, _, taken = (images[0]["src"] or "").partition(",")
    assert kind == "data:image/svg+xml" and "#" not in taken and '"' not in taken
    assert canonicalize(unquote(taken)) == canonicalize(re.sub(r"\s+", " ", small), strip_text=True)
    assert "Figures</a>" not in page.page(built, miniature, tmp_path / "none")


# -- scripts/render.py -------------------------------------------------------------------------------------------------


def render(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["render.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts/render.py"), run_name="__main__")


def test_render_published_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    store.publish(store.read_folders([MINIATURE / "runs"]), results)
    readme.write_text("before\n<!-- results:begin --><!-- results:end -->\nafter\n")
    render(monkeypatch, "--results", results, "--readme", readme)
    stems = {f"table{name}" if name.isdigit() else name for name in tables.NAMES}
    assert {path.stem for path in (results / "tables").iterdir()} == stems
    assert len(list((results / "tables").iterdir())) == 3 * len(stems)
    Elements((results / "index.html").read_text(encoding="utf-8"))
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "35.30 ± 0.30 (3)" in text


def test_render_of_other_results_leaves_the_readme_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    empty = "<!-- results:begin --><!-- results:end -->"
    Path("README.md").write_text(empty)
    for results in ("other", "results"):
        store.publish(store.read_folders([MINIATURE / "runs"]), results)
    render(monkeypatch, "--results", "other", "--tables", "2")
    assert Path("README.md").read_text() == empty
    render(monkeypatch, "--tables", "2")
    assert "35.30 ± 0.30 (3)" in Path("README.md").read_text(encoding="utf-8")


def test_render_local_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("no results here")
    render(monkeypatch, "--runs", MINIATURE / "runs", "--out", tmp_path / "out", "--tables", "2")
    names = ["index.html", "table2.csv", "table2.md", "table2.tex"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert readme.read_text() == "no results here"
    said = capsys.readouterr()
    assert "table2.md" in said.out and "Skipped" in said.err  # the record that is cut short


def test_render_takes_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "counts.txt").write_text("1000\n2\n")
    counts = f"inaturalist2018={tmp_path / 'counts.txt'}"
    render(monkeypatch, "--runs", MINIATURE / "runs", "--out", tmp_path, "--tables", "1", "--counts", counts)
    assert "| 437,513 | 1,002 ≠ |" in (tmp_path / "table1.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("inat", "3\n2\n", ": Table 1 wants counts of inaturalist2017, inaturalist2018, imagenet, not of 'inat'."),
        ("cifar10_lt", "3\n2\n", ": Table 1 wants counts of inaturalist2017, inaturalist2018, imagenet, not of 'cifar"),
        ("imagenet", "\n", ": the file is empty, but wants a whole number of 1 or more for each class."),
        ("imagenet", "3\n2\n0\n-5\n", ": the file holds -5, but wants a whole number of 1 or more for each class."),
        ("imagenet", "3\n0\n", ": the file holds 0, but wants"),
        ("imagenet", "3\n2.5\n", " cannot be read (invalid literal for int() with base 10: '2.5'): write NAME=FILE"),
    ],
)
def test_render_refuses_counts_that_are_none(
    name: str,
    text: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "counts.txt").write_text(text)
    counts = f"{name}={tmp_path / 'counts.txt'}"
    with pytest.raises(SystemExit) as stopped:
        render(monkeypatch, "--runs", MINIATURE / "runs", "--out", tmp_path / "out", "--counts", counts)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"--counts {counts}{sentence}") and "\n" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--results", "nowhere"], "nowhere has no runs.csv"),
        (["--results", "."], ". has no runs.csv"),
        (
            ["--runs", str(MINIATURE / "second_machine"), "--out", __file__],
            f"{__file__} cannot be a folder (File exists)",
        ),
        (["--runs", "nowhere"], "nowhere is no folder"),
        (
            ["--runs", str(MINIATURE / "second_machine"), "--counts", "imagenet=nowhere"],
            "--counts imagenet=nowhere cannot be read",
        ),
        (
            ["--runs", str(MINIATURE / "second_machine"), "--readme", "README.md"],
            "--readme is for the published runs in their own place: leave it out, or --runs and --out.",
        ),
        (
            ["--results", "nowhere", "--out", "out", "--readme", "README.md"],
            "--readme is for the published runs in their own place: leave it out, or --runs and --out.",
        ),
        (
            ["--results", "nowhere", "--readme", "nowhere.md"],
            "nowhere.md cannot be read (No such file or directory): give --readme a file with a results block.",
        ),
    ],
)
def test_render_refuses_in_one_sentence(
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        render(monkeypatch, *arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(sentence) and "\n" not in said
    assert list(tmp_path.iterdir()) == []
