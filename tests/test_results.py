"""The tables of results/: what a row says of a run, by hand and by another library."""

import argparse
import dataclasses
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from scipy.stats import bootstrap
from statsmodels.stats.contingency_tables import mcnemar
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, DataCollatorForLanguageModeling

from common import artifacts, data, device, distill, metrics, models, scoring, training, verbalizer

sys.path.insert(0, str(ROOT))
from results import black_box, distillation, few_labels, side_by_side, tables

CPU = device.Hardware("cpu", "fp32", "CPU")
LABELS = np.arange(200) % 2
REVIEWS = pd.DataFrame({"example_id": map(str, range(200)), "text": "a film", "label": LABELS})


def logits(accuracy: float, seed: int) -> np.ndarray:
    """(200, 2) logits that are right for this share of the labels."""
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(200) >= round(200 * accuracy)
    called = np.where(wrong, 1 - LABELS, LABELS)
    return (np.eye(2)[called] * rng.uniform(1, 2, size=(200, 1))).astype(np.float32)


def keep(folder, name: str, seed: int, scores: np.ndarray, **about) -> None:
    """The two files of a run that says this of the test reviews."""
    about = {"gold": 2000, "transfer": 8000, "teacher": "teacher", "seconds": 12} | about
    tables.keep(folder / "runs", name, seed, about, {"test": scores, "validation": np.nan_to_num(scores)})


@pytest.fixture
def folder(tmp_path):
    """Runs of a control, a student and their teacher."""
    tables.keep_labels(tmp_path / "runs", {"test": REVIEWS, "validation": REVIEWS})
    keep(tmp_path, "control", 1, logits(0.80, 1), transfer=0, teacher=None)
    keep(tmp_path, "logits", 1, logits(0.86, 2))
    keep(tmp_path, "teacher", 42, logits(0.90, 3), transfer=0, teacher=None)
    return tmp_path


SOME = logits(0.8, 0)


def rows_of(folder) -> pd.DataFrame:
    return tables.make_tables(folder)["white_box.csv"].set_index("run")


def test_a_row_says_how_much_of_the_gap_a_student_closes_and_whether_by_chance(folder):
    rows = rows_of(folder)
    assert rows.index.tolist() == ["teacher", "control", "logits"]  # only what was run
    assert rows.loc["logits", "gap_closed"] == pytest.approx((0.86 - 0.80) / (0.90 - 0.80))
    student, control, teacher = logits(0.86, 2), logits(0.80, 1), logits(0.90, 3)
    right = [one.argmax(1) == LABELS for one in (student, control)]
    pairs = [[np.sum(right[0] & right[1]), np.sum(right[0] & ~right[1])], [np.sum(~right[0] & right[1]), 0]]
    assert rows.loc["logits", "mcnemar_p"] == pytest.approx(mcnemar(pairs, exact=True).pvalue, abs=1e-6)
    assert rows.loc["logits", "agreement"] == np.mean(student.argmax(1) == teacher.argmax(1))
    assert rows.loc["logits", "transfer"] == 8000 and rows.loc["control", "transfer"] == 0
    assert rows.loc["control", ["gap_closed", "mcnemar_p"]].isna().all()
    assert pd.read_csv(folder / "white_box.csv")["run"].tolist() == rows.index.tolist()


def test_a_teacher_that_leads_by_less_than_a_point_leaves_no_gap_to_close(folder):
    keep(folder, "teacher", 42, logits(0.805, 3), transfer=0, teacher=None)
    assert rows_of(folder)["gap_closed"].isna().all()


def test_a_teacher_that_read_a_part_is_compared_on_that_part(folder):
    part = logits(0.90, 3)
    part[150:] = np.nan
    keep(folder, "teacher", 42, part, transfer=0, teacher=None)
    rows = rows_of(folder)
    calls = [one[:150].argmax(1) == LABELS[:150] for one in (logits(0.86, 2), logits(0.80, 1), part)]
    of_student, of_control, of_teacher = (np.mean(one) for one in calls)
    assert rows.loc["logits", "gap_closed"] == pytest.approx((of_student - of_control) / (of_teacher - of_control))
    assert rows.loc["logits", "n_test"] == 200 and rows.loc["teacher", "n_test"] == 150
    assert rows.loc["teacher", "accuracy"] == pytest.approx(of_teacher)


def test_what_a_run_keeps_in_half_precision_changes_no_call_and_hardly_a_figure(folder):
    exact = np.random.default_rng(0).normal(0, 3, (200, 2)).astype(np.float32)
    exact[0] = [0, 1e-6]  # as near to a tie as a score comes
    keep(folder, "final", 1, exact)
    kept = tables.read_run(folder / "runs", "final", 1)["scores"]["test"]
    assert np.array_equal(kept.argmax(1), exact.argmax(1))
    assert metrics.nll(LABELS, kept) == pytest.approx(metrics.nll(LABELS, exact), abs=1e-4)


def test_runs_of_other_reviews_are_refused_though_their_labels_are_the_same(folder, stops):
    tables.keep_labels(folder / "runs", {"test": REVIEWS})
    others = REVIEWS.assign(text="another film")
    stops(lambda: tables.keep_labels(folder / "runs", {"test": others}), "other test reviews", "--tables")


@pytest.mark.parametrize("damage", [None, b"", b"PK cut"])
def test_a_damaged_run_is_named_with_what_to_delete(folder, stops, damage):
    file = folder / "runs" / "logits-1.npz"
    file.unlink() if damage is None else file.write_bytes(damage)
    stops(lambda: tables.make_tables(folder), "logits-1.json or its .npz is damaged", "delete both")


def test_a_run_that_lacks_reviews_and_a_json_that_lacks_keys_are_named(folder, stops):
    keep(folder, "logits", 1, logits(0.8, 1)[:100])
    stops(lambda: tables.make_tables(folder), "has not all 200 validation reviews")
    (folder / "runs" / "logits-1.json").write_text("{}")
    stops(lambda: tables.make_tables(folder), "logits-1.json or its .npz is damaged")
    stops(lambda: tables.make_tables(folder / "nowhere"), "holds no runs")


def test_files_that_are_no_runs_are_left_alone(folder):
    (folder / "runs" / "logits-1 copy.json").write_text("{}")
    (folder / "runs" / "few_labels" / ".ipynb_checkpoints").mkdir(parents=True)
    assert rows_of(folder).index.tolist() == ["teacher", "control", "logits"]


@pytest.mark.parametrize("key", ["learning_rate", "batch_size", "max_length", "train", "validation", "transfer"])
def test_a_table_is_not_made_of_runs_with_different_settings_or_reviews(folder, stops, key):
    keep(folder, "logits", 1, logits(0.86, 2), made_from={key: "a"})
    keep(folder, "margin", 1, logits(0.86, 2), made_from={key: "b"})
    stops(lambda: tables.make_tables(folder), "margin-1.json", f"another {key}")


def test_a_student_is_not_shown_beside_another_teacher_than_its_own(folder, stops):
    teacher = tables.read_run(folder / "runs", "teacher", 42)["scores"]["test"]
    keep(folder, "logits", 1, logits(0.86, 2), made_from={"teacher": {"test": tables.digest(teacher)}})
    rows_of(folder)
    keep(folder, "teacher", 42, logits(0.90, 4), transfer=0, teacher=None)
    stops(lambda: rows_of(folder), "logits-1.json learned from another teacher")


