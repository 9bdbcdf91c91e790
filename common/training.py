"""What every training script needs: datasets, padding, TrainingArguments, room in memory and on disk, safe resume."""

import argparse
import json
import math
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import EvalPrediction

from common import callbacks, device, memory, models
from common.artifacts import whole
from common.callbacks import DIVERGED
from common.data import LABELS
from common.device import Hardware
from common.settings import stop

# What `training_arguments` takes where no validation reviews choose a checkpoint: the last weights are kept.
WITHOUT_VALIDATION = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


class ReviewDataset(Dataset):
    """Token ids and labels by row, with further arrays (a teacher's logits, its memory-mapped features) where given."""

    def __init__(self, ids: list[np.ndarray], labels: np.ndarray, **arrays: np.ndarray):
        self.ids, self.labels, self.arrays = ids, np.asarray(labels), arrays

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {"input_ids": self.ids[row], "labels": self.labels[row]} | {k: a[row] for k, a in self.arrays.items()}

    def longest_first(self) -> "ReviewDataset":
        """The same reviews in the order that wastes least padding, for an evaluation whose order does not matter."""
        order = sorted(range(len(self)), key=lambda row: -len(self.ids[row]))
        return ReviewDataset([self.ids[row] for row in order], self.labels[order])


class Collator:
    """Pads a micro-batch to its own longest review and stacks everything else."""

    def __init__(self, pad_id: int, left: bool = False):
        self.pad_id, self.left = pad_id, left

    def __call__(self, rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        input_ids, mask = models.pad([row["input_ids"] for row in rows], self.pad_id, self.left)
        rest = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0] if key != "input_ids"}
        return {"input_ids": input_ids, "attention_mask": mask, **rest}


