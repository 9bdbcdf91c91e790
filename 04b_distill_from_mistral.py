#!/usr/bin/env python
"""04b: the black-box student. DistilBERT learns the probabilities that Mistral gives to two label words.

    loss = alpha · T² · KL(teacher ‖ student)  +  (1 − alpha) · cross-entropy

The 4-bit LLM, with 03's adapter or as it is (--no-adapter), scores train, validation and the transfer set, one forward
pass a batch, into raw label log-probabilities on disk; an interrupted run continues them. Calibration is applied when
they are read. The student then trains on the labelled reviews and the transfer set together, with the trainer of 04a.

Reads   the reviews, outputs/03_mistral/adapter/
Writes  outputs/04b_student_from_mistral/  soft_labels/ (a table by split)  model/  metrics.json  run.json
Takes   on two T4s: planned 86 to 144 minutes (results/gpu/plan.csv), not measured yet

    python 04b_distill_from_mistral.py
    python 04b_distill_from_mistral.py --no-adapter --mistral-model path/to/any-causal-lm --max-transfer-samples 5000
"""

import argparse
from pathlib import Path

import numpy as np

from common import artifacts, data, demo, device, memory, metrics, models, scoring, settings, verbalizer

STEP, TEACHER_STEP = "04b_student_from_mistral", "03_mistral"
CANNOT_TEACH = "this LLM cannot teach: take another, or one that 03_finetune_mistral.py has taught more reviews"
AT_CHANCE = "pass --force with a smaller --learning-rate or more --epochs"
LOW_LABEL_MASS = 0.5
OTHER_TEACHER = 0.03  # another precision moves the accuracy by less, another base by more


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = settings.make_parser(__doc__, reads=("train", "transfer"))
    parser.set_defaults(max_transfer_samples="20000")
    add = parser.add_argument
    add("--student-model", help="hub name or folder of the encoder that becomes the student")
    add("--max-length", type=settings.positive_int, default=512, help="tokens of a review, head and tail kept")
    settings.add_training_flags(parser, epochs=4, learning_rate=5e-5, batch_size=32, micro_batch_size=32)
    add("--alpha", type=settings.fraction, default=0.9, help="weight of the soft labels; 1 - alpha is cross-entropy's")
    add("--soft-loss", choices=("kl", "margin"), default="kl", help="margin: squared difference of the log-odds")
    add("--temperature", type=settings.positive, default=2.0, help="softens both sides of the KL term")
    add(
        "--calibration",
        choices=("batch", "fitted", "none"),
        default="batch",
        help="of the label log-odds: their mean over the transfer set subtracted (no labels needed; assumes balanced "
        "classes), or a bias and a temperature fitted on validation",
    )
    add("--adapter", action=argparse.BooleanOptionalAction, default=True, help="teach with 03's adapter on the LLM")
    add("--mistral-model", help="with --no-adapter: hub name or folder of the causal LM; else 03's holds")
    add(
        "--prompt", default=verbalizer.PROMPT, help="with --no-adapter: {review} where the review goes; else 03's holds"
    )
    add("--label-words", nargs=2, default=list(verbalizer.LABEL_WORDS), metavar="WORD", help="likewise")
    add("--prompt-length", type=settings.positive_int, default=512, help="likewise: tokens with the review")
    add("--batch-tokens", type=settings.count_or_auto, default="auto", help=settings.BATCH_TOKENS_HELP)
    args = settings.parse(parser, STEP, argv)
    if args.alpha == 0:
        parser.error("--alpha 0 leaves the teacher out, as 04a's control does: raise it")
    return args


