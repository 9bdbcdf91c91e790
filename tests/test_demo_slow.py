"""The whole demo as `make demo` runs it: about four minutes."""

import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT

from common import artifacts


@pytest.mark.slow
def test_the_demo_shows_the_projects_point(tmp_path):
    flags = ["--preset", "demo", "--output-dir", str(tmp_path)]
    for command in (["demo/make.py"], *([script, *flags] for script in artifacts.SCRIPTS.values())):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    table = pd.read_csv(tmp_path / "05_benchmark" / "benchmark.csv").set_index("Type")
    baseline = table.loc["baseline", "Accuracy"].max()
    pairs = {"teacher, fine-tuned": "student, white-box", "teacher, 4-bit + LoRA": "student, black-box"}
    for teacher, student in pairs.items():
        assert table.loc[teacher, "Accuracy"] > baseline + 0.1
        assert table.loc[student, "Accuracy"] > table.loc[teacher, "Accuracy"] - 0.04
        assert table.loc[student, "Accuracy"] > table.loc["control, no teacher", "Accuracy"]
        assert table.loc[student, "Params (M)"] < table.loc[teacher, "Params (M)"]
