"""The README is part of the product: its tables are those of the CSVs, and what it names is there."""

import re
import shutil

import numpy as np
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
    flags |= set(re.findall(r"--[a-z-]+", (ROOT / "predict.py").read_text(encoding="utf-8")))
    known = flags | {"--help", "--no-adapter", "--nnodes"}
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
        shutil.copy(of, file)
    monkeypatch.setattr(readme, "FILES", files)
    assert readme.main(["--check"]) == 0
    files[number].write_text(re.sub(r"\| 0\.\d", "| 0.x", files[number].read_text(encoding="utf-8"), count=1))
    assert readme.main(["--check"]) == 1


def test_a_gap_without_bounds_is_shown_without_an_interval_and_an_unknown_one_not_at_all():
    assert [readme.percent(0.5, *ends) for ends in ((0.1, 0.9), (np.nan, np.nan))] == ["50% [10%, 90%]", "50%"]
    assert readme.percent(np.nan, np.nan, np.nan) == ""


def test_each_repair_of_a_library_names_tests_that_there_are():
    named = set(re.findall(r"\btest_\w+", (ROOT / "common" / "patches.py").read_text()))
    there = {name for file in (ROOT / "tests").glob("*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert len(named) > 5 and named <= there, named - there
