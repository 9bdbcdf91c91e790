#!/usr/bin/env python
"""The tables of results/distillation, made from what each run has left of itself: its score of every review.

    python results/tables.py      # no reviews, no weights, no training: a reader can check every figure

A run leaves two small files in runs/: NAME-SEED.json, what it is, and NAME-SEED.npz, its log-odds of "positive" for
each review of "validation" and "test", of a teacher also of "train" and "transfer" (NaN where it has not read it).
runs/labels.npz holds the gold labels of validation and test, reviews.json the fingerprints of these reviews;
runs/beside/ copies of runs with the same labels but other unlabelled reviews, which claims.csv alone reads.
distillation.py, black_box.py and few_labels.py write them as the runs finish; test comes with their --read-test. A
table is not made of runs with different settings, reviews or teachers.

Writes validation.csv and, once test is read, white_box.csv and black_box.csv (one row a run), claims.csv,
few_labels.csv and few_labels.png.
"""

import argparse
import hashlib
import json
import re
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, data, metrics, settings

TABLES = Path(__file__).parent / "distillation"
COLUMNS = "run seed gold transfer n_test accuracy ci_low ci_high gap_closed mcnemar_p agreement nll ece seconds".split()
CONTROLS = ("control", "control_longer", "control_levers")
BESIDE = ("final_longer", "nb_svm")  # what a claim stands beside though it has read other unlabelled reviews, or none
WHITE_BOX = ("teacher", *CONTROLS, "argmax_labels", "logits", "features", "logits_features", "margin")
WHITE_BOX += ("no_transfer_set", "confident", "final", "final_longer", "label_sorted")
LLM_TEACHERS = ("zero_shot", "zero_shot_batch", "tuned", "other_prompt", "whole_prompt")
BLACK_BOX = (*(f"{name}_teacher" for name in LLM_TEACHERS), "control", *LLM_TEACHERS, "tuned_label_sorted")
FEW_LABELS = ("control", "student_of_encoder", "student_of_llm", "nb_svm")
# Mistakes, and teachers of which nothing is promised: their students are reported as they fall, at chance too.
MAY_COLLAPSE = ("label_sorted", "tuned_label_sorted", "zero_shot", "zero_shot_batch", "other_prompt", "whole_prompt")
# What all runs of a table share, where they have it.
SHARED = "student_model max_length learning_rate batch_size weight_decay warmup_fraction temperature".split()
SHARED += ["precision", "train", "validation", "transfer"]
MADE = ("validation.csv", "white_box.csv", "black_box.csv", "claims.csv", "few_labels.csv")
RESAMPLES = 9999  # of a bootstrap
Runs = dict[tuple[str, int], dict]  # by name and seed: the JSON of a run, and "scores": (n, 2) logits by split


def keep(runs: Path, name: str, seed: int, about: dict, scores: dict[str, np.ndarray]) -> None:
    """Write a run's two files: what it is, and its (n, 2) logits by split as log-odds; the JSON comes last.

    Half precision keeps the sign, so every call; NLL and ECE change by less than 0.0001.
    """
    with artifacts.whole(runs / f"{name}-{seed}.npz") as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, **{split: (of[:, 1] - of[:, 0]).astype(np.float16) for split, of in scores.items()})
    artifacts.write_json(runs / f"{name}-{seed}.json", {"run": name, "seed": seed} | about)


def keep_labels(runs: Path, splits: dict[str, pd.DataFrame]) -> None:
    """Write the gold labels of each split and which reviews these are, beside those that are there.

    Stops when the runs that are there are of other reviews.
    """
    file, record = runs / "labels.npz", runs / "reviews.json"
    known = artifacts.read_json(record) if record.exists() else {}
    now = {split: data.fingerprint(table) for split, table in splits.items()}
    for split, of in now.items():
        if known.get(split, of) != of:
            settings.stop(f"{runs}/ holds runs of other {split} reviews: pass another --tables, or delete it")
    before = read_labels(runs) if known else {}
    if now.keys() <= before.keys():
        return
    labels = {split: table["label"].to_numpy(np.int8) for split, table in splits.items()}
    with artifacts.whole(file) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, **before | labels)
    artifacts.write_json(record, known | now)


