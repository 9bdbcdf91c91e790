"""The tables of results/: what a row says of a run, by hand and by another library."""

import argparse
import sys

import numpy as np
import pytest
from conftest import ROOT
from statsmodels.stats.contingency_tables import mcnemar

from common import artifacts

sys.path.insert(0, str(ROOT))
from results import black_box, distillation

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
    made = distillation.make_table(args, folder, LABELS, distillation.RUNS, dict.fromkeys(distillation.RUNS, logits(0.805, 3))).set_index("run")
    assert made["gap_closed"].isna().all()


def test_a_teacher_that_read_a_part_is_compared_on_that_part(table):
    _, folder, args, teacher = table
    part = teacher.copy()
    part[150:] = np.nan
    made = distillation.make_table(args, folder, LABELS, distillation.RUNS, dict.fromkeys(distillation.RUNS, part)).set_index("run")
    half = [np.load(folder / f"{name}-1" / "test_logits.npy")[:150].argmax(1) for name in ("logits", "control")]
    of_student, of_control, of_teacher = (np.mean(one == LABELS[:150]) for one in (*half, teacher[:150].argmax(1)))
    assert made.loc["logits", "gap_closed"] == pytest.approx((of_student - of_control) / (of_teacher - of_control))
    assert made.loc["logits", "n_test"] == 200


def test_the_black_box_runs_share_student_and_control_with_the_white_box():
    assert black_box.RUNS["control"] == distillation.RUNS["control"]
    assert black_box.RUNS["tuned"] == distillation.RUNS["logits"]
