#!/usr/bin/env python
"""04b: the black-box student. DistilBERT learns the probabilities that Mistral gives to two label words.

    loss = alpha · T² · KL(teacher ‖ student)  +  (1 − alpha) · cross-entropy

The 4-bit LLM scores train, validation and the transfer set, with 03's adapter or without it (--no-adapter). It needs
one forward pass per batch and saves raw label log-probabilities. An interrupted run continues them. Calibration is
applied when they are read. The student then trains on the labelled reviews and the transfer set, with 04a's trainer.

Reads   the reviews, outputs/03_mistral/adapter/
Writes  outputs/04b_student_from_mistral/  soft_labels/ (by split)  model/  validation.parquet  metrics.json  run.json
Takes   on two T4s: planned 151 to 199 minutes (results/gpu/plan.csv), not measured yet

    python 04b_distill_from_mistral.py
    python 04b_distill_from_mistral.py --no-adapter --mistral-model path/to/any-causal-lm --max-transfer-samples 5000
"""

import argparse
from pathlib import Path

import numpy as np

from common import artifacts, data, device, export, memory, metrics, models, scoring, settings, verbalizer

STEP, TEACHER_STEP = "04b_student_from_mistral", "03_mistral"
CANNOT_TEACH = "this LLM cannot teach: take another, or train it on more reviews with 03_finetune_mistral.py"
AT_CHANCE = "pass --force with a smaller --learning-rate or more --epochs"
LOW_LABEL_MASS = 0.5
# 03 decides four flags. FLAGS maps their names in 03's facts to this script's; DEFAULTS are their values without 03.
FLAGS = {"base": "mistral_model", "prompt": "prompt", "label_words": "label_words", "max_length": "prompt_length"}
DEFAULTS = {"prompt": verbalizer.PROMPT, "label_words": list(verbalizer.LABEL_WORDS), "max_length": 512}
OTHER_TEACHER = 0.03  # another precision changes the accuracy by less, another base by more


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = settings.make_parser(__doc__, reads=("train", "transfer"))
    parser.set_defaults(max_transfer_samples="20000")
    settings.add_student_flags(parser)
    add = parser.add_argument
    calibration = "shift of the label log-odds; batch: subtract the mean over the transfer set (no labels, but "
    calibration += "balanced classes needed); fitted: use a bias and a temperature fitted on validation"
    add("--calibration", choices=("batch", "fitted", "none"), default="batch", help=calibration)
    add("--adapter", action=argparse.BooleanOptionalAction, default=True, help="score with 03's adapter")
    add("--mistral-model", help="hub name or folder of the causal LM; default for this and the next three: 03's value")
    add("--prompt", help="question to the LLM, with {review} in the place of the review")
    add("--label-words", nargs=2, metavar="WORD", help="words for negative and positive")
    add("--prompt-length", type=settings.positive_int, help="tokens of the prompt with its review")
    add("--batch-tokens", type=settings.count_or_auto, default="auto", help=settings.BATCH_TOKENS_HELP)
    args = settings.parse(parser, STEP, argv)
    if args.alpha == 0:
        parser.error("--alpha 0 uses no teacher, which only 04a's control does: raise it")
    return args


def find_llm(args: argparse.Namespace) -> dict:
    """The teacher and its prompt, also set in `args`. 03 decides them, or with --no-adapter the flags do."""
    llm = {"base": settings.PRESETS[args.preset]["mistral_model"], **DEFAULTS}
    if args.adapter:
        llm = artifacts.read_run(args, TEACHER_STEP)["facts"]
    for name, flag in FLAGS.items():
        value = getattr(args, flag)
        if args.adapter and value not in (None, llm[name]):
            shown = f"--{flag.replace('_', '-')} {llm[name]!r}"
            settings.stop(f"03's adapter was trained with {shown}: drop the flag, or pass --no-adapter")
        setattr(args, flag, llm[name] if value is None else value)
    return llm | {name: getattr(args, flag) for name, flag in FLAGS.items()} | {"adapter": args.adapter}


def check_prompt(base: str, llm: dict):
    """The LLM's tokenizer and the label words' ids; stops if prompt, words or length do not work."""
    tokenizer = models.load_tokenizer(base)
    label_ids = verbalizer.label_token_ids(tokenizer, llm["prompt"], llm["label_words"])
    verbalizer.encode_prompts(tokenizer, [""], llm["prompt"], llm["max_length"])
    return tokenizer, label_ids


