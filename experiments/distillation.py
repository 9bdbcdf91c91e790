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
from common import artifacts, baseline, data, device, memory, models, scoring, settings, verbalizer

SAME = ("seed", "validation_samples", "max_train_samples")  # 01, 02 and 03 have learned from the same labels
TRAINING = "student_model max_length learning_rate batch_size weight_decay warmup_fraction temperature".split()
# A run. `teacher`: one of TEACHERS, or "". `labelled`: "all", "none", or "label-sorted", the negative half of a
# label-sorted file (an old mistake). `transfer_share`: part of the unlabelled reviews, the teacher's surest first.
# `transfer_samples`: the number of unlabelled reviews, by --seed; 0: all. `soft_labels`: the teacher's "logits", its
# "argmax", or "none". `terms`: "both" soft and hard labels where a review has both, or "one" term per review, which is
# the gold label's where there is one. `mlm_epochs`: masked-language modelling comes first.
STUDENT = {
    "teacher": "teacher",
    "labelled": "all",
    "transfer_share": 1.0,
    "transfer_samples": 0,
    "soft_labels": "logits",
    "terms": "both",
    "soft_loss": "kl",
    "alpha": 0.9,
    "feature_weight": 0.0,
    "epochs": 2,
    "mlm_epochs": 0,
}
FINAL = STUDENT | {"epochs": 4}  # the longer schedule gained most in levers.csv
ALONE = STUDENT | {"transfer_share": 0.0, "epochs": 6}
CONTROL = ALONE | {"teacher": "", "soft_labels": "none", "alpha": 0.0}
LABEL_SORTED = ALONE | {"labelled": "label-sorted", "epochs": 2}
RUNS = {
    "control": CONTROL,
    "control_longer": CONTROL | {"epochs": 20},  # 1,260 steps: as many as final takes at 8,000 unlabelled reviews
    "control_levers": CONTROL | {"mlm_epochs": 2},
    "argmax_labels": STUDENT | {"soft_labels": "argmax", "alpha": 0.0},
    "logits": STUDENT,
    "features": STUDENT | {"alpha": 0.0, "feature_weight": 0.1},
    "logits_features": STUDENT | {"feature_weight": 0.1},
    "margin": STUDENT | {"soft_loss": "margin"},
    "no_transfer_set": ALONE | {"feature_weight": 0.1},
    "confident": STUDENT | {"transfer_share": 0.75},
    "final": FINAL,
    "final_longer": STUDENT | {"epochs": 14},  # 4,382 steps: as many as final takes at 32,000 unlabelled reviews
    "label_sorted": LABEL_SORTED,
    "zero_shot": FINAL | {"teacher": "zero_shot_teacher"},
    "zero_shot_batch": FINAL | {"teacher": "zero_shot_batch_teacher"},
    "tuned": FINAL | {"teacher": "tuned_teacher"},
    "other_prompt": FINAL | {"teacher": "other_prompt_teacher"},
    "tuned_label_sorted": LABEL_SORTED | {"teacher": "tuned_teacher"},
}
# Whose soft labels, and how much unlabelled text? "tuned_one_8000": the LLM's student of 8,000, one term per review.
for terms in ("both", "one"):
    for transfer in (2000, 8000, 10000, 16000, 32000, "all"):
        recipe = FINAL | {"terms": terms, "transfer_samples": 0 if transfer == "all" else transfer}
        RUNS[f"{terms}_{transfer}"] = recipe
        RUNS[f"tuned_{terms}_{transfer}"] = recipe | {"teacher": "tuned_teacher"}
