"""The tables of results/: what a row says of a run, by hand and by another library."""

import argparse
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from statsmodels.stats.contingency_tables import mcnemar
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

from common import device, metrics, models

sys.path.insert(0, str(ROOT))
from results import black_box, distillation, few_labels, side_by_side, tables

LABELS = np.arange(200) % 2


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
    tables.keep_labels(tmp_path / "runs", {"test": LABELS, "validation": LABELS})
    keep(tmp_path, "control", 1, logits(0.80, 1), transfer=0, teacher=None)
    keep(tmp_path, "logits", 1, logits(0.86, 2))
    keep(tmp_path, "teacher", 42, logits(0.90, 3), transfer=0, teacher=None)
    return tmp_path


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
    with pytest.raises(ValueError, match="other labels of test"):
        tables.keep_labels(folder / "runs", {"test": 1 - LABELS})


def test_the_committed_tables_are_what_the_committed_runs_say(tmp_path):
    made_anew = shutil.copytree(tables.TABLES / "runs", tmp_path / "runs").parent
    made = tables.make_tables(made_anew, without_plot=True)
    assert "white_box.csv" in made
    for file, table in made.items():
        committed = pd.read_csv(tables.TABLES / file)
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / file), committed, rtol=1e-5, atol=2e-6)
        assert len(table) == len(committed) > 0


def test_the_black_box_runs_share_student_and_control_with_the_white_box():
    assert black_box.RUNS["control"] == distillation.RUNS["control"]
    assert black_box.RUNS["tuned"] == distillation.RUNS["final"]


def test_every_run_has_its_place_in_a_table():
    assert set(distillation.RUNS) | {"teacher"} == set(tables.WHITE_BOX)
    assert set(black_box.RUNS) | {f"{name}_teacher" for name in black_box.TEACHERS} == set(tables.BLACK_BOX)
    assert {*few_labels.RUNS, "nb_svm"} == set(tables.FEW_LABELS)


def test_a_claim_is_made_against_the_controls_that_have_all_its_seeds(tmp_path):
    seeds = {"final": (1, 2), "control": (1, 2, 3), "control_longer": (1,), "control_levers": (1, 2)}
    for name, seed in ((name, seed) for name, all_of in seeds.items() for seed in all_of):
        keep(tmp_path, name, seed, logits(0.8, seed))
    runs = tables.read_runs(tmp_path / "runs", tables.WHITE_BOX, "test")
    right = tables.right_by_run(runs, LABELS, "final", tables.CONTROLS)
    assert set(right) == {"final", "control", "control_levers"}
    assert all(of.shape == (2, 200) for of in right.values())
    assert tables.right_by_run(runs, LABELS, "final", ("control_longer",)) == {}


def test_claims_are_of_both_students_and_behind_the_llm_on_what_it_read(folder):
    for seed in (1, 2):
        keep(folder, "control", seed, logits(0.8, seed), teacher=None)
        keep(folder, "final", seed, logits(0.85, 10 + seed))
        keep(folder, "tuned", seed, logits(0.9, 20 + seed), teacher="tuned_teacher")
    part = logits(0.88, 30)
    part[100:] = np.nan
    keep(folder, "tuned_teacher", 42, part, teacher=None)
    claims = tables.make_tables(folder)["claims.csv"]
    assert claims[["student", "against"]].to_numpy().tolist() == [
        ["final", "control"],
        ["tuned", "control"],
        ["tuned", "tuned_teacher"],
    ]
    assert claims["lead"][0] == pytest.approx(0.05) and claims["lead"][1] == pytest.approx(0.1)
    assert claims["gap_closed"][0] == pytest.approx(0.5)
    assert claims["n_test"].tolist() == [200, 200, 100]
    called = [np.mean(logits(0.9, 20 + seed)[:100].argmax(1) == LABELS[:100]) for seed in (1, 2)]
    behind = np.mean(called) - np.mean(part[:100].argmax(1) == LABELS[:100])
    assert claims["lead"][2] == pytest.approx(behind, abs=1e-6)


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