def read_labels(runs: Path) -> dict[str, np.ndarray]:
    """The gold labels of the reviews of these runs, by split."""
    file = runs / "labels.npz"
    try:
        return dict(np.load(file))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as problem:
        settings.stop(f"{file} is missing or damaged ({problem}): delete reviews.json and it, the next run writes both")


def read_run(runs: Path, name: str, seed: int) -> dict | None:
    """The JSON of a finished run with its "scores", (n, 2) logits by split, and its "file"; None when there is none."""
    file = runs / f"{name}-{seed}.json"
    if not file.exists():
        return None
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        log_odds = {split: odds.astype(np.float32) for split, odds in np.load(file.with_suffix(".npz")).items()}
        lacking = {"gold", "transfer", "teacher", "seconds"} - run.keys()
        lacking |= set() if (run.get("run"), run.get("seed")) == (name, seed) else {f"{name}, seed {seed}"}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as problem:
        lacking = problem
    if lacking:
        settings.stop(f"{file} or its .npz is damaged ({lacking}): delete both, and the run is made again")
    scores = {split: np.stack([-odds / 2, odds / 2], axis=1) for split, odds in log_odds.items()}
    return run | {"scores": scores, "file": file}


def read_runs(runs: Path, names: tuple[str, ...], split: str, n: int | None = None) -> Runs:
    """The finished runs of these names that have scored a split, in the order of the names, by seed within a name.

    Stops when one has not scored its `n` reviews, if that is given.
    """
    found = {}
    for name in names:
        numbers = (re.fullmatch(rf"{name}-(\d+)\.json", file.name) for file in runs.glob(f"{name}-*.json"))
        for seed in sorted(int(number[1]) for number in numbers if number):
            run = read_run(runs, name, seed)
            if split in run["scores"]:
                found[name, seed] = run
                if n is not None and len(run["scores"][split]) != n:
                    settings.stop(f"{runs}/{name}-{seed}.npz has not all {n} {split} reviews: delete it and its .json")
    return found


def refuse_mixed(runs: Runs, first: dict[str, object] | None = None) -> dict[str, object]:
    """Stop when a table's runs differ in settings or reviews, or learned from another teacher than the kept one.

    Returns what they share; `first`: what those of another part of the table do.
    """
    first = dict(first or {})
    for run in runs.values():
        about = run.get("made_from") or run.get("reviews", {})
        for key in SHARED:
            if key in about and first.setdefault(key, about[key]) != about[key]:
                settings.stop(f"{run['file']} has another {key} ({about[key]}) than the runs beside it: delete it")
        kept = kept_teacher(runs, run["teacher"])
        learned_from = about.get("teacher", {}) if kept else {}
        if any(digest(kept["scores"][split]) != of for split, of in learned_from.items()):
            settings.stop(f"{run['file']} learned from another {run['teacher']} than the kept one: delete it")
    return first


def digest(scores: np.ndarray) -> str:
    """SHA-256 of a teacher's scores: which student learned from which."""
    return hashlib.sha256(scores.tobytes()).hexdigest()


def kept_teacher(runs: Runs, name: str | None) -> dict | None:
    """The run of a teacher of this name; there is one, of the seed of the subsets."""
    return next((run for (of, _), run in runs.items() if of == name), None)


def gap_closed(student: float, control: float, teacher: float) -> float | None:
    """(student - control) / (teacher - control) of accuracies; None where the teacher leads by less than a point."""
    return (student - control) / (teacher - control) if teacher - control >= 0.01 else None


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
            of = (metrics.accuracy(labels[both], one[both].argmax(axis=1)) for one in (logits, control, teacher))
            row["gap_closed"] = gap_closed(*of)
    return row


def table_of_runs(runs: Runs, labels: np.ndarray, of_controls: str) -> pd.DataFrame:
    """One row a run, beside the "teacher" that it names; the controls, which have none, beside `of_controls`."""
    refuse_mixed(runs)
    rows = []
    for (name, seed), run in runs.items():
        is_teacher = name.endswith("teacher")
        control = runs.get(("control", seed)) if name != "control" and not is_teacher else None
        teacher = None if is_teacher else kept_teacher(runs, run["teacher"] or of_controls)
        rows.append(compare(run, labels, *(one and one["scores"]["test"] for one in (teacher, control))))
    return pd.DataFrame(rows, columns=COLUMNS).astype({"seconds": "Int64"})