# Teachers: 02's encoder, and 03's LLM with or without its adapter, by a calibration and a prompt (None: 03's).
OTHER_PROMPT = "Review: {review}\nThe sentiment of this review is"  # not the one of training: an old mistake
TEACHERS = {
    "teacher": {},
    "zero_shot_teacher": {"adapter": False, "calibration": "none", "prompt": None},
    "zero_shot_batch_teacher": {"adapter": False, "calibration": "batch", "prompt": None},
    "tuned_teacher": {"adapter": True, "calibration": "batch", "prompt": None},
    "other_prompt_teacher": {"adapter": True, "calibration": "batch", "prompt": OTHER_PROMPT},
}
# Mistakes, and teachers of which nothing is promised: their students are reported at chance too.
MAY_COLLAPSE = ("label_sorted", "tuned_label_sorted", "zero_shot", "zero_shot_batch", "other_prompt")


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
            self.encoded[key] = data.encode(models.load_tokenizer(tokenizer), texts, max_length)
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
    parser.set_defaults(**subsets, max_test_samples=5000)
    add = parser.add_argument
    add("--student-model", help="hub name or folder of the student")
    add("--max-length", type=settings.positive_int, default=128, help="tokens of a review")
    add("--learning-rate", type=settings.positive, default=1e-4, help="peak, after the warm-up")
    add("--batch-size", type=settings.positive_int, default=32, help="reviews a step, over accumulation")
    add("--micro-batch-size", type=settings.positive_int, default=32, help="reviews in memory at once, at most")
    add("--weight-decay", type=settings.non_negative, default=0.01, help="AdamW's weight decay")
    add("--warmup-fraction", type=settings.fraction, default=0.06, help="share of the steps with a rising rate")
    add("--temperature", type=settings.positive, default=2.0, help="temperature of the KL term")
    add("--batch-tokens", type=settings.count_or_auto, default="auto", help=settings.BATCH_TOKENS_HELP)
    add("--llm-test-samples", type=settings.positive_int, default=2000, help="test reviews that an LLM reads")
    add("--teachers-from", help="the --output-dir of 01, 02 and 03; default: this one's")
    add("--runs", nargs="+", choices=list(runs), default=list(runs), help="which runs to make")
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
    artifacts.write_table(folder / "predictions.parquet", pd.concat(tables, ignore_index=True))
    artifacts.finish(args, folder, {"labels": data.LABELS} | facts)


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
    return logits[:, 1] - logits[:, 0]


def make_teacher(study: Study, name: str, force: bool = False) -> str:
    """The step that holds a teacher's log-odds of what its students read, and of test; made unless it is finished.

    With few labels test is left out: the teachers are not in that table.
    """
    from common import distill

    reviews, made_by = study.reviews, "02_roberta" if name == "teacher" else "03_mistral"
    run = read_origin(study, made_by)
    splits = {"train": reviews.train, "transfer": reviews.transfer} | ({} if study.labels else {"test": reviews.test})
    splits |= {"validation": reviews.validation} if name == "teacher" else {}
    sample = {"llm_test_samples": study.args.llm_test_samples} if TEACHERS[name] and "test" in splits else {}
    args = settings_of(study, name, study.origin.seed, **TEACHERS[name], **sample)
    args.force = force  # not a student's --force: its other students would be those of another teacher
    inputs = study.fingerprints("train", "validation", *splits) | {
        made_by: artifacts.fingerprint(study.origin, made_by)
    }
    step = f"teachers/{study.column(name, args.seed)}"
    folder = begun(args, step, inputs)
    if folder is None:
        return step
    log_odds, weights = (encoder_log_odds if name == "teacher" else llm_log_odds)(study, run, splits, **TEACHERS[name])
    gold = len(reviews.train) if TEACHERS[name].get("adapter", True) else 0
    if gold:  # nothing is promised of an untuned LLM
        logits = {split: verbalizer.teacher_logits(odds) for split, odds in log_odds.items()}
        distill.refuse_bad_teacher(logits["train"], reviews.train["label"].to_numpy(), "train")
        if len(reviews.transfer):
            distill.refuse_one_class(logits["transfer"])
    finish(args, folder, splits, log_odds, gold=gold, transfer=0, teacher="", weights=weights)
    return step


def encoder_log_odds(study: Study, run: dict, splits: dict[str, pd.DataFrame]) -> tuple[dict[str, np.ndarray], str]:
    """02's log-odds by split (its soft labels; of test scored here), and which weights these are."""
    from common import distill

    model, folder = (artifacts.require(study.origin, "02_roberta", part) for part in ("model", "soft_labels"))
    log_odds = {}
    for split, table in splits.items():
        if split == "test":
            log_odds[split] = score(study, model, str(model), run["settings"]["max_length"], split)
            continue
        in_file, logits = scoring.read_scores(folder, split, scoring.LOGITS)
        logits = logits[distill.teacher_rows(in_file, table["example_id"], split, "02_finetune_roberta.py")]
        log_odds[split] = logits[:, 1] - logits[:, 0]
    return log_odds, models.weights_digest(model)


