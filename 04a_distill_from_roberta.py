#!/usr/bin/env python
"""04a: the white-box student. DistilBERT learns RoBERTa's logits and hidden states; a control learns without them.

    loss = alpha · T² · KL(teacher ‖ student)  +  (1 − alpha) · cross-entropy  +  feature_weight · features

The student trains on the labelled reviews and the transfer set together, from the files that 02 saved. No teacher is
loaded. Cross-entropy counts where a gold label exists. The control is the same student, trained on the labelled reviews
with cross-entropy alone. It trains for as many steps, and validation chooses the best epoch. The difference between
the two is the teacher's contribution.

Reads   the reviews, outputs/02_roberta/soft_labels/
Writes  outputs/04a_student_from_roberta/  model/  control/  validation.parquet  metrics.json  run.json
Takes   on two T4s: planned 52 to 62 minutes (results/gpu/plan.csv), not measured yet

    python 04a_distill_from_roberta.py
    python 04a_distill_from_roberta.py --no-control --alpha 0.5 --temperature 4
"""

import argparse
from pathlib import Path

import numpy as np

from common import artifacts, checks, data, device, export, metrics, models, scoring, settings

STEP, TEACHER_STEP = "04a_student_from_roberta", "02_roberta"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = settings.make_parser(__doc__, reads=("train", "transfer"))
    settings.add_student_flags(parser)
    add = parser.add_argument
    # 0.1 changed nothing at 2,000 labels (results/README.md, section 4); all of IMDB was measured with it.
    add("--feature-weight", type=settings.non_negative, default=0.1, help="weight of the hidden-state term; 0: no term")
    add("--control", action=argparse.BooleanOptionalAction, default=True, help="train a control too, with no teacher")
    return settings.parse(parser, STEP, argv)


def read_teacher(args: argparse.Namespace, reviews: data.Reviews, facts: dict) -> tuple[dict, np.ndarray]:
    """The teacher's arrays for train, then the transfer set, and its (n, 2) validation logits.

    The arrays are `teacher_logits`, and `teacher_features`, which stay on disk.
    """
    from common import distill

    folder, script = artifacts.require(args, TEACHER_STEP, "soft_labels"), artifacts.SCRIPTS[TEACHER_STEP]
    model = folder.with_name("model")
    weights = {"weights": models.weights_digest(model)} if model.exists() else {}  # the model itself is not needed
    tables = {split: getattr(reviews, split) for split in ("validation", "train", "transfer")}
    logits, features = {}, []
    for split, table in ((split, table) for split, table in tables.items() if len(table)):
        scoring.refuse_stale(folder, split, weights, script)
        logits[split], rows = scoring.read_scores(folder, split, table, script)
        if args.feature_weight > 0 and split != "validation":
            features.append((np.load(folder / f"{split}_features.npy", mmap_mode="r"), rows))
    distill.refuse_bad_teacher(logits["train"], reviews.train["label"].to_numpy(), "train")
    if "transfer" in logits:
        distill.refuse_one_class(logits["transfer"], reviews.train["label"].to_numpy())
    validation = logits.pop("validation")
    teacher = {"teacher_logits": np.concatenate(list(logits.values()))}
    if features:
        saved = [facts["feature_layers"].index(layer) for layer in student_to_teacher_layers(args, facts)]
        teacher["teacher_features"] = distill.FeatureRows(features, saved)
    return teacher, validation


def student_to_teacher_layers(args: argparse.Namespace, facts: dict) -> list[int]:
    """The teacher's layer for each student layer; stops if 02 did not save them all."""
    from common import distill

    depth = models.load_config(args.student_model).get_text_config().num_hidden_layers
    layers, saved = distill.mapped_layers(depth, facts["teacher_layers"]), facts["feature_layers"]
    if not set(layers) <= set(saved):
        remedy = f"run 02_finetune_roberta.py --student-layers {depth} --force, or pass --feature-weight 0"
        settings.stop(f"02 saved layers {saved}, but a student of {depth} layers needs {layers}: {remedy}")
    return layers


