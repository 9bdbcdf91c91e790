#!/usr/bin/env python
"""04b: the black-box student. DistilBERT learns the probabilities that Mistral gives to two label words.

    loss = T² · KL(teacher ‖ student) of an unlabelled review,  cross-entropy of a labelled one

The 4-bit LLM scores validation and the transfer set, with 03's adapter or without it (--no-adapter). It needs one
forward pass per batch and saves raw label log-probabilities. An interrupted run continues them. Calibration is applied
when they are read. The student then trains on the labelled reviews and the transfer set, with 04a's trainer. With
--soft-labels all the LLM scores train too, and the loss is 04a's with its alpha. The LLM then reads twice as much, and
the student is no better (results/README.md, section 3).

With --teacher-scores FILE, no LLM is loaded and 03 is not needed: the file holds any LLM's answers for the reviews,
the unlabelled ones above all. Its columns are text or example_id, and log_odds, p_positive or a label. Labelled reviews
learn from their gold label, or with --soft-labels all from their scores too, if each of them has one.

Reads   the reviews, outputs/03_mistral/adapter/ or the file of scores
Writes  outputs/04b_student_from_mistral/  soft_labels/ or teacher_scores/ (by split)  model/  validation.parquet
        metrics.json  run.json
Takes   on two T4s: planned 84 to 110 minutes (results/gpu/plan.csv), not measured yet

    python 04b_distill_from_mistral.py
    python 04b_distill_from_mistral.py --no-adapter --mistral-model path/to/any-causal-lm --max-transfer-samples 5000
    python 04b_distill_from_mistral.py --teacher-scores scores.csv --max-transfer-samples all
"""

import argparse
from pathlib import Path

import numpy as np

from common import artifacts, checks, data, device, export, llms, memory, metrics, models, scoring, settings, verbalizer
from common.teacher_scores import Teacher, read_file, save_scores

STEP, TEACHER_STEP = "04b_student_from_mistral", "03_mistral"
CANNOT_TEACH = "this LLM cannot teach: take another, or train it on more reviews with 03_finetune_mistral.py"
LOW_LABEL_MASS = 0.5
# 03 decides four flags. FLAGS maps their names in 03's facts to this script's; DEFAULTS are their values without 03.
FLAGS = {"base": "mistral_model", "prompt": "prompt", "label_words": "label_words", "max_length": "prompt_length"}
DEFAULTS = {"prompt": verbalizer.PROMPT, "label_words": list(verbalizer.LABEL_WORDS)}
MOST_ACCURACY_CHANGE = 0.03  # another precision changes the accuracy by less, another base by more


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = settings.make_parser(__doc__, reads=("train", "transfer"))
    settings.add_student_flags(parser)
    parser.set_defaults(max_transfer_samples="20000", soft_labels="transfer")
    add = parser.add_argument
    calibration = "shift of the label log-odds; batch: subtract the mean over the transfer set (no labels, but "
    calibration += "balanced classes needed); fitted: use a bias and a temperature fitted on validation; auto: the one "
    calibration += "of the three with the best held-out NLL on validation"
    add("--calibration", choices=("auto", "batch", "fitted", "none"), default="auto", help=calibration)
    add("--adapter", action=argparse.BooleanOptionalAction, default=True, help="score with 03's adapter")
    add("--mistral-model", help="hub name or folder of the causal LM; default for this and the next three: as in 03")
    add("--prompt", help="question to the LLM, with {review} in the place of the review")
    add("--label-words", nargs=2, metavar="WORD", help="words for negative and positive")
    add("--prompt-length", type=settings.positive_int, help="tokens of the prompt with its review")
    add("--batch-tokens", type=settings.count_or_auto, default="auto", help=settings.BATCH_TOKENS_HELP)
    scores = "file of another LLM's answers, in any format of reviews: text or example_id, and log_odds, p_positive or "
    add("--teacher-scores", metavar="FILE", help=scores + "a label; needs neither 03 nor an LLM")
    add("--teacher-name", metavar="NAME", help="that LLM's name in tables and cards; default: the file's")
    args = settings.parse(parser, STEP, argv)
    typed = [flag for flag in (*FLAGS.values(), "batch_tokens") if getattr(args, flag) is not None]
    typed += [] if args.adapter else ["no_adapter"]
    if args.teacher_scores and typed:
        parser.error(f"--teacher-scores asks no LLM: drop --{typed[0].replace('_', '-')}")
    if args.teacher_name and not args.teacher_scores:
        parser.error("--teacher-name names the LLM of --teacher-scores: pass both")
    return args


