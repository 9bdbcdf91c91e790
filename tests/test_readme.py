"""The README is part of the product: its tables are those of the CSVs, and what it names is there."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from experiments import readme

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_csvs():
    assert all(readme.TABLE.search(file.read_text(encoding="utf-8")) for file in readme.FILES)
    assert readme.main(["--check"]) == 0, "run python experiments/readme.py"


def test_every_file_and_flag_that_it_names_is_there(script):
    for name in re.findall(r"`((?:results|tests|common|experiments)/[\w./-]+|\w+\.(?:py|ipynb|txt))`", README):
        assert (ROOT / name).exists(), name
    flags = set()
    for number in ("01", "02", "03", "04a", "04b", "05"):
        flags |= {f"--{flag.replace('_', '-')}" for flag in vars(script(number).parse_args([]))}
    known = flags | {"--help", "--no-adapter", "--nnodes", "--plan", "--simulate"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def test_the_commands_beside_the_results_are_parts_of_run_sh():
    files = ("results/README.md", "experiments/run.sh")
    results, run_sh = (" ".join((ROOT / file).read_text(encoding="utf-8").split()) for file in files)
    asked = {part for parts in re.findall(r'run\.sh path/to/imdb "?([a-z_ ]+)', results) for part in parts.split()}
    assert len(asked) == 5 and all(f" {part}() {{" in run_sh for part in asked)


@pytest.mark.parametrize("number", [0, 1])
def test_a_figure_changed_by_hand_is_noticed_in_either_readme(number, tmp_path, monkeypatch):
    files = [tmp_path / str(which) for which in range(len(readme.FILES))]
    for file, of in zip(files, readme.FILES, strict=True):
        file.write_text(of.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(readme, "FILES", files)
    assert readme.main(["--check"]) == 0
    files[number].write_text(re.sub(r"\| 0\.\d", "| 0.x", files[number].read_text(encoding="utf-8"), count=1))
    assert readme.main(["--check"]) == 1


def test_runs_are_shown_by_the_mean_of_their_seeds_and_one_seed_by_its_interval():
    row = {"seed": 1, "n_test": 500, "ci_low": 0.86, "ci_high": 0.9, "nll": 0.3, "ece": 0.02, "agreement": 0.95}
    none = {"gap_closed": np.nan, "mcnemar_p": np.nan}
    some = {"gap_closed": 0.5, "mcnemar_p": 0.04}
    table = [row | none | {"run": "control", "accuracy": 0.88}, row | some | {"run": "final", "accuracy": 0.9}]
    table.append(row | {"run": "final", "seed": 2, "accuracy": 0.91, "gap_closed": 0.7, "mcnemar_p": 0.0002})
    lines = readme.as_markdown(pd.DataFrame(table)).splitlines()
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert cells[2] == ["control", "0.8800 [0.8600, 0.9000]", "1", "", "", "0.950", "0.300", "0.020", "500"]
    assert cells[3][:5] == ["final", "0.9050 (0.9000 to 0.9100)", "2", "60%", "0.04, <0.001"]


def test_a_claim_is_shown_by_its_lead_with_the_interval():
    row = {"student": "final", "against": "control", "seeds": 2, "against_seeds": 1, "n_test": 500}
    row |= {"student_accuracy": 0.9, "against_accuracy": 0.88, "lead": 0.02, "ci_low": -0.001, "ci_high": 0.041}
    row |= {"seeds_low": -0.01, "seeds_high": 0.05, "gap_closed": 0.5, "gap_low": 0.1, "gap_high": 0.9}
    unbounded = row | {"gap_low": np.nan, "gap_high": np.nan}
    lines = readme.as_markdown(pd.DataFrame([row, unbounded, unbounded | {"gap_closed": np.nan}])).splitlines()
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    intervals = ["[-0.0010, +0.0410]", "[-0.0100, +0.0500]"]
    assert cells[2] == ["final", "control", "2, 1", "0.9000", "0.8800", "+0.0200", *intervals, "50% [10%, 90%]", "500"]
    assert [row[8] for row in cells[3:]] == ["50%", ""]


def test_few_labels_are_shown_with_a_column_a_number_of_labels():
    table = pd.DataFrame({"labels": [0, 50, 50], "run": ["llm", "control", "control"], "accuracy": [0.8, 0.7, 0.72]})
    cells = [line.replace(" ", "")[1:-1].split("|") for line in readme.as_markdown(table).splitlines()]
    assert cells[0] == ["run", "0", "50"] and cells[2:] == [["control", "", "0.7100"], ["llm", "0.8000", ""]]
