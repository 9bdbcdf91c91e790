"""The tables of results/: what a row says of a run, by hand and by another library; what is not mixed in one table."""

import argparse
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy.stats import bootstrap
from statsmodels.stats.contingency_tables import mcnemar

from common import artifacts, metrics
from experiments import distillation, tables

QUESTIONS = [file.parent for file in sorted((ROOT / "results").glob("*/runs.csv"))]
LABELS = np.arange(200) % 2
REVIEWS = pd.DataFrame({"example_id": [f"{row}" for row in range(200)], "text": "a film", "label": LABELS})


def odds(accuracy: float, seed: int) -> np.ndarray:
    """(200,) log-odds that are right for this share of the labels."""
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(200) >= round(200 * accuracy)
    return (np.where(wrong, 1 - LABELS, LABELS) * 2 - 1) * rng.uniform(1, 2, size=200)


def right(log_odds: np.ndarray) -> np.ndarray:
    return (log_odds > 0) == LABELS


def run(tmp_path, name: str, seed: int, log_odds, **facts) -> Path:
    """A finished run's folder, which says this of validation and test alike; `facts` override what it is."""
    taught = {"teacher": "teacher", "teacher_weights": "w", "transfer": 8000}
    taught = {} if name.startswith("control") or name.endswith("teacher") else taught
    facts = {"gold": 2000, "transfer": 0, "teacher": "", "seconds": 12, "weights": "w"} | taught | facts
    reviews = facts.pop("reviews", REVIEWS)
    inputs = {f"{split}_reviews": facts.pop(split, split) for split in ("train", "validation", "test")}
    inputs |= {"transfer_reviews": facts.pop("unlabelled", "8000")} if facts["transfer"] else {}
    flags = {key: facts.pop(key, value) for key, value in {"labels": "", "subset_seed": 42}.items()}
    shared = [*tables.SHARED[:-1], "arithmetic"]
    flags |= {key: facts.pop(key, "0.1") for key in shared if not name.endswith("teacher")}
    args = argparse.Namespace(output_dir=str(tmp_path / "made"), force=True, run=name, seed=seed, **flags)
    folder = artifacts.begin(args, "-".join(filter(None, [name, flags["labels"], str(seed)])), inputs)
    splits, says = dict.fromkeys(("validation", "test"), reviews), {"validation": np.nan_to_num(log_odds)}
    distillation.finish(args, folder, splits, says | {"test": log_odds}, **facts)
    return folder.with_name(folder.name.removesuffix(artifacts.NEW))  # of a run that was finished before


def add(tmp_path, *facts, read_test: bool = True, **more) -> None:
    tables.collect(tmp_path, [run(tmp_path, *facts, **more)], read_test)


@pytest.fixture
def folder(tmp_path):
    """A question of a control, a student and their teacher."""
    add(tmp_path, "control", 1, odds(0.80, 1))
    add(tmp_path, "logits", 1, odds(0.86, 2))
    add(tmp_path, "teacher", 42, odds(0.90, 3))
    return tmp_path


def rows_of(folder) -> pd.DataFrame:
    return tables.make_tables(folder)["white_box.csv"].set_index("run")


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
def test_the_committed_tables_are_to_the_byte_what_the_committed_predictions_say(question, tmp_path):
    for file in ("predictions.parquet", "runs.csv"):
        shutil.copy(question / file, tmp_path / file)
    made = tables.make_tables(tmp_path)
    assert {file.name for file in question.glob("*.csv")} - {
        "runs.csv",
        "levers.csv",
        "benchmark.csv",
        "curve.csv",
    } == made.keys()
    for file, table in made.items():
        assert len(table) and (tmp_path / file).read_bytes() == (question / file).read_bytes(), file
    assert (question / "predictions.parquet").stat().st_size < 2_000_000


def test_a_row_says_how_much_of_the_gap_a_student_closes_and_whether_by_chance(folder):
    student, control, teacher = odds(0.86, 2), odds(0.80, 1), odds(0.90, 3)
    rows = rows_of(folder)
    assert rows.index.tolist() == ["teacher", "control", "logits"]
    assert rows.loc["logits", "gap_closed"] == pytest.approx((0.86 - 0.80) / (0.90 - 0.80))
    pairs = [[0, np.sum(right(student) & ~right(control))], [np.sum(~right(student) & right(control)), 0]]
    assert rows.loc["logits", "mcnemar_p"] == pytest.approx(mcnemar(pairs, exact=True).pvalue, abs=1e-6)
    assert rows.loc["logits", "agreement"] == np.mean((student > 0) == (teacher > 0))
    assert rows.loc["logits", ["transfer", "gold", "seconds"]].tolist() == [8000, 2000, 12]
    assert rows.loc["control", ["gap_closed", "mcnemar_p"]].isna().all()
    teacher[150:] = np.nan  # which it has not read
    add(folder, "teacher", 42, teacher)
    rows = rows_of(folder)
    student, control, teacher = (right(one)[:150].mean() for one in (student, control, teacher))
    assert rows.loc["logits", "gap_closed"] == pytest.approx((student - control) / (teacher - control))
    assert rows["n_test"].tolist() == [150, 200, 200] and rows.loc["teacher", "accuracy"] == pytest.approx(teacher)
    add(folder, "teacher", 42, odds(0.805, 3))  # leads by less than a point
    assert rows_of(folder)["gap_closed"].isna().all()


