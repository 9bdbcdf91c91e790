#!/usr/bin/env python
"""Test accuracy against the number of gold labels: where does a teacher pay, and where is a plain fine-tune enough?

At each number of labels (those of validation counted) three students: the control, fine-tuned on the labels alone; the
student of the encoder and the student of the LLM that were fine-tuned on the same labels, both with the transfer set.
Without any label the LLM teaches as it is, calibrated on the transfer set. With fewer than 500 no student reads
validation, which would be too few to choose by: the last epoch is kept. The teachers are made by 02 and 03 with the
same subsets, in a folder by number of labels; those of all labels are the ones of distillation.py and black_box.py, and
so is the LLM's student. 01's NB-SVM on the same labels stands beside them: is a neural model needed at all?

    common="--dataset path/to/imdb --output-dir outputs/results --student-model results/weights/minilm-l6"
    python results/few_labels.py $common
    python results/few_labels.py $common --read-test

Writes with --read-test results/distillation/few_labels.csv and few_labels.png.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, data, device, metrics, settings
from results import black_box, distillation

# Labels in all: reviews of validation and of train. The last is the whole subset of the other tables.
LABELS = {0: None, 50: (16, 34), 500: (100, 400), 3000: (1000, 2000)}
RUNS = ("control", "student_of_encoder", "student_of_llm")
ELSEWHERE = {"student_of_llm": "tuned"}  # of all labels: the run of black_box.py


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = distillation.make_parser(__doc__, dict.fromkeys(RUNS, {}))
    parser.set_defaults(max_transfer_samples=4000, seeds=[1])
    parser.add_argument("--labels", nargs="+", type=int, choices=list(LABELS), default=list(LABELS))
    return settings.parse(parser, "few_labels", argv)


def at(args, labels: int) -> argparse.Namespace:
    """The settings of a number of labels: subsets, and the folder of its teachers."""
    if LABELS[labels] is None or labels == max(LABELS):
        return args
    validation, train = LABELS[labels]
    folder = Path(args.output_dir, "few_labels", str(labels))
    own = {"validation_samples": validation, "max_train_samples": train, "output_dir": str(folder)}
    return argparse.Namespace(**vars(args) | own)


def student_folder(args, labels: int, name: str, seed: int) -> Path:
    """Where a student lies."""
    if labels == max(LABELS) and name in ELSEWHERE:
        return Path(args.output_dir, "distillation", f"{ELSEWHERE[name]}-{seed}")
    return Path(args.output_dir, "few_labels", str(labels), f"{name}-{seed}")


def recipe(name: str, labels: int, gold: int, transfer: int, batch: int) -> dict:
    """A run; the control takes as many steps as the students."""
    if name != "control":
        return distillation.FINAL if labels else distillation.FINAL | {"gold": "none", "alpha": 1.0}
    steps = distillation.FINAL_EPOCHS * math.ceil((gold + transfer) / batch)
    return distillation.CONTROL | {"epochs": round(steps / math.ceil(gold / batch))}


def read_teacher(args, hardware, name: str, labels: int, reviews: data.Reviews) -> dict:
    """What a student of `name` learns from, by split."""
    if name == "control":
        return {}
    if name == "student_of_encoder":
        artifacts.refuse_conflict(args, artifacts.read_run(args, "02_roberta"), reviews.fingerprints, distillation.SAME)
        folder = artifacts.require(args, "02_roberta", "soft_labels")
        return {
            split: distillation.read_soft_labels(folder, split, getattr(reviews, split))
            for split in ("train", "transfer")
        }
    artifacts.refuse_conflict(args, artifacts.read_run(args, "03_mistral"), reviews.fingerprints, distillation.SAME)
    who, scored = "tuned" if labels else "as_it_is", Path(args.output_dir, "black_box")
    splits = {"train": reviews.train, "transfer": reviews.transfer}
    black_box.score_llm(args, hardware, who, reviews, scored, splits)
    teacher = black_box.read_teacher(scored / who, "batch", ("train", "transfer"))
    return {split: (teacher[split], None) for split in splits}


def make_students(args, hardware, labels: int) -> None:
    """The students at one number of labels, unless they are there."""
    here = at(args, labels)
    reviews = data.load_reviews(here, reads=("train", "transfer"))
    ids = distillation.encode_reviews(here, reviews)
    if labels < 500:
        ids["validation"] = []
    for seed in args.seeds:
        for name in args.runs:
            folder = student_folder(args, labels, name, seed)
            if (folder / "seconds.json").exists() or (not labels and name != "student_of_llm"):
                continue
            print(f"{labels} labels: {name}, seed {seed}", flush=True)
            soft = read_teacher(here, hardware, name, labels, reviews)
            run = recipe(name, labels, len(reviews.train), len(reviews.transfer), args.batch_size)
            called = folder.name.removesuffix(f"-{seed}")
            distillation.make_run(here, hardware, run, called, seed, folder.parent, reviews, ids, soft)


def read_test(args, hardware) -> pd.DataFrame:
    """One row a finished student."""
    test = data.load_reviews(args, reads=("train", "test")).test
    rows = []
    for labels, name, seed in [(labels, name, seed) for labels in LABELS for name in RUNS for seed in args.seeds]:
        folder = student_folder(args, labels, name, seed)
        if not (folder / "seconds.json").exists():
            continue
        logits = distillation.score(args, hardware, folder / "model", test, folder / "test_logits.npy")
        quality = metrics.describe(test["label"].to_numpy(), logits)
        scores = {key: quality[key] for key in ("accuracy", "ci_low", "ci_high")}
        rows.append({"labels": labels, "run": name, "seed": seed, **scores, "n_test": len(test)})
    return pd.concat([pd.DataFrame(rows), read_nb_svm(args, len(test))], ignore_index=True)


def read_nb_svm(args, n_test: int) -> pd.DataFrame:
    """One row a number of labels at which 01 has run: its NB-SVM on all of them, tested on the same reviews."""
    rows = []
    for labels in LABELS:
        file = Path(at(args, labels).output_dir, "01_baseline", "metrics.json")
        if labels and file.exists():
            quality = artifacts.read_json(file)["nb_svm"]["test"]
            if quality["n"] != n_test:
                settings.stop(f"{file} is of {quality['n']} test reviews, not {n_test}: run 01_baseline.py --force")
            scores = {key: quality[key] for key in ("accuracy", "ci_low", "ci_high")}
            rows.append({"labels": labels, "run": "nb_svm", "seed": args.seed, **scores, "n_test": n_test})
    return pd.DataFrame(rows)


def plot(table: pd.DataFrame, file: Path) -> None:
    """Accuracy with its interval against labels, a line a run (seed mean); no labels stand at the left edge."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = sorted(table["labels"].unique())
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    shift = dict(zip((*RUNS, "nb_svm"), (-0.09, -0.03, 0.03, 0.09), strict=True))
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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    hardware = device.detect(args)
    if not args.read_test:
        for labels in args.labels:
            make_students(args, hardware, labels)
        return
    table = read_test(args, hardware)
    artifacts.write_table(args.tables / "few_labels.csv", table.round(6))
    plot(table, args.tables / "few_labels.png")
    print(table.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
