#!/usr/bin/env python
"""Test accuracy against the number of gold labels: where does a teacher pay, and where is a plain fine-tune enough?

At each number of labels (those of validation counted) three students: the control, fine-tuned on the labels alone; the
student of the encoder and the student of the LLM that were fine-tuned on the same labels, both with the transfer set.
Without any label the LLM teaches as it is, calibrated on the transfer set. With fewer than 500 no student reads
validation, which would be too few to choose by: the last epoch is kept. The teachers are made by 02 and 03 with the
same subsets, in a folder by number of labels; those of all labels and of none are the ones of distillation.py and
black_box.py, and so is the LLM's student of all labels. 01's NB-SVM on the same labels stands beside them: is a neural
model needed at all?

    common="--dataset path/to/imdb --output-dir outputs/results --student-model results/weights/minilm-l6"
    common="$common --tables outputs/results/tables"
    python results/few_labels.py $common --read-test
    python results/tables.py --tables outputs/results/tables
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, baseline, data, device, settings
from results import black_box, distillation, tables

# Labels in all: reviews of validation and of train. The last is the whole subset of the other tables.
LABELS = {0: None, 50: (16, 34), 500: (100, 400), 3000: (1000, 2000)}
RUNS = ("control", "student_of_encoder", "student_of_llm")
ELSEWHERE = {"student_of_llm": "tuned"}  # of all labels: the run of black_box.py


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = distillation.make_parser(__doc__, dict.fromkeys(RUNS, {}))
    distillation.add_read_test(parser)
    parser.set_defaults(max_transfer_samples=4000, seeds=[1])
    parser.add_argument("--labels", nargs="+", type=int, choices=list(LABELS), default=list(LABELS))
    args = distillation.parse(parser, "few_labels", argv)
    subsets = ("max_train_samples", "validation_samples")
    if any(getattr(args, name) != parser.get_default(name) for name in subsets):
        parser.error(
            "--labels says how many reviews train and validate: leave out --max-train- and --validation-samples"
        )
    return args


def at(args, labels: int) -> argparse.Namespace:
    """The settings of a number of labels: subsets, and the folder of its teachers."""
    if LABELS[labels] is None or labels == max(LABELS):
        return args
    validation, train = LABELS[labels]
    folder = Path(args.output_dir, "few_labels", str(labels))
    own = {"validation_samples": validation, "max_train_samples": train, "output_dir": str(folder)}
    return argparse.Namespace(**vars(args) | own)


def recipe(name: str, labels: int, gold: int, transfer: int, batch: int) -> dict:
    """A run; the control takes as many steps as the students."""
    if name != "control":
        return distillation.FINAL if labels else distillation.FINAL | {"gold": "none", "alpha": 1.0}
    steps = distillation.FINAL_EPOCHS * math.ceil((gold + transfer) / batch)
    return distillation.CONTROL | {"epochs": round(steps / math.ceil(gold / batch))}


def read_teacher(
    args, hardware, name: str, labels: int, reviews: data.Reviews, runs: Path
) -> tuple[str | None, dict[str, np.ndarray]]:
    """The teacher of a student, and what it says by split; None and nothing of the control."""
    if name == "control":
        return None, {}
    if name == "student_of_encoder":
        teacher, kept = "teacher", distillation.keep_teacher(args, hardware, runs, reviews, test=False)
    else:
        who, scored = "tuned" if labels else "zero_shot_batch", Path(args.output_dir, "black_box")
        kept = black_box.keep_teacher(args, hardware, who, reviews, scored, runs, test=False)
        teacher = f"{who}_teacher"
    return teacher, {split: kept["scores"][split] for split in ("train", "transfer")}


def make_students(args, hardware, labels: int, runs: Path) -> None:
    """The students at one number of labels, and what they say, unless they are there."""
    here, folder = at(args, labels), Path(args.output_dir, "few_labels", str(labels))
    reviews = data.load_reviews(here, reads=("train", "transfer", "test"))
    if LABELS[labels] and (len(reviews.validation), len(reviews.train)) != LABELS[labels]:
        settings.stop(f"{args.dataset} has too few labelled reviews: pass other --labels than {labels}")
    if args.read_test:
        tables.keep_labels(runs, {"test": reviews.test})
    ids, into = distillation.encode_reviews(here, reviews), runs / "few_labels" / str(labels)
    if labels < 500:
        ids["validation"] = []
    proof = distillation.Proof(here, hardware, reviews, ids, folder, into)
    for seed, name in [(seed, name) for seed in args.seeds for name in args.runs]:
        run = recipe(name, labels, len(reviews.train), len(reviews.transfer), args.batch_size)
        if labels == max(LABELS) and name in ELSEWHERE:
            share(proof, run, runs, ELSEWHERE[name], name, seed)
        elif labels or name == "student_of_llm":
            print(f"{labels} labels: {name}, seed {seed}", flush=True)
            kept_in = into if labels else runs  # the LLM as it is has been kept with the runs of black_box.py
            teacher, soft = read_teacher(here, hardware, name, labels, reviews, kept_in)
            distillation.make_run(proof, name, run, seed, soft, teacher)


def share(proof: distillation.Proof, run: dict, runs: Path, of: str, name: str, seed: int) -> None:
    """A run of black_box.py as one of this table; stops unless it was made as this one would be."""
    found = tables.read_run(runs, of, seed)
    if found is None:
        settings.stop(f"{of}, seed {seed}, is missing: run results/black_box.py first")
    teacher = tables.read_run(runs, found["teacher"], proof.args.seed)
    if teacher is None:
        settings.stop(f"{found['teacher']}, from which {of} learned, is missing: run results/black_box.py first")
    if proof.args.read_test and "test" not in found["scores"]:
        settings.stop(f"{of}, seed {seed}, has not read test: run results/black_box.py --read-test first")
    soft = {split: teacher["scores"][split] for split in ("train", "transfer")}
    distillation.refuse_other(distillation.made_from(proof, run, seed, soft), found["made_from"], found["file"])
    about = {key: value for key, value in found.items() if key not in ("run", "seed", "scores", "file")}
    tables.keep(proof.runs, name, seed, about, found["scores"])


def keep_nb_svm(args, labels: int, runs: Path) -> None:
    """What 01's NB-SVM says that was fitted to these labels."""
    here, into = at(args, labels), runs / "few_labels" / str(labels)
    reviews = data.load_reviews(here, reads=("train", "test"))
    of = {split: data.fingerprint(getattr(reviews, split)) for split in ("train", "validation", "test")}
    kept = tables.read_run(into, "nb_svm", args.seed)
    if kept:
        return distillation.refuse_other(of, kept.get("reviews", {}), kept["file"], "delete it and its .npz")
    folder = artifacts.require(here, "01_baseline", "nb_svm")
    artifacts.refuse_conflict(here, artifacts.read_run(here, "01_baseline"), reviews.fingerprints, distillation.SAME)
    logits = baseline.load_baseline(folder).logits(reviews.test["text"])
    about = {"gold": len(reviews.train), "transfer": 0, "teacher": None, "seconds": None, "reviews": of}
    tables.keep(into, "nb_svm", args.seed, about, {"test": logits})


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    hardware = device.detect(args)
    runs = args.tables / "runs"
    for labels in args.labels:
        make_students(args, hardware, labels, runs)
        if labels and args.read_test:
            keep_nb_svm(args, labels, runs)


if __name__ == "__main__":
    main()
