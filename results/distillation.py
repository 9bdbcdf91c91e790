#!/usr/bin/env python
"""The proof of the white-box method: students of one teacher against students without, on real reviews and weights.

Each run trains a student on the same gold reviews and leaves its logits on the test part; the table is made from those.
An interrupted part continues where it stopped: runs that are finished are not trained again. The teacher is 02's folder
under --output-dir, made by 02_finetune_roberta.py with the same subsets (`make results` runs both).

    common="--dataset path/to/imdb --output-dir outputs/results --student-model results/weights/minilm-l6"
    python results/distillation.py $common
    python results/distillation.py $common --runs control logits --seeds 1

Writes results/distillation/white_box.csv, one row a run.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, data, device, metrics, models, scoring, settings

TABLE = Path(__file__).parent / "distillation" / "white_box.csv"
COLUMNS = "run seed gold transfer n_test accuracy ci_low ci_high gap_closed mcnemar_p agreement nll ece seconds".split()
TEACHER_STEP = "02_roberta"
# What a run is. `transfer`: unlabelled reviews beside the gold ones; `labels`: the teacher's "logits", "argmax", or
# none; `gold`: the gold reviews, or the negative ones first of a label-sorted file, cut (the old mistake).
GOLD_EPOCHS, TRANSFER_EPOCHS, MLM_EPOCHS = 6, 2, 2
STUDENT = {
    "transfer": True,
    "labels": "logits",
    "gold": "all",
    "feature_weight": 0.0,
    "alpha": 0.9,
    "epochs": TRANSFER_EPOCHS,
}
ALONE = STUDENT | {"transfer": False, "epochs": GOLD_EPOCHS}
RUNS = {
    "control": ALONE | {"labels": "none", "alpha": 0.0},
    "logits": STUDENT,
    "features": STUDENT | {"alpha": 0.0, "feature_weight": 0.1},
    "logits_features": STUDENT | {"feature_weight": 0.1},
    "margin": STUDENT | {"soft_loss": "margin"},
    "argmax_labels": STUDENT | {"labels": "argmax", "alpha": 0.0},
    "no_transfer_set": ALONE | {"feature_weight": 0.1},
    "control_levers": ALONE | {"labels": "none", "alpha": 0.0, "base": "mlm"},
    "final": STUDENT | {"base": "mlm"},
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
    add("--runs", nargs="+", choices=list(runs), default=list(runs), help="which to train; the table holds all found")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of the student's training; the subsets are --seed's")
    return parser


def score_test(args, hardware: device.Hardware, model_folder: Path, test: pd.DataFrame, file: Path) -> None:
    """A model's (n, 2) logits on the test part, saved once."""
    if file.exists():
        return
    tokenizer = models.load_tokenizer(str(model_folder))
    model = models.load_classifier(str(model_folder)).to(hardware.device).eval()
    ids = models.encode(tokenizer, test["text"].tolist(), args.max_length)
    scores = scoring.score_encoder(model, ids, tokenizer.pad_token_id, hardware, args.batch_tokens)["scores"]
    with artifacts.whole(file) as temporary, open(temporary, "wb") as handle:
        np.save(handle, scores)


