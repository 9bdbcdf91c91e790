"""kaggle.ipynb from the first cell to the last on the demo, then continued in a second session: about seven minutes."""

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from common import artifacts


def run_notebook(folder: Path, **settings: object) -> dict[str, list]:
    """Run the notebook in `folder` with these lines of its settings cell changed; the outputs of its cells by id."""
    notebook = nbformat.read(ROOT / "kaggle.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if cell.id == "settings")
    for name, value in {"PRESET": "demo", "PROJECT": str(ROOT), **settings}.items():
        cell.source, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", cell.source, flags=re.MULTILINE)
        assert count == 1, name
    folder.mkdir(exist_ok=True)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}}).execute()
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def text(outputs: list) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


def shown_table(folder: Path, outputs: list) -> pd.DataFrame:
    """The benchmark's table, of which these outputs show each row, and a plot."""
    table = pd.read_csv(folder / "outputs/05_benchmark/benchmark.csv")
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    (html,) = [data["text/html"] for data in shown if "<table" in data.get("text/html", "")]
    assert html.count("<tr") == 1 + len(table) and any("image/png" in data for data in shown)
    return table.set_index("Type")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The first session: its folder and its cells' outputs."""
    folder = tmp_path_factory.mktemp("first")
    return folder, run_notebook(folder)


@pytest.mark.slow
def test_run_all_ends_with_a_plot_and_the_table_which_shows_the_projects_point(first):
    folder, cells = first
    table = shown_table(folder, cells["results"])
    for step, script in artifacts.SCRIPTS.items():
        assert f"{script} --preset demo" in text(cells["run"])
        assert f"{step}/ is finished in" in text(cells["run"])
    baseline, control = table.loc["baseline", "Accuracy"].max(), table.loc["control, no teacher", "Accuracy"]
    pairs = {"teacher, fine-tuned": "student, white-box", "teacher, 4-bit + LoRA": "student, black-box"}
    for teacher, student in ((table.loc[one], table.loc[other]) for one, other in pairs.items()):
        assert teacher["Accuracy"] > baseline + 0.1
        assert student["Accuracy"] > max(teacher["Accuracy"] - 0.04, control)
        assert student["Params (M)"] < teacher["Params (M)"]


@pytest.mark.slow
def test_a_second_session_takes_over_what_the_first_left_read_only_and_continues_a_half_finished_step(first, tmp_path):
    earlier = first[0] / "outputs"
    (earlier / "05_benchmark" / "run.json").unlink()
    everything = [earlier, *earlier.glob("**/*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        cells = run_notebook(tmp_path / "second", EARLIER_OUTPUTS=str(earlier))
    finally:
        for path in everything:
            path.chmod(0o755 if path.is_dir() else 0o644)
    *finished, benchmark = artifacts.SCRIPTS
    for step in finished:
        assert f"{step}/ is finished with these settings" in text(cells["run"])
    assert text(cells["run"]).count("was interrupted; continuing.") == 1
    assert f"{benchmark}/ was interrupted; continuing." in text(cells["run"])
    assert "making the demo" not in text(cells["run"])
    shown_table(tmp_path / "second", cells["results"])
