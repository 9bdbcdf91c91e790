"""What every training script needs: datasets, padding, TrainingArguments for any 5.x, safe resume, saving."""

import argparse
import dataclasses
import math
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from common.artifacts import whole
from common.data import LABELS
from common.device import Hardware
from common.scoring import last_logits, pad
from common.settings import stop


class ReviewDataset(Dataset):
    """Token ids and labels by row, with further arrays (a teacher's logits, its memory-mapped features) where given."""

    def __init__(self, ids: list[np.ndarray], labels: np.ndarray, **arrays: np.ndarray):
        self.ids, self.labels, self.arrays = ids, np.asarray(labels), arrays

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """For Trainer's length grouping, which walks the dataset for its lengths alone.

        Without this it would read every feature from disk for them, and take any IndexError for the end of the data.
        """
        return ({"input_ids": ids} for ids in self.ids)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {"input_ids": self.ids[row], "labels": self.labels[row]} | {k: a[row] for k, a in self.arrays.items()}


class Collator:
    """Pads a micro-batch to its own longest review and stacks everything else."""

    def __init__(self, pad_id: int, left: bool = False):
        self.pad_id, self.left = pad_id, left

    def __call__(self, rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        input_ids, mask = pad([row["input_ids"] for row in rows], self.pad_id, self.left)
        rest = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0] if key != "input_ids"}
        return {"input_ids": input_ids, "attention_mask": mask, **rest}


class ReviewTrainer(Trainer):
    """Trainer that evaluates in dataset order: by default length grouping would permute the rows, silently."""

    def _get_eval_sampler(self, eval_dataset: Dataset) -> SequentialSampler:
        return SequentialSampler(eval_dataset)


class LabelWordTrainer(ReviewTrainer):
    """Trains a causal LM on the cross-entropy, over all tokens, of the label word as the token after the prompt."""

    def __init__(self, *args, label_ids: list[int], **kwargs):
        super().__init__(*args, **kwargs)
        self.label_ids = label_ids
        self.model_accepts_loss_kwargs = False  # the loss is a mean over its micro-batch: Trainer must divide

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = last_logits(model, inputs["input_ids"], inputs["attention_mask"]).float()
        words = torch.tensor(self.label_ids, device=logits.device)[inputs["labels"]]
        loss = torch.nn.functional.cross_entropy(logits, words)
        return (loss, {"logits": logits[:, self.label_ids]}) if return_outputs else loss


def validation_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Trainer's metric that chooses the checkpoint."""
    return {"accuracy": float((prediction.predictions.argmax(axis=-1) == prediction.label_ids).mean())}


def training_arguments(
    args: argparse.Namespace, hardware: Hardware, checkpoints: Path, rows: int, **more: object
) -> TrainingArguments:
    """TrainingArguments from the settings, for `rows` training reviews; `more` overrides (epochs under Trainer's name).

    Evaluates and saves once an epoch; the checkpoint with the best validation accuracy is loaded at the end.
    """
    accumulation = max(1, args.batch_size // args.micro_batch_size)
    steps = math.ceil(math.ceil(rows / args.batch_size) * more.get("num_train_epochs", args.epochs))
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    grouping = (
        {"train_sampling_strategy": "group_by_length"}
        if "train_sampling_strategy" in fields
        else {"group_by_length": True}
    )
    settings = dict(  # noqa: C408
        output_dir=str(checkpoints),
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=min(args.batch_size, args.micro_batch_size),
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=2 * args.micro_batch_size,
        weight_decay=args.weight_decay,
        warmup_steps=int(args.warmup_fraction * steps),
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,  # the best and the newest stay
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        logging_steps=max(1, steps // 20),
        fp16=hardware.precision == "fp16",
        bf16=hardware.precision == "bf16",
        use_cpu=hardware.device == "cpu",
        dataloader_pin_memory=hardware.device == "cuda",
        seed=args.seed,
        logging_nan_inf_filter=False,  # else a NaN is logged as 0, and train() could not see it
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
        label_names=["labels"],
    )
    return TrainingArguments(**(settings | grouping | more))


def train(trainer: Trainer) -> None:
    """Train, continuing from the newest undamaged checkpoint of an interrupted run; stop when the loss is NaN."""
    checkpoint = newest_checkpoint(Path(trainer.args.output_dir))
    if checkpoint is not None:
        print(f"continuing from {checkpoint}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if losses and not math.isfinite(losses[-1]):
        stop("the training loss became NaN: pass --force with a smaller --learning-rate, or --precision fp32")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; damaged newer ones are deleted with a notice.

    Trainer does not write checkpoints atomically, and continues without a word, but otherwise than before, from one
    whose optimizer, scheduler or random state is missing.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in found:
        damage = _damage(path)
        if damage is None:
            return path
        print(f"{path} is damaged ({damage}): deleting it and falling back to the one before")
        shutil.rmtree(path)
    return None


def _damage(checkpoint: Path) -> str | None:
    for name in ("trainer_state.json", "scheduler.pt", "rng_state.pth", "optimizer.pt"):
        if not (checkpoint / name).is_file():
            return f"no {name}"
    if not zipfile.is_zipfile(checkpoint / "optimizer.pt"):
        return "optimizer.pt is cut short"
    weights = [checkpoint / "model.safetensors", checkpoint / "adapter_model.safetensors"]
    for file in weights:
        if file.is_file():
            try:
                with safe_open(file, framework="numpy"):
                    return None
            except SafetensorError as problem:
                return f"{file.name}: {problem}"
    return "no weights"


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, checkpoints: Path) -> None:
    """Write weights (safetensors), config and tokenizer into `folder`, whole; then the checkpoints can go."""
    with whole(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    shutil.rmtree(checkpoints, ignore_errors=True)


def refuse_collapse(logits: np.ndarray, labels: np.ndarray, remedy: str) -> float:
    """Validation accuracy of (n, 2) logits; stops when all predictions are one class or no better than chance.

    Chance is one half within two standard errors, so a small validation set is not refused for its noise alone.
    """
    predictions = logits.argmax(axis=1)
    accuracy = float((predictions == labels).mean())
    if len(np.unique(predictions)) == 1:
        stop(f"the model calls every validation review {LABELS[predictions[0]]} (it collapsed): {remedy}")
    if accuracy < 0.5 + 1 / math.sqrt(len(labels)):
        stop(f"validation accuracy is {accuracy:.3f}, no better than chance: {remedy}")
    return accuracy
