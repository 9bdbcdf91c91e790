"""The tables of results/: what a row says of a run, by hand and by another library."""

import argparse
import re
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from statsmodels.stats.contingency_tables import mcnemar
from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

from common import artifacts, device, models

sys.path.insert(0, str(ROOT))
from results import black_box, distillation, few_labels, side_by_side

LABELS = np.arange(200) % 2


def logits(accuracy: float, seed: int) -> np.ndarray:
    """(200, 2) logits that are right for this share of the labels."""
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(200) >= round(200 * accuracy)
    called = np.where(wrong, 1 - LABELS, LABELS)
    return (np.eye(2)[called] * rng.uniform(1, 2, size=(200, 1))).astype(np.float32)


@pytest.fixture
def table(tmp_path):
    def write(name: str, accuracy: float, seed: int) -> None:
        (tmp_path / f"{name}-{seed}").mkdir()
        np.save(tmp_path / f"{name}-{seed}" / "test_logits.npy", logits(accuracy, seed))
        artifacts.write_json(tmp_path / f"{name}-{seed}" / "seconds.json", {"seconds": 12})
        reviews = {"transfer_reviews": 0 if name == "control" else 8000}
        artifacts.write_json(tmp_path / f"{name}-{seed}" / "made_from.json", reviews)

    write("control", 0.80, 1)
    write("logits", 0.86, 2)
    (tmp_path / "logits-2").rename(tmp_path / "logits-1")
    args = argparse.Namespace(seeds=[1, 2], seed=42, max_train_samples=2000, max_transfer_samples=8000)
    teacher = logits(0.90, 3)
    made = distillation.make_table(args, tmp_path, LABELS, distillation.RUNS, dict.fromkeys(distillation.RUNS, teacher))
    return made.set_index("run"), tmp_path, args, teacher


def test_a_row_says_how_much_of_the_gap_a_student_closes_and_whether_by_chance(table):
    rows, folder, _, teacher = table
    assert rows.index.tolist() == ["control", "logits"]  # only what was run
    assert rows.loc["logits", "gap_closed"] == pytest.approx((0.86 - 0.80) / (0.90 - 0.80))
    right = [np.load(folder / f"{name}-1" / "test_logits.npy").argmax(1) == LABELS for name in ("logits", "control")]
    pairs = [[np.sum(right[0] & right[1]), np.sum(right[0] & ~right[1])], [np.sum(~right[0] & right[1]), 0]]
    assert rows.loc["logits", "mcnemar_p"] == pytest.approx(mcnemar(pairs, exact=True).pvalue)
    student = np.load(folder / "logits-1" / "test_logits.npy")
    assert rows.loc["logits", "agreement"] == np.mean(student.argmax(1) == teacher.argmax(1))
    assert rows.loc["logits", "transfer"] == 8000 and rows.loc["control", "transfer"] == 0


def test_a_teacher_that_leads_by_less_than_a_point_leaves_no_gap_to_close(table):
    _, folder, args, _ = table
    made = distillation.make_table(
        args, folder, LABELS, distillation.RUNS, dict.fromkeys(distillation.RUNS, logits(0.805, 3))
    ).set_index("run")
    assert made["gap_closed"].isna().all()


def test_a_teacher_that_read_a_part_is_compared_on_that_part(table):
    _, folder, args, teacher = table
    part = teacher.copy()
    part[150:] = np.nan
    made = distillation.make_table(
        args, folder, LABELS, distillation.RUNS, dict.fromkeys(distillation.RUNS, part)
    ).set_index("run")
    half = [np.load(folder / f"{name}-1" / "test_logits.npy")[:150].argmax(1) for name in ("logits", "control")]
    of_student, of_control, of_teacher = (np.mean(one == LABELS[:150]) for one in (*half, teacher[:150].argmax(1)))
    assert made.loc["logits", "gap_closed"] == pytest.approx((of_student - of_control) / (of_teacher - of_control))
    assert made.loc["logits", "n_test"] == 200


def test_the_black_box_runs_share_student_and_control_with_the_white_box():
    assert black_box.RUNS["control"] == distillation.RUNS["control"]
    assert black_box.RUNS["tuned"] == distillation.RUNS["final"]


def test_saved_logits_are_read_again_for_the_same_reviews_alone(tmp_path, tiny):
    reviews = pd.DataFrame({"example_id": ["a", "b", "c"], "text": ["good", "bad", "fine"], "label": [1, 0, 1]})
    args, file = argparse.Namespace(max_length=16, batch_tokens=None), tmp_path / "test_logits.npy"
    models.load_classifier(str(tiny / "distilbert")).save_pretrained(tmp_path / "model")
    models.load_tokenizer(str(tiny / "distilbert")).save_pretrained(tmp_path / "model")
    first, again, others = (
        distillation.score(args, device.Hardware("cpu", "fp32", "CPU"), tmp_path / "model", part, file)
        for part in (reviews, reviews, reviews[::-1])
    )
    assert np.array_equal(first, again)
    np.testing.assert_allclose(others, first[::-1], atol=1e-5)
    assert not np.allclose(others, first, atol=1e-4)


def test_a_claim_is_made_against_the_controls_that_have_all_its_seeds(tmp_path):
    seeds = {"final": (1, 2), "control": (1, 2, 3), "control_longer": (1,), "control_levers": (1, 2)}
    for name, seed in ((name, seed) for name, all_of in seeds.items() for seed in all_of):
        artifacts.write_json(tmp_path / f"{name}-{seed}" / "seconds.json", {"seconds": 1})
        np.save(tmp_path / f"{name}-{seed}" / "test_logits.npy", logits(0.8, seed))
    right = distillation.right_by_run(tmp_path, LABELS, "final", ["control", "control_longer", "control_levers"])
    assert set(right) == {"final", "control", "control_levers"}
    assert all(of.shape == (2, 200) for of in right.values())
    assert distillation.right_by_run(tmp_path, LABELS, "final", ["control_longer"]) == {}


def test_the_claim_compares_seed_means_review_by_review():
    rng = np.random.default_rng(0)
    right = {
        name: rng.random((3, 4000)) < p for name, p in (("control", 0.85), ("control_levers", 0.86), ("final", 0.9))
    }
    right["teacher"] = rng.random((1, 4000)) < 0.92
    row = distillation.claim(right, "final", ["control", "control_levers"], "teacher")
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
