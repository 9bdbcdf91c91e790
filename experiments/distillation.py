#!/usr/bin/env python
"""Students of a fine-tuned encoder and of a 4-bit LLM, and the same student without a teacher, on the same reviews.

A run is a dict of settings. It trains a student, scores validation and test, and is finished in a folder of its own:
--output-dir/runs/NAME-SEED. 02, 03 and (for nb_svm) 01 have run before with the same labels, in --teachers-from; 02 has
scored at least these unlabelled reviews. Run the command again: finished runs stay, an interrupted one continues, and
one of other settings is refused. --force makes the named runs again; a student's teacher only if it is named itself.

    common="--dataset path/to/imdb --output-dir outputs/distillation --student-model outputs/weights/minilm-l6"
    python experiments/distillation.py $common --runs control final --seeds 1 2 3
    python experiments/distillation.py $common --runs tuned --max-transfer-samples 4000
    python experiments/tables.py results/distillation --collect outputs/distillation/{teachers,runs}

tables.py shows validation first, to choose a recipe by; its --read-test adds test when the recipe is frozen.
`experiments/run.sh` holds the commands of all tables.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import (
    artifacts,
    baseline,
    checks,
    data,
    device,
    encoding,
    llms,
    memory,
    metrics,
    models,
    scoring,
    settings,
    storage,
    verbalizer,
)

SAME = ("seed", "validation_samples", "max_train_samples")  # 01, 02 and 03 have learned from the same labels
TRAINING = "student_model max_length learning_rate batch_size weight_decay warmup_fraction temperature".split()
# A run. `teacher`: one of TEACHERS, or "": then it reads no unlabelled reviews. `labelled`: "all", or "none" for the
# teacher's labels alone. `transfer_samples`: the number of unlabelled reviews, by --seed; 0: all. `terms`: "both" soft
# and hard labels where a review has both, or "one" term per review, which is the gold label's where there is one.
FINAL = {
    "teacher": "teacher",
    "labelled": "all",
    "transfer_samples": 0,
    "terms": "both",
    "alpha": 0.9,
    "epochs": 4,  # chosen on validation before test was read (levers.csv)
}
CONTROL = FINAL | {"teacher": "", "terms": "", "alpha": 0.0, "epochs": 6}
TUNED, SHORT = FINAL | {"teacher": "tuned_teacher"}, FINAL | {"epochs": 2}
RUNS = {
    "control": CONTROL,
    "control_longer": CONTROL | {"epochs": 20},  # 1,260 steps: as many as final takes at 8,000 unlabelled reviews
    "logits": FINAL | {"epochs": 2},
    "final": FINAL,
    "final_longer": FINAL | {"epochs": 14},  # 4,382 steps: as many as final takes at 32,000 unlabelled reviews
    "tuned": TUNED,
    "zero_shot_batch": FINAL | {"teacher": "zero_shot_batch_teacher"},
    # How much unlabelled text?
    "both_2000": FINAL | {"transfer_samples": 2000},
    "both_8000": FINAL | {"transfer_samples": 8000},
    "both_32000": FINAL | {"transfer_samples": 32000},
    "tuned_both_16000": TUNED | {"transfer_samples": 16000},
    "short_control": CONTROL,
    "encoder_short_both_2000": SHORT | {"transfer_samples": 2000},
    "encoder_short_both_8000": SHORT | {"transfer_samples": 8000},
    "encoder_short_both_32000": SHORT | {"transfer_samples": 32000},
    # Whose soft labels? Half of what the LLM reads in short_both_2000 is labelled.
    "encoder_short_one_2000": SHORT | {"transfer_samples": 2000, "terms": "one"},
    "short_both_2000": TUNED | {"transfer_samples": 2000, "epochs": 2},
    "short_one_2000": TUNED | {"transfer_samples": 2000, "epochs": 2, "terms": "one"},
    "short_one_4000": TUNED | {"transfer_samples": 4000, "epochs": 2, "terms": "one"},
}
# Teachers: 02's encoder, and 03's LLM with or without its adapter.
ADAPTER = {"tuned_teacher": True, "zero_shot_batch_teacher": False}
TEACHERS = ("teacher", *ADAPTER)


@dataclass(frozen=True)
class Study:
    """What all runs of one subset of the reviews share."""

    args: argparse.Namespace
    hardware: device.Hardware
    reviews: data.Reviews
    origin: argparse.Namespace  # where 01, 02 and 03 are, and which labels they have read
    labels: str = ""  # gold labels in all, where their number is the question
    encoded: dict = field(default_factory=dict)  # token ids by tokenizer, length and split

    def ids(self, tokenizer: str, max_length: int, split: str) -> list[np.ndarray]:
        """A split's token ids, made once for all runs of one tokenizer."""
        key = tokenizer, max_length, split
        if key not in self.encoded:
            texts = getattr(self.reviews, split)["text"].tolist()
            self.encoded[key] = encoding.encode(models.load_tokenizer(tokenizer), texts, max_length)
        return self.encoded[key]

    def column(self, name: str, seed: int) -> str:
        """A run's folder, and its column in predictions.parquet."""
        return "-".join([name, *([self.labels] if self.labels else []), str(seed)])

    def fingerprints(self, *splits: str) -> dict[str, str]:
        """Which reviews a run reads, by the name of its column in runs.csv."""
        return {f"{split}_reviews": data.fingerprint(getattr(self.reviews, split)) for split in splits}