def scored_splits(args: argparse.Namespace, reviews: data.Reviews) -> list[str]:
    """The splits that the LLM scores; train only if its soft labels are learned or calibrate."""
    from common import distill

    train = ["train"] if distill.reviews_with_soft_labels(args, reviews) == "all" else []
    return ["validation", *train, *(["transfer"] if len(reviews.transfer) else [])]


def save_soft_labels(
    args: argparse.Namespace, reviews: data.Reviews, llm: dict, adapter: Path | None, hardware, folder: Path
) -> None:
    """Save the LLM's raw label log-probabilities by example_id, for every split.

    They take hours, so they stay when only the student's settings change. Those of another teacher or sample are
    deleted.
    """
    origin = {"weights": models.weights_digest(adapter) if adapter else "no adapter"}
    origin |= {name: llm[name] for name in ("base", "prompt", "label_words", "max_length")}
    splits = scored_splits(args, reviews)
    for split in splits:
        texts = data.fingerprint(getattr(reviews, split))
        scoring.delete_unless_made_from(folder, split, origin | {"texts": texts})
    if device.share(all(scoring.is_scored(folder, split, len(getattr(reviews, split))) for split in splits)):
        return
    base = llm["base"]
    tokenizer, label_ids = check_prompt(base, llm)
    print(f"label words {llm['label_words']} are the tokens {tokenizer.convert_ids_to_tokens(label_ids)}")
    model = models.load_llm(base, hardware, adapter)

    def score(texts: list[str]) -> dict[str, np.ndarray]:
        ids = verbalizer.encode_prompts(tokenizer, texts, llm["prompt"], llm["max_length"])
        return {"scores": scoring.score_llm(model, ids, label_ids, tokenizer.pad_token_id, hardware, args.batch_tokens)}

    for split in splits:
        scoring.in_chunks(folder, split, getattr(reviews, split), scoring.LOG_PROBABILITIES, score, chunk=250)


def calibrate(
    chosen: str, log_odds: dict[str, np.ndarray], labels: np.ndarray
) -> tuple[float, float, dict[str, dict[str, float]]]:
    """Bias and temperature of the chosen calibration, and the teacher's figures on validation with each one."""
    bias = verbalizer.batch_calibration(log_odds["transfer" if "transfer" in log_odds else "train"])
    calibrations = {"none": (0.0, 1.0), "batch": (bias, 1.0)}
    quality = {
        name: metrics.describe(labels, verbalizer.teacher_logits(log_odds["validation"], *shift))
        for name, shift in calibrations.items()
    }
    # For an LLM near chance a fit means nothing, and may not exist.
    if chosen == "fitted" or quality["batch"]["accuracy"] > 0.5 + 2 / np.sqrt(len(labels)):
        calibrations["fitted"] = verbalizer.fitted_calibration(log_odds["validation"], labels)
        held_out = verbalizer.out_of_fold(log_odds["validation"], labels)
        quality["fitted"] = metrics.describe(labels, verbalizer.teacher_logits(held_out))
    return *calibrations[chosen], quality


def read_teacher(args: argparse.Namespace, reviews: data.Reviews, llm: dict, folder: Path) -> tuple:
    """The teacher's calibrated arrays for train, then transfer; its logits, the calibration, its figures on validation.

    Stops if the LLM is at chance, or is not the one that 03 trained: its student would be random.
    """
    from common import distill, training

    log_p = {}
    for split in scored_splits(args, reviews):
        file_ids, scores = scoring.read_scores(folder, split, scoring.LOG_PROBABILITIES)
        rows = distill.teacher_rows(
            file_ids, getattr(reviews, split)["example_id"], split, "04b_distill_from_mistral.py"
        )
        log_p[split] = scores[rows]
    log_odds = {split: verbalizer.log_odds(scores) for split, scores in log_p.items()}
    labels = reviews.validation["label"].to_numpy()
    bias, temperature, quality = calibrate(args.calibration, log_odds, labels)
    learned = np.concatenate([log_odds[split] for split in ("train", "transfer") if split in log_odds])
    teacher_logits = verbalizer.teacher_logits(learned, bias, temperature)
    if "train" not in log_odds:  # gold labels alone: zeros stand in the labelled rows, and no loss reads them
        teacher_logits = np.concatenate([np.zeros((len(reviews.train), 2), np.float32), teacher_logits])
    mass = verbalizer.label_mass(log_p["validation"])

    print(f"label mass p(positive) + p(negative): {mass:.3f}")
    if mass < LOW_LABEL_MASS:
        print("warning: the LLM prefers other words to the label words; its ranking may still be good")
    spread = np.percentile((learned - bias) / temperature, (5, 50, 95))
    print("log-odds of the soft labels: 5% {:.2f}, median {:.2f}, 95% {:.2f}".format(*spread))
    for name, scores in quality.items():
        note = f" (in use: minus {bias:.3f}, divided by {temperature:.3f})" if name == args.calibration else ""
        print(
            f"teacher on validation, calibration {name}: accuracy {metrics.in_words(scores)}, "
            f"NLL {scores['nll']:.3f}, ECE {scores['ece']:.3f}{note}"
        )
    accuracy, recorded = quality["none"]["accuracy"], llm.get("validation_accuracy")
    if recorded is not None and abs(accuracy - recorded) > max(OTHER_TEACHER, 2 / len(labels)):
        settings.stop(
            f"the LLM's validation accuracy is {accuracy:.3f} here and was {recorded:.3f} in 03: "
            f"is {llm['base']} still the base that the adapter was trained on?"
        )
    validation_logits = verbalizer.teacher_logits(log_odds["validation"], bias, temperature)
    distill.refuse_bad_teacher(validation_logits, labels, "validation")
    training.refuse_collapse(validation_logits, labels, CANNOT_TEACH)
    if "transfer" in log_odds:
        distill.refuse_one_class(verbalizer.teacher_logits(log_odds["transfer"], bias, temperature))
    calibration = {"calibration": args.calibration, "bias": bias, "calibration_temperature": temperature}
    figures = {"label_mass": round(mass, 6)} | {f"teacher_{name}": scores for name, scores in quality.items()}
    return {"teacher_logits": teacher_logits}, validation_logits, calibration, figures


