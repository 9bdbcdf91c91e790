#!/usr/bin/env python
"""The proof of the white-box method: students of one teacher against students without, on real reviews and weights.

Each run trains a student on the same gold reviews and leaves its score of every review in results/distillation/runs/,
from which results/tables.py makes the tables. Levers are chosen on validation; test is read when the recipe is frozen,
by --read-test. An interrupted part continues where it stopped: finished runs are not trained again. The teacher is 02's
folder under --output-dir, made by 02_finetune_roberta.py with the same subsets.

    common="--dataset path/to/imdb --output-dir outputs/results --student-model results/weights/minilm-l6"
    python results/distillation.py $common --runs control logits --seeds 1
    python results/tables.py

`results/distillation/run.sh` holds the commands of all tables.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, data, device, models, scoring, settings
from results import tables

TEACHER_STEP = "02_roberta"
SAME = ("seed", "validation_samples", "max_train_samples")  # a teacher has learned from the same labels, no more
# What a run is. `transfer`: share of the unlabelled reviews beside the gold ones, the teacher's surest first; `labels`:
# the teacher's "logits", its "argmax", or none; `gold`: "all" gold reviews, "none", or the negative ones first of a
# label-sorted file, cut (the old mistake); `base`: the student as downloaded, after masked-language modelling ("mlm"),
# or as another run of the same seed left it.
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
FINAL = STUDENT | {"epochs": FINAL_EPOCHS}  # the longer schedule: the one lever that led on validation
ALONE = STUDENT | {"transfer": 0.0, "epochs": GOLD_EPOCHS}
CONTROL = ALONE | {"labels": "none", "alpha": 0.0}
RUNS = {
    "control": CONTROL,
    "control_longer": CONTROL | {"epochs": 20},  # as many reviews pass as of final at 8,000 unlabelled ones
    "logits": STUDENT,
    "features": STUDENT | {"alpha": 0.0, "feature_weight": 0.1},
    "logits_features": STUDENT | {"feature_weight": 0.1},
    "margin": STUDENT | {"soft_loss": "margin"},
    "argmax_labels": STUDENT | {"labels": "argmax", "alpha": 0.0},
    "no_transfer_set": ALONE | {"feature_weight": 0.1},
    "gold_last": CONTROL | {"base": "logits", "epochs": 1, "learning_rate": 2e-5},
    "final": FINAL,
    "confident": STUDENT | {"transfer": 0.75},
    "control_levers": CONTROL | {"base": "mlm"},
    "after_mlm": STUDENT | {"base": "mlm"},
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
    settings.add_training_flags(parser, epochs=2, learning_rate=1e-4, batch_size=32, micro_batch_size=32)
    add("--temperature", type=settings.positive, default=2.0, help="of the KL term")
    add("--batch-tokens", type=settings.count_or_auto, default="auto", help=settings.BATCH_TOKENS_HELP)
    add("--runs", nargs="+", choices=list(runs), default=list(runs), help="which to make; finished ones stay")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of the student's training; the subsets are --seed's")
    add("--tables", type=Path, default=tables.TABLES, help="whose folder runs/ keeps what each run says")
    add("--read-test", action="store_true", help="the recipe is frozen: the runs score the test reviews too")
    return parser


def score(args, hardware: device.Hardware, model_folder: Path, reviews: pd.DataFrame) -> np.ndarray:
    """A model's (n, 2) logits of the reviews."""
    tokenizer = models.load_tokenizer(str(model_folder))
    model = models.load_classifier(str(model_folder)).to(hardware.device).eval()
    ids = models.encode(tokenizer, reviews["text"].tolist(), args.max_length)
    return scoring.score_encoder(model, ids, tokenizer.pad_token_id, hardware, args.batch_tokens)["scores"]


def keep_teacher(args, hardware, runs: Path, reviews: data.Reviews, test: bool) -> dict:
    """What 02's teacher says of each split, in `runs`; made there unless it is there.

    Students learn from what is kept, so they can be trained without their teacher.
    """
    splits = {split: getattr(reviews, split) for split in ("train", "transfer", "validation")}
    splits |= {"test": reviews.test} if test else {}
    of = {split: data.fingerprint(table) for split, table in splits.items()}
    kept = tables.read_run(runs, "teacher", args.seed)
    if kept and of.items() <= kept["reviews"].items():
        return kept
    artifacts.refuse_conflict(args, artifacts.read_run(args, TEACHER_STEP), reviews.fingerprints, SAME)
    model, folder = (artifacts.require(args, TEACHER_STEP, part) for part in ("model", "soft_labels"))
    scores = {split: read_soft_labels(folder, split, table) for split, table in splits.items() if split != "test"}
    scores |= {"test": score(args, hardware, model, reviews.test)} if test else {}
    about = {"gold": len(reviews.train), "transfer": 0, "teacher": None, "seconds": None, "reviews": of}
    tables.keep(runs, "teacher", args.seed, about | {"weights": models.weights_digest(model)}, scores)
    return tables.read_run(runs, "teacher", args.seed)


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


