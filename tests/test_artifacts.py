import argparse
import errno
import json
import random
import subprocess
import sys
from contextlib import suppress

import pytest
from conftest import ROOT
from drill import KINDS, damage

from common import artifacts, settings, storage


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(output_dir=str(tmp_path), preset="demo", force=False, precision="auto", seed=1, epochs=2)


INPUTS = {"dataset/train": "aa"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_write_replaces_the_old_file_or_folder_whole_or_not_at_all(tmp_path, kind):
    for content in ("old", "half", "new"):
        with suppress(RuntimeError), storage.whole(tmp_path / "model") as temporary:
            if kind == "folder":
                temporary.mkdir()
            (temporary / "weights" if kind == "folder" else temporary).write_text(content)
            if content == "half":
                raise RuntimeError
        file = tmp_path / "model" / "weights" if kind == "folder" else tmp_path / "model"
        assert file.read_text() == ("new" if content == "new" else "old")
    assert names(tmp_path) == ["model"]


def test_finished_with_the_same_settings_stops_with_exit_code_0_and_holds_what_a_reader_needs(args, finished, capsys):
    run = json.loads((finished / "run.json").read_text())
    assert {"settings", "facts", "seed", "versions", "git_commit", "wall_time_s", "peak_memory_mb"} <= run.keys()
    assert run["versions"]["torch"] and run["inputs"] == INPUTS
    args.precision = "bf16"  # how, not what
    with pytest.raises(SystemExit) as left:
        artifacts.begin(args, "02_roberta", INPUTS)
    assert left.value.code == 0 and "--force redoes it" in capsys.readouterr().out


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_or_inputs_are_named_and_nothing_is_deleted(args, stops, finished):
    folder = artifacts.begin(args, "02_roberta", INPUTS)
    if finished:
        artifacts.finish(args, folder, {})
    args.epochs = 3
    stops(lambda: artifacts.begin(args, "02_roberta", INPUTS), "epochs was 2, is 3", "--force", "--output-dir")
    args.epochs = 2
    stops(lambda: artifacts.begin(args, "02_roberta", {"dataset/train": "bb"}), "dataset/train was aa, is bb")
    if not finished:
        (folder / "half").touch()
        args.precision = "bf16"
        assert artifacts.begin(args, "02_roberta", INPUTS) == folder and (folder / "half").exists()
        (folder / "started.json").unlink()
        stops(lambda: artifacts.begin(args, "02_roberta", INPUTS), "unknown run", "--force")


@pytest.fixture
def finished(args):
    """A finished step of one file in a part."""
    folder = artifacts.begin(args, "02_roberta", INPUTS)
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("12345")
    artifacts.finish(args, folder, {"labels": ["negative", "positive"]}, {"accuracy": 0.5})
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_of_a_finished_step_is_told_with_its_remedy_by_every_reader(args, stops, finished, kind):
    damage(finished / "model" / "weights", kind, random.Random(1))
    words = ("weights is missing or damaged", "--force")
    stops(lambda: artifacts.begin(args, "02_roberta", INPUTS), *words)
    stops(lambda: artifacts.require(args, "02_roberta", "model"), *words)
    stops(lambda: artifacts.verify(finished / "model"), *words)
    assert artifacts.require(args, "02_roberta", "metrics.json")  # another part, which is whole


def test_a_bit_anywhere_in_run_json_is_noticed(args, stops, finished):
    whole = (finished / "run.json").read_bytes()
    for bit in range(0, 8 * len(whole), 61):  # all bits of a byte, at different bytes
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (finished / "run.json").write_bytes(damaged)
        stops(lambda: artifacts.read_run(args, "02_roberta"), "damaged", "02_finetune_roberta.py --force")
    stops(lambda: artifacts.begin(args, "02_roberta", INPUTS), "run.json", "damaged", "--force")
    (finished / "run.json").unlink()
    assert artifacts.begin(args, "02_roberta", INPUTS) == finished  # as if a kill had come before it


def test_a_finished_step_of_before_is_checked_by_its_sizes(args, stops, finished):
    run = json.loads((finished / "run.json").read_text())
    run = {name: value for name, value in run.items() if name != "sha256"} | {
        "files": {"model/weights": 5, "r.html": 9}
    }
    storage.write_json(finished / "run.json", run)
    assert artifacts.require(args, "02_roberta", "model")
    artifacts.verify(finished)  # a report may be drawn again, or edited
    (finished / "model" / "weights").write_text("123")
    stops(lambda: artifacts.require(args, "02_roberta", "model"), "weights is missing or damaged")


def test_a_second_process_in_the_same_folder_is_refused(args, tmp_path):
    code = f"import pathlib, common.artifacts as a; a.lock(pathlib.Path({str(tmp_path)!r}, '02_roberta'))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT).returncode == 0  # a lock ends with its process
    artifacts.begin(args, "02_roberta", INPUTS)
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 2 and "another process is at work" in second.stderr


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_force_leaves_the_finished_step_in_place_until_its_successor_is_finished(args, finished, tmp_path):
    before = (finished / "run.json").read_bytes()
    args.force, args.epochs = True, 5
    new = artifacts.begin(args, "02_roberta", INPUTS)
    assert names(tmp_path) == ["02_roberta", "02_roberta.new"] and names(new) == ["started.json"]
    (new / "model").mkdir()
    (new / "model" / "weights").write_text("new")
    assert artifacts.require(args, "02_roberta", "model") == finished / "model"
    assert (finished / "run.json").read_bytes() == before
    artifacts.finish(args, new, {})
    assert names(tmp_path) == ["02_roberta"] and (finished / "model" / "weights").read_text() == "new"
    run = storage.read_json(finished / "run.json")
    assert (run["step"], run["settings"]["epochs"]) == ("02_roberta", 5)


def test_the_command_that_force_began_continues_its_successor_and_others_find_the_old_step(args, finished, stops):
    args.force, args.epochs = True, 5
    new = artifacts.begin(args, "02_roberta", INPUTS)
    (new / "half").touch()
    assert artifacts.begin(args, "02_roberta", INPUTS) == new and (new / "half").exists()
    args.force = False
    stops(lambda: artifacts.begin(args, "02_roberta", INPUTS), "epochs was 2, is 5", "--force")
    args.epochs = 2
    with pytest.raises(SystemExit) as left:
        artifacts.begin(args, "02_roberta", INPUTS)
    assert left.value.code == 0 and (new / "half").exists()
    args.force, args.epochs, args.precision = True, 5, "fp32"  # not the command that began the successor
    artifacts.begin(args, "02_roberta", INPUTS)
    assert not (new / "half").exists() and (finished / "run.json").exists()


def test_force_begins_an_unfinished_step_anew_and_spares_what_the_step_keeps(args):
    folder = artifacts.begin(args, "02_roberta", INPUTS)
    (folder / "old").touch()
    (folder / "kept").mkdir()
    args.force, args.epochs = True, 5
    assert artifacts.begin(args, "02_roberta", INPUTS, keep=("kept",)) == folder
    assert names(folder) == ["kept", "started.json"]
    assert storage.read_json(folder / "started.json")["settings"]["epochs"] == 5


def test_a_successor_takes_over_undamaged_parts_and_no_write_reaches_the_old_ones(args, finished, capsys):
    for name in ("sound", "flipped"):
        (finished / "model" / name).write_text(name)
    (finished / "run.json").unlink()
    artifacts.finish(args, finished, {})
    damage(finished / "model" / "flipped", "flipped", random.Random(1))
    args.force = True
    new = artifacts.begin(args, "02_roberta", INPUTS, keep=("model", "never_made"))
    assert names(new) == ["model", "started.json"] and names(new / "model") == ["sound", "weights"]
    assert "flipped is damaged" in capsys.readouterr().out
    with storage.whole(new / "model" / "sound") as temporary:
        temporary.write_text("other")
    (new / "model" / "weights").unlink()
    assert (finished / "model" / "sound").read_text() == "sound" and (finished / "model" / "weights").exists()


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_within_the_swap_leaves_a_finished_step_and_the_next_command_completes_it(
    args, finished, tmp_path, monkeypatch, renames
):
    args.force, args.epochs = True, 5
    new, replace, left = artifacts.begin(args, "02_roberta", INPUTS), artifacts.os.replace, [renames]

    def dies(source, target):
        if source.name.startswith("02_roberta"):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(artifacts.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        artifacts.finish(args, new, {"labels": []})
    monkeypatch.undo()
    epochs = artifacts.read_run(args, "02_roberta")["settings"]["epochs"]
    assert epochs == (2 if renames == 0 else 5)  # until the first rename the old one serves
    args.force = False
    with pytest.raises(SystemExit) as finished_with_these:
        artifacts.begin(args, "02_roberta", INPUTS)
    assert finished_with_these.value.code == 0 and names(tmp_path) == ["02_roberta"]


def test_a_step_that_checks_its_own_parts_is_opened_again_beside_its_finished_one(args, finished):
    args.epochs = 5
    new = artifacts.begin(args, "02_roberta", INPUTS, keep=("model",), again=True)
    assert new != finished and (new / "model" / "weights").read_text() == "12345"
    args.epochs = 6
    assert artifacts.begin(args, "02_roberta", INPUTS, keep=("model",), again=True) == new
    assert storage.read_json(new / "started.json")["settings"]["epochs"] == 6


@pytest.mark.parametrize(
    ("step", "maker"),
    [("02_roberta", "02_finetune_roberta.py"), ("runs/final-1", "the command that makes it")],  # of experiments/
)
def test_a_missing_unfinished_or_damaged_input_names_what_makes_it(args, stops, step, maker):
    message = stops(lambda: artifacts.require(args, step, "soft_labels"), f"run {maker} first")
    assert f"{step}/soft_labels/ is missing" in message
    folder = artifacts.begin(args, step, INPUTS)
    stops(lambda: artifacts.require(args, step), "is not finished", f"{maker} again")
    (folder / "run.json").write_text("{}")
    stops(lambda: artifacts.read_run(args, step), "run.json is damaged", f"{maker} --force")


def test_a_folder_that_cannot_be_written_is_one_sentence(args, stops, tmp_path):
    (tmp_path / "file").touch()
    args.output_dir = str(tmp_path / "file")
    stops(lambda: artifacts.begin(args, "02_roberta", INPUTS), "cannot be written", "another --output-dir")


def test_other_reviews_or_another_split_than_the_earlier_step_read_are_refused(args, stops):
    args.validation_samples = 20
    folder = artifacts.begin(args, "02_roberta", INPUTS)
    artifacts.finish(args, folder, {"labels": ["negative", "positive"]})
    run = storage.read_json(folder / "run.json")
    artifacts.refuse_conflict(args, run, INPUTS)
    swapped = run | {"facts": {"labels": ["positive", "negative"]}}
    stops(lambda: artifacts.refuse_conflict(args, swapped, INPUTS), "numbered the labels", "run it again")
    other = {"dataset/train": "bb"}
    stops(lambda: artifacts.refuse_conflict(args, run, other), "02_finetune_roberta.py read other reviews")
    args.validation_samples = 30
    stops(lambda: artifacts.refuse_conflict(args, run, INPUTS), "--validation-samples 20")


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (OSError("10000 requested and 1218 written"), "disk is full"),  # numpy's
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "disk is full"),
        (Exception("File too large (os error 27)"), "disk is full"),  # of tokenizers; safetensors' is alike
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
    ],
)
def test_a_full_or_read_only_disk_is_one_sentence_and_what_was_written_is_deleted(tmp_path, stops, problem, words):
    def fill():
        with storage.whole(tmp_path / "table.csv") as temporary:
            temporary.write_text("half")
            raise problem

    stops(fill, words, "table.csv")
    assert not list(tmp_path.iterdir())


def test_a_flag_that_an_older_run_lacks_had_its_default_there(args, stops, finished, monkeypatch):
    monkeypatch.setattr(settings, "_defaults", {"soft_loss": "kl", "preset": "kaggle"})
    args.soft_loss = "margin"
    stops(lambda: artifacts.begin(args, "02_roberta", INPUTS), "soft_loss was kl, is margin")
    args.soft_loss = "kl"
    with pytest.raises(SystemExit) as left:
        artifacts.begin(args, "02_roberta", INPUTS)
    assert left.value.code == 0
    stops(lambda: artifacts.begin(args, "02_roberta", INPUTS | {"dataset/test": "cc"}), "dataset/test was absent")