def make_parser(description: str, runs: Iterable[str]) -> argparse.ArgumentParser:
    """The flags of all runs: subsets, student, training."""
    parser = settings.make_parser(description, reads=("train", "transfer", "test"))
    subsets = {"max_train_samples": 2000, "validation_samples": 1000, "max_transfer_samples": 8000}
    parser.set_defaults(**subsets, max_test_samples=5000, weight_decay=0.01, warmup_fraction=0.06, temperature=2.0)
    add = parser.add_argument
    add("--student-model", help="hub name or folder of the student")
    add("--max-length", type=settings.positive_int, default=128, help="tokens of a review")
    add("--learning-rate", type=settings.positive, default=1e-4, help="peak, after the warm-up")
    add("--batch-size", type=settings.positive_int, default=32, help="reviews a step, over accumulation")
    add("--micro-batch-size", type=settings.positive_int, default=32, help="reviews in memory at once, at most")
    add("--batch-tokens", type=settings.count_or_auto, default="auto", help=settings.BATCH_TOKENS_HELP)
    add("--llm-test-samples", type=settings.positive_int, default=2000, help="test reviews that an LLM reads")
    add("--teachers-from", help="the --output-dir of 01, 02 and 03; default: this one's")
    add("--runs", nargs="+", choices=list(runs), help="which runs to make")
    add("--seeds", nargs="+", type=settings.positive_int, default=[1], help="seeds of training; --seed draws subsets")
    return parser


def begun(args: argparse.Namespace, step: str, inputs: dict[str, str]) -> Path | None:
    """The folder of a step that is to be made or continued; None when it is finished."""
    try:
        return artifacts.begin(args, step, inputs)
    except SystemExit as left:
        if left.code:
            raise
        return None


def finish(args, folder: Path, splits: dict[str, pd.DataFrame], log_odds: dict[str, np.ndarray], **facts) -> None:
    """Write a run's predictions.parquet (example_id, split, label, log_odds), and last its run.json."""
    tables = [table.drop(columns="text").assign(split=name, log_odds=log_odds[name]) for name, table in splits.items()]
    storage.write_table(folder / "predictions.parquet", pd.concat(tables, ignore_index=True))
    artifacts.finish(args, folder, facts)