def read_soft_labels(folder: Path, split: str, table: pd.DataFrame) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The teacher's logits, and (features, rows), of a table's reviews."""
    from common import distill

    in_file, scores = scoring.read_scores(folder, split, scoring.LOGITS)
    rows = distill.teacher_rows(in_file, table["example_id"], split, "02_finetune_roberta.py")
    return scores[rows], (artifacts.read_array(folder / f"{split}_features.npy", len(in_file)), rows)


class Texts(Dataset):
    """Token ids alone, for masked-language modelling."""

    def __init__(self, ids: list[np.ndarray]):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        return {"input_ids": self.ids[row].tolist()}


def pretrain(args, hardware: device.Hardware, tokenizer, ids: list[np.ndarray], folder: Path) -> None:
    """The student after in-domain masked-language modelling on train and transfer reviews (Gururangan et al. 2020)."""
    if folder.exists():
        return
    import torch
    from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

    from common import training

    device.seed_everything(args.seed)
    model = AutoModelForMaskedLM.from_pretrained(args.student_model, dtype=torch.float32)
    model.accepts_loss_kwargs = False
    checkpoints = folder.with_name("mlm_checkpoints")
    once = {"eval_strategy": "no", "load_best_model_at_end": False, "num_train_epochs": MLM_EPOCHS}
    trainer = training.ReviewTrainer(
        model=model,
        args=training.training_arguments(args, hardware, checkpoints, len(ids), **once),
        train_dataset=Texts(ids),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    )
    training.train(trainer, hardware)
    training.save(model, tokenizer, folder, checkpoints)


def train_run(
    args, hardware, run: dict, seed: int, folder: Path, reviews: data.Reviews, ids: dict, soft: dict
) -> float:
    """Train a run's student into folder/model; the seconds that it took."""
    from common import distill, training

    gold = reviews.train["label"].to_numpy()
    splits = ["train", "transfer"] if run["transfer"] else ["train"]
    hard = np.concatenate([gold if split == "train" else np.full(len(ids[split]), distill.IGNORED) for split in splits])
    all_ids = [one for split in splits for one in ids[split]]
    logits = np.concatenate([soft[split][0] for split in splits]) if run["labels"] != "none" else None
    keep = np.arange(len(hard))
    if run["gold"] == "label-sorted":
        keep = np.argsort(gold, kind="stable")[: len(gold) // 2]
    if run["labels"] == "argmax":  # the teacher's hard labels where no gold one is known
        hard = np.where(hard == distill.IGNORED, logits.argmax(axis=1), hard)
    arrays = {}
    if run["labels"] == "logits":
        arrays["teacher_logits"] = logits[keep]
    width = None
    if run["feature_weight"] > 0:
        parts = [soft[split][1] for split in splits]
        arrays["teacher_features"] = distill.FeatureRows(parts, list(range(parts[0][0].shape[1])))
        width = parts[0][0].shape[-1]
    base = str(folder.with_name("mlm")) if run.get("base") == "mlm" else args.student_model
    about = {"seed": seed, "soft_loss": run.get("soft_loss", "kl"), "student_model": base}
    options = argparse.Namespace(**vars(args) | about)
    started = time.time()
    distill.train_student(
        options,
        hardware,
        folder / "model",
        training.ReviewDataset([all_ids[row] for row in keep], hard[keep], **arrays),
        training.ReviewDataset(ids["validation"], reviews.validation["label"].to_numpy()),
        epochs=run["epochs"],
        alpha=run["alpha"],
        feature_weight=run["feature_weight"],
        teacher_width=width,
    )
    return time.time() - started


def make_run(args, hardware, run: dict, name: str, seed: int, folder: Path, reviews, ids: dict, soft: dict) -> None:
    """A run's student and its logits on test, unless they are there."""
    here = folder / f"{name}-{seed}"
    if (here / "test_logits.npy").exists():
        return
    print(f"{name}, seed {seed}", flush=True)
    if run.get("base") == "mlm":
        tokenizer = models.load_tokenizer(args.student_model)
        pretrain(args, hardware, tokenizer, ids["train"] + ids["transfer"], folder / "mlm")
    seconds = train_run(args, hardware, run, seed, here, reviews, ids, soft)
    artifacts.write_json(here / "seconds.json", {"seconds": round(seconds)})
    score_test(args, hardware, here / "model", reviews.test, here / "test_logits.npy")


def describe_teacher(args, name: str, labels: np.ndarray, logits: np.ndarray) -> dict:
    """The row of a teacher."""
    quality = metrics.describe(labels, logits)
    row = {"run": name, "seed": args.seed, "gold": args.max_train_samples, "transfer": 0, "n_test": quality["n"]}
    scores = {key: quality[key] for key in ("accuracy", "ci_low", "ci_high", "nll", "ece")}
    return row | scores | {"agreement": 1.0}


def make_table(args, folder: Path, labels: np.ndarray, runs: dict[str, dict], teacher: np.ndarray) -> pd.DataFrame:
    """One row a finished run, compared with the teacher and with the control of its seed.

    `teacher` holds (n, 2) logits, NaN where it has not read the review: gap and agreement are of the others.
    """

    def read(name: str, seed: int) -> np.ndarray | None:
        file = folder / f"{name}-{seed}" / "test_logits.npy"
        return np.load(file) if file.exists() else None

    def accuracy_beside_teacher(logits: np.ndarray) -> float:
        return metrics.accuracy(labels[read_by_teacher], logits[read_by_teacher].argmax(axis=1))

    read_by_teacher, rows = np.isfinite(teacher[:, 0]), []
    for name, seed in [(name, seed) for name in runs for seed in args.seeds]:
        logits, control = read(name, seed), read("control", seed)
        if logits is None:
            continue
        called, gap, p = logits.argmax(axis=1), None, None
        if control is not None and name != "control":
            lead = accuracy_beside_teacher(teacher) - accuracy_beside_teacher(control)
            if lead >= 0.01:
                gap = (accuracy_beside_teacher(logits) - accuracy_beside_teacher(control)) / lead
            p = metrics.mcnemar_p(called == labels, control.argmax(axis=1) == labels)
        quality = metrics.describe(labels, logits)
        rows.append(
            {
                "run": name,
                "seed": seed,
                "gold": args.max_train_samples,
                "transfer": args.max_transfer_samples if runs[name]["transfer"] else 0,
                "n_test": quality["n"],
                **{key: quality[key] for key in ("accuracy", "ci_low", "ci_high")},
                "gap_closed": gap,
                "mcnemar_p": p,
                "agreement": metrics.accuracy(teacher[read_by_teacher].argmax(axis=1), called[read_by_teacher]),
                "nll": quality["nll"],
                "ece": quality["ece"],
                "seconds": artifacts.read_json(folder / f"{name}-{seed}" / "seconds.json")["seconds"],
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    args = settings.parse(make_parser(__doc__, RUNS), "distillation", None)
    hardware = device.detect(args)
    reviews = data.load_reviews(args, reads=("train", "transfer", "test"))
    tokenizer = models.load_tokenizer(args.student_model)
    ids = {
        split: models.encode(tokenizer, getattr(reviews, split)["text"].tolist(), args.max_length)
        for split in ("train", "validation", "transfer")
    }
    folder, soft, labels = Path(args.output_dir, "distillation"), {}, reviews.test["label"].to_numpy()
    taught = any(RUNS[name]["labels"] != "none" for name in args.runs)  # the others can run while 02 still scores
    if taught:
        artifacts.refuse_conflict(args, artifacts.read_run(args, TEACHER_STEP), reviews.fingerprints)
        of_teacher = artifacts.require(args, TEACHER_STEP, "soft_labels")
        soft = {split: read_soft_labels(of_teacher, split, getattr(reviews, split)) for split in ("train", "transfer")}
        score_test(args, hardware, of_teacher.with_name("model"), reviews.test, folder / "teacher" / "test_logits.npy")
    for seed in args.seeds:
        for name in args.runs:
            make_run(args, hardware, RUNS[name], name, seed, folder, reviews, ids, soft)
            if taught:
                teacher = np.load(folder / "teacher" / "test_logits.npy")
                rows = pd.DataFrame([describe_teacher(args, "teacher", labels, teacher)])
                table = pd.concat([rows, make_table(args, folder, labels, RUNS, teacher)])
                artifacts.write_table(TABLE, table[COLUMNS].round(6))
                print(table[COLUMNS].to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