class LengthGrouped(Sampler[int]):
    """Rows of an epoch shuffled and then grouped by length, in an order that seed and epoch alone decide.

    transformers' own length grouping draws from each process's random state, which dropout has moved on by unequal
    steps: two processes would go by two orders, and some reviews would come twice and others never.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, trainer: Trainer):
        self.lengths, self.batch_size, self.seed, self.trainer = lengths, batch_size, seed, trainer

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        epoch = int(self.trainer.state.epoch or 0)  # begun epochs: also right when an interrupted one goes on
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class ReviewTrainer(Trainer):
    """Trainer that trains on reviews of similar length together."""

    def __init__(self, *args, **kwargs):
        added = [callbacks.SaveOften(), callbacks.MaxHours(), callbacks.RefuseNaN(), callbacks.Progress()]
        super().__init__(*args, callbacks=added, **kwargs)
        self.remove_callback(PrinterCallback)  # prints dictionaries

    def get_train_dataloader(self) -> DataLoader:
        # Trainer would keep the micro-batch from before `fit_memory`, and transformers 5.0 that of the checkpoint: with
        # our accumulation either would be another batch.
        self._train_batch_size = self.args.per_device_train_batch_size
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthGrouped:
        lengths = [len(ids) for ids in self.train_dataset.ids]
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGrouped(lengths, batch, self.args.seed, self)


class LabelWordTrainer(ReviewTrainer):
    """Trains a causal LM on the cross-entropy, over all tokens, of the label word as the token after the prompt."""

    def __init__(self, *args, label_ids: list[int], **kwargs):
        super().__init__(*args, **kwargs)
        self.label_ids = label_ids
        self.model_accepts_loss_kwargs = False  # the loss is a mean over its micro-batch: Trainer must divide

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = models.last_logits(model, inputs["input_ids"], inputs["attention_mask"]).float()
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

    Evaluates once an epoch; the checkpoint with the best validation accuracy is loaded at the end.
    """
    steps = math.ceil(math.ceil(rows / args.batch_size) * more.get("num_train_epochs", args.epochs))
    micro_batch = micro_batch_of(args.batch_size, hardware.processes, args.micro_batch_size)
    settings = dict(  # noqa: C408
        output_dir=str(checkpoints),
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=args.batch_size // (micro_batch * hardware.processes),
        per_device_eval_batch_size=2 * micro_batch,
        weight_decay=args.weight_decay,
        warmup_steps=int(args.warmup_fraction * steps),
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,  # the best and the newest stay, and a third while it is written: 12.8 GB of RoBERTa-large
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        logging_steps=max(1, steps // 20),
        fp16=hardware.precision == "fp16",
        bf16=hardware.precision == "bf16",
        use_cpu=hardware.device == "cpu",
        dataloader_pin_memory=hardware.device == "cuda",
        ddp_find_unused_parameters=False,  # true finds none, and fails with gradient checkpointing
        seed=args.seed,
        logging_nan_inf_filter=False,  # else a NaN is logged as 0, and train() could not see it
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    return TrainingArguments(**(settings | more))


def micro_batch_of(batch_size: int, processes: int, at_most: int) -> int:
    """The largest micro-batch that, times processes and whole accumulation steps, gives the batch."""
    share = batch_size // processes
    return max(size for size in range(1, min(share, at_most) + 1) if share % size == 0)


def train(trainer: Trainer, hardware: Hardware) -> None:
    """Train, continuing from the newest undamaged checkpoint of an interrupted run.

    Stops when the loss is NaN, and with exit code 3 when --max-hours is over before the last step.
    """
    checkpoints = Path(trainer.args.output_dir)
    checkpoint = device.share(device.first_alone(lambda: newest_checkpoint(checkpoints)))
    fit_memory(trainer, hardware)
    device.first_alone(lambda: refuse_full_disk(trainer.model, checkpoints))
    if checkpoint is not None:
        print(f"continuing from {checkpoint}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.state.max_steps:
        device.stop_for_time()
    best = trainer.state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and not (best and Path(best).exists()):
        stop(f"the best checkpoint ({best}) is gone, and its weights with it: pass --force to train again")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if losses and not math.isfinite(losses[-1]):
        stop(DIVERGED)


def fit_memory(trainer: Trainer, hardware: Hardware) -> None:
    """Try a step at the longest review, and halve the micro-batch until it fits on every process's device.

    Accumulation makes up for it, so the batch stays what it was. The trial takes two accumulated micro-steps, because
    the second one runs beside the first one's gradients (RoBERTa-large, micro-batch 8: 11.2 GiB instead of 9.9). It
    holds the memory of what comes later: Adam's two moments, and the buckets in which processes exchange gradients.
    """
    arguments, dataset = trainer.args, trainer.train_dataset
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    model = trainer.model.train()
    longest = max(range(len(dataset)), key=lambda row: len(dataset.ids[row]))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    later = trainable * (8 + (4 if hardware.processes > 1 else 0))  # bytes

    def step(micro_batch: int) -> None:
        model.zero_grad(set_to_none=True)  # of a trial that did not fit
        reserved = torch.empty(later if hardware.device == "cuda" else 0, dtype=torch.uint8, device=arguments.device)
        inputs = trainer.data_collator([dataset[longest]] * micro_batch)
        inputs = {name: tensor.to(arguments.device) for name, tensor in inputs.items()}
        for _ in range(min(2, batch // micro_batch)):
            with hardware.autocast():
                loss = trainer.compute_loss(model, inputs)
            loss.backward()
            del loss
        del reserved

    fits = memory.largest_that_fits(step, arguments.per_device_train_batch_size)
    model.zero_grad(set_to_none=True)
    everywhere = device.gather(fits)
    if None in everywhere:
        stop(
            f"{hardware.name} has too little memory for one review of {len(dataset.ids[longest])} tokens: pass a "
            "smaller --max-length"
        )
    micro_batch = micro_batch_of(batch * hardware.processes, hardware.processes, min(everywhere))
    arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size = micro_batch, 2 * micro_batch
    arguments.gradient_accumulation_steps = batch // micro_batch
    print(
        f"a step at {len(dataset.ids[longest])} tokens fits with micro-batch {micro_batch} (x {batch // micro_batch} "
        f"accumulated x {hardware.processes} processes), peak {max(device.gather(memory.peak_mb())):,.0f} MB",
        flush=True,
    )
    memory.free()
    # The trial's dropout has drawn from the random state; and each process is to drop other units than its neighbours.
    device.seed_everything(arguments.seed + device.rank())


def refuse_full_disk(model: torch.nn.Module, checkpoints: Path) -> None:
    """Stop when the disk cannot hold three checkpoints (best, newest, and one being written) and the saved model."""
    weights = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    needed = 3 * (weights + 2 * weights) + weights  # Adam keeps two numbers a weight
    there = sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file())
    parent = next(path for path in (checkpoints, *checkpoints.parents) if path.exists())
    free = shutil.disk_usage(parent).free + there
    if free < needed:
        stop(
            f"training needs up to {needed / 1e9:.1f} GB of disk for checkpoints and {free / 1e9:.1f} GB are free: "
            "make room, or pass an --output-dir on another disk"
        )


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; damaged newer ones are deleted with a notice.

    Trainer does not write checkpoints atomically, and continues without a word, but otherwise than before, from one
    whose optimizer, scheduler or random state is missing.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        damage = _damage(path)
        if damage is None:
            return path
        print(f"{path} is damaged ({damage}): deleting it and falling back to the one before")
        shutil.rmtree(path)
    return None


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint or with the best one so far, which it would end with; None if nothing is."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json"
    saved = [checkpoint / "scheduler.pt", checkpoint / "optimizer.pt", *checkpoint.glob("rng_state*.pth")]
    if len(saved) == 2:  # one random state a process; another number of processes continues as well
        return "no random state"
    if state.get("stateful_callbacks", {}).get("fp16"):
        saved.append(checkpoint / "scaler.pt")
    for file in saved:
        if not zipfile.is_zipfile(file):
            return file.name
    weights = [checkpoint / "model.safetensors", checkpoint / "adapter_model.safetensors"]
    try:
        with safe_open(next(file for file in weights if file.is_file()), framework="numpy"):
            pass
    except (StopIteration, SafetensorError):
        return "its weights"
    best = checkpoint.with_name(f"checkpoint-{state.get('best_global_step')}")
    # A best one that is gone was beaten by a later epoch, which will come again.
    if state.get("best_global_step") and best != checkpoint and best.exists() and _damage(best):
        return f"{best.name}, the best so far"
    return None


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, checkpoints: Path) -> None:
    """Write weights (safetensors), config and tokenizer into `folder`, whole; then the checkpoints can go."""

    def write() -> None:
        with whole(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        shutil.rmtree(checkpoints, ignore_errors=True)

    device.first_alone(write)


def refuse_collapse(logits: np.ndarray, labels: np.ndarray, remedy: str) -> None:
    """Stop when a model's (n, 2) logits of validation are all of one class or no better than chance.

    Chance is one half within two standard errors, so a small validation set is not refused for its noise alone.
    """
    predictions = logits.argmax(axis=1)
    accuracy = float((predictions == labels).mean())
    if len(np.unique(predictions)) == 1:
        stop(f"the model calls every validation review {LABELS[predictions[0]]} (it collapsed): {remedy}")
    if accuracy < 0.5 + 1 / math.sqrt(len(labels)):
        stop(f"validation accuracy is {accuracy:.3f}, no better than chance: {remedy}")