def settings_of(study: Study, run: str, seed: int, **recipe: object) -> argparse.Namespace:
    """A run's settings, which artifacts.begin compares. Which reviews it reads is compared by their fingerprints."""
    args = study.args
    flags = {name: getattr(args, name) for name in ("output_dir", "batch_tokens", "force")}
    flags |= {"run": run, "labels": study.labels, "seed": seed, "subset_seed": study.origin.seed}
    return argparse.Namespace(**flags, **recipe)


def read_origin(study: Study, step: str) -> dict:
    """The run.json of 01, 02 or 03; stops when that script has read other reviews or labels."""
    run = artifacts.read_run(study.origin, step)
    artifacts.refuse_conflict(study.origin, run, study.reviews.fingerprints, SAME)
    return run


def score(study: Study, model_folder: Path, tokenizer: str, max_length: int, split: str) -> np.ndarray:
    """An encoder's (n,) log-odds of a split's reviews; `tokenizer` names the model that it was made from."""
    pad_id = models.load_tokenizer(tokenizer).pad_token_id
    model = models.prepare_for_scoring(models.load_classifier(str(model_folder)), study.hardware)
    ids, batch_tokens = study.ids(tokenizer, max_length, split), study.args.batch_tokens
    logits = scoring.score_encoder(model, ids, pad_id, study.hardware, batch_tokens)["scores"]
    return metrics.log_odds(logits)


def make_teacher(study: Study, name: str, force: bool = False) -> str:
    """The step that holds a teacher's log-odds of what its students read, and of test; made unless it is finished.

    With few labels test is left out: the teachers are not in that table.
    """
    from common import distill

    reviews, of_llm = study.reviews, name in ADAPTER
    made_by = "03_mistral" if of_llm else "02_roberta"
    run = read_origin(study, made_by)
    splits = {"train": reviews.train, "transfer": reviews.transfer} | ({} if study.labels else {"test": reviews.test})
    splits |= {} if of_llm else {"validation": reviews.validation}
    flags = {"adapter": ADAPTER[name]} if of_llm else {}
    flags |= {"llm_test_samples": study.args.llm_test_samples} if of_llm and "test" in splits else {}
    args = settings_of(study, name, study.origin.seed, **flags)
    args.force = force  # not a student's --force: its other students would be those of another teacher
    inputs = study.fingerprints("train", "validation", *splits)
    inputs[made_by] = artifacts.fingerprint(study.origin, made_by)
    step = f"teachers/{study.column(name, args.seed)}"
    folder = begun(args, step, inputs)
    if folder is None:
        return step
    score_splits = llm_log_odds if of_llm else encoder_log_odds
    log_odds, weights = score_splits(study, run, splits, folder, ADAPTER.get(name))
    gold = len(reviews.train) if ADAPTER.get(name, True) else 0
    if gold:  # nothing is promised of an untuned LLM
        logits = {split: metrics.two_logits(odds) for split, odds in log_odds.items()}
        distill.refuse_bad_teacher(logits["train"], reviews.train["label"].to_numpy(), "train")
        if len(reviews.transfer):
            distill.refuse_one_class(logits["transfer"], reviews.train["label"].to_numpy())
    finish(args, folder, splits, log_odds, gold=gold, transfer=0, teacher="", weights=weights)
    return step


def encoder_log_odds(study: Study, run: dict, splits: dict, *_: object) -> tuple[dict[str, np.ndarray], str]:
    """02's log-odds by split (its soft labels; of test scored here), and which weights these are."""
    model, folder = (artifacts.require(study.origin, "02_roberta", part) for part in ("model", "soft_labels"))
    log_odds = {}
    for split, table in splits.items():
        if split == "test":
            log_odds[split] = score(study, model, str(model), run["settings"]["max_length"], split)
            continue
        script = "02_finetune_roberta.py"
        logits, _ = scoring.read_scores(folder, split, scoring.LOGITS, table["example_id"], script)
        log_odds[split] = metrics.log_odds(logits)
    return log_odds, models.weights_digest(model)