def pretrain(args, hardware: device.Hardware, tokenizer, ids: list[np.ndarray], folder: Path) -> None:
    """The student after in-domain masked-language modelling on train and transfer reviews (Gururangan et al. 2020)."""
    if folder.exists():
        return
    import torch
    from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

    from common import training

    class MaskedTokens(training.ReviewTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return masked_loss(model, inputs)

    device.seed_everything(args.seed)
    model = AutoModelForMaskedLM.from_pretrained(args.student_model, dtype=torch.float32)
    model.accepts_loss_kwargs = False
    checkpoints = folder.with_name("mlm_checkpoints")
    own = training.WITHOUT_VALIDATION | {"num_train_epochs": MLM_EPOCHS}
    trainer = MaskedTokens(
        model=model,
        args=training.training_arguments(args, hardware, checkpoints, len(ids), **own),
        train_dataset=Texts(ids),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    )
    training.train(trainer, hardware)
    training.save(model, tokenizer, folder, checkpoints)


def base_of(args, run: dict, seed: int, folder: Path) -> str:
    """The folder or name of the weights that a run's student starts from."""
    if run["base"] == "downloaded":
        return args.student_model
    return str(folder / "mlm" if run["base"] == "mlm" else folder / f"{run['base']}-{seed}" / "model")


def chosen_rows(run: dict, gold: np.ndarray, transfer_logits: np.ndarray | None) -> dict[str, np.ndarray]:
    """The rows of each split that a run trains on: of the transfer set those of which the teacher is surest."""
    rows = {"train": np.arange(len(gold))} if run["gold"] != "none" else {}
    if run["gold"] == "label-sorted":
        rows["train"] = np.argsort(gold, kind="stable")[: len(gold) // 2]
    if run["transfer"]:
        surest = np.argsort(-np.abs(transfer_logits[:, 1] - transfer_logits[:, 0]), kind="stable")
        rows["transfer"] = np.sort(surest[: round(run["transfer"] * len(surest))])
    return rows


def train_run(
    args, hardware, run: dict, seed: int, folder: Path, base: str, runs: Path, reviews, ids: dict, soft: dict
) -> None:
    """Train a run's student into folder/model."""
    from common import distill, training

    gold = reviews.train["label"].to_numpy()
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
        features = read_features(args, runs, reviews)
        parts = [(features[split][0], features[split][1][kept]) for split, kept in rows.items()]
        arrays["teacher_features"] = distill.FeatureRows(parts, list(range(parts[0][0].shape[1])))
        width = parts[0][0].shape[-1]
    own = {"seed": seed, "soft_loss": run.get("soft_loss", "kl"), "student_model": base}
    own["learning_rate"] = run.get("learning_rate", args.learning_rate)
    distill.train_student(
        argparse.Namespace(**vars(args) | own),
        hardware,
        folder / "model",
        training.ReviewDataset([ids[split][row] for split, kept in rows.items() for row in kept], hard, **arrays),
        training.ReviewDataset(ids["validation"], reviews.validation["label"].to_numpy())
        if ids["validation"]
        else None,
        epochs=run["epochs"],
        alpha=run["alpha"],
        feature_weight=run["feature_weight"],
        teacher_width=width,
    )


def made_from(args, run: dict, seed: int, runs: Path, reviews: data.Reviews, soft: dict) -> dict:
    """What decides a run's student: its recipe, the settings, the reviews and the teacher's logits.

    `transfer_reviews` counts the unlabelled ones that it reads, or that the run read from which it starts.
    """
    names = "student_model max_length learning_rate batch_size weight_decay warmup_fraction temperature".split()
    about = {"run": run, "seed": seed} | {name: getattr(args, name) for name in names}
    share = 1.0 if run["base"] == "mlm" else run["transfer"]
    splits = ["train", "validation"] + (["transfer"] if share else [])
    about |= {split: data.fingerprint(getattr(reviews, split)) for split in splits}
    about["transfer_reviews"] = round(share * len(reviews.transfer))
    if run["base"] not in ("downloaded", "mlm"):
        before = tables.read_run(runs, run["base"], seed)
        if before is None:
            settings.stop(f"{run['base']}, seed {seed}, is missing: put it before the run that starts from it")
        about["transfer_reviews"] = before["transfer"]
    if run["labels"] != "none":
        about["teacher"] = {split: hashlib.sha256(logits.tobytes()).hexdigest() for split, logits in soft.items()}
    return about


def keep_labels(args, runs: Path, reviews: data.Reviews) -> None:
    """The gold labels that everything is measured by."""
    splits = splits_to_keep(args, reviews)
    tables.keep_labels(runs, {split: table["label"].to_numpy() for split, table in splits.items()})


def splits_to_keep(args, reviews: data.Reviews) -> dict[str, pd.DataFrame]:
    """The reviews that a run scores for the tables: test once the recipe is frozen."""
    return {"validation": reviews.validation} | ({"test": reviews.test} if args.read_test else {})


def refuse_other(now: dict, then: dict, path: Path) -> None:
    """Stop when what lies at `path` was made from something else."""
    if then != now:
        settings.stop(f"{path} was made with other settings, reviews or teacher: delete it to make it again")


def make_run(
    args, hardware, name: str, run: dict, seed: int, folder: Path, runs: Path, reviews, ids: dict, soft: dict, teacher
) -> None:
    """A run's student in `folder` and what it says in `runs`, unless they are there.

    Stops when the one that is there was made from something else.
    """
    here, splits = folder / f"{name}-{seed}", splits_to_keep(args, reviews)
    artifacts.lock(here)
    of_this, kept = made_from(args, run, seed, runs, reviews, soft), tables.read_run(runs, name, seed)
    if kept and splits.keys() <= kept["scores"].keys():
        return refuse_other(of_this, kept["made_from"], runs / f"{name}-{seed}.json")
    record, continued = here / "made_from.json", here.exists()
    if not continued:
        artifacts.write_json(record, of_this)
    refuse_other(of_this, artifacts.read_json(record), here)
    if not (here / "seconds.json").exists():
        print(f"{name}, seed {seed}", flush=True)
        if run["base"] == "mlm":
            tokenizer = models.load_tokenizer(args.student_model)
            pretrain(args, hardware, tokenizer, ids["train"] + ids["transfer"], folder / "mlm")
        started = time.time()
        train_run(args, hardware, run, seed, here, base_of(args, run, seed, folder), runs, reviews, ids, soft)
        # An interrupted training's seconds are not known: the time of its first part is gone.
        artifacts.write_json(here / "seconds.json", {"seconds": None if continued else round(time.time() - started)})
    scores = {split: score(args, hardware, here / "model", table) for split, table in splits.items()}
    rows = chosen_rows(run | {"transfer": 0}, reviews.train["label"].to_numpy(), None)
    about = {"gold": len(rows.get("train", [])), "transfer": of_this["transfer_reviews"], "teacher": teacher}
    about |= artifacts.read_json(here / "seconds.json") | {"made_from": of_this}
    tables.keep(runs, name, seed, about, scores)


def encode_reviews(args, reviews: data.Reviews) -> dict[str, list[np.ndarray]]:
    """The student's token ids of every split that it trains on or is chosen by."""
    tokenizer = models.load_tokenizer(args.student_model)
    return {
        split: models.encode(tokenizer, getattr(reviews, split)["text"].tolist(), args.max_length)
        for split in ("train", "validation", "transfer")
    }


def main() -> None:
    args = settings.parse(make_parser(__doc__, RUNS), "distillation", None)
    hardware = device.detect(args)
    folder, runs = Path(args.output_dir, "distillation"), args.tables / "runs"
    reviews = data.load_reviews(args, reads=("train", "transfer", "test"))
    keep_labels(args, runs, reviews)
    ids, soft = encode_reviews(args, reviews), {}
    if any(RUNS[name]["labels"] != "none" for name in args.runs):  # the others can run while 02 still scores
        teacher = keep_teacher(args, hardware, runs, reviews, args.read_test)
        soft = {split: teacher["scores"][split] for split in ("train", "transfer")}
    for seed in args.seeds:
        for name in args.runs:
            teacher_name = "teacher" if RUNS[name]["labels"] != "none" else None
            make_run(args, hardware, name, RUNS[name], seed, folder, runs, reviews, ids, soft, teacher_name)


if __name__ == "__main__":
    main()