def llm_log_odds(
    study: Study, run: dict, splits: dict[str, pd.DataFrame], adapter: bool, calibration: str, prompt: str | None
) -> tuple[dict[str, np.ndarray], str]:
    """An LLM's calibrated log-odds by split, scored as by 04b, and which LLM and prompt these are.

    Of test it reads --llm-test-samples reviews, and has NaN for the others.
    """
    llm = {name: run["facts"][name] for name in ("base", "prompt", "label_words", "max_length")}
    llm |= {"prompt": prompt} if prompt else {}
    weights = artifacts.require(study.origin, "03_mistral", "adapter") if adapter else None
    identity = llm | {"weights": models.weights_digest(weights) if adapter else "no adapter"}
    folder = Path(study.args.output_dir, "llm", study.column(digest(identity), study.origin.seed))
    artifacts.lock(folder)
    read = dict(splits)
    if "test" in splits:
        rows = np.sort(data.stratified_order(splits["test"]["label"], study.args.seed)[: study.args.llm_test_samples])
        read["test"] = splits["test"].iloc[rows]
    for split, table in read.items():
        scoring.delete_unless_made_from(folder, split, identity | {"texts": data.fingerprint(table)})
    tokenizer = models.load_tokenizer(llm["base"])
    label_ids = verbalizer.label_token_ids(tokenizer, llm["prompt"], llm["label_words"])
    if not all(scoring.is_scored(folder, split, len(table)) for split, table in read.items()):
        model = models.load_llm(llm["base"], study.hardware, weights)

    def score_texts(texts: list[str]) -> dict[str, np.ndarray]:
        ids = verbalizer.encode_prompts(tokenizer, texts, llm["prompt"], llm["max_length"])
        pad_id, batch_tokens = tokenizer.pad_token_id, study.args.batch_tokens
        return {"scores": scoring.score_llm(model, ids, label_ids, pad_id, study.hardware, batch_tokens)}

    log_odds = {}
    for split, table in read.items():
        scoring.in_chunks(folder, split, table, scoring.LOG_PROBABILITIES, score_texts, chunk=250)
        log_odds[split] = verbalizer.log_odds(scoring.read_scores(folder, split, scoring.LOG_PROBABILITIES)[1])
    memory.free()
    bias = verbalizer.batch_calibration(log_odds["transfer"]) if calibration == "batch" else 0.0
    log_odds = {split: odds - bias for split, odds in log_odds.items()}
    if "test" in splits:
        every = np.full(len(splits["test"]), np.nan)
        every[rows] = log_odds["test"]
        log_odds["test"] = every
    return log_odds, digest(identity | {"base": Path(llm["base"]).name})


def digest(content: dict) -> str:
    """A short name for what decides an LLM's scores."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_soft_labels(study: Study, step: str) -> dict[str, np.ndarray]:
    """A finished teacher's (n, 2) logits of the train and transfer reviews."""
    from common import distill

    table = artifacts.read_table(artifacts.require(study.args, step, "predictions.parquet"))
    logits = {}
    for split in ("train", "transfer"):
        part, wanted = table[table["split"] == split], getattr(study.reviews, split)["example_id"]
        rows = distill.teacher_rows(pd.Index(part["example_id"]), wanted, split, "experiments/distillation.py")
        logits[split] = verbalizer.teacher_logits(part["log_odds"].to_numpy()[rows])
    return logits


def read_features(study: Study) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """02's hidden states by split, and the rows of these reviews in them."""
    from common import distill

    folder, found = artifacts.require(study.origin, "02_roberta", "soft_labels"), {}
    for split in ("train", "transfer"):
        in_file, _ = scoring.read_scores(folder, split, scoring.LOGITS)
        wanted = getattr(study.reviews, split)["example_id"]
        rows = distill.teacher_rows(in_file, wanted, split, "02_finetune_roberta.py")
        found[split] = artifacts.read_array(folder / f"{split}_features.npy", len(in_file)), rows
    return found