@pytest.mark.parametrize(
    ("question", "columns"),
    [("imdb", ["naive_bayes-42", "nb_svm-42", "teacher-42", "final-42", "control-42"]), ("deploy", None)],
)
def test_a_benchmarks_accuracies_are_those_of_the_committed_predictions(question, columns):
    table = pd.read_csv(ROOT / f"results/{question}/benchmark.csv")
    predictions = pd.read_parquet(ROOT / f"results/{question}/predictions.parquet")
    predictions = predictions[predictions["split"] == "test"] if "split" in predictions else predictions
    right = [((predictions[name] > 0) == (predictions["label"] == 1)).mean() for name in columns or table["Model"]]
    assert table["Accuracy"].to_numpy() == pytest.approx(right, abs=1e-6) and (table["n"] == len(predictions)).all()


def test_the_first_screens_promise_of_a_cascade_is_that_of_its_tables():
    table, cascade = (pd.read_csv(ROOT / f"results/imdb/{name}.csv") for name in ("benchmark", "cascade"))
    (chosen,) = cascade[cascade["chosen"]].itertuples()
    seconds = 1 / table.set_index("Type")["Throughput (samp/s)"]  # these add up, and medians of latencies do not
    share = seconds["student, white-box"] / seconds["teacher, fine-tuned"] + chosen.test_share
    promise = (
        f"least sure {chosen.test_share:.0%} of reviews to the teacher, the two reach {chosen.test_accuracy:.3f} too"
    )
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"{promise}, in {share:.0%} of the teacher's time" in readme and f"{table['Accuracy'].max():.3f}" in promise


def test_test_is_read_only_when_it_is_asked_for_and_a_run_made_anew_is_not_seen_before(folder):
    add(folder, "final", 1, odds(0.86, 2))
    assert "claims.csv" in tables.make_tables(folder) and (folder / "claims.csv").exists()
    for name in ("margin", "final"):
        add(folder, name, 1, odds(0.88, 4), read_test=False)
    made = tables.make_tables(folder)
    assert {"margin", "final"} < set(made["validation.csv"]["run"])
    assert made["white_box.csv"]["run"].tolist() == ["teacher", "control", "logits"]
    assert not (folder / "claims.csv").exists()  # a table of no run any more is deleted
    tables.collect(folder, [folder / "made" / "margin-1"], read_test=True)
    assert rows_of(folder).loc["margin", "accuracy"] == 0.88


def test_runs_of_other_reviews_or_labels_are_refused_and_nothing_is_written(folder, stops):
    before = (folder / "runs.csv").read_bytes(), (folder / "predictions.parquet").read_bytes()
    for change in ({"label": 1 - LABELS}, {"example_id": REVIEWS["example_id"] + "x"}):
        other = REVIEWS.assign(**change)
        stops(lambda: add(folder, "margin", 1, odds(0.8, 1), reviews=other), "of other", "another results folder")  # noqa: B023
    stops(lambda: add(folder, "margin", 1, odds(0.8, 1), test="other texts"), "margin-1 has another test_reviews")
    other = [run(folder, "teacher", 42, odds(0.9, 4), weights="other")]
    stops(lambda: tables.collect(folder, other, True), "logits-1 has another teacher (w) than teacher-42 (other)")
    assert before == ((folder / "runs.csv").read_bytes(), (folder / "predictions.parquet").read_bytes())
    tables.collect(folder, other, True, replace_teachers=True)
    assert rows_of(folder).index.tolist() == ["teacher", "control"]  # the student of the replaced one is gone


@pytest.mark.parametrize("key", [*tables.SHARED, "train", "validation", "unlabelled", "teacher_weights"])
def test_a_table_is_not_made_of_runs_with_different_settings_reviews_or_teachers(folder, stops, key):
    name = {"unlabelled": "transfer_reviews", "train": "train_reviews", "validation": "validation_reviews"}
    name = {"teacher_weights": "teacher"}.get(key, name.get(key, key))
    facts = {"arithmetic" if key == "precision" else key: "other"}
    stops(lambda: add(folder, "margin", 1, odds(0.8, 1), **facts), f"margin-1 has another {name} (other)")