def test_a_student_of_few_labels_is_not_shown_when_its_teacher_is_another_one_by_now(folder, stops):
    few, teachers = folder / "runs" / "few_labels" / "50", {"train": logits(0.9, 1), "transfer": logits(0.9, 2)}
    about = {"gold": 34, "transfer": 200, "seconds": 1}

    def keep_students() -> None:
        for name in ("teacher", "tuned_teacher"):
            tables.keep(few, name, 42, about | {"teacher": None, "reviews": {}}, teachers)
        for name, teacher in (("student_of_encoder", "teacher"), ("student_of_llm", "tuned_teacher")):
            kept = tables.read_run(few, teacher, 42)["scores"]
            of = {split: tables.digest(scores) for split, scores in kept.items()}
            tables.keep(few, name, 1, about | {"teacher": teacher, "made_from": {"teacher": of}}, {"test": SOME})

    keep_students()
    for name in ("teacher", "tuned_teacher"):  # of all labels: none of these students learned from them
        of_all = {"teacher": None, "reviews": {"train": "all"}}
        tables.keep(folder / "runs", name, 42, about | of_all, teachers | {"test": SOME, "validation": SOME})
    assert len(tables.make_tables(folder)["few_labels.csv"]) == 2
    for name, student in (("teacher", "student_of_encoder"), ("tuned_teacher", "student_of_llm")):
        negated = {split: -scores for split, scores in teachers.items()}
        tables.keep(few, name, 42, about | {"teacher": None, "reviews": {}}, negated)
        stops(lambda: tables.make_tables(folder), f"50/{student}-1.json learned from another {name}")  # noqa: B023
        keep_students()


def test_a_table_whose_runs_are_gone_is_deleted(folder):
    keep(folder, "final", 1, logits(0.86, 2))
    assert "claims.csv" in tables.make_tables(folder) and (folder / "claims.csv").exists()
    for file in (folder / "runs").glob("final-1.*"):
        file.unlink()
    tables.make_tables(folder)
    assert not (folder / "claims.csv").exists() and (folder / "white_box.csv").exists()
    assert not (folder / "black_box.csv").exists()  # the control alone is none


def test_a_student_is_compared_with_the_control_of_its_own_seed_and_with_the_teacher_that_it_names(folder):
    keep(folder, "control", 2, logits(0.70, 5), transfer=0, teacher=None)
    keep(folder, "logits", 2, logits(0.86, 6))
    rows = rows_of(folder).set_index("seed", append=True)
    assert rows.loc[("logits", 1), "gap_closed"].item() == pytest.approx(0.06 / 0.10)
    assert rows.loc[("logits", 2), "gap_closed"].item() == pytest.approx(0.16 / 0.20)
    keep(folder, "tuned_teacher", 42, logits(0.95, 7), teacher=None)
    keep(folder, "zero_shot_teacher", 42, logits(0.75, 8), teacher=None)
    keep(folder, "zero_shot", 1, logits(0.74, 9), teacher="zero_shot_teacher")
    black = tables.make_tables(folder)["black_box.csv"].set_index(["run", "seed"])
    agreement = np.mean(logits(0.74, 9).argmax(1) == logits(0.75, 8).argmax(1))
    assert black.loc[("zero_shot", 1), "agreement"].item() == pytest.approx(agreement)
    agreement = np.mean(logits(0.80, 1).argmax(1) == logits(0.95, 7).argmax(1))
    assert black.loc[("control", 1), "agreement"].item() == pytest.approx(agreement)


@pytest.mark.parametrize(
    "folder", [runs.parent for runs in tables.TABLES.rglob("runs")], ids=lambda folder: folder.name
)
def test_the_committed_tables_are_what_the_committed_runs_say(folder, tmp_path):
    made_anew = shutil.copytree(folder / "runs", tmp_path / "runs").parent
    made = tables.make_tables(made_anew, without_plot=True)
    by_others = {"levers.csv", "textbrewer.csv"}  # of no committed runs
    assert "white_box.csv" in made and {file.name for file in folder.glob("*.csv")} - by_others == made.keys()
    for file, table in made.items():
        committed = pd.read_csv(folder / file)
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / file), committed, rtol=1e-5, atol=2e-6)
        assert len(table) == len(committed) > 0


def test_the_black_box_runs_share_student_and_control_with_the_white_box():
    assert black_box.RUNS["control"] == distillation.RUNS["control"]
    assert black_box.RUNS["tuned"] == distillation.RUNS["final"]


def test_every_run_has_its_place_in_a_table():
    assert set(distillation.RUNS) | {"teacher"} == set(tables.WHITE_BOX)
    assert set(black_box.RUNS) | {f"{name}_teacher" for name in black_box.TEACHERS} == set(tables.BLACK_BOX)
    assert {*few_labels.RUNS, "nb_svm"} == set(tables.FEW_LABELS)


def test_the_committed_runs_are_of_the_recipes_that_stand_in_the_code():
    recipes = distillation.RUNS | {name: run for name, run in black_box.RUNS.items() if name != "control"}
    runs = tables.read_runs(tables.TABLES / "runs", tuple(recipes), "test", 5000)
    assert len(runs) > 5
    for (name, seed), run in runs.items():
        assert run["made_from"]["run"] == recipes[name] and run["made_from"]["seed"] == seed, name
        epochs = distillation.MLM_EPOCHS if recipes[name]["base"] == "mlm" else None
        assert run["made_from"].get("mlm_epochs") == epochs, name
    more = tables.read_runs(tables.TABLES / "more_unlabelled" / "runs", ("teacher", "control", "final"), "test", 5000)
    teacher = tables.read_run(tables.TABLES / "runs", "teacher", 42)
    assert more["teacher", 42]["weights"] == teacher["weights"]
    for (name, seed), run in more.items():  # the same control and recipe, beside more reviews of the same teacher
        if name == "control":
            assert run["made_from"] == runs[name, seed]["made_from"]
        if name == "final":
            assert run["made_from"]["run"] == recipes[name] and run["transfer"] == 32000
    beside = tables.read_runs(tables.TABLES / "more_unlabelled" / "runs" / "beside", ("final_longer",), "test", 5000)
    assert beside["final_longer", 1]["made_from"] == runs["final_longer", 1]["made_from"]
    for labels, sizes in few_labels.LABELS.items():
        found = tables.read_runs(tables.TABLES / "runs" / "few_labels" / str(labels), few_labels.RUNS, "test", 5000)
        assert len(found) == (3 if labels else 1)
        for (name, _), run in found.items():
            gold = sizes[1] if labels else 0
            recipe = few_labels.recipe(name, labels, gold, 4000, run["made_from"]["batch_size"])
            assert run["made_from"]["run"] == recipe and run["gold"] == gold, (labels, name)