def chosen_rows(
    run: dict, gold: np.ndarray, transfer_logits: np.ndarray | None, subset_seed: int = 0
) -> dict[str, np.ndarray]:
    """The rows of each split that a run trains on.

    Of the transfer set these are the rows of which the teacher is surest, or a sample. It is the sample that the
    scripts draw by this seed for --max-transfer-samples.
    """
    rows = {"train": np.arange(len(gold))} if run["labelled"] != "none" else {}
    if run["labelled"] == "label-sorted":
        rows["train"] = np.argsort(gold, kind="stable")[: len(gold) // 2]
    if run["transfer_share"]:
        surest = np.argsort(-np.abs(transfer_logits[:, 1] - transfer_logits[:, 0]), kind="stable")
        rows["transfer"] = np.sort(surest[: round(run["transfer_share"] * len(surest))])
    if run["transfer_samples"]:
        order = data.stratified_order(np.zeros(len(transfer_logits)), subset_seed)
        rows["transfer"] = np.sort(order[: run["transfer_samples"]])
    return rows


def train(study: Study, args: argparse.Namespace, run: dict, target: Path, soft: dict[str, np.ndarray]) -> None:
    """Train a run's student from the teacher's logits of each split into `target`, unless it is there."""
    from common import distill

    reviews, tokenizer = study.reviews, study.args.student_model
    models.check_length(args.max_length, tokenizer)
    gold = reviews.train["label"].to_numpy()
    rows = chosen_rows(run, gold, soft.get("transfer"), study.origin.seed)
    hard = {"train": gold, "transfer": np.full(len(reviews.transfer), distill.IGNORED)}
    hard = np.concatenate([hard[split][kept] for split, kept in rows.items()])
    arrays, width, validation = {}, None, None
    if run["soft_labels"] != "none":
        logits = np.concatenate([soft[split][kept] for split, kept in rows.items()])
        if run["soft_labels"] == "argmax":  # the teacher's hard labels where no gold one is known
            hard = np.where(hard == distill.IGNORED, logits.argmax(axis=1), hard)
        else:
            arrays["teacher_logits"] = logits
    if run["feature_weight"] > 0:
        features = read_features(study)
        parts = [(features[split][0], features[split][1][kept]) for split, kept in rows.items()]
        arrays["teacher_features"] = distill.FeatureRows(parts, list(range(parts[0][0].shape[1])))
        width = parts[0][0].shape[-1]
    if args.reads_validation:
        ids = study.ids(tokenizer, args.max_length, "validation")
        validation = data.ReviewDataset(ids, reviews.validation["label"].to_numpy())
    ids = [study.ids(tokenizer, args.max_length, split)[row] for split, kept in rows.items() for row in kept]
    dataset, chosen = data.ReviewDataset(ids, hard, **arrays), {"epochs": run["epochs"], "alpha": run["alpha"]}
    chosen |= {"feature_weight": run["feature_weight"], "teacher_width": width}
    chosen["soft_labels"] = "transfer" if run["terms"] == "one" else "all"
    distill.train_student(args, study.hardware, target, dataset, validation, **chosen)


def make_student(study: Study, name: str, run: dict, seed: int, reads_validation: bool = True) -> None:
    """Train and score a run's student unless it is finished.

    Without `reads_validation`, the last epoch is kept. Stops when a student that should have learned has not.
    """
    from common import training

    reviews, share = study.reviews, 1.0 if run["mlm_epochs"] else run["transfer_share"]
    flags = {key: getattr(study.args, key) for key in (*TRAINING, "micro_batch_size")}
    flags |= {"arithmetic": study.hardware.precision, "reads_validation": reads_validation}
    args = settings_of(study, name, seed, **flags, **run)
    inputs = study.fingerprints("train", "validation", "test", *(["transfer"] if share else []))
    soft, facts = {}, {"teacher": run["teacher"], "device": study.hardware.name}
    if run["teacher"]:
        step = make_teacher(study, run["teacher"])
        inputs["teacher_run"], soft = artifacts.fingerprint(args, step), read_soft_labels(study, step)
        facts["teacher_weights"] = artifacts.read_run(args, step)["facts"]["weights"]
    folder = begun(args, f"runs/{study.column(name, seed)}", inputs)
    if folder is None:
        return
    base = str(pretrain(study, args)) if run["mlm_epochs"] else args.student_model
    continued, started = any(path.name != "started.json" for path in folder.iterdir()), time.time()
    train(study, argparse.Namespace(**vars(args) | {"student_model": base}), run, folder / "model", soft)
    # The time of an interrupted training's first part is gone.
    facts["seconds"] = None if continued else round(time.time() - started)
    splits, shared = (
        {"validation": reviews.validation, "test": reviews.test},
        (study.args.student_model, args.max_length),
    )
    log_odds = {split: score(study, folder / "model", *shared, split) for split in splits}
    if reads_validation and name not in MAY_COLLAPSE:
        remedy = f"{name} is no measure; change the cause and pass --force"
        logits = verbalizer.teacher_logits(log_odds["validation"])
        training.refuse_collapse(logits, reviews.validation["label"].to_numpy(), remedy)
    no_transfer = {"transfer_share": 0, "transfer_samples": 0}
    gold = len(chosen_rows(run | no_transfer, reviews.train["label"].to_numpy(), None).get("train", []))
    transfer = min(run["transfer_samples"], len(reviews.transfer)) or round(share * len(reviews.transfer))
    finish(args, folder, splits, log_odds, gold=gold, transfer=transfer, **facts)
    memory.free()


def pretrain(study: Study, args: argparse.Namespace) -> Path:
    """The folder of the student after masked-language modelling on all reviews (Gururangan et al. 2020)."""
    flags = {name: getattr(args, name) for name in (*TRAINING, "micro_batch_size", "arithmetic")}
    args = settings_of(study, "mlm", study.origin.seed, **flags, epochs=args.mlm_epochs)
    step = f"mlm/{args.epochs}"
    args.force = False
    folder = begun(args, step, study.fingerprints("train", "transfer"))
    if folder is None:
        return artifacts.require(args, step, "model")
    import torch
    from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

    from common import training

    class MaskedTokens(training.ReviewTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return masked_loss(model, inputs)

    tokenizer = models.load_tokenizer(args.student_model)
    ids = [ids for split in ("train", "transfer") for ids in study.ids(args.student_model, args.max_length, split)]
    device.seed_everything(args.seed)
    model = AutoModelForMaskedLM.from_pretrained(args.student_model, dtype=torch.float32)
    model.accepts_loss_kwargs = False
    checkpoints = folder / "checkpoints"
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    trainer = MaskedTokens(
        model=model,
        args=training.training_arguments(args, study.hardware, checkpoints, len(ids), **training.WITHOUT_VALIDATION),
        train_dataset=data.ReviewDataset(ids, np.zeros(len(ids))),
        data_collator=lambda rows: collator([{"input_ids": row["input_ids"].tolist()} for row in rows]),
    )
    training.train(trainer, study.hardware)
    training.save(model, tokenizer, folder / "model", checkpoints)
    artifacts.finish(args, folder, {"labels": data.LABELS})
    return folder / "model"


def masked_loss(model, inputs: dict):
    """Cross-entropy of the masked tokens, with the vocabulary's logits computed for those alone.

    They are 15% of all; over every token the head costs as much arithmetic as MiniLM's blocks.
    """
    import torch.nn.functional as F

    masked = inputs["labels"] != -100

    def keep_masked(_module, _inputs, output):
        output.last_hidden_state = output.last_hidden_state[masked].unsqueeze(0)
        return output

    hook = model.base_model.register_forward_hook(keep_masked)
    try:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[0]
    finally:
        hook.remove()
    return F.cross_entropy(logits.float(), inputs["labels"][masked])


def make_nb_svm(study: Study) -> None:
    """The test predictions of 01's NB-SVM, as a run."""
    read_origin(study, "01_baseline")
    args = settings_of(study, "nb_svm", study.origin.seed)
    inputs = study.fingerprints("train", "validation", "test")
    inputs["01_baseline"] = artifacts.fingerprint(study.origin, "01_baseline")
    folder = begun(args, f"runs/{study.column('nb_svm', args.seed)}", inputs)
    if folder:
        model, test = (
            baseline.load_baseline(artifacts.require(study.origin, "01_baseline", "nb_svm")),
            study.reviews.test,
        )
        logits = model.logits(test["text"])
        facts = {"gold": len(study.reviews.train), "transfer": 0, "teacher": ""}
        finish(args, folder, {"test": test}, {"test": logits[:, 1] - logits[:, 0]}, **facts)


def main(argv: list[str] | None = None) -> None:
    args = settings.parse(make_parser(__doc__, [*RUNS, "nb_svm", *TEACHERS]), "distillation", argv)
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