def llm_log_odds(
    study: Study, run: dict, splits: dict, folder: Path, adapter: bool
) -> tuple[dict[str, np.ndarray], str]:
    """An LLM's calibrated log-odds by split, scored as by 04b in chunks in `folder`, and which LLM this is.

    Of test it reads --llm-test-samples reviews, and has NaN for the others.
    """
    args, llm = study.args, run["facts"]
    weights = artifacts.require(study.origin, "03_mistral", "adapter") if adapter else None
    tokenizer, model = models.load_tokenizer(llm["base"]), llms.load_llm(llm["base"], study.hardware, weights)
    log_odds = {}
    for split, table in splits.items():
        rows = np.arange(len(table))
        if split == "test":
            rows = np.sort(data.stratified_order(table["label"], args.seed)[: args.llm_test_samples])
        part = table.iloc[rows]
        scoring.score_prompts(folder, split, part, model, tokenizer, llm, study.hardware, args.batch_tokens)
        ids, script = part["example_id"], "experiments/distillation.py"
        log_p, _ = scoring.read_scores(folder, split, scoring.LOG_PROBABILITIES, ids, script)
        log_odds[split] = np.full(len(table), np.nan)
        log_odds[split][rows] = metrics.log_odds(log_p)
    memory.free()
    bias = verbalizer.batch_calibration(log_odds["transfer"])
    identity = {name: llm[name] for name in ("prompt", "label_words", "max_length")}
    identity |= {"base": Path(llm["base"]).name, "weights": models.weights_digest(weights) if adapter else "no adapter"}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return {split: odds - bias for split, odds in log_odds.items()}, digest


def read_soft_labels(study: Study, step: str) -> dict[str, np.ndarray]:
    """A finished teacher's (n, 2) logits of the train and transfer reviews."""
    table = storage.read_table(artifacts.require(study.args, step, "predictions.parquet"))
    logits = {}
    for split in ("train", "transfer"):
        log_odds = table[table["split"] == split].set_index("example_id", verify_integrity=True)["log_odds"]
        logits[split] = metrics.two_logits(log_odds[getattr(study.reviews, split)["example_id"]].to_numpy())
    return logits


def chosen_rows(study: Study, run: dict) -> dict[str, np.ndarray]:
    """The rows of each split that a run trains on.

    With --max-transfer-samples all, the unlabelled ones are those that the scripts draw by this seed.
    """
    rows = {"train": np.arange(len(study.reviews.train))} if run["labelled"] == "all" else {}
    if run["teacher"]:
        order = data.stratified_order(np.zeros(len(study.reviews.transfer)), study.origin.seed)
        rows["transfer"] = np.sort(order[: run["transfer_samples"] or None])
    return rows


def train(study: Study, args: argparse.Namespace, rows: dict, target: Path, soft: dict[str, np.ndarray]) -> None:
    """Train a student on these rows of each split and their teacher's logits into `target`, unless it is there."""
    from common import distill

    reviews, tokenizer, arrays, validation = study.reviews, args.student_model, {}, None
    checks.check_length(args.max_length, tokenizer)
    hard = {"train": reviews.train["label"].to_numpy(), "transfer": np.full(len(reviews.transfer), distill.IGNORED)}
    hard = np.concatenate([hard[split][kept] for split, kept in rows.items()])
    if soft:
        arrays["teacher_logits"] = np.concatenate([soft[split][kept] for split, kept in rows.items()])
    if args.reads_validation:
        ids = study.ids(tokenizer, args.max_length, "validation")
        validation = encoding.ReviewDataset(ids, reviews.validation["label"].to_numpy())
    ids = [study.ids(tokenizer, args.max_length, split)[row] for split, kept in rows.items() for row in kept]
    dataset, terms = encoding.ReviewDataset(ids, hard, **arrays), "transfer" if args.terms == "one" else "all"
    how = {"epochs": args.epochs, "alpha": args.alpha, "soft_labels": terms}
    distill.train_student(args, study.hardware, target, dataset, validation, **how)


