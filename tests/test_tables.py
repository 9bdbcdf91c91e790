"""The tables of results/: made of two files a question, and equal to what is committed."""

import shutil
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from experiments import tables

QUESTIONS = [file.parent for file in sorted((ROOT / "results").glob("*/predictions.parquet"))]


@pytest.mark.parametrize("folder", QUESTIONS, ids=lambda folder: folder.name)
def test_the_committed_tables_are_to_the_byte_what_the_committed_predictions_say(folder, tmp_path):
    for file in ("predictions.parquet", "runs.csv"):
        shutil.copy(folder / file, tmp_path / file)
    made = tables.make_tables(tmp_path, plot=False)
    others = {"runs.csv", "levers.csv", "few_labels.csv", "textbrewer.csv"} - made.keys()  # of no kept predictions
    assert made and {file.name for file in folder.glob("*.csv")} - others == made.keys()
    for file in made:
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), file
    assert (folder / "predictions.parquet").stat().st_size < 2_000_000