def claim(student: np.ndarray, against: np.ndarray, teacher: np.ndarray | None = None) -> dict:
    """How far a student leads another model by seed-mean accuracy, and how much of the gap to `teacher` it closes.

    Each is (seeds, n) booleans: whether each test review was called right. The intervals are of a bootstrap (Efron
    1979), percentile, 9,999 times: `ci` over the reviews, the same for all models, so of these trained models on other
    reviews; `seeds` and `gap` over each model's seeds as well. Few seeds make these too narrow, by a third or more in
    what they add where there are three, and of one seed nothing is added.
    """
    rng, n = np.random.default_rng(0), student.shape[1]
    models = np.concatenate([student, against, *([] if teacher is None else [teacher])]).astype(np.float64)
    drawn = np.stack([models @ np.bincount(rng.integers(n, size=n), minlength=n) / n for _ in range(RESAMPLES)])
    of_student, of_against, of_teacher = np.split(drawn, np.cumsum([len(student), len(against)]), axis=1)
    row = {"seeds": len(student), "against_seeds": len(against), "n_test": n}
    row |= {"student_accuracy": student.mean(), "against_accuracy": against.mean()}
    row["lead"] = student.mean() - against.mean()
    row |= interval("ci", of_student.mean(axis=1) - of_against.mean(axis=1))
    of_student, of_against = (  # seeds drawn anew for each resample
        np.take_along_axis(of, rng.integers(of.shape[1], size=of.shape), axis=1).mean(axis=1)
        for of in (of_student, of_against)
    )
    row |= interval("seeds", of_student - of_against)
    gap = None if teacher is None else gap_closed(student.mean(), against.mean(), teacher.mean())
    row |= {"gap_closed": gap, "gap_low": None, "gap_high": None}
    if gap is not None and (of_teacher[:, 0] > of_against).all():  # else the ratio has no bounds
        row |= interval("gap", (of_student - of_against) / (of_teacher[:, 0] - of_against))
    return row