def make_student(study: Study, name: str, run: dict, seed: int, reads_validation: bool = True) -> None:
    """Train and score a run's student unless it is finished.

    Without `reads_validation`, the last epoch is kept. Stops when a student that should have learned has not.
    """
    from common import training

    reviews = study.reviews
    flags = {key: getattr(study.args, key) for key in (*TRAINING, "micro_batch_size")}
    flags |= {"arithmetic": study.hardware.precision, "reads_validation": reads_validation}
    args = settings_of(study, name, seed, **flags, **run)
    inputs = study.fingerprints("train", "validation", "test", *(["transfer"] if run["teacher"] else []))
    soft, facts = {}, {"teacher": run["teacher"], "device": study.hardware.name}
    rows = chosen_rows(study, run)
    facts |= {"gold": len(rows.get("train", [])), "transfer": len(rows.get("transfer", []))}
    if run["teacher"]:
        step = make_teacher(study, run["teacher"])
        inputs["teacher_run"], soft = artifacts.fingerprint(args, step), read_soft_labels(study, step)
        facts["teacher_weights"] = artifacts.read_run(args, step)["facts"]["weights"]
    folder = begun(args, f"runs/{study.column(name, seed)}", inputs)
    if folder is None:
        return
    continued, started = any(path.name != "started.json" for path in folder.iterdir()), time.time()
    train(study, args, rows, folder / "model", soft)
    # The time of an interrupted training's first part is gone.
    facts["seconds"] = None if continued else round(time.time() - started)
    splits = {"validation": reviews.validation, "test": reviews.test}
    odds = {split: score(study, folder / "model", args.student_model, args.max_length, split) for split in splits}
    if reads_validation and run["teacher"] != "zero_shot_batch_teacher":  # an untuned LLM, which promises nothing
        remedy = f"{name} is no measure; change the cause and pass --force"
        logits = metrics.two_logits(odds["validation"])
        training.refuse_collapse(logits, reviews.validation["label"].to_numpy(), remedy)
    finish(args, folder, splits, odds, **facts)
    memory.free()


def make_nb_svm(study: Study) -> None:
    """The test predictions of 01's NB-SVM, as a run."""
    read_origin(study, "01_baseline")
    args = settings_of(study, "nb_svm", study.origin.seed)
    inputs = study.fingerprints("train", "validation", "test")
    inputs["01_baseline"] = artifacts.fingerprint(study.origin, "01_baseline")
    folder = begun(args, f"runs/{study.column('nb_svm', args.seed)}", inputs)
    if folder:
        model = baseline.load_baseline(artifacts.require(study.origin, "01_baseline", "nb_svm"))
        test = study.reviews.test
        logits = model.logits(test["text"])
        facts = {"gold": len(study.reviews.train), "transfer": 0, "teacher": ""}
        finish(args, folder, {"test": test}, {"test": metrics.log_odds(logits)}, **facts)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, [*RUNS, "nb_svm", *TEACHERS])
    args = settings.parse(parser, "distillation", argv)
    if not args.runs:
        parser.error("--runs is missing: name the runs to make")
    hardware = device.detect(args)
    origin = argparse.Namespace(**vars(args) | {"output_dir": args.teachers_from or args.output_dir})
    study = Study(args, hardware, data.load_reviews(args, reads=("train", "transfer", "test")), origin)
    for seed in args.seeds:
        for name in args.runs:
            print(f"{name}, seed {seed}", flush=True)
            if name in TEACHERS:
                make_teacher(study, name, args.force)
            elif name == "nb_svm":
                make_nb_svm(study)
            else:
                make_student(study, name, RUNS[name], seed)


if __name__ == "__main__":
    main()