def train_students(
    args: argparse.Namespace, hardware: device.Hardware, folder: Path, reviews: data.Reviews, teacher: dict, width: int
) -> dict[str, np.ndarray]:
    """Train the student, and the control unless --no-control; their (n, 2) validation logits by name."""
    from common import distill, training

    train, labelled, validation = distill.student_datasets(args, reviews, teacher)
    how = {"epochs": args.epochs, "alpha": args.alpha}
    how |= {"soft_labels": settings.reviews_with_soft_labels(args, len(reviews.transfer))}
    how |= {"feature_weight": args.feature_weight, "teacher_width": width if args.feature_weight > 0 else None}
    logits = {"student": distill.train_student(args, hardware, folder / "model", train, validation, **how)}
    training.refuse_collapse(logits["student"], validation.labels)
    if args.control:
        how = {"epochs": args.epochs * len(train) / len(labelled), "alpha": 0.0}  # as many steps as the student
        print(f"control: {len(labelled):,} labelled reviews, up to {how['epochs']:.1f} epochs", flush=True)
        logits["control"] = distill.train_student(args, hardware, folder / "control", labelled, validation, **how)
        remedy = f"the control is no measure; {training.TRAIN_OTHERWISE}"
        training.refuse_collapse(logits["control"], validation.labels, remedy)
    return logits


def write_cards(args: argparse.Namespace, folder: Path, reviews: data.Reviews, logits: dict, teacher: str) -> None:
    """Describe the student and the control, each in its folder."""
    add_card, base = export.add_temperature_and_card, args.student_model
    role = f"A student of {teacher}: it learned from gold labels and from the teacher's soft labels."
    rows = export.student_rows(args, reviews) | {"feature_weight": args.feature_weight}
    add_card(args, folder / "model", role, base, reviews, logits["student"], **rows)
    if args.control:
        role, epochs = "A control: the student without a teacher.", "the best of as many steps as the student's"
        add_card(args, folder / "control", role, base, reviews, logits["control"], epochs=epochs)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    hardware = device.start(args, __file__)
    teacher_run = artifacts.read_run(args, TEACHER_STEP)
    reviews = data.load_reviews(args, reads=("train", "transfer"))
    settings.refuse_no_teacher(args, len(reviews.transfer))
    artifacts.refuse_conflict(args, teacher_run, reviews.fingerprints)
    checks.check_encoder(args.student_model, args.max_length, reviews.train["text"], hardware)
    taught_by = teacher_run["facts"]
    teacher, of_validation = read_teacher(args, reviews, taught_by)
    inputs = reviews.fingerprints | {TEACHER_STEP: artifacts.fingerprint(args, TEACHER_STEP)}
    folder = artifacts.begin(args, STEP, inputs)
    device.one_process_per_gpu(args, hardware, __file__, argv)

    logits = train_students(args, hardware, folder, reviews, teacher, taught_by["teacher_width"])

    labels = reviews.validation["label"].to_numpy()
    scores = {name: metrics.describe(labels, student_logits) for name, student_logits in logits.items()}
    facts = {"student": args.student_model, "teacher": taught_by["teacher"], "max_length": args.max_length}
    write_cards(args, folder, reviews, logits, settings.short(taught_by["teacher"]))
    scoring.save_validation(folder, reviews.validation, **logits, teacher=of_validation)
    artifacts.finish(args, folder, facts, {"validation": scores})
    for name, figures in scores.items():
        print(f"{name}: validation accuracy {metrics.in_words(figures)}")
    if (folder.parent / "03_mistral" / "run.json").exists():
        print(f"next: {settings.next_command('04b_distill_from_mistral.py', 'student_model')}")
    else:
        print(f"next: {settings.next_command('03_finetune_mistral.py')}")
    print(f"  or: {settings.next_command('05_benchmark.py')}")


if __name__ == "__main__":
    main()