def find_llm(args: argparse.Namespace) -> dict:
    """What the teacher is and what it is asked: 03's facts, which `args` takes on, or the flags of --no-adapter."""
    flags = {"base": "mistral_model", "prompt": "prompt", "label_words": "label_words", "max_length": "prompt_length"}
    if not args.adapter:
        return {name: getattr(args, flag) for name, flag in flags.items()} | {"adapter": False}
    facts, defaults = artifacts.read_run(args, TEACHER_STEP)["facts"], parse_args(["--preset", args.preset])
    for name, flag in flags.items():
        if getattr(args, flag) not in (getattr(defaults, flag), facts[name]):
            settings.stop(f"03's adapter was trained with {flag} {facts[name]!r}: leave it so, or pass --no-adapter")
        setattr(args, flag, facts[name])
    return facts | {"adapter": True}


def check_prompt(base: str, llm: dict):
    """The LLM's tokenizer and the label words' ids; stops when prompt, words or length cannot serve."""
    tokenizer = models.load_tokenizer(base)
    label_ids = verbalizer.label_token_ids(tokenizer, llm["prompt"], llm["label_words"])
    verbalizer.encode_prompts(tokenizer, [""], llm["prompt"], llm["max_length"])
    return tokenizer, label_ids


def save_soft_labels(
    args: argparse.Namespace, reviews: data.Reviews, llm: dict, adapter: Path | None, hardware, folder: Path
) -> None:
    """Raw label log-probabilities by example_id, of every split, by the LLM with its prompt and length.

    Those of other student settings took hours and still hold; those of another teacher or sample are deleted.
    """
    origin = {"weights": models.weights_digest(adapter) if adapter else "no adapter"}
    origin |= {name: llm[name] for name in ("base", "prompt", "label_words", "max_length")}
    splits = [split for split in ("validation", "train", "transfer") if len(getattr(reviews, split))]
    for split in splits:
        own = {"texts": data.fingerprint(getattr(reviews, split))}
        scoring.delete_unless_made_from(folder, split, origin | own)
    if device.share(all(scoring.is_scored(folder, split, len(getattr(reviews, split))) for split in splits)):
        return
    base = settings.locate(args, llm["base"])
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
    """Bias and temperature of the chosen calibration, and how good the teacher is on validation with each of them."""
    bias = verbalizer.batch_calibration(log_odds.get("transfer", log_odds["train"]))
    calibrations = {"none": (0.0, 1.0), "batch": (bias, 1.0)}
    quality = {
        name: metrics.describe(labels, verbalizer.teacher_logits(log_odds["validation"], *shift))
        for name, shift in calibrations.items()
    }
    # Of an LLM near chance a fit means nothing, and may not exist.
    if chosen == "fitted" or quality["batch"]["accuracy"] > 0.5 + 2 / np.sqrt(len(labels)):
        calibrations["fitted"] = verbalizer.fitted_calibration(log_odds["validation"], labels)
        held_out = verbalizer.out_of_fold(log_odds["validation"], labels)
        quality["fitted"] = metrics.describe(labels, verbalizer.teacher_logits(held_out))
    return *calibrations[chosen], quality


