#!/usr/bin/env python
"""04b: the black-box student. DistilBERT learns the probabilities that Mistral gives to two label words.

    loss = alpha · T² · KL(teacher ‖ student)  +  (1 − alpha) · cross-entropy

The 4-bit base with 03's adapter scores train, validation and the transfer set, one forward pass a batch, into raw label
log-probabilities on disk; an interrupted run continues them. Batch calibration is applied when they are read. The
student then trains on the labelled reviews and the transfer set together, with the trainer of 04a.

Reads   the reviews, outputs/03_mistral/adapter/
Writes  outputs/04b_student_from_mistral/  soft_labels/ (a table by split)  model/  metrics.json  run.json
Takes   on a Kaggle T4: not measured yet

    python 04b_distill_from_mistral.py
    python 04b_distill_from_mistral.py --max-transfer-samples 5000 --calibration none
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

from common import artifacts, data, demo, device, memory, metrics, models, scoring, settings, verbalizer

STEP, TEACHER_STEP = "04b_student_from_mistral", "03_mistral"
AT_CHANCE = "pass --force with a smaller --learning-rate or more --epochs"
LOW_LABEL_MASS = 0.5
OTHER_TEACHER = 0.03  # another precision moves the accuracy by less, another base by more


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = settings.make_parser(__doc__, reads=("train", "transfer"))
    parser.set_defaults(max_transfer_samples="20000")
    add = parser.add_argument
    add("--student-model", help="hub name or folder of the encoder that becomes the student")
    add("--max-length", type=settings.positive_int, default=512, help="tokens of a review, head and tail kept")
    settings.add_training_flags(parser, epochs=3, learning_rate=5e-5, batch_size=32, micro_batch_size=32)
    add("--alpha", type=settings.fraction, default=0.9, help="weight of the soft labels; 1 - alpha is cross-entropy's")
    add("--temperature", type=settings.positive, default=2.0, help="softens both sides of the KL term")
    add("--calibration", choices=("batch", "none"), default="batch", help="of the label log-odds, without labels")
    add("--batch-tokens", type=settings.positive_int, default=8192, help="padded tokens a batch of the LLM")
    return settings.parse(parser, STEP, argv)


def keep_or_delete_soft_labels(args: argparse.Namespace, inputs: dict[str, str], folder: Path) -> None:
    """Delete soft labels of another teacher or sample; those of other student settings took hours and still hold."""
    names = ("seed", "validation_samples", "max_train_samples", "max_transfer_samples")
    made_from = {"inputs": inputs, "settings": {name: getattr(args, name) for name in names}}
    record = folder / "made_from.json"
    if folder.exists() and (not record.exists() or artifacts.read_json(record) != made_from):
        print(f"deleting {folder}/, which other settings made")
        shutil.rmtree(folder)
    artifacts.write_json(record, made_from)


def save_soft_labels(args: argparse.Namespace, reviews: data.Reviews, facts: dict, hardware, folder: Path) -> None:
    """Raw label log-probabilities by example_id, of every split, by the LLM with 03's adapter, prompt and length."""
    splits = [split for split in ("validation", "train", "transfer") if len(getattr(reviews, split))]
    if all((folder / f"{split}.parquet").exists() for split in splits):
        return
    base = settings.locate(args, facts["base"])
    tokenizer = models.load_tokenizer(base)
    label_ids = verbalizer.label_token_ids(tokenizer, facts["prompt"], facts["label_words"])
    words = tokenizer.convert_ids_to_tokens(label_ids)
    print(f"label words {facts['label_words']} are the tokens {words}")
    model = models.load_llm(base, hardware, artifacts.require(args, TEACHER_STEP, "adapter"))
    for split in splits:
        table = getattr(reviews, split)

        def score(texts: list[str]) -> dict[str, np.ndarray]:
            ids = verbalizer.encode_prompts(tokenizer, texts, facts["prompt"], facts["max_length"])
            log_p = scoring.score_llm(model, ids, label_ids, tokenizer.pad_token_id, hardware, args.batch_tokens)
            return {"scores": log_p}

        scoring.in_chunks(folder, split, table, scoring.LOG_PROBABILITIES, score, chunk=250)


