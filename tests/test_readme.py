"""The README is part of the product: its tables are those of the CSVs, and what it names is there."""

import re
import subprocess
import sys

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_csvs():
    assert len(re.findall(r"<!-- results/\S+\.csv -->", README)) >= 2
    checked = subprocess.run([sys.executable, "results/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr or "run python results/readme.py"


def test_every_file_and_flag_that_it_names_is_there(script):
    for name in re.findall(r"`((?:results|tests|common)/[\w./-]+|\w+\.(?:py|ipynb|txt))`", README):
        assert (ROOT / name).exists(), name
    flags = set()
    for number in ("01", "02", "03", "04a", "04b", "05"):
        flags |= {f"--{flag.replace('_', '-')}" for flag in vars(script(number).parse_args([]))}
    known = flags | {"--help", "--no-adapter", "--nnodes", "--plan"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known
