import argparse
import errno
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


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


INPUTS = {"dataset/train": "aa"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_write_replaces_the_old_file_or_folder_whole_or_not_at_all(tmp_path, kind):
    problems = {"half": RuntimeError, "refused": lambda: settings.Stop("a user error")}
    for content in ("old", "half", "refused", "new"):
        with suppress(RuntimeError, settings.Stop), storage.whole(tmp_path / "model") as temporary:
            if kind == "folder":
                temporary.mkdir()
            (temporary / "weights" if kind == "folder" else temporary).write_text(content)
            if content in problems:
                raise problems[content]()
        file = tmp_path / "model" / "weights" if kind == "folder" else tmp_path / "model"
        assert file.read_text() == ("new" if content == "new" else "old")
        assert names(tmp_path) == ["model"]


FORCED = {"force": True, "epochs": 5}
EMPTY, KEPT, ALL = ["started.json"], ["model", "started.json"], ["half", "model", "started.json"]


def found(args, state):
    """A step's folder in one of begin()'s states: with a part that the step keeps, and with half of its other work."""
    if state in ("finished", "successor"):
        finish_one(args)
    if state in ("nothing", "finished"):
        return
    vars(args).update(FORCED if state in ("successor", "forced") else {})
    work = artifacts.begin(args, "02_roberta", INPUTS, keep=("model",))
    (work / "model").mkdir(exist_ok=True)
    (work / "half").touch()
    if state == "unknown":
        (work / "started.json").unlink()


@pytest.mark.parametrize(
    ("state", "changes", "expected"),  # an exit code, words of an error, or the names in the opened folder
    [
        ("nothing", {}, EMPTY),
        ("unknown", {}, "holds files of an unknown run"),
        ("unknown", FORCED, KEPT),
        ("unfinished", {}, ALL),
        ("unfinished", {"precision": "bf16"}, ALL),  # how, not what
        ("unfinished", {"epochs": 3}, "begun with other settings (epochs was 2, is 3)"),
        ("unfinished", {"dataset/train": "bb"}, "dataset/train was aa, is bb"),
        ("unfinished", {"force": True}, KEPT),
        ("forced", FORCED, ALL),
        ("forced", FORCED | {"precision": "fp32"}, KEPT),  # not the same command: a remedy for a loss of NaN
        ("finished", {}, 0),
        ("finished", {"precision": "bf16"}, 0),
        ("finished", {"epochs": 3}, "finished with other settings (epochs was 2, is 3)"),
        ("finished", {"dataset/train": "bb"}, "dataset/train was aa, is bb"),
        ("finished", {"dataset/test": "cc"}, "dataset/test was absent, is cc"),
        ("finished", FORCED, KEPT),
        ("finished", {"epochs": 5, "again": True}, KEPT),
        ("successor", {}, 0),
        ("successor", {"epochs": 5}, "finished with other settings (epochs was 2, is 5)"),
        ("successor", FORCED, ALL),
        ("successor", FORCED | {"precision": "fp32"}, KEPT),
        ("successor", {"epochs": 6, "again": True}, ALL),
    ],
)
def test_a_folder_is_opened_as_begins_table_says_and_a_finished_step_stays(
    args, tmp_path, stops, capsys, state, changes, expected
):
    before = dict(vars(args))
    found(args, state)
    vars(args).update(before)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    inputs = INPUTS | {name: value for name, value in changes.items() if "/" in name}
    vars(args).update({name: value for name, value in changes.items() if name in before})

    def begin():
        return artifacts.begin(args, "02_roberta", inputs, keep=("model",), again="again" in changes)

    if isinstance(expected, list):
        work = begin()
        assert work.name == ("02_roberta.new" if state in ("finished", "successor") else "02_roberta")
        assert names(work) == expected
        assert storage.read_json(work / "started.json")["settings"]["epochs"] == args.epochs
        stay = tmp_path / "02_roberta" if work.name != "02_roberta" else work / "model"
        files = {path: content for path, content in files.items() if stay in path.parents}
    elif expected == 0:
        with pytest.raises(SystemExit) as left:
            begin()
        assert left.value.code == 0 and "--force redoes it" in capsys.readouterr().out
    else:
        stops(begin, expected, "--force", "--output-dir")
    assert all(path.read_bytes() == content for path, content in files.items())


def finish_one(args):
    """A finished step of one file in a part."""
    folder = artifacts.begin(args, "02_roberta", INPUTS)
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("12345")
    artifacts.finish(args, folder, {"labels": ["negative", "positive"]}, {"accuracy": 0.5})
    return folder


@pytest.fixture
def finished(args):
    return finish_one(args)


def test_run_json_holds_what_a_reader_needs(finished):
    run = storage.read_json(finished / "run.json")
    assert {"settings", "facts", "seed", "versions", "git_commit", "wall_time_s", "peak_memory_mb"} <= run.keys()
    assert run["versions"]["torch"] and run["inputs"] == INPUTS


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


def test_a_second_process_in_the_same_folder_is_refused(args, tmp_path):
    code = f"import pathlib, common.artifacts as a; a.lock(pathlib.Path({str(tmp_path)!r}, '02_roberta'))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT).returncode == 0  # a lock ends with its process
    artifacts.begin(args, "02_roberta", INPUTS)
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 2 and "another process is at work" in second.stderr


def test_a_finished_step_is_read_until_its_successor_is_finished_and_takes_its_place(args, finished, tmp_path):
    args.force, args.epochs = True, 5
    new = artifacts.begin(args, "02_roberta", INPUTS)
    (new / "model").mkdir()
    (new / "model" / "weights").write_text("new")
    assert artifacts.require(args, "02_roberta", "model") == finished / "model" != new / "model"
    artifacts.finish(args, new, {})
    assert names(tmp_path) == ["02_roberta"] and (finished / "model" / "weights").read_text() == "new"
    run = storage.read_json(finished / "run.json")
    assert (run["step"], run["settings"]["epochs"]) == ("02_roberta", 5)


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
    monkeypatch.setattr(settings, "_defaults", {"new_flag": "old", "preset": "kaggle"})
    args.new_flag = "other"
    stops(lambda: artifacts.begin(args, "02_roberta", INPUTS), "new_flag was old, is other")
    args.new_flag = "old"
    with pytest.raises(SystemExit) as left:
        artifacts.begin(args, "02_roberta", INPUTS)
    assert left.value.code == 0


@pytest.mark.slow
def test_whatever_breaks_the_same_command_ends_with_the_same_results_or_a_remedy():
    command = [sys.executable, "tests/drill.py", *"--kills 6 --damages 24 --disks 3".split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tried, survived, detected = map(int, done.stdout.partition("damaged files      ")[2].split()[:3])
    assert tried == survived == 24 and detected >= 12  # the others are for people, or records of a start