def test_claims_are_of_both_students_and_behind_the_llm_on_what_it_read(folder):
    for seed in (1, 2):
        keep(folder, "control", seed, logits(0.8, seed), transfer=0, teacher=None)
        made_from = {"train": "all", "validation": "v", "transfer": "more", "max_length": 128}
        keep(folder, "final", seed, logits(0.85, 10 + seed), made_from=made_from)
        keep(folder, "tuned", seed, logits(0.9, 20 + seed), teacher="tuned_teacher")
    keep(folder, "control_longer", 2, logits(0.82, 40), transfer=0, teacher=None)
    about = {"gold": 2000, "transfer": 0, "teacher": None, "seconds": None}
    for labels, train, accuracy in ((500, "some", 0.7), (3000, "all", 0.86), (4000, "more", 0.9)):
        few, of = folder / "runs" / "few_labels" / str(labels), {"train": train, "validation": "v"}
        tables.keep(few, "nb_svm", 42, about | {"reviews": of}, {"test": logits(accuracy, 50)})
    beside = folder / "runs" / "beside"  # of other unlabelled reviews, so not among the runs
    for seed, train in ((1, "all"), (2, "some")):
        made_from = {"train": train, "validation": "v", "transfer": "few", "max_length": 128}
        tables.keep(beside, "final_longer", seed, about | {"made_from": made_from}, {"test": logits(0.83, 60)})
    part = logits(0.88, 30)
    part[LABELS == 0] = np.nan  # what it has not read must not count as a call of "negative", which would be right
    keep(folder, "tuned_teacher", 42, part, teacher=None)
    claims = tables.make_tables(folder)["claims.csv"]
    assert claims[["student", "against", "seeds", "against_seeds"]].to_numpy().tolist() == [
        ["final", "control", 2, 2],
        ["final", "control_longer", 2, 1],
        ["final", "final_longer", 2, 1],  # those of the same labels
        ["final", "nb_svm", 2, 1],
        ["tuned", "control", 2, 2],
        ["tuned", "nb_svm", 2, 1],
        ["tuned", "tuned_teacher", 2, 1],
    ]
    assert claims["lead"].tolist()[:6] == pytest.approx([0.05, 0.03, 0.02, -0.01, 0.1, 0.04])
    assert claims["gap_closed"].tolist()[:2] == pytest.approx([0.5, 0.03 / 0.08])
    assert claims["gap_closed"].isna().tolist() == [False] * 2 + [True] * 5
    assert claims["n_test"].tolist() == [200, 200, 200, 200, 200, 200, 100]
    read = LABELS == 1
    called = [np.mean(logits(0.9, 20 + seed)[read].argmax(1) == 1) for seed in (1, 2)]
    behind = np.mean(called) - np.mean(part[read].argmax(1) == 1)
    assert claims["lead"][6] == pytest.approx(behind, abs=1e-6)


def test_what_a_claim_stands_beside_has_the_settings_and_the_teacher_of_the_student(folder, stops):
    made_from = {"train": "all", "validation": "v", "transfer": "more", "max_length": 128}
    keep(folder, "final", 1, logits(0.85, 11), made_from=made_from)
    teacher = {"gold": 2000, "transfer": 0, "teacher": None, "seconds": None}
    tables.keep(folder / "runs", "teacher", 42, teacher, {"test": logits(0.9, 12), "train": SOME, "transfer": SOME})
    kept = tables.read_run(folder / "runs", "teacher", 42)["scores"]

    def keep_beside(**other):
        # another transfer set, and so another digest of what the teacher says of it
        of = {"train": tables.digest(kept["train"]), "transfer": "few"}
        about = {"gold": 2000, "transfer": 8000, "teacher": "teacher", "seconds": None}
        about["made_from"] = made_from | {"transfer": "few", "teacher": of} | other
        tables.keep(folder / "runs" / "beside", "final_longer", 1, about, {"test": logits(0.83, 60)})

    keep_beside()
    assert "final_longer" in tables.make_tables(folder)["claims.csv"]["against"].tolist()
    keep_beside(max_length=512)
    stops(lambda: tables.make_tables(folder), "beside/final_longer-1.json has another max_length (512)")
    keep_beside(teacher={"train": "another", "transfer": "few"})
    stops(lambda: tables.make_tables(folder), "beside/final_longer-1.json learned from another teacher")
    keep_beside()
    keep(folder, "final_longer", 2, logits(0.9, 13), made_from=made_from)  # their mean would be of both transfer sets
    stops(lambda: tables.make_tables(folder), "beside/final_longer-1.json is beside a final_longer in", "delete one")


def test_few_labels_are_a_row_a_student_and_a_line_a_run(folder):
    for labels in (50, 500):
        for name in ("control", "nb_svm"):
            about = {"gold": 1, "transfer": 0, "teacher": None, "seconds": None}
            tables.keep(folder / "runs" / "few_labels" / str(labels), name, 1, about, {"test": logits(0.8, labels)})
    made = tables.make_tables(folder)["few_labels.csv"]
    assert made[["labels", "run"]].to_numpy().tolist() == [
        [50, "control"],
        [50, "nb_svm"],
        [500, "control"],
        [500, "nb_svm"],
    ]
    assert (made["accuracy"] == 0.8).all() and (folder / "few_labels.png").stat().st_size > 1000


def test_no_table_is_made_of_runs_with_different_settings(folder, stops):
    few, about = folder / "runs" / "few_labels", {"gold": 1, "transfer": 0, "teacher": None, "seconds": None}
    for labels, student in ((50, "small"), (500, "large")):
        tables.keep(few / str(labels), "control", 1, about | {"made_from": {"student_model": student}}, {"test": SOME})
    stops(lambda: tables.make_tables(folder), "500/control-1.json has another student_model (large)")
    shutil.rmtree(few)
    for name, train in (("control", "a"), ("nb_svm", "b")):
        tables.keep(few / "50", name, 1, about | {"made_from": {"train": train}}, {"test": SOME})
    stops(lambda: tables.make_tables(folder), "has another train")
    shutil.rmtree(few)
    for name, length in (("control", 128), ("final", 512)):
        tables.keep(folder / "runs", name, 1, about | {"made_from": {"max_length": length}}, {"validation": SOME})
    stops(lambda: tables.make_tables(folder), "final-1.json has another max_length (512)")


def test_a_run_under_another_ones_name_and_damaged_labels_are_told(folder, stops):
    for end in ("json", "npz"):
        shutil.copy(folder / "runs" / f"control-1.{end}", folder / "runs" / f"final-1.{end}")
    stops(lambda: tables.make_tables(folder), "final-1.json", "delete both")
    labels = folder / "runs" / "labels.npz"
    labels.write_bytes(labels.read_bytes()[:100])
    stops(lambda: tables.make_tables(folder), "labels.npz is missing or damaged", "the next run writes both")
    stops(lambda: tables.keep_labels(folder / "runs", {"test": REVIEWS}), "labels.npz is missing or damaged")


@pytest.fixture
def small_proof(tmp_path, tiny):
    """A proof of the tests' tiny student and eight reviews."""
    table = pd.DataFrame({"example_id": list("abcdefgh"), "text": ["good", "bad"] * 4, "label": [1, 0] * 4})
    transfer = table.assign(text=["fine", "dull"] * 4, label=-1)
    reviews = data.Reviews(train=table, validation=table, transfer=transfer, test=table, fingerprints={})
    arguments = ["--student-model", str(tiny / "distilbert"), "--max-length", "16", "--precision", "fp32"]
    args = distillation.make_parser("", distillation.RUNS).parse_args([*arguments, "--learning-rate", "1e-3"])
    args.tables, args.batch_tokens, args.read_test = tmp_path, 256, False
    ids = distillation.encode_reviews(args, reviews)
    folders = (tmp_path / "models", tmp_path / "runs")
    return distillation.Proof(args, CPU, reviews, ids, *folders)