def find_llm(args: argparse.Namespace) -> dict:
    """The teacher and its prompt, also set in `args`. 03 decides them, or with --no-adapter the flags do."""
    preset = settings.PRESETS[args.preset]
    length = preset.get("03_mistral.max_length", preset.get("max_length", 512))
    llm = {"base": preset["03_mistral.mistral_model"], "max_length": length, **DEFAULTS}
    if args.adapter:
        llm = artifacts.read_run(args, TEACHER_STEP)["facts"]
    for name, flag in FLAGS.items():
        value = getattr(args, flag)
        if args.adapter and value not in (None, llm[name]):
            shown = f"--{flag.replace('_', '-')} {llm[name]!r}"
            settings.stop(f"03's adapter was trained with {shown}: drop the flag, or pass --no-adapter")
        setattr(args, flag, llm[name] if value is None else value)
    return llm | {name: getattr(args, flag) for name, flag in FLAGS.items()} | {"adapter": args.adapter}


def check_teacher(args: argparse.Namespace, llm: dict, reviews: data.Reviews) -> dict[str, str]:
    """The fingerprint of 03 if its adapter is read; stops if the LLM, its prompt or 03's split does not fit."""
    inputs = {}
    if llm["adapter"]:
        artifacts.refuse_conflict(args, artifacts.read_run(args, TEACHER_STEP), reviews.fingerprints)
        artifacts.require(args, TEACHER_STEP, "adapter")
        inputs[TEACHER_STEP] = artifacts.fingerprint(args, TEACHER_STEP)
    tokenizer = checks.check_llm(llm["base"], llm["max_length"], reviews.train["text"], "--prompt-length")
    checks.check_prompt(tokenizer, llm["prompt"], llm["label_words"], llm["max_length"])
    return inputs


def scored_splits(args: argparse.Namespace, reviews: data.Reviews) -> list[str]:
    """The splits that the LLM scores; train only if its soft labels are learned."""
    train = ["train"] if settings.reviews_with_soft_labels(args, len(reviews.transfer)) == "all" else []
    return ["validation", *train, *(["transfer"] if len(reviews.transfer) else [])]


def save_soft_labels(
    args: argparse.Namespace, hardware: device.Hardware, folder: Path, reviews: data.Reviews, llm: dict
) -> None:
    """Save the LLM's raw label log-probabilities by example_id, for every split.

    They take hours, so they stay when only the student's settings change. Those of another teacher or sample are
    deleted.
    """
    adapter = Path(args.output_dir, TEACHER_STEP, "adapter") if llm["adapter"] else None
    origin = {"weights": models.weights_digest(adapter) if adapter else "no adapter"}
    origin |= {name: llm[name] for name in ("base", "prompt", "label_words", "max_length")}
    if base_files := models.sampled_digest(llm["base"]):
        origin["base_files"] = base_files
    splits = scored_splits(args, reviews)
    for split in splits:
        texts = data.fingerprint(getattr(reviews, split))
        scoring.delete_unless_made_from(folder, split, origin | {"texts": texts})
    if device.share(all(scoring.is_scored(folder, split, len(getattr(reviews, split))) for split in splits)):
        print("soft labels stay, whatever the precision: delete soft_labels/ to score again", flush=True)
        return
    tokenizer, model = models.load_tokenizer(llm["base"]), llms.load_llm(llm["base"], hardware, adapter)
    for split in splits:
        table = getattr(reviews, split)
        scoring.score_prompts(folder, split, table, model, tokenizer, llm, hardware, args.batch_tokens)


def ask_llm(
    args: argparse.Namespace, hardware: device.Hardware, folder: Path, reviews: data.Reviews, llm: dict
) -> Teacher:
    """The LLM as a teacher, with the log-odds of all splits that it scores."""
    save_soft_labels(args, hardware, folder, reviews, llm)
    memory.free()  # the LLM's memory, for the student
    log_p = {}
    for split in scored_splits(args, reviews):
        log_p[split], _ = scoring.read_scores(folder, split, getattr(reviews, split), artifacts.SCRIPTS[STEP])
    mass = check_scores(llm, log_p["validation"], reviews.validation["label"].to_numpy())
    log_odds = {split: metrics.log_odds(scores) for split, scores in log_p.items()}
    role = "which scored two label words after each review"
    return Teacher(llm["base"], role, log_odds, {"llm": llm}, CANNOT_TEACH, {"label_mass": mass})


def check_scores(llm: dict, log_p: np.ndarray, labels: np.ndarray) -> float:
    """The label mass on validation; stops if the LLM is not the one that 03 trained."""
    mass = verbalizer.label_mass(log_p)
    print(f"label mass p(positive) + p(negative): {mass:.3f}")
    if mass < LOW_LABEL_MASS:
        print("warning: the LLM prefers other words to the label words; its ranking may still be good")
    accuracy, recorded = metrics.accuracy(labels, log_p.argmax(axis=1)), llm.get("validation_accuracy")
    if recorded is not None and abs(accuracy - recorded) > max(MOST_ACCURACY_CHANGE, 2 / len(labels)):
        change = f"the LLM's validation accuracy is {accuracy:.3f} here and was {recorded:.3f} in 03"
        settings.stop(f"{change}: is {llm['base']} still the base that the adapter was trained on?")
    return round(mass, 6)