def interval(name: str, resampled: np.ndarray) -> dict[str, float]:
    """The middle 95% of a bootstrap's resamples."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def right(runs: Runs, name: str, labels: np.ndarray) -> np.ndarray:
    """(seeds, n) booleans: whether each seed of a run called each test review right."""
    return np.stack([run["scores"]["test"].argmax(axis=1) == labels for (of, _), run in runs.items() if of == name])


def claims(white: Runs, black: Runs, others: Runs, labels: np.ndarray) -> pd.DataFrame:
    """What the mission claims, a row each: the white-box student leads every control and closes a part of the gap; the
    black-box student leads the control, and is not far behind its teacher, on the reviews that this one read. NB-SVM of
    the same labels stands beside both, a longer schedule beside the first: they are in `others` or among the runs."""
    rows = []
    for runs, student, against, name in (
        (white | others, "final", (*CONTROLS, *BESIDE), "teacher"),
        (black | others, "tuned", ("control", "nb_svm"), "tuned_teacher"),
    ):
        teacher, there = kept_teacher(runs, name), {of for of, _ in runs}
        if student not in there or teacher is None:
            continue
        read = np.isfinite(teacher["scores"]["test"][:, 0])
        of_student, of_teacher = right(runs, student, labels), right(runs, name, labels)
        for other in (one for one in against if one in there):
            gap_to = of_teacher if other in CONTROLS and read.all() else None
            row = claim(of_student, right(runs, other, labels), gap_to)
            rows.append({"student": student, "against": other} | row)
        if student == "tuned":
            rows.append({"student": student, "against": name} | claim(of_student[:, read], of_teacher[:, read]))
    return pd.DataFrame(rows)


def table_of_validation(runs: Runs, labels: np.ndarray) -> pd.DataFrame:
    """One row a run: what it says on validation."""
    rows = []
    for (name, seed), run in runs.items():
        quality = metrics.describe(labels, run["scores"]["validation"])
        rows.append({"run": name, "seed": seed} | {key: value for key, value in quality.items() if key != "f1"})
    return pd.DataFrame(rows)


def few_labels_folders(runs: Path) -> list[Path]:
    """The folders of runs/few_labels, one a number of labels, that with most of them last."""
    folders = (folder for folder in (runs / "few_labels").glob("*/") if folder.name.isdigit())
    return sorted(folders, key=lambda folder: int(folder.name))


def few_labels_teachers(found: Runs, folder: Path, runs: Path) -> Runs:
    """The teachers that runs with few labels name: kept beside them, or in `runs` if those had the same labels."""
    names = tuple(sorted({run["teacher"] for run in found.values() if run["teacher"]}))
    labels = {run["made_from"].get("train") for run in found.values() if "made_from" in run}
    of_all = read_runs(runs, names, "transfer")
    same = {key: run for key, run in of_all.items() if run.get("reviews", {}).get("train") in labels}
    return same | read_runs(folder, names, "transfer")


def runs_beside(runs: Path, white: Runs, n: int) -> Runs:
    """The runs of BESIDE in runs/beside and runs/few_labels that had the labels of `white`; others are passed over.

    Stops when one of them had other settings or another teacher than `white`, or stands there too. What unlabelled
    reviews it has read is left open.
    """
    shared, found = refuse_mixed(white), {}
    for folder in (runs / "beside", *few_labels_folders(runs)):
        for key, run in read_runs(folder, BESIDE, "test", n).items():
            about = run.get("made_from") or run.get("reviews", {})
            if any(about.get(split) != shared.get(split) for split in ("train", "validation")):
                continue
            if any(name == run["run"] for name, _ in white):
                settings.stop(f"{run['file']} is beside a {run['run']} in {runs}/ itself: delete one of the two")
            about = {name: of for name, of in about.items() if name != "transfer"}
            if run["teacher"]:
                about["teacher"] = {"train": about["teacher"]["train"]}
            found[key] = run | {"made_from": about}
    refuse_mixed(white | found)
    return found


def table_of_few_labels(runs: Path, labels: np.ndarray) -> pd.DataFrame:
    """One row a student and number of gold labels."""
    rows = []
    shared = {}
    for folder in few_labels_folders(runs):
        found = read_runs(folder, FEW_LABELS, "test", len(labels))
        of_folder = refuse_mixed(found | few_labels_teachers(found, folder, runs), shared)
        shared = {key: value for key, value in of_folder.items() if key not in ("train", "validation")}
        for (name, seed), run in found.items():
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
    axes.legend(loc="lower right")  # where lines that rise with the labels leave room
    with artifacts.whole(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def make_tables(folder: Path, without_plot: bool = False) -> dict[str, pd.DataFrame]:
    """Every table of folder/runs by its file's name, written beside it; one that has no run any more is deleted."""
    runs, made = folder / "runs", {}
    if not (runs / "labels.npz").exists():
        settings.stop(f"{runs}/ holds no runs (no labels.npz): make some with results/distillation.py")
    labels = read_labels(runs)
    if "validation" in labels:
        n = len(labels["validation"])
        white, black = (read_runs(runs, names, "validation", n) for names in (WHITE_BOX, BLACK_BOX))
        for of in (white, black):  # the transfer sets of the two may differ
            refuse_mixed(of)
        made["validation.csv"] = table_of_validation(white | black, labels["validation"])
    if "test" in labels:
        white, black = (read_runs(runs, names, "test", len(labels["test"])) for names in (WHITE_BOX, BLACK_BOX))
        made["white_box.csv"] = table_of_runs(white, labels["test"], "teacher")
        if {name for name, _ in black} - {"control"}:  # which is of both tables
            made["black_box.csv"] = table_of_runs(black, labels["test"], "tuned_teacher")
        others = runs_beside(runs, white, len(labels["test"]))
        made["claims.csv"] = claims(white, black, others, labels["test"])
        made["few_labels.csv"] = table_of_few_labels(runs, labels["test"])
    made = {file: table.round(6) for file, table in made.items() if len(table)}
    for file in MADE:
        if file in made:
            artifacts.write_table(folder / file, made[file])
        else:
            (folder / file).unlink(missing_ok=True)
    plot = folder / "few_labels.png"
    if "few_labels.csv" not in made:
        plot.unlink(missing_ok=True)
    elif not without_plot:
        plot_few_labels(made["few_labels.csv"], plot)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=TABLES, help="the folder that holds runs/")
    for file, table in make_tables(parser.parse_args().tables).items():
        print(f"{file}\n{table.to_string(index=False)}\n")


if __name__ == "__main__":
    main()