SOFT = {split: np.array([[-1.0, 1], [1, -1]] * 4, dtype=np.float32) for split in ("train", "transfer")}


def make(proof, name: str, soft=SOFT, seed: int = 1, **changed) -> dict:
    """A run of a proof, as tables.read_run gives it."""
    run = distillation.RUNS[name] | {"epochs": 8} | changed
    distillation.make_run(proof, name, run, seed, soft, "teacher")
    return tables.read_run(proof.runs, name, seed)


def weights_of(proof, name: str):
    return proof.folder / f"{name}-1" / "model" / "model.safetensors"


def test_a_finished_run_is_not_trained_again_and_scores_test_when_it_is_asked_to(small_proof):
    first = make(small_proof, "logits")
    assert set(first["scores"]) == {"validation"} and first["gold"] == 8 and first["transfer"] == 8
    assert first["made_from"]["teacher"] == {split: tables.digest(logits) for split, logits in SOFT.items()}
    written = weights_of(small_proof, "logits").stat().st_mtime_ns
    small_proof.args.read_test = True
    assert set(make(small_proof, "logits")["scores"]) == {"validation", "test"}
    assert weights_of(small_proof, "logits").stat().st_mtime_ns == written
    shutil.rmtree(small_proof.folder)  # what a run says is enough
    make(small_proof, "logits")
    assert not (small_proof.folder / "logits-1").exists()


def test_a_run_of_another_recipe_or_teacher_is_not_taken_for_this_one(small_proof, stops):
    make(small_proof, "logits")
    other = SOFT | {"transfer": 2 * SOFT["transfer"]}
    for changed in ({"alpha": 0.5}, {"soft": other}):
        stops(lambda: make(small_proof, "logits", **changed), "runs/logits-1.json was made with other settings")  # noqa: B023
    small_proof.args.read_test = True  # test is still to be read: no reason to train another student in its place
    shutil.rmtree(small_proof.folder)
    stops(lambda: make(small_proof, "logits", alpha=0.5), "runs/logits-1.json was made with other settings")
    make(small_proof, "logits")
    (small_proof.runs / "logits-1.json").unlink()
    stops(lambda: make(small_proof, "logits", alpha=0.5), "models/logits-1 was made with other settings")


def test_a_run_that_was_killed_before_its_first_file_begins_anew(small_proof):
    (small_proof.folder / "logits-1").mkdir(parents=True)
    assert make(small_proof, "logits")["seconds"] is not None


def test_masked_language_modelling_of_other_settings_is_not_reused(small_proof, stops):
    distillation.pretrain(small_proof)
    small_proof.args.learning_rate = 2e-3
    stops(lambda: distillation.pretrain(small_proof), "mlm was made with other settings", "(learning_rate)")


def test_a_control_after_masked_language_modelling_starts_from_its_weights(small_proof):
    assert distillation.base_of(small_proof, distillation.RUNS["control"]) == small_proof.args.student_model
    base = distillation.base_of(small_proof, distillation.RUNS["control_levers"])
    before, after = (models.load_classifier(name).state_dict() for name in (small_proof.args.student_model, base))
    moved = [name for name, weight in before.items() if not torch.equal(weight, after[name])]
    assert any("transformer.layer.0" in name for name in moved)


@pytest.mark.parametrize("other", [{"precision": "bf16"}, {"device": "cpu"}])
def test_a_run_of_another_precision_is_another_run(small_proof, stops, other):
    make(small_proof, "control")
    proof = dataclasses.replace(small_proof, hardware=dataclasses.replace(CPU, **other))
    if "precision" in other:
        stops(lambda: make(proof, "control"), "made with other settings", "(precision)")
    else:
        make(proof, "control")


def test_a_student_at_chance_is_no_measure_but_an_old_mistake_is_shown_as_it_falls(small_proof, stops):
    small_proof.args.learning_rate = 1e-9
    stops(lambda: make(small_proof, "control"), "control is no measure")
    assert not (small_proof.runs / "control-1.json").exists()
    assert make(small_proof, "label_sorted")["gold"] == 4


def trained_with(proof, monkeypatch, name: str, **changed) -> dict:
    """What a run hands to the product's train_student."""
    got = {}

    def train_student(args, hardware, target, train, validation, **weights):
        got.update(weights, args=args, train=train, validation=validation)

    monkeypatch.setattr(distill, "train_student", train_student)
    base, target = distillation.base_of(proof, distillation.RUNS[name] | changed), proof.folder / "model"
    distillation.train_run(proof, distillation.RUNS[name] | changed, 3, base, target, SOFT)
    return got


def test_a_run_trains_by_its_recipe_and_seed_on_its_own_reviews(small_proof, monkeypatch):
    final = trained_with(small_proof, monkeypatch, "final")
    assert (final["epochs"], final["alpha"], final["feature_weight"], final["teacher_width"]) == (4, 0.9, 0.0, None)
    assert (final["args"].seed, final["args"].soft_loss, final["args"].learning_rate) == (3, "kl", 1e-3)
    assert final["train"].labels.tolist() == [1, 0] * 4 + [distill.IGNORED] * 8
    np.testing.assert_array_equal(final["train"].arrays["teacher_logits"], np.concatenate([*SOFT.values()]))
    assert len(final["validation"]) == 8 and final["validation"].labels.tolist() == [1, 0] * 4

    control = trained_with(small_proof, monkeypatch, "control")
    assert (control["epochs"], control["alpha"], control["feature_weight"]) == (6, 0.0, 0.0)
    assert len(control["train"]) == 8 and not control["train"].arrays
    assert trained_with(small_proof, monkeypatch, "margin")["args"].soft_loss == "margin"

    argmax = trained_with(small_proof, monkeypatch, "argmax_labels")
    assert argmax["alpha"] == 0.0 and not argmax["train"].arrays
    assert argmax["train"].labels.tolist() == [1, 0] * 8  # gold where it is known, else the teacher's
    swapped = {split: -logits for split, logits in SOFT.items()}
    monkeypatch.setitem(globals(), "SOFT", swapped)
    assert trained_with(small_proof, monkeypatch, "argmax_labels")["train"].labels.tolist() == [1, 0] * 4 + [0, 1] * 4


def soft_labels_of_02(args, reviews) -> None:
    """A finished 02 whose files hold the reviews in another order."""
    folder = Path(args.output_dir, "02_roberta")
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    for split in ("train", "transfer", "validation"):
        table = getattr(reviews, split).iloc[::-1]
        scores = {"logit_negative": [2.0, -2.0] * 4, "logit_positive": [-2.0, 2.0] * 4}  # the last review is negative
        artifacts.write_table(
            folder / "soft_labels" / f"{split}.parquet", pd.DataFrame({"example_id": table["example_id"], **scores})
        )
    settings = {name: getattr(args, name) for name in distillation.SAME}
    facts = {"labels": ["negative", "positive"]}
    run = {"step": "02_roberta", "settings": settings, "inputs": {}, "facts": facts}
    artifacts.write_json(folder / "run.json", run)