def test_a_half_replaced_question_is_named(folder, stops):
    lines = (folder / "runs.csv").read_text().splitlines()
    (folder / "runs.csv").write_text("\n".join(lines[:-1]))
    stops(lambda: tables.make_tables(folder), "runs.csv does not describe")
    stops(lambda: tables.make_tables(folder / "nowhere"), "has no predictions.parquet")


def test_one_mean_is_not_of_two_transfer_sets(folder, stops):
    add(folder, "final", 1, odds(0.85, 11))
    add(folder, "final_longer", 1, odds(0.83, 60), unlabelled="2000")
    stops(lambda: add(folder, "final_longer", 2, odds(0.9, 13)), "final_longer-2 has another transfer_reviews (8000)")


def test_few_labels_are_a_row_a_student_and_a_line_a_run_and_each_number_has_its_own_reviews(tmp_path, stops):
    for labels in ("500", "50"):
        for seed, name in ((42, "nb_svm"), (1, "control")):
            facts = {"train": labels, "validation": labels, "transfer": 0, "teacher": "", "teacher_weights": ""}
            add(tmp_path, name, seed, odds(0.8, int(labels)), labels=labels, **facts)
    made = tables.make_tables(tmp_path)
    assert made.keys() == {"few_labels.csv"} and (tmp_path / "few_labels.png").stat().st_size > 1000
    expected = [[50, "control", 1], [50, "nb_svm", 42], [500, "control", 1], [500, "nb_svm", 42]]
    assert made["few_labels.csv"][["labels", "run", "seed"]].to_numpy().tolist() == expected
    assert (made["few_labels.csv"]["accuracy"] == 0.8).all()

    def add_student(seed: int, labels: str = "50", **facts) -> None:
        facts = {"labels": labels, "train": labels, "validation": labels, "teacher": "teacher"} | facts
        add(tmp_path, "student_of_encoder", seed, odds(0.8, 1), **facts)

    stops(lambda: add_student(1, train="500"), "another train_reviews")
    add_student(1)
    stops(lambda: add_student(2, teacher_weights="another"), "has another teacher")
    add_student(1, "500", teacher_weights="another")
    others = dict.fromkeys(("train", "validation", "unlabelled", "teacher_weights"), "others")
    add_student(2, subset_seed=43, **others)


def test_a_claim_compares_seed_means_with_the_intervals_of_scipy_and_wider_ones_where_seeds_count():
    rng = np.random.default_rng(1)
    teacher = rng.random((1, 2000)) < 0.92
    student = teacher & (rng.random((3, 2000)) < 0.97)
    control = student & (rng.random((3, 2000)) < np.array([[0.97], [0.94], [0.91]]))  # its seeds differ
    row, lead = tables.claim(student, control, teacher), student.mean(0) - control.mean(0)
    assert row["seeds"] == 3 and row["lead"] == pytest.approx(student.mean() - control.mean())
    assert row["gap_closed"] == pytest.approx(lead.mean() / (teacher.mean() - control.mean()))
    theirs = bootstrap((lead,), np.mean, method="percentile").confidence_interval
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(theirs), abs=0.001)
    spread = control.mean(1).std() / np.sqrt(3)  # of a mean of three drawn with replacement
    both = 1.959964 * np.hypot(spread, lead.std() / np.sqrt(2000))
    assert row["seeds_high"] - row["seeds_low"] == pytest.approx(2 * both, rel=0.1)
    assert row["gap_low"] < row["gap_closed"] < row["gap_high"]
    without = tables.claim(student, control, control[2:])  # no teacher that leads, no gap
    assert without["gap_closed"] is without["gap_low"] is without["gap_high"] is None
    one = tables.claim(student[:1], control[:1], teacher)  # one seed each: nothing to draw
    assert (one["seeds_low"], one["seeds_high"]) == pytest.approx((one["ci_low"], one["ci_high"]))

    def gap(ours, theirs, best):
        return (ours.mean(-1) - theirs.mean(-1)) / (best.mean(-1) - theirs.mean(-1))

    theirs = bootstrap((student[0], control[0], teacher[0]), gap, paired=True, method="percentile").confidence_interval
    assert (one["gap_low"], one["gap_high"]) == pytest.approx(tuple(theirs), abs=0.02)


def test_what_results_say_of_setfit_is_what_the_predictions_say():
    rows = pd.read_parquet(ROOT / "results/few_labels/predictions.parquet").dropna(subset=["setfit-50-42"])
    setfit, student = ((rows[name] > 0) == (rows["label"] == 1) for name in ("setfit-50-42", "student_of_encoder-50-1"))
    lead, low, high = (100 * value for value in metrics.paired_difference(setfit.to_numpy(), student.to_numpy()))
    text = " ".join((ROOT / "results/README.md").read_text().split())
    assert (
        f"on {len(rows)} reviews no difference to that student shows: {lead:+.1f} points [−{-low:.1f}, {high:+.1f}]"
        in text
    )
