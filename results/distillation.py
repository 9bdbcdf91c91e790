#!/usr/bin/env python
"""The proof of the white-box method: students of one teacher against students without, on real reviews and weights.

Each run trains a student on the same gold reviews and leaves its score of every review in results/distillation/runs/,
from which results/tables.py makes the tables. Levers are chosen on validation; test is read when the recipe is frozen,
by --read-test. An interrupted part continues where it stopped: finished runs are not trained again. The teacher is 02's
folder under --output-dir, made by 02_finetune_roberta.py with the same subsets.

    common="--dataset path/to/imdb --output-dir outputs/results --student-model results/weights/minilm-l6"
    common="$common --tables outputs/results/tables"
    python results/distillation.py $common --runs control logits --seeds 1
    python results/tables.py --tables outputs/results/tables

`results/distillation/run.sh` holds the commands of all tables.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, data, device, models, scoring, settings
from results import tables

TEACHER_STEP = "02_roberta"
TRAINING = "student_model max_length learning_rate batch_size weight_decay warmup_fraction".split()
SAME = ("seed", "validation_samples", "max_train_samples")  # a teacher has learned from the same labels, no more
# What a run is. `transfer`: share of the unlabelled reviews beside the gold ones, the teacher's surest first; `labels`:
# the teacher's "logits", its "argmax", or none; `gold`: "all" gold reviews, "none", or the negative ones first of a
# label-sorted file, cut (the old mistake); `base`: the student's weights, as "downloaded" or after masked-language
# modelling, "mlm".
GOLD_EPOCHS, TRANSFER_EPOCHS, FINAL_EPOCHS, MLM_EPOCHS = 6, 2, 4, 2
STUDENT = {
    "transfer": 1.0,
    "labels": "logits",
    "gold": "all",
    "feature_weight": 0.0,
    "alpha": 0.9,
    "epochs": TRANSFER_EPOCHS,
    "base": "downloaded",
}
FINAL = STUDENT | {"epochs": FINAL_EPOCHS}  # the longer schedule: of the levers in levers.csv the one that gained most
ALONE = STUDENT | {"transfer": 0.0, "epochs": GOLD_EPOCHS}
CONTROL = ALONE | {"labels": "none", "alpha": 0.0}
RUNS = {
    "control": CONTROL,
    "control_longer": CONTROL | {"epochs": 20},  # 1,260 steps: as many as final takes at 8,000 unlabelled reviews
    "logits": STUDENT,
    "features": STUDENT | {"alpha": 0.0, "feature_weight": 0.1},
    "logits_features": STUDENT | {"feature_weight": 0.1},
    "margin": STUDENT | {"soft_loss": "margin"},
    "argmax_labels": STUDENT | {"labels": "argmax", "alpha": 0.0},
    "no_transfer_set": ALONE | {"feature_weight": 0.1},
    "final": FINAL,
    "final_longer": STUDENT | {"epochs": 14},  # 4,382 steps: as many as final takes at 32,000 unlabelled reviews
    "confident": STUDENT | {"transfer": 0.75},
    "control_levers": CONTROL | {"base": "mlm"},
    "label_sorted": ALONE | {"gold": "label-sorted", "epochs": TRANSFER_EPOCHS},
}


def make_parser(description: str, runs: dict[str, dict]) -> argparse.ArgumentParser:
    """The flags of a proof: subsets, student and training, the same for all its runs."""
    parser = settings.make_parser(description, reads=("train", "transfer", "test"))
    subsets = {"max_train_samples": 2000, "validation_samples": 1000, "max_transfer_samples": 8000}
    parser.set_defaults(**subsets, max_test_samples=5000)
    add = parser.add_argument
    add("--student-model", help="hub name or folder of the student")
    add("--max-length", type=settings.positive_int, default=128, help="tokens of a review")
    settings.add_training_flags(parser, epochs=FINAL_EPOCHS, learning_rate=1e-4, batch_size=32, micro_batch_size=32)
    parser.set_defaults(epochs=None)
    add("--temperature", type=settings.positive, default=2.0, help="of the KL term")
    add("--batch-tokens", type=settings.count_or_auto, default="auto", help=settings.BATCH_TOKENS_HELP)
    add("--runs", nargs="+", choices=list(runs), default=list(runs), help="which to make; finished ones stay")
    add(
        "--seeds",
        nargs="*",
        type=settings.positive_int,
        default=[1, 2, 3],
        help="of training, none to keep what the teacher says and no more; the subsets are --seed's",
    )
    add("--tables", type=Path, default=tables.TABLES, help="whose folder runs/ keeps what each run says")
    return parser


def add_read_test(parser: argparse.ArgumentParser) -> None:
    """The flag by which a frozen recipe's runs read test."""
    parser.add_argument("--read-test", action="store_true", help="the recipe is frozen: score the test reviews too")