def read_teacher(args: argparse.Namespace, reviews: data.Reviews, llm: dict, folder: Path) -> tuple[dict, dict, dict]:
    """Teacher's arrays for train followed by the transfer set, calibrated; the calibration; its figures on validation.

    Stops when the LLM is at chance or another than the one that 03 trained, instead of making a random student.
    """
    from common import distill, training

    log_p = {}
    for split in ("train", "validation", "transfer"):
        table = getattr(reviews, split)
        if len(table):
            in_file, scores = scoring.read_scores(folder, split, scoring.LOG_PROBABILITIES)
            rows = distill.teacher_rows(in_file, table["example_id"], split, "04b_distill_from_mistral.py")
            log_p[split] = scores[rows]
    log_odds = {split: verbalizer.log_odds(scores) for split, scores in log_p.items()}
    labels = reviews.validation["label"].to_numpy()
    bias, temperature, quality = calibrate(args.calibration, log_odds, labels)
    shared = np.concatenate([log_odds[split] for split in ("train", "transfer") if split in log_odds])
    teacher_logits = verbalizer.teacher_logits(shared, bias, temperature)
    mass = verbalizer.label_mass(log_p["validation"])

    print(f"label mass p(positive) + p(negative): {mass:.3f}")
    if mass < LOW_LABEL_MASS:
        print("warning: the LLM would rather say something else than a label word; its ranking may still be good")
    spread = np.percentile((shared - bias) / temperature, (5, 50, 95))
    print("log-odds of the soft labels: 5% {:.2f}, median {:.2f}, 95% {:.2f}".format(*spread))
    for name, scores in quality.items():
        note = f" (in use: {bias:.3f} subtracted, divided by {temperature:.3f})" if name == args.calibration else ""
        print(
            f"teacher on validation, calibration {name}: accuracy {metrics.in_words(scores)}, "
            f"NLL {scores['nll']:.3f}, ECE {scores['ece']:.3f}{note}"
        )
    now, recorded = quality["none"]["accuracy"], llm.get("validation_accuracy")
    if recorded is not None and abs(now - recorded) > OTHER_TEACHER:
        settings.stop(
            f"the LLM's validation accuracy is {now:.3f} here and was {recorded:.3f} in 03: "
            f"is {llm['base']} still the base that the adapter was trained on?"
        )
    on_validation = verbalizer.teacher_logits(log_odds["validation"], bias, temperature)
    distill.refuse_bad_teacher(on_validation, labels, "validation")
    training.refuse_collapse(on_validation, labels, CANNOT_TEACH)
    if "transfer" in log_odds:
        distill.refuse_one_class(verbalizer.teacher_logits(log_odds["transfer"], bias, temperature))
    calibration = {"calibration": args.calibration, "bias": bias, "calibration_temperature": temperature}
    figures = {"label_mass": round(mass, 6)} | {f"teacher_{name}": scores for name, scores in quality.items()}
    return {"teacher_logits": teacher_logits}, calibration, figures


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    hardware = device.detect(args)
    print("04b_distill_from_mistral.py with")
    llm = find_llm(args)
    settings.show(args)
    if args.preset == "demo":
        demo.prepare(Path(args.output_dir, "demo"))
    reviews = data.load_reviews(args, reads=("train", "transfer"))
    inputs = dict(reviews.fingerprints)
    if llm["adapter"]:
        artifacts.refuse_conflict(args, artifacts.read_run(args, TEACHER_STEP), reviews.fingerprints)
        inputs[TEACHER_STEP] = artifacts.fingerprint(args, TEACHER_STEP)
    models.check_length(llm["max_length"], settings.locate(args, llm["base"]), "--prompt-length")
    check_prompt(settings.locate(args, llm["base"]), llm)
    adapter = artifacts.require(args, TEACHER_STEP, "adapter") if llm["adapter"] else None
    models.check_length(args.max_length, settings.locate(args, args.student_model))
    tokenizer = models.load_tokenizer(settings.locate(args, args.student_model))
    folder = artifacts.begin(args, STEP, inputs, keep="soft_labels")
    device.one_process_per_gpu(args, hardware, __file__, argv)

    from common import distill, training

    save_soft_labels(args, reviews, llm, adapter, hardware, folder / "soft_labels")
    memory.free()  # the LLM's, for the student
    teacher, calibration, figures = read_teacher(args, reviews, llm, folder / "soft_labels")
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

    peak_mb = max(device.gather(memory.highest_peak_mb(), last=True))
    if device.rank() > 0:
        return
    one = metrics.describe(labels, logits)
    artifacts.write_json(folder / "metrics.json", {"validation": {"student": one} | figures})
    made = {"student": args.student_model, "teacher": llm["base"], "max_length": args.max_length, "llm": llm}
    artifacts.finish(args, folder, {"labels": data.LABELS} | made | calibration, peak_mb)
    print(f"student: validation accuracy {metrics.in_words(one)}")
    print(f"next: {settings.next_command(args, '05_benchmark.py')}")


if __name__ == "__main__":
    main()
