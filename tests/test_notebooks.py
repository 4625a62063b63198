"""The notebooks run on what is published, and are committed without outputs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from cbl import store

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
MINIATURE = Path(__file__).resolve().parent / "miniature" / "runs"


def code(name: str) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(cells: list[nbformat.NotebookNode]) -> list[tuple[str, bool]]:
    """Runs the cells in one kernel, started in notebooks/; of each, what it printed and whether it drew a figure."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.source) for cell in cells])
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    return [
        (
            "".join(output.get("text", "") for output in cell.outputs),
            any("image/png" in output.get("data", {}) for output in cell.outputs),
        )
        for cell in notebook.cells
    ]


def test_effective_number_runs():
    assert sum(figure for _, figure in execute(code("effective_number.ipynb"))) == 4


def test_results_run_on_what_is_published_on_other_runs_and_on_none(tmp_path):
    store.publish(store.read_folders([MINIATURE]), tmp_path / "miniature")
    places = [NOTEBOOKS.parent / "results", tmp_path / "miniature", tmp_path / "nothing"]
    cells = code("results.ipynb")
    for place in places[1:]:
        other = code("results.ipynb")
        assert "results = paper.FOLDER.parent" in other[0].source
        other[0].source = other[0].source.replace("paper.FOLDER.parent", repr(str(place)))
        cells += other
    outputs = execute(cells)
    each = len(outputs) // len(places)
    for i, place in enumerate(places):
        texts, figures = zip(*outputs[i * each : (i + 1) * each], strict=True)
        runs = store.load(place).runs
        assert f"{len(runs)} published runs" in texts[0]
        assert ("None yet: `make reproduce-table`" in texts[0]) == (not runs["status"].eq("done").any())
        assert sum(figures) + sum("No runs for this figure yet." in text for text in texts) == 4
        if place.name != "results":
            assert sum(figures) == (4 if place.name == "miniature" else 0)


def test_what_is_published_is_told_apart():
    cells = [cell for cell in code("results.ipynb") if re.search("^(found|summary|chosen) = ", cell.source, re.M)]
    rows = "summary.duplicated([*recipe, 'loss', 'gamma', 'beta']).sum()"
    columns = "chosen['cell'].nunique() == chosen['beta'].nunique()"
    *_, (printed, _) = execute([*cells, nbformat.v4.new_code_cell(f"print({rows}, {columns})")])
    assert printed == "0 True\n"


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_no_outputs_are_committed(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code(path.name))