def read_teacher(args: argparse.Namespace, reviews: data.Reviews, facts: dict, folder: Path) -> tuple[dict, dict]:
    """The teacher's arrays for train followed by the transfer set, calibrated; and what 05 and a reader must know."""
    from common import distill, training

    log_p = {}
    for split in ("train", "validation", "transfer"):
        table = getattr(reviews, split)
        if len(table):
            in_file, scores = scoring.read_scores(folder, split, scoring.LOG_PROBABILITIES)
            log_p[split] = scores[
                distill.teacher_rows(in_file, table["example_id"], split, "04b_distill_from_mistral.py")
            ]
    labels = reviews.validation["label"].to_numpy()
    bias = 0.0
    if args.calibration == "batch":
        bias = verbalizer.batch_calibration(verbalizer.log_odds(log_p.get("transfer", log_p["train"])))
    raw, calibrated = (verbalizer.teacher_logits(log_p["validation"], shift) for shift in (0.0, bias))
    training_logits = np.concatenate(
        [verbalizer.teacher_logits(log_p[split], bias) for split in ("train", "transfer") if split in log_p]
    )
    spread = np.percentile(training_logits[:, 1] - training_logits[:, 0], (5, 50, 95))
    mass = verbalizer.label_mass(log_p["validation"])
    before, after = metrics.describe(labels, raw), metrics.describe(labels, calibrated)

    print(f"label mass p(positive) + p(negative): {mass:.3f}")
    if mass < LOW_LABEL_MASS:
        print("warning: the LLM would rather say something else than a label word; its ranking may still be good")
    print("log-odds of the soft labels: 5% {:.2f}, median {:.2f}, 95% {:.2f}".format(*spread))
    print(f"teacher's validation accuracy, raw: {metrics.in_words(before)}")
    print(f"the same with {bias:.3f} subtracted ({args.calibration} calibration): {metrics.in_words(after)}")
    recorded = facts["validation_accuracy"]
    if abs(before["accuracy"] - recorded) > OTHER_TEACHER:
        settings.stop(
            f"the LLM's validation accuracy is {before['accuracy']:.3f} here and was {recorded:.3f} in 03: "
            f"is {facts['base']} still the base that the adapter was trained on?"
        )
    distill.refuse_bad_teacher(calibrated, labels, "validation")
    training.refuse_collapse(
        calibrated, labels, "this LLM cannot teach; run 03_finetune_mistral.py --force with more reviews"
    )
    quality = {"label_mass": round(mass, 6), "teacher_raw": before, "teacher_calibrated": after}
    return {"teacher_logits": training_logits}, {"calibration": args.calibration, "bias": bias, "quality": quality}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    print("04b_distill_from_mistral.py with")
    settings.show(args)
    teacher_run = artifacts.read_run(args, TEACHER_STEP)
    hardware = device.detect(args.precision)
    if args.preset == "demo":
        demo.prepare(Path(args.output_dir, "demo"))
    reviews = data.load_reviews(args, reads=("train", "transfer"))
    artifacts.refuse_conflict(args, teacher_run, reviews.fingerprints)
    inputs = reviews.fingerprints | {TEACHER_STEP: artifacts.fingerprint(args, TEACHER_STEP)}
    models.check_length(args.max_length, settings.locate(args, args.student_model))
    tokenizer = models.load_tokenizer(settings.locate(args, args.student_model))
    facts = teacher_run["facts"]
    folder = artifacts.begin(args, STEP, inputs, keep="soft_labels")

    from common import distill, training

    keep_or_delete_soft_labels(args, inputs, folder / "soft_labels")
    save_soft_labels(args, reviews, facts, hardware, folder / "soft_labels")
    memory.free()  # the LLM's, for the student
    teacher, calibration = read_teacher(args, reviews, facts, folder / "soft_labels")
    gold_ids, transfer_ids, validation_ids = (
        models.encode(tokenizer, table["text"].tolist(), args.max_length)
        for table in (reviews.train, reviews.transfer, reviews.validation)
    )
    gold, labels = reviews.train["label"].to_numpy(), reviews.validation["label"].to_numpy()
    hard_labels = np.concatenate([gold, np.full(len(transfer_ids), distill.IGNORED)])
    validation = training.ReviewDataset(validation_ids, labels)

    print(f"student: {len(gold_ids):,} labelled and {len(transfer_ids):,} unlabelled reviews", flush=True)
    logits = distill.train_student(
        args,
        hardware,
        folder / "model",
        training.ReviewDataset(gold_ids + transfer_ids, hard_labels, **teacher),
        validation,
        epochs=args.epochs,
        alpha=args.alpha,
    )
    training.refuse_collapse(logits, labels, AT_CHANCE)

    one = metrics.describe(labels, logits)
    artifacts.write_json(folder / "metrics.json", {"validation": {"student": one} | calibration.pop("quality")})
    made = {"student": args.student_model, "teacher": facts["base"], "max_length": args.max_length}
    artifacts.finish(args, folder, {"labels": data.LABELS} | made | calibration, memory.peak_mb())
    print(f"student: validation accuracy {metrics.in_words(one)}")
    print(f"next: python 05_benchmark.py --preset {args.preset}")


if __name__ == "__main__":
    main()
