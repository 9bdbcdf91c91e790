#!/usr/bin/env python
"""The tables of results/distillation, made from what each run has left of itself: its score of every review.

    python results/tables.py      # no reviews, no weights, no training: a reader can check every figure

A run leaves two small files in runs/: NAME-SEED.json, what it is, and NAME-SEED.npz, its log-odds of "positive" for
each review of "validation" and "test", of a teacher also of "train" and "transfer" (NaN where it has not read it).
runs/labels.npz holds the gold labels of validation and test. distillation.py, black_box.py and few_labels.py write them
as the runs finish; test comes with their --read-test.

Writes validation.csv and, once test is read, white_box.csv and black_box.csv (one row a run), claims.csv,
few_labels.csv and few_labels.png.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, metrics

TABLES = Path(__file__).parent / "distillation"
COLUMNS = "run seed gold transfer n_test accuracy ci_low ci_high gap_closed mcnemar_p agreement nll ece seconds".split()
CONTROLS = ("control", "control_longer", "control_levers")
WHITE_BOX = ("teacher", *CONTROLS, "argmax_labels", "logits", "features", "logits_features", "margin")
WHITE_BOX += ("no_transfer_set", "gold_last", "confident", "after_mlm", "final", "label_sorted")
LLM_TEACHERS = ("zero_shot", "zero_shot_batch", "tuned", "other_prompt", "whole_prompt")
BLACK_BOX = (*(f"{name}_teacher" for name in LLM_TEACHERS), "control", *LLM_TEACHERS, "tuned_label_sorted")
FEW_LABELS = ("control", "student_of_encoder", "student_of_llm", "nb_svm")
Runs = dict[tuple[str, int], dict]  # by name and seed: the JSON of a run, and "scores": (n, 2) logits by split


def keep(runs: Path, name: str, seed: int, about: dict, scores: dict[str, np.ndarray]) -> None:
    """Write a run's two files: what it is, and its (n, 2) logits by split as log-odds; the JSON comes last.

    Half precision keeps the sign, so every call; NLL and ECE change by less than 0.0001.
    """
    with artifacts.whole(runs / f"{name}-{seed}.npz") as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, **{split: (of[:, 1] - of[:, 0]).astype(np.float16) for split, of in scores.items()})
    artifacts.write_json(runs / f"{name}-{seed}.json", {"run": name, "seed": seed} | about)


def keep_labels(runs: Path, labels: dict[str, np.ndarray]) -> None:
    """Write the gold labels by split beside those that are there; a split has the same labels in all runs."""
    file = runs / "labels.npz"
    known = dict(np.load(file)) if file.exists() else {}
    if labels.keys() <= known.keys() and all(np.array_equal(known[split], of) for split, of in labels.items()):
        return
    for split, of in labels.items():
        if split in known and not np.array_equal(known[split], of):
            raise ValueError(f"{file} holds other labels of {split}: the runs beside it are of other reviews")
    with artifacts.whole(file) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, **known | {split: of.astype(np.int8) for split, of in labels.items()})


def read_run(runs: Path, name: str, seed: int) -> dict | None:
    """The JSON of a finished run with its "scores", (n, 2) logits by split; None when there is none."""
    file = runs / f"{name}-{seed}.json"
    if not file.exists():
        return None
    log_odds = {split: odds.astype(np.float32) for split, odds in np.load(file.with_suffix(".npz")).items()}
    return artifacts.read_json(file) | {
        "scores": {split: np.stack([-odds / 2, odds / 2], axis=1) for split, odds in log_odds.items()}
    }


def read_runs(runs: Path, names: tuple[str, ...], split: str) -> Runs:
    """The finished runs of these names that have scored a split, in the order of the names, by seed within a name."""
    found = {}
    for name in names:
        seeds = sorted(int(file.stem.rpartition("-")[2]) for file in runs.glob(f"{name}-*.json"))
        found |= {(name, seed): read_run(runs, name, seed) for seed in seeds}
    return {key: run for key, run in found.items() if split in run["scores"]}


def gap_closed(labels: np.ndarray, student: np.ndarray, control: np.ndarray, teacher: np.ndarray) -> float | None:
    """(student - control) / (teacher - control) of accuracies, by (n, 2) logits; None where the teacher leads by less
    than a point."""
    of_student, of_control, of_teacher = (
        metrics.accuracy(labels, logits.argmax(axis=1)) for logits in (student, control, teacher)
    )
    return (of_student - of_control) / (of_teacher - of_control) if of_teacher - of_control >= 0.01 else None


def compare(run: dict, labels: np.ndarray, teacher: np.ndarray | None, control: np.ndarray | None) -> dict:
    """A run's row: its figures on test beside its teacher's and those of the control of its seed, by (n, 2) logits.

    Reviews that a teacher has not read (NaN) are left out of what compares with it.
    """
    logits = run["scores"]["test"]
    read = np.isfinite(logits[:, 0])
    row = {name: run[name] for name in ("run", "seed", "gold", "transfer", "seconds")}
    quality = metrics.describe(labels[read], logits[read])
    row |= {"n_test": quality["n"], "gap_closed": None, "mcnemar_p": None, "agreement": None}
    row |= {name: quality[name] for name in ("accuracy", "ci_low", "ci_high", "nll", "ece")}
    if control is not None:
        row["mcnemar_p"] = metrics.mcnemar_p(logits.argmax(axis=1) == labels, control.argmax(axis=1) == labels)
    if teacher is not None:
        both = np.isfinite(teacher[:, 0])
        row["agreement"] = metrics.accuracy(teacher[both].argmax(axis=1), logits[both].argmax(axis=1))
        if control is not None:
            row["gap_closed"] = gap_closed(labels[both], logits[both], control[both], teacher[both])
    return row


def table_of_runs(runs: Runs, labels: np.ndarray, of_controls: str) -> pd.DataFrame:
    """One row a run, beside the "teacher" that it names; the controls, which have none, beside `of_controls`."""
    scores = {name: run["scores"]["test"] for (name, _), run in runs.items() if name.endswith("teacher")}
    rows = []
    for (name, seed), run in runs.items():
        control = runs.get(("control", seed)) if name != "control" and name not in scores else None
        teacher = None if name in scores else scores.get(run["teacher"] or of_controls)
        rows.append(compare(run, labels, teacher, control and control["scores"]["test"]))
    return pd.DataFrame(rows, columns=COLUMNS).astype({"seconds": "Int64"})


def claim(right: dict[str, np.ndarray], student: str, controls: list[str], teacher: str | None = None) -> dict:
    """How far `student` leads the best of `controls` by seed-mean accuracy, and how much of the gap to `teacher` it
    closes.

    `right` holds (seeds, n) booleans by run: whether each test review was called right. The interval is a bootstrap
    over the reviews (Efron 1979), paired: of each review's share of right seeds, the student's less the control's. The
    gap is that to the first of the controls.
    """
    from scipy.stats import bootstrap

    best = max(controls, key=lambda name: right[name].mean())
    lead = right[student].mean(axis=0) - right[best].mean(axis=0)
    interval = bootstrap((lead,), np.mean, n_resamples=9999, batch=100, method="percentile", rng=0).confidence_interval
    row = {"student": student, "against": best, "seeds": len(right[student]), "n_test": len(lead)}
    row |= {"student_accuracy": right[student].mean(), "against_accuracy": right[best].mean(), "lead": lead.mean()}
    row |= {"ci_low": interval.low, "ci_high": interval.high, "gap_closed": None}
    if teacher is not None:
        first = right[controls[0]].mean()
        row["gap_closed"] = (right[student].mean() - first) / (right[teacher].mean() - first)
    return row


def right_by_run(runs: Runs, labels: np.ndarray, student: str, controls: tuple[str, ...]) -> dict[str, np.ndarray]:
    """(seeds, n) booleans by run, of the student's seeds: itself, and those of the controls that have all of them.

    Empty where the student or the first of the controls, against which gaps are measured, is not finished.
    """
    seeds = [seed for name, seed in runs if name == student]
    names = [student, *(name for name in controls if all((name, seed) in runs for seed in seeds))]
    if not seeds or controls[0] not in names:
        return {}
    called = {name: [runs[name, seed]["scores"]["test"].argmax(axis=1) for seed in seeds] for name in names}
    return {name: np.stack(of) == labels for name, of in called.items()}


def claims(white: Runs, black: Runs, labels: np.ndarray) -> pd.DataFrame:
    """What the mission claims, a row each: the white-box student leads the best control, and closes a part of the gap;
    the black-box student leads the control, and is not far behind its teacher, on the reviews that this one read."""
    rows = []
    right = right_by_run(white, labels, "final", CONTROLS)
    teachers = [run["scores"]["test"] for (name, _), run in white.items() if name == "teacher"]
    if right and teachers:
        right["teacher"] = (teachers[0].argmax(axis=1) == labels)[None]
        rows.append(claim(right, "final", [name for name in right if name in CONTROLS], "teacher"))
    right = right_by_run(black, labels, "tuned", ("control",))
    teachers = [run["scores"]["test"] for (name, _), run in black.items() if name == "tuned_teacher"]
    if right and teachers:
        read = np.isfinite(teachers[0][:, 0])
        rows.append(claim(right, "tuned", ["control"]))
        of_part = {run: of[:, read] for run, of in right.items()}
        of_part["tuned_teacher"] = (teachers[0].argmax(axis=1) == labels)[None, read]
        rows.append(claim(of_part, "tuned", ["tuned_teacher"]))
    return pd.DataFrame(rows)


def table_of_validation(runs: Runs, labels: np.ndarray) -> pd.DataFrame:
    """One row a run: what it says on validation."""
    rows = []
    for (name, seed), run in runs.items():
        quality = metrics.describe(labels, run["scores"]["validation"])
        rows.append({"run": name, "seed": seed} | {key: value for key, value in quality.items() if key != "f1"})
    return pd.DataFrame(rows)


def table_of_few_labels(runs: Path, labels: np.ndarray) -> pd.DataFrame:
    """One row a student and number of gold labels."""
    rows = []
    for folder in sorted((runs / "few_labels").glob("*/"), key=lambda folder: int(folder.name)):
        for (name, seed), run in read_runs(folder, FEW_LABELS, "test").items():
            quality = metrics.describe(labels, run["scores"]["test"])
            scores = {key: quality[key] for key in ("accuracy", "ci_low", "ci_high")}
            rows.append({"labels": int(folder.name), "run": name, "seed": seed, **scores, "n_test": quality["n"]})
    return pd.DataFrame(rows)


def plot_few_labels(table: pd.DataFrame, file: Path) -> None:
    """Accuracy with its interval against labels, a line a run (seed mean); no labels stand at the left edge."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = sorted(table["labels"].unique())
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    shift = dict(zip(FEW_LABELS, (-0.09, -0.03, 0.03, 0.09), strict=True))
    for run in shift:
        mean = table[table["run"] == run].groupby("labels")[["accuracy", "ci_low", "ci_high"]].mean()
        below, above = mean["accuracy"] - mean["ci_low"], mean["ci_high"] - mean["accuracy"]
        places = np.array([counts.index(labels) for labels in mean.index]) + shift[run]
        axes.errorbar(places, mean["accuracy"], [below, above], marker="o", capsize=3, label=run.replace("_", " "))
    axes.set_xticks(range(len(counts)), [f"{labels:,}" for labels in counts])
    axes.set(xlabel="gold labels, validation included", ylabel="test accuracy (95% interval)")
    axes.grid(alpha=0.3)
    axes.legend()
    with artifacts.whole(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def make_tables(folder: Path, without_plot: bool = False) -> dict[str, pd.DataFrame]:
    """Write every table of folder/runs beside it; a table without a run is not written. By file name, what is there."""
    runs, made = folder / "runs", {}
    if not (runs / "labels.npz").exists():
        return made
    labels = np.load(runs / "labels.npz")
    names = tuple(dict.fromkeys(WHITE_BOX + BLACK_BOX))
    made["validation.csv"] = table_of_validation(read_runs(runs, names, "validation"), labels["validation"])
    if "test" in labels:
        white, black = (read_runs(runs, names, "test") for names in (WHITE_BOX, BLACK_BOX))
        made["white_box.csv"] = table_of_runs(white, labels["test"], "teacher")
        made["black_box.csv"] = table_of_runs(black, labels["test"], "tuned_teacher")
        made["claims.csv"] = claims(white, black, labels["test"])
        made["few_labels.csv"] = table_of_few_labels(runs, labels["test"])
    made = {file: table.round(6) for file, table in made.items() if len(table)}
    for file, table in made.items():
        artifacts.write_table(folder / file, table)
    if "few_labels.csv" in made and not without_plot:
        plot_few_labels(made["few_labels.csv"], folder / "few_labels.png")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=TABLES, help="the folder that holds runs/")
    for file, table in make_tables(parser.parse_args().tables).items():
        print(f"{file}\n{table.to_string(index=False)}\n")


if __name__ == "__main__":
    main()
