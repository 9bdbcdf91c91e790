#!/usr/bin/env python
"""Test accuracy against the number of gold labels: where does a teacher pay, where is a plain fine-tune enough?

At each number of labels, those of validation included: the control, fine-tuned on the labels alone; a student of the
encoder and one of the LLM, both tuned on the same labels, both with unlabelled reviews; 01's NB-SVM. Without labels the
LLM teaches as it is, calibrated on the transfer set. With fewer than 500 labels no student reads validation, and its
last epoch is kept. Seed 1 draws the labels by seed 42, seed 2 by 43, and so on; test stays the same. 01, 02 and 03 of
each draw have run before with its subsets, in --teachers-from/LABELS-DRAW (0 labels: that with most of them).

    common="--dataset path/to/imdb --output-dir outputs/few_labels --student-model outputs/weights/minilm-l6"
    python experiments/few_labels.py $common --labels 50 --seeds 1 2 3
    python experiments/tables.py results/few_labels --collect outputs/few_labels/runs --read-test
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import data, device, settings
from experiments import distillation

LABELS = {0: (1000, 2000), 50: (16, 34), 500: (100, 400), 3000: (1000, 2000)}  # reviews of validation and of train
RUNS = ("control", "student_of_encoder", "student_of_llm", "nb_svm")
READS_VALIDATION = 500  # fewer labels are too few to choose an epoch by
FIRST_DRAW = 42


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = distillation.make_parser(__doc__, RUNS)
    parser.set_defaults(max_transfer_samples=4000)
    parser.add_argument("--labels", nargs="+", type=int, choices=LABELS, default=list(LABELS), help="numbers of labels")
    args = settings.parse(parser, "few_labels", argv)
    if any(getattr(args, name) != parser.get_default(name) for name in ("max_train_samples", "validation_samples")):
        parser.error("--labels decides the subsets: leave out --max-train-samples and --validation-samples")
    return args


def recipe(name: str, labels: int, gold: int, transfer: int, batch: int) -> dict:
    """A run's settings; the control takes as many steps as the students."""
    if name == "control":
        steps = distillation.FINAL["epochs"] * math.ceil((gold + transfer) / batch)
        return distillation.CONTROL | {"epochs": round(steps / math.ceil(gold / batch))}
    if name == "student_of_encoder":
        return distillation.FINAL
    if labels:
        return distillation.FINAL | {"teacher": "tuned_teacher"}
    return distillation.FINAL | {"teacher": "zero_shot_batch_teacher", "labelled": "none", "alpha": 1.0}


def study_of(args: argparse.Namespace, hardware: device.Hardware, labels: int, seed: int) -> distillation.Study:
    """The reviews of a draw of labels, with the same test reviews for all, and the place of its 01, 02 and 03."""
    (validation, train), draw = LABELS[labels], FIRST_DRAW + seed - 1
    folder = Path(args.teachers_from or args.output_dir, f"{labels or max(LABELS)}-{draw}")
    subset = {"validation_samples": validation, "max_train_samples": train, "seed": draw, "output_dir": str(folder)}
    origin = argparse.Namespace(**vars(args) | subset)
    reviews = data.load_reviews(origin, reads=("train", "transfer"))
    if (len(reviews.validation), len(reviews.train)) != (validation, train):
        settings.stop(f"{args.dataset} has too few labelled reviews: pass other --labels than {labels}")
    reviews = dataclasses.replace(reviews, test=data.load_reviews(args, reads=("test",)).test)
    return distillation.Study(args, hardware, reviews, origin, str(labels))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    hardware = device.detect(args)
    for labels, seed in [(labels, seed) for labels in args.labels for seed in args.seeds]:
        study = study_of(args, hardware, labels, seed)
        for name in args.runs if labels else {"student_of_llm"} & set(args.runs):
            print(f"{labels} labels: {name}, seed {seed}", flush=True)
            if name == "nb_svm":
                distillation.make_nb_svm(study)
            else:
                sizes = len(study.reviews.train), len(study.reviews.transfer)
                run = recipe(name, labels, *sizes, args.batch_size)
                distillation.make_student(study, name, run, seed, labels >= READS_VALIDATION)


if __name__ == "__main__":
    main()