def check_inputs(args: argparse.Namespace, llm: dict, reviews: data.Reviews) -> dict[str, str]:
    """The fingerprints of everything that the step reads; stops if a model, a length or 03's split does not fit."""
    inputs = dict(reviews.fingerprints)
    if llm["adapter"]:
        artifacts.refuse_conflict(args, artifacts.read_run(args, TEACHER_STEP), reviews.fingerprints)
        inputs[TEACHER_STEP] = artifacts.fingerprint(args, TEACHER_STEP)
    models.check_length(llm["max_length"], llm["base"], "--prompt-length")
    check_prompt(llm["base"], llm)
    models.check_length(args.max_length, args.student_model)
    models.load_tokenizer(args.student_model)
    return inputs


def train_student(args: argparse.Namespace, hardware, folder: Path, reviews: data.Reviews, teacher: dict) -> np.ndarray:
    """Train the student on the teacher's arrays; its (n, 2) validation logits."""
    from common import distill, training

    train, labelled, validation = distill.student_datasets(args, reviews, teacher)
    print(f"student: {len(labelled):,} labelled and {len(train) - len(labelled):,} unlabelled reviews", flush=True)
    weights = {"epochs": args.epochs, "alpha": args.alpha}
    weights["soft_labels"] = distill.reviews_with_soft_labels(args, reviews)
    logits = distill.train_student(args, hardware, folder / "model", train, validation, **weights)
    training.refuse_collapse(logits, validation.labels, AT_CHANCE)
    return logits


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    llm = find_llm(args)
    hardware = device.start(args, __file__)
    reviews = data.load_reviews(args, reads=("train", "transfer"))
    inputs = check_inputs(args, llm, reviews)
    adapter = artifacts.require(args, TEACHER_STEP, "adapter") if llm["adapter"] else None
    folder = artifacts.begin(args, STEP, inputs, keep="soft_labels")
    device.one_process_per_gpu(args, hardware, __file__, argv)

    save_soft_labels(args, reviews, llm, adapter, hardware, folder / "soft_labels")
    memory.free()  # the LLM's memory, for the student
    teacher, validation_logits, calibration, figures = read_teacher(args, reviews, llm, folder / "soft_labels")
    logits = train_student(args, hardware, folder, reviews, teacher)

    scores = metrics.describe(reviews.validation["label"].to_numpy(), logits)
    models_used = {"student": args.student_model, "teacher": llm["base"], "max_length": args.max_length, "llm": llm}
    facts = {"labels": data.LABELS} | models_used | calibration
    role = f"A student of {settings.short(llm['base'])}, which scored two label words after each review."
    export.describe_model(
        args, folder / "model", role, args.student_model, reviews, logits, **export.student_rows(args, reviews)
    )
    scoring.save_validation(folder, reviews.validation, student=logits, teacher=validation_logits)
    artifacts.finish(args, folder, facts, {"validation": {"student": scores} | figures})
    print(f"student: validation accuracy {metrics.in_words(scores)}")
    print(f"next: {settings.next_command('05_benchmark.py')}")


if __name__ == "__main__":
    main()