def calibrate(
    asked: str, teacher: Teacher, labels: np.ndarray
) -> tuple[str, verbalizer.Calibration, dict[str, dict[str, float] | str]]:
    """The calibration in use with its name, and the teacher's held-out figures on validation with each.

    Stops if the teacher cannot teach: its student would be random. If a file scores too few validation reviews, auto
    means none, and the figures are absent.
    """
    from common import distill, training

    validation, transfer = teacher.log_odds["validation"], teacher.log_odds.get("transfer", np.empty(0))
    scored = ~np.isnan(validation)
    validation, gold = validation[scored], labels[scored]
    few = not scored.all() and np.bincount(gold, minlength=2).min() < verbalizer.MIN_OF_A_CLASS
    asked = "none" if few and asked == "auto" else asked
    made = verbalizer.calibrations(validation, gold, transfer, asked)
    chosen = verbalizer.best_calibration(made, validation, gold, transfer) if asked == "auto" else asked
    logits, figures = made[chosen].logits(validation), {}
    if few:
        figures["teacher"] = f"absent: {len(gold):,} of {len(labels):,} reviews have its score, too few of a class"
        print(f"teacher on validation: {figures['teacher']}; calibration {chosen}")
    else:
        for name, one in made.items():
            figures[f"teacher_{name}"] = scores = metrics.describe(gold, metrics.two_logits(one.held_out))
            used = f" (in use: minus {one.bias:.3f}, divided by {one.temperature:.3f})" if name == chosen else ""
            print(
                f"teacher on validation, calibration {name}: accuracy {metrics.in_words(scores)}, "
                f"NLL {scores['nll']:.3f}, ECE {scores['ece']:.3f}{used}"
            )
        distill.refuse_bad_teacher(logits, gold, "validation")
        training.refuse_collapse(logits, gold, teacher.remedy)
    distill.refuse_one_class(made[chosen].logits(transfer), labels)
    return chosen, made[chosen], figures


def teacher_arrays(
    reviews: data.Reviews, log_odds: dict[str, np.ndarray], calibration: verbalizer.Calibration
) -> dict[str, np.ndarray]:
    """The teacher's calibrated logits for train, then transfer. No loss reads those of a split that was not scored."""
    unread = {split: np.zeros(len(getattr(reviews, split))) for split in ("train", "transfer")}
    odds = np.concatenate([log_odds.get(split, zeros) for split, zeros in unread.items()])
    return {"teacher_logits": calibration.logits(odds)}


def train_student(
    args: argparse.Namespace, hardware: device.Hardware, folder: Path, reviews: data.Reviews, teacher: dict
) -> np.ndarray:
    """Train the student on the teacher's arrays; its (n, 2) validation logits."""
    from common import distill, training

    train, _, validation = distill.student_datasets(args, reviews, teacher)
    how = {"epochs": args.epochs, "alpha": args.alpha}
    how |= {"soft_labels": settings.reviews_with_soft_labels(args, len(reviews.transfer))}
    logits = distill.train_student(args, hardware, folder / "model", train, validation, **how)
    training.refuse_collapse(logits, validation.labels)
    return logits


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    llm = None if args.teacher_scores else find_llm(args)
    hardware = device.start(args, __file__)
    reviews = data.load_reviews(args, reads=("train", "transfer"))
    if llm:
        inputs = check_teacher(args, llm, reviews)
    else:
        reviews, teacher, inputs = read_file(args, reviews)
    settings.refuse_no_teacher(args, len(reviews.transfer))
    checks.check_encoder(args.student_model, args.max_length, reviews.train["text"], hardware)
    folder = artifacts.begin(args, STEP, reviews.fingerprints | inputs, keep=("soft_labels",))
    device.one_process_per_gpu(args, hardware, __file__, argv)

    if llm:
        teacher = ask_llm(args, hardware, folder / "soft_labels", reviews, llm)
    else:
        save_scores(folder / "teacher_scores", reviews, teacher.log_odds)
    labels = reviews.validation["label"].to_numpy()
    chosen, calibration, figures = calibrate(args.calibration, teacher, labels)
    logits = train_student(args, hardware, folder, reviews, teacher_arrays(reviews, teacher.log_odds, calibration))

    facts = {"student": args.student_model, "teacher": teacher.name, **teacher.facts}
    facts |= {"max_length": args.max_length, "calibration": chosen}
    facts |= {"bias": calibration.bias, "calibration_temperature": calibration.temperature}
    measured = {"student": metrics.describe(labels, logits), "calibration": chosen} | teacher.measured | figures
    role, rows = f"A student of {settings.short(teacher.name)}, {teacher.role}.", export.student_rows(args, reviews)
    export.add_temperature_and_card(args, folder / "model", role, args.student_model, reviews, logits, **rows)
    of_validation = calibration.logits(teacher.log_odds["validation"])  # NaN where a file has no score
    scoring.save_validation(folder, reviews.validation, student=logits, teacher=of_validation)
    artifacts.finish(args, folder, facts, {"validation": measured})
    print(f"student: validation accuracy {metrics.in_words(measured['student'])}")
    print(f"next: {settings.next_command('05_benchmark.py')}")


if __name__ == "__main__":
    main()