def parse(parser: argparse.ArgumentParser, step: str, argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of a proof: its runs have their own epochs, one process, and are made again by deleting them."""
    args = settings.parse(parser, step, argv)
    if args.epochs != parser.get_default("epochs") or args.force:
        parser.error("--epochs is the runs' own; to make a run again, delete its two files in runs/ and its folder")
    if args.num_processes not in (None, 1):
        parser.error("the runs are of one process on one GPU: leave out --num-processes")
    del args.num_processes  # or a second GPU would halve the batch of the one process that there is
    return args


@dataclass(frozen=True)
class Proof:
    """What all runs of a proof share."""

    args: argparse.Namespace
    hardware: device.Hardware
    reviews: data.Reviews
    ids: dict[str, list[np.ndarray]]  # the student's token ids by split; no validation: the last epoch is kept
    folder: Path  # of the models
    runs: Path  # of what they say


def score(args, hardware: device.Hardware, model_folder: Path, reviews: pd.DataFrame) -> np.ndarray:
    """A model's (n, 2) logits of the reviews."""
    tokenizer = models.load_tokenizer(str(model_folder))
    model = models.prepare_for_scoring(models.load_classifier(str(model_folder)), hardware)
    ids = models.encode(tokenizer, reviews["text"].tolist(), args.max_length)
    return scoring.score_encoder(model, ids, tokenizer.pad_token_id, hardware, args.batch_tokens)["scores"]


def keep_teacher(args, hardware, runs: Path, reviews: data.Reviews, test: bool) -> dict:
    """What 02's teacher says of each split, in `runs`; made there unless it is there.

    Students learn from what is kept, so they can be trained without their teacher. Stops when the kept one is another
    than 02's, or has read other reviews.
    """
    from common import distill

    splits = {split: getattr(reviews, split) for split in ("train", "transfer", "validation")}
    splits |= {"test": reviews.test} if test else {}
    of = {split: data.fingerprint(table) for split, table in splits.items()}
    model = Path(args.output_dir, TEACHER_STEP, "model")
    weights = models.weights_digest(model) if model.exists() else None
    kept = tables.read_run(runs, "teacher", args.seed)
    if kept:
        refuse_other_teacher(kept, of, weights)
        if of.keys() <= kept["reviews"].keys():
            return kept
    artifacts.refuse_conflict(args, artifacts.read_run(args, TEACHER_STEP), reviews.fingerprints, SAME)
    model, folder = (artifacts.require(args, TEACHER_STEP, part) for part in ("model", "soft_labels"))
    scores = {split: read_soft_labels(folder, split, table) for split, table in splits.items() if split != "test"}
    distill.refuse_bad_teacher(scores["train"], reviews.train["label"].to_numpy(), "train")
    if len(reviews.transfer):
        distill.refuse_one_class(scores["transfer"])
    scores |= {"test": score(args, hardware, model, reviews.test)} if test else {}
    about = {"gold": len(reviews.train), "transfer": 0, "teacher": None, "seconds": None, "reviews": of}
    tables.keep(runs, "teacher", args.seed, about | {"weights": weights}, scores)
    return tables.read_run(runs, "teacher", args.seed)


def refuse_other_teacher(kept: dict, of: dict[str, str], weights: str | None, asked: dict | None = None) -> None:
    """Stop when a kept teacher has read other reviews, or is another than the one at hand (None: none is).

    `asked`, of an LLM: which one, by what prompt, label words and length.
    """
    now = {split: of[split] for split in of.keys() & kept["reviews"].keys()}
    now |= {"weights": weights or kept["weights"], "asked": asked or kept.get("asked")}
    then = kept["reviews"] | {"weights": kept["weights"], "asked": kept.get("asked")}
    remedy = "delete it and its .npz, and every run that learned from it"
    refuse_other(now, {name: then[name] for name in now}, kept["file"], remedy)


def read_soft_labels(folder: Path, split: str, table: pd.DataFrame) -> np.ndarray:
    """02's logits of a table's reviews."""
    from common import distill

    in_file, scores = scoring.read_scores(folder, split, scoring.LOGITS)
    return scores[distill.teacher_rows(in_file, table["example_id"], split, "02_finetune_roberta.py")]


def read_features(args, runs: Path, reviews: data.Reviews) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """02's hidden states by split, and the rows of these reviews in them; only the kept teacher's own will do."""
    from common import distill

    model, folder = (artifacts.require(args, TEACHER_STEP, part) for part in ("model", "soft_labels"))
    if models.weights_digest(model) != tables.read_run(runs, "teacher", args.seed)["weights"]:
        settings.stop(f"{model}/ is not the teacher that {tables.TABLES.name}/runs/ keeps: delete runs/ to start again")
    found = {}
    for split in ("train", "transfer"):
        in_file, _ = scoring.read_scores(folder, split, scoring.LOGITS)
        wanted = getattr(reviews, split)["example_id"]
        rows = distill.teacher_rows(in_file, wanted, split, "02_finetune_roberta.py")
        found[split] = artifacts.read_array(folder / f"{split}_features.npy", len(in_file)), rows
    return found


class Texts(Dataset):
    """Token ids alone, for masked-language modelling."""

    def __init__(self, ids: list[np.ndarray]):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        return {"input_ids": self.ids[row].tolist()}


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


def pretrain(proof: Proof) -> None:
    """The student after in-domain masked-language modelling on train and transfer reviews (Gururangan et al. 2020)."""
    args, folder = proof.args, proof.folder / "mlm"
    about = {name: getattr(args, name) for name in ("seed", *TRAINING)}
    about |= {"precision": proof.hardware.precision, "epochs": MLM_EPOCHS}
    begin(folder, about | {split: data.fingerprint(getattr(proof.reviews, split)) for split in ("train", "transfer")})
    if (folder / "model").exists():
        return
    import torch
    from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

    from common import training

    class MaskedTokens(training.ReviewTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return masked_loss(model, inputs)

    ids, tokenizer = proof.ids["train"] + proof.ids["transfer"], models.load_tokenizer(args.student_model)
    device.seed_everything(args.seed)
    model = AutoModelForMaskedLM.from_pretrained(args.student_model, dtype=torch.float32)
    model.accepts_loss_kwargs = False
    own = training.WITHOUT_VALIDATION | {"num_train_epochs": MLM_EPOCHS}
    trainer = MaskedTokens(
        model=model,
        args=training.training_arguments(args, proof.hardware, folder / "checkpoints", len(ids), **own),
        train_dataset=Texts(ids),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    )
    training.train(trainer, proof.hardware)
    training.save(model, tokenizer, folder / "model", folder / "checkpoints")


def base_of(proof: Proof, run: dict) -> str:
    """The folder or name of the weights that a run's student starts from."""
    if run["base"] == "downloaded":
        return proof.args.student_model
    pretrain(proof)
    return str(proof.folder / "mlm" / "model")


def chosen_rows(run: dict, gold: np.ndarray, transfer_logits: np.ndarray | None) -> dict[str, np.ndarray]:
    """The rows of each split that a run trains on: of the transfer set those of which the teacher is surest."""
    rows = {"train": np.arange(len(gold))} if run["gold"] != "none" else {}
    if run["gold"] == "label-sorted":
        rows["train"] = np.argsort(gold, kind="stable")[: len(gold) // 2]
    if run["transfer"]:
        surest = np.argsort(-np.abs(transfer_logits[:, 1] - transfer_logits[:, 0]), kind="stable")
        rows["transfer"] = np.sort(surest[: round(run["transfer"] * len(surest))])
    return rows


def train_run(proof: Proof, run: dict, seed: int, base: str, target: Path, soft: dict[str, np.ndarray]) -> None:
    """Train a run's student, from the weights of `base` and the teacher's logits of each split, into `target`."""
    from common import distill, training

    gold, ids, validation = proof.reviews.train["label"].to_numpy(), proof.ids, None
    rows = chosen_rows(run, gold, soft["transfer"] if run["transfer"] else None)
    hard = {"train": gold, "transfer": np.full(len(ids["transfer"]), distill.IGNORED)}
    hard = np.concatenate([hard[split][kept] for split, kept in rows.items()])
    arrays, width = {}, None
    if run["labels"] != "none":
        logits = np.concatenate([soft[split][kept] for split, kept in rows.items()])
        if run["labels"] == "argmax":  # the teacher's hard labels where no gold one is known
            hard = np.where(hard == distill.IGNORED, logits.argmax(axis=1), hard)
        else:
            arrays["teacher_logits"] = logits
    if run["feature_weight"] > 0:
        features = read_features(proof.args, proof.runs, proof.reviews)
        parts = [(features[split][0], features[split][1][kept]) for split, kept in rows.items()]
        arrays["teacher_features"] = distill.FeatureRows(parts, list(range(parts[0][0].shape[1])))
        width = parts[0][0].shape[-1]
    if ids["validation"]:
        validation = training.ReviewDataset(ids["validation"], proof.reviews.validation["label"].to_numpy())
    own = {"seed": seed, "soft_loss": run.get("soft_loss", "kl"), "student_model": base}
    distill.train_student(
        argparse.Namespace(**vars(proof.args) | own),
        proof.hardware,
        target,
        training.ReviewDataset([ids[split][row] for split, kept in rows.items() for row in kept], hard, **arrays),
        validation,
        epochs=run["epochs"],
        alpha=run["alpha"],
        feature_weight=run["feature_weight"],
        teacher_width=width,
    )


def made_from(proof: Proof, run: dict, seed: int, soft: dict[str, np.ndarray]) -> dict:
    """What decides a run's student: its recipe, the settings, the reviews and the teacher's logits.

    `transfer_reviews` counts the unlabelled ones that it reads, or that its masked-language modelling has read.
    """
    reviews = proof.reviews
    about = {"run": run, "seed": seed, "precision": proof.hardware.precision}
    about |= {name: getattr(proof.args, name) for name in (*TRAINING, "temperature")}
    about |= {"mlm_epochs": MLM_EPOCHS} if run["base"] == "mlm" else {}
    share = 1.0 if run["base"] == "mlm" else run["transfer"]
    splits = ["train", "validation"] + (["transfer"] if share else [])
    about |= {split: data.fingerprint(getattr(reviews, split)) for split in splits}
    about["transfer_reviews"] = round(share * len(reviews.transfer))
    if run["labels"] != "none":
        about["teacher"] = {split: tables.digest(logits) for split, logits in soft.items()}
    return about


def splits_to_keep(args, reviews: data.Reviews) -> dict[str, pd.DataFrame]:
    """The reviews that a run scores for the tables: test once the recipe is frozen."""
    return {"validation": reviews.validation} | ({"test": reviews.test} if args.read_test else {})


def refuse_other(now: dict, then: dict, path: Path, remedy: str = "delete it") -> None:
    """Stop when what lies at `path` was made from something else; `remedy` is how to have it made again."""
    if then != now:
        differing = ", ".join(sorted(key for key in now | then if now.get(key) != then.get(key)))
        settings.stop(
            f"{path} was made with other settings, reviews or teacher ({differing}): pass the same ones, another "
            f"--tables and --output-dir, or {remedy}"
        )


def begin(folder: Path, of_this: dict) -> bool:
    """Record what a folder's model is made from; whether that was done before. Stops when it was something else."""
    record = folder / "made_from.json"
    begun = record.exists()
    if begun:
        refuse_other(of_this, artifacts.read_json(record), folder)
    else:
        artifacts.write_json(record, of_this)
    return begun


def make_run(
    proof: Proof, name: str, run: dict, seed: int, soft: dict[str, np.ndarray], teacher: str | None = None
) -> None:
    """A run's student and what it says, unless they are there.

    Stops when the one that is there was made from something else, and when a student that should have learned has not.
    """
    from common import training

    args, reviews, here = proof.args, proof.reviews, proof.folder / f"{name}-{seed}"
    splits = splits_to_keep(args, reviews)
    artifacts.lock(here)
    of_this, kept = made_from(proof, run, seed, soft), tables.read_run(proof.runs, name, seed)
    if kept:
        refuse_other(of_this, kept["made_from"], kept["file"], f"delete it, its .npz and {here}/")
        if splits.keys() <= kept["scores"].keys():
            return
    continued = begin(here, of_this)
    if not ((here / "seconds.json").exists() and (here / "model").exists()):
        print(f"{name}, seed {seed}", flush=True)
        base = base_of(proof, run)
        started = time.time()
        train_run(proof, run, seed, base, here / "model", soft)
        # An interrupted training's seconds are not known: the time of its first part is gone.
        artifacts.write_json(here / "seconds.json", {"seconds": None if continued else round(time.time() - started)})
    scores = {split: score(args, proof.hardware, here / "model", table) for split, table in splits.items()}
    if proof.ids["validation"] and name not in tables.MAY_COLLAPSE:
        gold, remedy = reviews.validation["label"].to_numpy(), f"{name} is no measure; delete {here}/, change the cause"
        training.refuse_collapse(scores["validation"], gold, remedy)
    rows = chosen_rows(run | {"transfer": 0}, reviews.train["label"].to_numpy(), None)
    about = {"gold": len(rows.get("train", [])), "transfer": of_this["transfer_reviews"], "teacher": teacher}
    about |= artifacts.read_json(here / "seconds.json") | {"made_from": of_this}
    about |= {"device": proof.hardware.name, **artifacts.made_with()}
    tables.keep(proof.runs, name, seed, about, scores)


def encode_reviews(args, reviews: data.Reviews) -> dict[str, list[np.ndarray]]:
    """The student's token ids of every split that it trains on or is chosen by."""
    models.check_length(args.max_length, args.student_model)
    tokenizer = models.load_tokenizer(args.student_model)
    return {
        split: models.encode(tokenizer, getattr(reviews, split)["text"].tolist(), args.max_length)
        for split in ("train", "validation", "transfer")
    }


def main() -> None:
    parser = make_parser(__doc__, RUNS)
    add_read_test(parser)
    args = parse(parser, "distillation", None)
    hardware = device.detect(args)
    reviews, runs = data.load_reviews(args, reads=("train", "transfer", "test")), args.tables / "runs"
    tables.keep_labels(runs, splits_to_keep(args, reviews))
    proof = Proof(args, hardware, reviews, encode_reviews(args, reviews), Path(args.output_dir, "distillation"), runs)
    soft = {}
    if any(RUNS[name]["labels"] != "none" for name in args.runs):  # the others can run while 02 still scores
        teacher = keep_teacher(args, hardware, runs, reviews, args.read_test)
        soft = {split: teacher["scores"][split] for split in ("train", "transfer")}
    for seed in args.seeds:
        for name in args.runs:
            make_run(proof, name, RUNS[name], seed, soft, "teacher" if RUNS[name]["labels"] != "none" else None)


if __name__ == "__main__":
    main()
