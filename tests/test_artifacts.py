import argparse
import errno
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from common import artifacts, settings


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(output_dir=str(tmp_path), preset="demo", force=False, precision="auto", seed=1, epochs=2)


INPUTS = {"dataset/train": "aa"}


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), artifacts.whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert artifacts.read_json(path) == {"old": 1}


def test_a_folder_takes_its_name_whole_and_replaces_the_old_one(tmp_path):
    folder = tmp_path / "model"
    for content in ("old", "new"):
        with artifacts.whole(folder) as temporary:
            temporary.mkdir()
            assert not (temporary / "weights").exists()
            (temporary / "weights").write_text(content)
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_finished_with_the_same_settings_stops_with_exit_code_0(args, capsys):
    folder = artifacts.begin(args, "02_roberta", INPUTS)
    artifacts.finish(args, folder, {"labels": ["negative", "positive"]})
    args.precision = "bf16"  # how, not what
    with pytest.raises(SystemExit) as left:
        artifacts.begin(args, "02_roberta", INPUTS)
    assert left.value.code == 0 and "--force redoes it" in capsys.readouterr().out


def test_interrupted_with_the_same_settings_continues(args):
    folder = artifacts.begin(args, "02_roberta", INPUTS)
    (folder / "half").touch()
    assert artifacts.begin(args, "02_roberta", INPUTS) == folder
    assert (folder / "half").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_or_inputs_are_named_and_nothing_is_deleted(args, stops, finished):
    folder = artifacts.begin(args, "02_roberta", INPUTS)
    if finished:
        artifacts.finish(args, folder, {})
    args.epochs = 3
    stops(lambda: artifacts.begin(args, "02_roberta", INPUTS), "epochs was 2, is 3", "--force", "--output-dir")
    args.epochs = 2
    stops(lambda: artifacts.begin(args, "02_roberta", {"dataset/train": "bb"}), "dataset/train was aa, is bb")
    assert (folder / "started.json").exists()


def test_a_folder_of_an_unknown_run_is_never_adopted(args, stops):
    folder = artifacts.begin(args, "02_roberta", INPUTS)
    (folder / "model").mkdir()
    (folder / "started.json").unlink()
    stops(lambda: artifacts.begin(args, "02_roberta", INPUTS), "unknown run", "--force")


def test_a_finished_step_whose_files_are_gone_or_cut_says_so(args, stops):
    folder = artifacts.begin(args, "02_roberta", INPUTS)
    (folder / "weights").write_text("12345")
    artifacts.finish(args, folder, {})
    for damage in (lambda: (folder / "weights").write_text("123"), (folder / "weights").unlink):
        damage()
        stops(lambda: artifacts.begin(args, "02_roberta", INPUTS), "weights is missing or damaged", "--force")


def test_a_second_process_in_the_same_folder_is_refused(args, tmp_path):
    code = f"import pathlib, common.artifacts as a; a.lock(pathlib.Path({str(tmp_path)!r}, '02_roberta'))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT).returncode == 0  # a lock ends with its process
    artifacts.begin(args, "02_roberta", INPUTS)
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 2 and "another process is at work" in second.stderr


def test_force_begins_anew_and_spares_what_the_step_keeps(args):
    folder = artifacts.begin(args, "02_roberta", INPUTS)
    (folder / "old").touch()
    (folder / "kept").mkdir()
    args.force, args.epochs = True, 5
    artifacts.begin(args, "02_roberta", INPUTS, keep="kept")
    assert sorted(path.name for path in folder.iterdir()) == ["kept", "started.json"]
    assert artifacts.read_json(folder / "started.json")["settings"]["epochs"] == 5


@pytest.mark.parametrize(
    ("step", "maker"),
    [("02_roberta", "02_finetune_roberta.py"), ("runs/final-1", "the command that makes it")],  # of experiments/
)
def test_a_missing_unfinished_or_damaged_input_names_what_makes_it(args, stops, step, maker):
    message = stops(lambda: artifacts.require(args, step, "soft_labels"), f"run {maker} first")
    assert f"{step}/soft_labels/ is missing" in message
    folder = artifacts.begin(args, step, INPUTS)
    stops(lambda: artifacts.require(args, step), "is not finished", f"{maker} again")
    artifacts.finish(args, folder, {})  # without the facts of a step
    stops(lambda: artifacts.read_run(args, step), "run.json is damaged", f"{maker} again")
    (folder / "run.json").write_text('{"step": ')
    stops(lambda: artifacts.read_json(folder / "run.json"), "run.json is damaged")


def test_a_folder_that_cannot_be_written_is_one_sentence(args, stops, tmp_path):
    (tmp_path / "file").touch()
    args.output_dir = str(tmp_path / "file")
    stops(lambda: artifacts.begin(args, "02_roberta", INPUTS), "cannot be written", "another --output-dir")


def test_run_json_holds_what_a_reader_needs(args):
    folder = artifacts.begin(args, "02_roberta", INPUTS)
    artifacts.finish(args, folder, {"max_length": 512})
    run = json.loads((folder / "run.json").read_text())
    needed = {"settings", "inputs", "facts", "seed", "versions", "git_commit", "wall_time_s", "peak_memory_mb"}
    assert needed <= run.keys()
    assert run["versions"]["torch"] and run["facts"] == {"max_length": 512} and run["inputs"] == INPUTS


def test_other_reviews_or_another_split_than_the_earlier_step_read_are_refused(args, stops):
    args.validation_samples = 20
    folder = artifacts.begin(args, "02_roberta", INPUTS)
    artifacts.finish(args, folder, {"labels": ["negative", "positive"]})
    run = artifacts.read_json(folder / "run.json")
    artifacts.refuse_conflict(args, run, INPUTS)
    swapped = run | {"facts": {"labels": ["positive", "negative"]}}
    stops(lambda: artifacts.refuse_conflict(args, swapped, INPUTS), "numbered the labels", "run it again")
    other = {"dataset/train": "bb"}
    stops(lambda: artifacts.refuse_conflict(args, run, other), "02_finetune_roberta.py read other reviews")
    args.validation_samples = 30
    stops(lambda: artifacts.refuse_conflict(args, run, INPUTS), "--validation-samples 20")


def test_a_full_disk_is_one_sentence(tmp_path, stops):
    def fill():
        with artifacts.whole(tmp_path / "table.csv"):
            raise OSError(errno.ENOSPC, "No space left on device")

    stops(fill, "disk is full", "continues")


@pytest.mark.parametrize("finished", [True, False])
def test_a_flag_that_an_older_run_lacks_had_its_default_there(args, stops, monkeypatch, finished):
    folder = artifacts.begin(args, "02_roberta", INPUTS)
    if finished:
        artifacts.finish(args, folder, {})
    monkeypatch.setattr(settings, "_defaults", {"soft_loss": "kl", "preset": "kaggle"})
    args.soft_loss = "margin"
    stops(lambda: artifacts.begin(args, "02_roberta", INPUTS), "soft_loss was kl, is margin")
    args.soft_loss = "kl"
    if finished:
        with pytest.raises(SystemExit) as left:
            artifacts.begin(args, "02_roberta", INPUTS)
        assert left.value.code == 0
    else:
        assert artifacts.begin(args, "02_roberta", INPUTS) == folder
    stops(lambda: artifacts.begin(args, "02_roberta", INPUTS | {"dataset/test": "cc"}), "dataset/test was absent")