def test_the_kept_teacher_is_02s_by_example_id_and_another_one_is_refused(small_proof, tmp_path, stops):
    args, reviews, runs = small_proof.args, small_proof.reviews, small_proof.runs
    args.output_dir = str(tmp_path / "outputs")
    keep_teacher = lambda: distillation.keep_teacher(args, small_proof.hardware, runs, reviews, test=False)  # noqa: E731
    stops(keep_teacher, "run 02_finetune_roberta.py first")
    soft_labels_of_02(args, reviews)
    for split, wrong, words in (
        ("train", [2.0, -2.0] * 4, "its label order is swapped"),
        ("transfer", [2.0] * 8, "100% of the transfer set positive"),
    ):
        file = Path(args.output_dir, "02_roberta", "soft_labels", f"{split}.parquet")
        right = pd.read_parquet(file)
        artifacts.write_table(file, right.assign(logit_positive=wrong, logit_negative=[-x for x in wrong]))
        stops(keep_teacher, words)
        artifacts.write_table(file, right)
    assert keep_teacher()["scores"]["train"].argmax(1).tolist() == [1, 0] * 4
    shutil.rmtree(tmp_path / "outputs")  # a kept teacher is enough
    assert set(keep_teacher()["scores"]) == {"train", "transfer", "validation"}
    soft_labels_of_02(args, reviews)
    (tmp_path / "outputs" / "02_roberta" / "model" / "model.safetensors").write_bytes(b"others")
    stops(keep_teacher, "teacher-42.json was made with other settings")
    shutil.rmtree(tmp_path / "outputs")
    fewer = dataclasses.replace(reviews, transfer=reviews.transfer[:4])
    stops(
        lambda: distillation.keep_teacher(args, small_proof.hardware, runs, fewer, test=False),
        "teacher-42.json was made with other settings",
    )


def test_hidden_states_are_read_by_example_id(small_proof, tmp_path):
    args, reviews = small_proof.args, small_proof.reviews
    args.output_dir = str(tmp_path / "outputs")
    soft_labels_of_02(args, reviews)
    distillation.keep_teacher(args, small_proof.hardware, small_proof.runs, reviews, test=False)
    for split in ("train", "transfer"):  # the files hold the last review first
        numbers = np.arange(8, dtype=np.float16)[::-1].reshape(8, 1, 1, 1)
        np.save(Path(args.output_dir, "02_roberta", "soft_labels", f"{split}_features.npy"), numbers)
    found = distillation.read_features(args, small_proof.runs, reviews)
    for features, rows in found.values():
        assert features[rows].ravel().tolist() == list(range(8))


@pytest.fixture
def llm_proof(small_proof, tiny, tmp_path):
    """A proof of eight different reviews whose 03 has asked the tests' tiny LLM; of test it reads four."""
    args, of_reviews = small_proof.args, small_proof.reviews
    args.output_dir, args.llm_test_samples = str(tmp_path / "outputs"), 4
    splits = {}
    for split in ("train", "transfer", "test"):
        texts = [f"A {word} {split} number {row}." for row, word in enumerate(["good", "dull"] * 4)]
        splits[split] = getattr(of_reviews, split).assign(text=texts)
    settings = {name: getattr(args, name) for name in distillation.SAME}
    facts = {"labels": ["negative", "positive"], "base": str(tiny / "mistral"), "max_length": 96}
    facts |= {"prompt": verbalizer.PROMPT, "label_words": list(verbalizer.LABEL_WORDS)}
    run = {"step": "03_mistral", "settings": settings, "inputs": {}, "facts": facts}
    artifacts.write_json(Path(args.output_dir, "03_mistral", "run.json"), run)
    return dataclasses.replace(small_proof, reviews=dataclasses.replace(of_reviews, **splits))


def log_odds_of(proof, split: str, prompt: str, adapter: Path | None = None) -> np.ndarray:
    """What the tiny LLM says of a split, by the product's functions."""
    name = artifacts.read_run(proof.args, "03_mistral")["facts"]["base"]
    tokenizer, llm = models.load_tokenizer(name), models.load_llm(name, proof.hardware, adapter)
    ids = verbalizer.encode_prompts(tokenizer, getattr(proof.reviews, split)["text"].tolist(), prompt, 96)
    words = verbalizer.label_token_ids(tokenizer, prompt, verbalizer.LABEL_WORDS)
    log_p = scoring.score_llm(llm, ids, words, tokenizer.pad_token_id, proof.hardware, 256)
    return verbalizer.log_odds(log_p)


def kept_log_odds(proof, name: str, split: str) -> np.ndarray:
    args, reviews, scored = proof.args, proof.reviews, Path(proof.args.output_dir, "black_box")
    kept = black_box.keep_teacher(args, proof.hardware, name, reviews, scored, proof.runs, test=True)
    return kept["scores"][split][:, 1] - kept["scores"][split][:, 0]


def test_the_llm_is_asked_and_calibrated_as_by_04b(llm_proof, stops):
    expected = {split: log_odds_of(llm_proof, split, verbalizer.PROMPT) for split in ("train", "transfer", "test")}
    close = {"atol": 0.01, "rtol": 0.001}  # kept in half precision
    for name, bias in (("zero_shot", 0.0), ("zero_shot_batch", expected["transfer"].mean())):
        for split in ("train", "transfer"):
            np.testing.assert_allclose(kept_log_odds(llm_proof, name, split), expected[split] - bias, **close)
        of_test = kept_log_odds(llm_proof, name, "test")
        read = np.isfinite(of_test)
        assert read.sum() == 4
        np.testing.assert_allclose(of_test[read], (expected["test"] - bias)[read], **close)
    assert np.ptp(expected["test"]) > 0.1 and abs(expected["transfer"].mean()) > 0.1  # or nothing was tested

    file = Path(llm_proof.args.output_dir, "03_mistral", "run.json")
    run = artifacts.read_json(file)
    artifacts.write_json(file, run | {"facts": run["facts"] | {"max_length": 90}})
    stops(lambda: kept_log_odds(llm_proof, "zero_shot", "train"), "zero_shot_teacher-42.json was made with other")