@pytest.fixture
def small_proof(tmp_path, tiny):
    """What distillation.make_run needs, of the tests' tiny student and eight reviews."""
    table = pd.DataFrame(
        {"example_id": list("abcdefgh"), "text": ["good", "bad"] * 4, "label": [1, 0] * 4, "split": "train"}
    )
    reviews = argparse.Namespace(**dict.fromkeys(("train", "validation", "transfer", "test"), table))
    arguments = ["--student-model", str(tiny / "distilbert"), "--max-length", "16", "--precision", "fp32"]
    args = distillation.make_parser("", distillation.RUNS).parse_args(arguments)
    args.tables, args.read_test, args.batch_tokens = tmp_path, False, 256
    hardware, ids = device.Hardware("cpu", "fp32", "CPU"), distillation.encode_reviews(args, reviews)
    soft = {split: np.array([[-1.0, 1], [1, -1]] * 4, dtype=np.float32) for split in ("train", "transfer")}

    def make(name: str, **changed) -> dict:
        run = distillation.RUNS[name] | {"epochs": 1} | changed
        rest = (tmp_path / "models", tmp_path / "runs", reviews, ids, soft, "teacher")
        distillation.make_run(args, hardware, name, run, 1, *rest)
        return tables.read_run(tmp_path / "runs", name, 1)

    return make, args, tmp_path


def test_a_finished_run_is_not_trained_again_and_scores_test_when_it_is_asked_to(small_proof):
    make, args, folder = small_proof
    first = make("logits")
    assert set(first["scores"]) == {"validation"} and first["gold"] == 8 and first["transfer"] == 8
    weights = (folder / "models" / "logits-1" / "model" / "model.safetensors").stat().st_mtime_ns
    args.read_test = True
    assert set(make("logits")["scores"]) == {"validation", "test"}
    assert (folder / "models" / "logits-1" / "model" / "model.safetensors").stat().st_mtime_ns == weights
    shutil.rmtree(folder / "models")  # what a run says is enough
    make("logits")
    assert not (folder / "models" / "logits-1").exists()


def test_a_run_of_another_recipe_is_not_taken_for_this_one(small_proof, capsys):
    make, _, folder = small_proof
    make("logits")
    with pytest.raises(SystemExit):
        make("logits", alpha=0.5)
    assert "runs/logits-1.json was made with other settings" in capsys.readouterr().err
    (folder / "runs" / "logits-1.json").unlink()
    with pytest.raises(SystemExit):
        make("logits", alpha=0.5)
    assert "models/logits-1 was made with other settings" in capsys.readouterr().err


def test_the_claim_compares_seed_means_review_by_review():
    rng = np.random.default_rng(0)
    right = {
        name: rng.random((3, 4000)) < p for name, p in (("control", 0.85), ("control_levers", 0.86), ("final", 0.9))
    }
    right["teacher"] = rng.random((1, 4000)) < 0.92
    row = tables.claim(right, "final", ["control", "control_levers"], "teacher")
    lead = right["final"].mean(0) - right["control_levers"].mean(0)
    normal = 1.959964 * lead.std() / np.sqrt(4000)  # the bootstrap's interval of a mean, in the limit
    assert row["against"] == "control_levers" and row["seeds"] == 3
    assert row["lead"] == pytest.approx(right["final"].mean() - right["control_levers"].mean())
    assert row["ci_low"] == pytest.approx(lead.mean() - normal, abs=0.0005)
    assert row["ci_high"] == pytest.approx(lead.mean() + normal, abs=0.0005)
    first, last = right["control"].mean(), right["teacher"].mean()
    assert row["gap_closed"] == pytest.approx((right["final"].mean() - first) / (last - first))


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


def test_the_scoring_pass_counts_into_our_time_once_however_many_epochs_follow():
    def row(seconds: float) -> dict:
        return {"tool": "x", "teacher": "y", "order": "", "padded_to": "", "seconds_per_1000": seconds, "accuracy": 0.8}

    made = {"textbrewer": row(400.0), "scoring pass": row(300.0), "ours": row(100.0)}
    table = side_by_side.with_ratios(made).set_index("teacher")
    assert table.loc["scored once for 1", "seconds_per_1000"] == 400 and table.loc["scored once for 1", "ratio"] == 1
    assert table.loc["scored once for 3", "seconds_per_1000"] == 200 and table.loc["scored once for 3", "ratio"] == 2
    assert table["ratio"].tolist()[2] == 4


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