def test_the_tuned_llm_is_asked_with_03s_adapter_and_calibrated(llm_proof, script):
    base = artifacts.read_run(llm_proof.args, "03_mistral")["facts"]["base"]
    flags = argparse.Namespace(gradient_checkpointing=False, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    model, adapter = models.load_llm(base, llm_proof.hardware), Path(llm_proof.args.output_dir, "03_mistral", "adapter")
    model = script("03").with_lora(flags, model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero until it is trained
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(adapter)
    tuned = {one: log_odds_of(llm_proof, one, verbalizer.PROMPT, adapter) for one in ("train", "transfer")}
    as_it_is = log_odds_of(llm_proof, "train", verbalizer.PROMPT)
    assert np.abs(tuned["train"] - as_it_is).max() > 0.1 and abs(tuned["transfer"].mean()) > 0.02
    kept = kept_log_odds(llm_proof, "tuned", "train")
    np.testing.assert_allclose(kept, tuned["train"] - tuned["transfer"].mean(), atol=0.01, rtol=0.001)


def test_the_mistake_of_another_prompt_is_made(llm_proof, monkeypatch):
    monkeypatch.setattr(black_box, "adapter_of", lambda *_: None)
    odds = kept_log_odds(llm_proof, "other_prompt", "transfer")
    other, usual = (log_odds_of(llm_proof, "transfer", one) for one in (black_box.OTHER_PROMPT, verbalizer.PROMPT))
    np.testing.assert_allclose(odds, other - other.mean(), atol=0.01)
    assert np.abs(odds - (usual - usual.mean())).max() > 0.05


def test_the_mistaken_loss_is_transformers_own_over_prompts_and_label_words(tiny):
    llm = AutoModelForCausalLM.from_pretrained(tiny / "mistral").eval()
    prompts, words = [np.array([5, 6, 7, 8]), np.array([9, 10])], [11, 12]
    ids, mask = models.pad(prompts, 0, left=True)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([1, 0])}
    together = black_box.whole_prompt_loss(llm, inputs, words)
    rows = [torch.tensor([[5, 6, 7, 8, 12]]), torch.tensor([[9, 10, 11]])]
    alone = [llm(input_ids=row, labels=row).loss * (row.shape[1] - 1) for row in rows]
    assert together.item() == pytest.approx((sum(alone) / 6).item(), rel=1e-5)


def test_the_mistaken_adapter_is_trained_on_the_mean_of_its_micro_batches(llm_proof, script, monkeypatch):
    file = Path(llm_proof.args.output_dir, "03_mistral", "run.json")
    run, flags = artifacts.read_json(file), ["--batch-size", "8", "--micro-batch-size", "4", "--epochs", "1"]
    own = {"mistral_model": run["facts"]["base"], "lora_dropout": 0.0, "gradient_checkpointing": False}
    asked = {name: run["facts"][name] for name in ("prompt", "label_words", "max_length")}
    trained = vars(script("03").parse_args(flags)) | own | asked
    artifacts.write_json(file, run | {"settings": trained | run["settings"]})
    seen, train = [], training.train
    monkeypatch.setattr(training, "train", lambda trainer, hardware: (seen.append(trainer), train(trainer, hardware)))
    adapter = llm_proof.folder / "adapter"
    black_box.tune_on_whole_prompts(llm_proof.args, CPU, llm_proof.reviews, adapter)
    assert (adapter / "adapter_model.safetensors").exists() and seen[0].args.gradient_accumulation_steps == 2
    rows = training.Collator(seen[0].data_collator.pad_id, left=True)([seen[0].train_dataset[row] for row in range(8)])
    tokenizer = models.load_tokenizer(run["facts"]["base"])
    words = verbalizer.label_token_ids(tokenizer, verbalizer.PROMPT, verbalizer.LABEL_WORDS)
    at_first = black_box.whole_prompt_loss(models.load_llm(run["facts"]["base"], CPU), rows, words).item()
    logged = seen[0].state.log_history[0]["loss"]  # of the only step: LoRA was nothing yet
    assert logged == pytest.approx(at_first, rel=0.05)


def test_nb_svm_of_other_labels_is_not_taken_for_this_one(small_proof, tmp_path, monkeypatch, stops):
    args = few_labels.parse_args(["--student-model", "x", "--output-dir", str(tmp_path)])
    monkeypatch.setattr(data, "load_reviews", lambda *_, **__: small_proof.reviews)
    stops(lambda: few_labels.keep_nb_svm(args, 50, small_proof.runs), "run 01_baseline.py first")
    of = {split: data.fingerprint(small_proof.reviews.train) for split in ("train", "validation", "test")}
    about = {"gold": 8, "transfer": 0, "teacher": None, "seconds": None, "reviews": of}
    tables.keep(small_proof.runs / "few_labels" / "50", "nb_svm", 42, about, {"test": SOFT["train"]})
    few_labels.keep_nb_svm(args, 50, small_proof.runs)
    about["reviews"] = of | {"train": "others"}
    tables.keep(small_proof.runs / "few_labels" / "50", "nb_svm", 42, about, {"test": SOFT["train"]})
    stops(lambda: few_labels.keep_nb_svm(args, 50, small_proof.runs), "nb_svm-42.json was made with other")


def test_few_labels_make_their_students_and_take_the_rest_from_the_other_tables(small_proof, monkeypatch, stops):
    proof = small_proof
    args = few_labels.parse_args(["--runs", "student_of_llm", "--read-test", "--student-model", "x"])
    for name in ("student_model", "max_length", "batch_tokens", "learning_rate"):
        setattr(args, name, getattr(proof.args, name))
    args.output_dir = str(proof.folder)
    monkeypatch.setattr(few_labels, "LABELS", {0: None, 16: (8, 8)})
    monkeypatch.setattr(distillation, "FINAL", distillation.FINAL | {"epochs": 8})
    monkeypatch.setattr(data, "load_reviews", lambda *_, **__: proof.reviews)
    of = {split: data.fingerprint(getattr(proof.reviews, split)) for split in ("train", "transfer")}
    about = {"gold": 0, "transfer": 0, "teacher": None, "seconds": None, "reviews": of, "weights": "no adapter"}
    tables.keep(proof.runs, "zero_shot_batch_teacher", 42, about, SOFT)
    few_labels.make_students(args, proof.hardware, 0, proof.runs)
    made = tables.read_run(proof.runs / "few_labels" / "0", "student_of_llm", 1)
    assert made["gold"] == 0 and made["transfer"] == 8 and set(made["scores"]) == {"validation", "test"}
    assert made["made_from"]["run"]["alpha"] == 1.0

    share = lambda: few_labels.make_students(args, proof.hardware, 16, proof.runs)  # noqa: E731
    stops(share, "tuned, seed 1, is missing")
    tables.keep(proof.runs, "tuned_teacher", 42, about, SOFT)
    at_all = dataclasses.replace(proof, args=args)
    distillation.make_run(at_all, "tuned", distillation.FINAL, 1, SOFT, "tuned_teacher")
    share()
    assert tables.read_run(proof.runs / "few_labels" / "16", "student_of_llm", 1)["gold"] == 8
    monkeypatch.setattr(distillation, "FINAL", distillation.FINAL | {"epochs": 2})
    stops(share, "tuned-1.json was made with other settings")
    assert list(tables.make_tables(proof.runs.parent)["few_labels.csv"]["labels"]) == [0, 16]


@pytest.mark.parametrize(("labels", "reads_validation"), [(0, False), (50, False), (500, True)])
def test_with_few_labels_each_student_learns_from_its_own_teacher(small_proof, monkeypatch, labels, reads_validation):
    args = few_labels.parse_args(["--student-model", small_proof.args.student_model, "--output-dir", "nowhere"])
    reviews, asked, made = small_proof.reviews, [], {}
    monkeypatch.setattr(data, "load_reviews", lambda *_, **__: reviews)
    monkeypatch.setattr(few_labels, "LABELS", {0: None, labels: (8, 8), 3000: (8, 8)} if labels else few_labels.LABELS)

    def of_encoder(args, hardware, runs, reviews, test):
        asked.append(("encoder", args.output_dir, args.max_train_samples, runs))
        return {"scores": SOFT}

    def of_llm(args, hardware, name, reviews, scored, runs, test):
        asked.append((name, args.output_dir, args.max_train_samples, runs))
        return {"scores": SOFT}

    def make_run(proof, name, run, seed, soft, teacher):
        made[name] = teacher, len(soft), len(proof.ids["validation"]), run["gold"]

    monkeypatch.setattr(distillation, "keep_teacher", of_encoder)
    monkeypatch.setattr(black_box, "keep_teacher", of_llm)
    monkeypatch.setattr(distillation, "make_run", make_run)
    few_labels.make_students(args, CPU, labels, small_proof.runs)
    read = 8 if reads_validation else 0
    if labels:
        where, kept_in = str(Path("nowhere", "few_labels", str(labels))), small_proof.runs / "few_labels" / str(labels)
        assert asked == [("encoder", where, 8, kept_in), ("tuned", where, 8, kept_in)]
        assert made == {
            "control": (None, 0, read, "all"),
            "student_of_encoder": ("teacher", 2, read, "all"),
            "student_of_llm": ("tuned_teacher", 2, read, "all"),
        }
    else:  # as it is, calibrated, and kept with the runs of black_box.py
        assert asked == [("zero_shot_batch", "nowhere", 2000, small_proof.runs)]
        assert made == {"student_of_llm": ("zero_shot_batch_teacher", 2, 0, "none")}


def test_the_labels_of_few_labels_are_its_own_to_choose(capsys):
    for flag in ("--max-train-samples", "--validation-samples"):
        with pytest.raises(SystemExit):
            few_labels.parse_args([flag, "500"])
        assert "--labels says how many" in capsys.readouterr().err


def test_flags_that_a_proof_would_ignore_are_refused(capsys):
    for script in (black_box, few_labels, side_by_side):
        for flags in (["--epochs", "3"], ["--force"], ["--seeds", "-1"], ["--num-processes", "2"]):
            with pytest.raises(SystemExit) as left:
                script.parse_args(flags)
            assert left.value.code == 2, flags
        assert "num_processes" not in script.parse_args([])  # detect() then takes one GPU, whatever is in sight
    with pytest.raises(SystemExit):
        side_by_side.parse_args(["--seeds", "1", "2"])


def test_the_claim_compares_seed_means_review_by_review():
    rng = np.random.default_rng(0)
    control, final = rng.random((3, 4000)) < 0.85, rng.random((3, 4000)) < 0.9
    teacher = rng.random((1, 4000)) < 0.92
    row = tables.claim(final, control, teacher)
    lead = final.mean(0) - control.mean(0)
    normal = 1.959964 * lead.std() / np.sqrt(4000)  # the bootstrap's interval of a mean, in the limit
    assert row["seeds"] == 3 and row["lead"] == pytest.approx(final.mean() - control.mean())
    assert row["ci_low"] == pytest.approx(lead.mean() - normal, abs=0.0005)
    assert row["ci_high"] == pytest.approx(lead.mean() + normal, abs=0.0005)
    gap = (final.mean() - control.mean()) / (teacher.mean() - control.mean())
    assert row["gap_closed"] == pytest.approx(gap)
    without = tables.claim(final, control, control[:1])  # no teacher that leads, no gap
    assert without["gap_closed"] is without["gap_low"] is without["gap_high"] is None


def test_a_claims_intervals_are_those_of_scipy_and_wider_where_seeds_count():
    rng = np.random.default_rng(1)
    teacher = rng.random((1, 2000)) < 0.92
    alike = teacher & (rng.random((3, 2000)) < 0.97)
    control = alike & (rng.random((3, 2000)) < np.array([[0.97], [0.94], [0.91]]))  # its seeds differ
    row = tables.claim(alike, control, teacher)
    lead = alike.mean(0) - control.mean(0)
    ours = row["ci_low"], row["ci_high"]
    assert ours == pytest.approx(tuple(bootstrap((lead,), np.mean, method="percentile").confidence_interval), abs=0.001)
    spread = control.mean(1).std() / np.sqrt(3)  # of a mean of three drawn with replacement
    both = 1.959964 * np.hypot(spread, lead.std() / np.sqrt(2000))
    assert row["seeds_high"] - row["seeds_low"] == pytest.approx(2 * both, rel=0.1)
    assert row["gap_low"] < row["gap_closed"] < row["gap_high"]
    one = tables.claim(alike[:1], control[:1], teacher)  # one seed each: nothing to draw
    assert (one["seeds_low"], one["seeds_high"]) == pytest.approx((one["ci_low"], one["ci_high"]))
    of_gap = bootstrap(
        (alike[0], control[0], teacher[0]),
        lambda ours, theirs, best: (ours.mean(-1) - theirs.mean(-1)) / (best.mean(-1) - theirs.mean(-1)),
        paired=True,
        method="percentile",
    ).confidence_interval
    assert (one["gap_low"], one["gap_high"]) == pytest.approx(tuple(of_gap), abs=0.02)


def test_the_surest_part_of_the_transfer_set_is_that_of_the_largest_log_odds():
    gold = np.array([1, 0, 1, 0])
    log_odds = np.array([0.1, -3, 2, -0.2, 5, 1, -4, 0.5])
    logits = np.stack([-log_odds, log_odds], axis=1)
    rows = distillation.chosen_rows(distillation.RUNS["confident"], gold, logits)
    assert rows["train"].tolist() == [0, 1, 2, 3] and rows["transfer"].tolist() == [1, 2, 4, 5, 6, 7]
    rows = distillation.chosen_rows(distillation.RUNS["label_sorted"], gold, None)
    assert gold[rows["train"]].tolist() == [0, 0] and "transfer" not in rows


def test_with_few_labels_the_control_takes_as_many_steps_as_the_students():
    for gold in (34, 400, 2000):
        control = few_labels.recipe("control", 500, gold, transfer=4000, batch=32)
        steps, of_students = control["epochs"] * -(-gold // 32), distillation.FINAL_EPOCHS * -(-(gold + 4000) // 32)
        assert steps == pytest.approx(of_students, rel=0.03) and control["alpha"] == 0
    without = few_labels.recipe("student_of_llm", 0, gold=2000, transfer=4000, batch=32)
    assert without["gold"] == "none" and without["alpha"] == 1


def test_both_tools_see_the_same_padded_batch():
    rows = [{"input_ids": np.arange(1, n + 1)} for n in (3, 5)]
    batch = side_by_side.collator(0, 8)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    assert side_by_side.collator(0, None)(rows)["input_ids"].shape == (2, 5)


def test_both_tools_minimise_the_same_loss(tiny, tmp_path, monkeypatch):
    reason = "TextBrewer serves results/side_by_side.py alone: pip install --no-deps textbrewer==0.2.1.post1"
    textbrewer = pytest.importorskip("textbrewer", reason=reason)
    step, compared = textbrewer.GeneralDistiller.train_on_batch, []

    def both(self, batch, args):
        for projection in self.projs:
            torch.nn.init.zeros_(projection.bias)  # ours has none
        self.model_S.eval()  # no dropout
        total, terms = step(self, batch, args)
        outputs = [
            model(**batch[who], output_hidden_states=True)
            for model, who in ((self.model_S, "student"), (self.model_T, "teacher"))
        ]
        student, teacher = (output.logits.detach() for output in outputs)
        masks = [batch[who]["attention_mask"] for who in ("student", "teacher")]
        layers = distill.mapped_layers(2, len(outputs[1].hidden_states) - 1)
        of_student = [p(models.pool(h, masks[0])) for p, h in zip(self.projs, outputs[0].hidden_states[1:])]
        of_teacher = [models.pool(outputs[1].hidden_states[layer], masks[1]) for layer in layers]
        kl = distill.soft_label_loss(student, teacher, 2.0)
        log_p = torch.log_softmax(teacher / 2.0, dim=-1)
        entropy = -(log_p.exp() * log_p).sum(dim=-1).mean()  # TextBrewer's cross-entropy is KL and this constant
        features = distill.feature_loss(torch.stack(of_student, dim=1), torch.stack(of_teacher, dim=1))
        ours = 0.9 * (kl + 4 * entropy) + 0.1 * distill.hard_label_loss(student, batch["student"]["labels"], 1.0)
        compared.append((total.item(), (ours + side_by_side.FEATURE_WEIGHT * features).item(), features.item()))
        return total, terms

    monkeypatch.setattr(textbrewer.GeneralDistiller, "train_on_batch", both)
    args = side_by_side.parse_args(["--student-model", str(tiny / "distilbert"), "--max-length", "64"])
    train = REVIEWS[:40].assign(text=["good " * (row % 7 + 1) for row in range(40)])
    side_by_side.train_textbrewer(args, CPU, tiny / "roberta", tmp_path, train, None, "as configured")
    assert len(compared) == 2  # batches of 32 and of 8
    for theirs, ours, features in compared:
        assert theirs == pytest.approx(ours, rel=1e-4) and features > 0.1
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_rows_seconds_are_of_an_epoch(monkeypatch, tmp_path):
    monkeypatch.setattr(side_by_side, "train_textbrewer", lambda *_: 50.0)
    monkeypatch.setattr(side_by_side, "train_ours", lambda *_: 20.0)
    monkeypatch.setattr(distillation, "score", lambda *_: logits(0.8, 1))
    args = argparse.Namespace(epochs=2, max_length=16)
    reviews = data.Reviews(train=REVIEWS, validation=REVIEWS, transfer=REVIEWS, test=REVIEWS, fingerprints={})
    for name, seconds in (("textbrewer", 125), ("ours", 50)):
        row = side_by_side.make_row(args, CPU, name, tmp_path, tmp_path, reviews)
        assert row["seconds_per_1000"] == seconds and row["accuracy"] == 0.8 and row["tool"] == name


@pytest.mark.parametrize("order", ["grouped", "given order"])
def test_side_by_side_our_student_reads_each_reviews_own_scores(tiny, tmp_path, monkeypatch, order):
    train = REVIEWS[:12].assign(text=["good " * (row + 1) for row in range(12)])
    numbers = np.arange(12, dtype=np.float32)
    scores = pd.DataFrame({"example_id": train["example_id"], "logit_negative": -numbers, "logit_positive": numbers})
    artifacts.write_table(tmp_path / "train.parquet", scores)
    np.save(tmp_path / "train_features.npy", np.tile(numbers[:, None, None, None], (1, 6, 2, 8)).astype(np.float16))
    args = side_by_side.parse_args(["--student-model", str(tiny / "distilbert"), "--max-length", "64"])
    seen = []
    monkeypatch.setattr(distill.DistillationTrainer, "train", lambda self: seen.append(self))
    side_by_side.train_ours(args, CPU, tmp_path, tmp_path / "student", train, order, None, "as configured")
    dataset, tokenizer = seen[0].train_dataset, models.load_tokenizer(str(tiny / "distilbert"))
    of_text = {tuple(one): row for row, one in enumerate(models.encode(tokenizer, train["text"].tolist(), 64))}
    rows = [of_text[tuple(one)] for one in dataset.ids]
    assert dataset.arrays["teacher_logits"][:, 1].tolist() == rows
    assert dataset.labels.tolist() == train["label"].to_numpy()[rows].tolist()
    assert [dataset[row]["teacher_features"][0, 0, 0] for row in range(12)] == rows
    assert (rows == sorted(rows)) == (order == "grouped")


def test_the_scoring_pass_counts_into_our_time_once_however_many_epochs_follow():
    def row(name: str, seconds: float) -> dict:
        columns = ("tool", "teacher", "order", "padded_to", "attention_dropout")
        described = dict(zip(columns, side_by_side.RUNS[name], strict=True))
        return described | {"seconds_per_1000": seconds, "accuracy": 0.8}

    seconds = {"textbrewer, padded to the limit": 400.0, "textbrewer": 420.0, "scoring pass": 300.0, "ours": 100.0}
    seconds |= {"textbrewer, no attention dropout": 330.0, "ours, no attention dropout": 66.0}
    table = side_by_side.with_ratios({name: row(name, one) for name, one in seconds.items()})
    once = table.set_index("teacher")
    assert once.loc["scored once for 1", "seconds_per_1000"] == 400 and once.loc["scored once for 1", "ratio"] == 1
    assert once.loc["scored once for 3", "seconds_per_1000"] == 200 and once.loc["scored once for 3", "ratio"] == 2
    assert (
        once.loc[["scored once for 1", "scored once for 3"], "accuracy"].isna().all()
    )  # of one epoch, that of 3 is not
    # beside the faster of TextBrewer's rows with the same dropout
    assert table["ratio"].tolist()[3:6] == [4, 1, 5]


@pytest.mark.parametrize("rates", [("distilbert", "dropout", "attention_dropout"),
                                   ("roberta", "hidden_dropout_prob", "attention_probs_dropout_prob")])  # fmt: skip
def test_a_student_without_attention_dropout_keeps_its_other_dropout(tiny, tmp_path, rates):
    name, *rates = rates
    AutoModel.from_pretrained(tiny / name, **dict.fromkeys(rates, 0.1)).save_pretrained(tmp_path)

    as_is, without = (side_by_side.load_student(str(tmp_path), one) for one in ("as configured", "none"))
    rates = [[part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)] for model in (as_is, without)]
    layers = as_is.config.num_hidden_layers
    assert min(rates[0]) > 0 and rates[1].count(0) == layers < len(rates[1])


def test_run_sh_asks_for_runs_that_there_are():
    text = (ROOT / "results" / "distillation" / "run.sh").read_text()
    asked = {name for names in re.findall(r"--runs ([a-z_ ]+) --", text) for name in names.split()}
    assert {"control", "tuned"} <= asked <= {*distillation.RUNS, *black_box.RUNS, *few_labels.RUNS, *side_by_side.RUNS}


@pytest.mark.parametrize("architecture", ["distilbert", "roberta"])
def test_the_loss_of_masked_tokens_alone_is_that_of_transformers_over_all(tiny, architecture):
    name = str(tiny / architecture)
    tokenizer, model = models.load_tokenizer(name), AutoModelForMaskedLM.from_pretrained(name).eval()
    ids = models.encode(tokenizer, ["a good film and a long one", "bad", "it was all right, I think"] * 2, 32)
    batch = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4)([{"input_ids": one} for one in ids])
    theirs = model(**batch)
    assert distillation.masked_loss(model, batch).item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert model(**batch).logits.shape == theirs.logits.shape  # the hook is gone
