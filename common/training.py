"""Training: TrainingArguments, the trainers, checks of memory and disk, safe resume."""

import argparse
import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import EvalPrediction

from common import device, llms, memory, metrics
from common.callbacks import SIZES, MaxHours, Progress, RecordFiles, RefuseNaN, SaveOften
from common.data import LABELS
from common.device import Hardware
from common.settings import stop
from common.storage import explained, intact_json, whole

TRAIN_OTHERWISE = "pass --force with a smaller --learning-rate or more --epochs"
# For `training_arguments` when there are no validation reviews: the last weights are kept.
WITHOUT_VALIDATION = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


class LengthGrouped(Sampler[int]):
    """Rows of an epoch, shuffled and then grouped by length. Only seed and epoch decide the order.

    transformers' length grouping draws from each process's random state, and dropout changes that state differently in
    each process. The processes would disagree on the order: some reviews would come twice and others never.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def __len__(self) -> int:
        return len(self.trainer.train_dataset)

    def __iter__(self) -> Iterator[int]:
        arguments, lengths = self.trainer.args, [len(ids) for ids in self.trainer.train_dataset.ids]
        batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        epoch = int(self.trainer.state.epoch or 0)  # rounded down, so that a resumed epoch has the same order
        generator = torch.Generator().manual_seed(arguments.seed + epoch)
        return iter(get_length_grouped_indices(lengths, batch, generator=generator))


class ReviewTrainer(Trainer):
    """A Trainer with this project's callbacks. Its batches hold reviews of similar length."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, callbacks=[RecordFiles, SaveOften, MaxHours, RefuseNaN, Progress], **kwargs)
        # The loss is a micro-batch mean, so Trainer must divide it. It believes otherwise of models with **kwargs
        # (test_distill.py: gradients of accumulated micro-batches).
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)  # prints dictionaries

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy of the logits. Whatever else a model returns would reach `validation_accuracy`."""
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()
        loss = torch.nn.functional.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader:
        # Trainer keeps the micro-batch from before `fit_memory`, and transformers 5.0 the checkpoint's. With the new
        # accumulation steps both would change the batch size.
        self._train_batch_size = self.args.per_device_train_batch_size
        return super().get_train_dataloader()

    def _load_scaler(self, checkpoint: str | None) -> None:
        # Trainer fails on the gradient scaler of an fp16 checkpoint when training continues in another precision
        # (test_training.py: an interrupted fp16 run).
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *args, **kwargs) -> None:
        # Trainer resets its running loss by subtracting it from itself. After one NaN it would log NaN to the end, and
        # RefuseNaN would stop a sound fp16 run (test_training.py: a single NaN).
        logged = self.control.should_log
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        if logged:
            tr_loss.zero_()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthGrouped:
        return LengthGrouped(self)


class LabelWordTrainer(ReviewTrainer):
    """Trains a causal LM to predict the label word after the prompt: cross-entropy over the whole vocabulary."""

    def __init__(self, *args, label_ids: list[int], **kwargs):
        super().__init__(*args, **kwargs)
        self.label_ids = label_ids

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = llms.last_logits(model, inputs["input_ids"], inputs["attention_mask"]).float()
        words = torch.tensor(self.label_ids, device=logits.device)[inputs["labels"]]
        loss = torch.nn.functional.cross_entropy(logits, words)
        return (loss, {"logits": logits[:, self.label_ids]}) if return_outputs else loss


def validation_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The metric by which Trainer chooses the checkpoint."""
    return {"accuracy": float((prediction.predictions.argmax(axis=-1) == prediction.label_ids).mean())}


def training_arguments(
    args: argparse.Namespace, hardware: Hardware, checkpoints: Path, rows: int, **overrides: object
) -> TrainingArguments:
    """TrainingArguments from the settings, for `rows` training reviews; `overrides` are Trainer's own names."""
    steps = math.ceil(math.ceil(rows / args.batch_size) * overrides.get("num_train_epochs", args.epochs))
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
        save_total_limit=2,  # best and newest, and a third while it is written: 12.8 GB for RoBERTa-large
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        logging_steps=max(1, steps // 20),
        fp16=hardware.precision == "fp16",
        bf16=hardware.precision == "bf16",
        use_cpu=hardware.device == "cpu",
        dataloader_pin_memory=hardware.device == "cuda",
        ddp_find_unused_parameters=False,  # no parameter is unused, and True fails with gradient checkpointing
        seed=args.seed,
        logging_nan_inf_filter=False,  # otherwise a NaN is logged as 0, and RefuseNaN cannot see it
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    return TrainingArguments(**(settings | overrides))


def micro_batch_of(batch_size: int, processes: int, at_most: int) -> int:
    """The largest micro-batch up to `at_most` that divides each process's share of the batch."""
    share = batch_size // processes
    return max(size for size in range(1, min(share, at_most) + 1) if share % size == 0)


def train(trainer: Trainer, hardware: Hardware) -> None:
    """Train, or continue from the newest undamaged checkpoint of an interrupted run.

    Stops if the loss becomes NaN. Exits with code 3 if --max-hours is over before the last step.
    """
    checkpoints = Path(trainer.args.output_dir)
    checkpoint = device.share(device.first_alone(lambda: newest_checkpoint(checkpoints)))
    fit_memory(trainer, hardware)
    device.first_alone(lambda: refuse_full_disk(trainer.model, checkpoints))
    if checkpoint is not None:
        print(f"continuing from {checkpoint}")
    with explained(checkpoints):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.state.max_steps:
        device.stop_for_time()
    best = trainer.state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and not (best and Path(best).exists()):
        stop(f"the best checkpoint ({best}) and its weights are gone: delete {checkpoints}/ to train again")


def fit_memory(trainer: Trainer, hardware: Hardware) -> None:
    """Try a step at the longest review, and halve the micro-batch until it fits on every process's device.

    More accumulation steps keep the batch size. The trial takes two accumulated micro-steps, because the second also
    needs memory for the first one's gradients. With RoBERTa-large and micro-batch 8 it takes 11.3 GiB instead of 9.9.
    The trial reserves what comes later: Adam's two moments, and the buckets in which processes exchange gradients.
    """
    memory.free()  # 04a's student, before its control
    arguments, dataset = trainer.args, trainer.train_dataset
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    model = trainer.model.train()
    longest = max(range(len(dataset)), key=lambda row: len(dataset.ids[row]))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    later_bytes = trainable * (8 + (4 if hardware.processes > 1 else 0)) if hardware.device == "cuda" else 0

    def step(micro_batch: int) -> None:
        model.zero_grad(set_to_none=True)  # the gradients of a trial that did not fit
        reserved = torch.empty(later_bytes, dtype=torch.uint8, device=arguments.device)
        inputs = trainer.data_collator([dataset[longest]] * micro_batch)
        inputs = {name: tensor.to(arguments.device) for name, tensor in inputs.items()}
        for _ in range(min(2, batch // micro_batch)):
            with hardware.autocast():
                loss = trainer.compute_loss(model, inputs)
            loss.backward()
            del loss
        del reserved

    micro_batch = arguments.per_device_train_batch_size
    while micro_batch and not memory.fits(partial(step, micro_batch)):
        micro_batch //= 2
    fitting = min(device.gather(micro_batch))
    model.zero_grad(set_to_none=True)
    tokens = len(dataset.ids[longest])
    if not fitting:
        stop(f"{hardware.name} has too little memory for one review of {tokens} tokens: pass a smaller --max-length")
    micro_batch = micro_batch_of(batch * hardware.processes, hardware.processes, fitting)
    arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size = micro_batch, 2 * micro_batch
    arguments.gradient_accumulation_steps = batch // micro_batch
    print(
        f"a step at {tokens} tokens fits with micro-batch {micro_batch} (x {batch // micro_batch} accumulated "
        f"x {hardware.processes} processes), peak {max(device.gather(memory.peak_mb())):,.0f} MB",
        flush=True,
    )
    memory.free()
    # The trial's dropout has changed the random state. The rank is added because each process drops other units.
    device.seed_everything(arguments.seed + device.rank())


def refuse_full_disk(model: torch.nn.Module, checkpoints: Path) -> None:
    """Stop when the disk cannot hold three checkpoints (best, newest, and one being written) and the saved model."""
    weights = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    needed = 3 * (weights + 2 * weights) + weights  # Adam keeps two numbers per weight
    used = sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file())
    parent = next(path for path in (checkpoints, *checkpoints.parents) if path.exists())
    free = shutil.disk_usage(parent).free + used
    if free < needed:
        lack = f"up to {needed / 1e9:.1f} GB of disk for checkpoints, but only {free / 1e9:.1f} GB are free"
        stop(f"training needs {lack}: make room, or pass an --output-dir on another disk")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; damaged newer ones are deleted with a notice.

    Trainer does not write checkpoints atomically. If the optimizer, scheduler or random state is missing, it continues
    silently, but differently.
    """
    steps = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    for step in sorted(map(int, filter(str.isdigit, steps)), reverse=True):
        path = folder / f"checkpoint-{step}"
        damage = _damage(path)
        if damage is None:
            return path
        print(f"{path} is damaged ({damage}): deleting it and trying the one before")
        shutil.rmtree(path)
    return None


def _damage(checkpoint: Path) -> str | None:
    """The damaged part of a checkpoint, or the best checkpoint so far if that is damaged; else None."""
    sizes = intact_json(checkpoint / SIZES)
    if sizes is None:
        return f"it has no {SIZES}, which is written last"
    for name, size in sizes.items():
        if not (checkpoint / name).is_file() or (checkpoint / name).stat().st_size != size:
            return name
    state = intact_json(checkpoint / "trainer_state.json") or {}
    best = checkpoint.with_name(f"checkpoint-{state.get('best_global_step')}")
    # If the best checkpoint was deleted, a later epoch had a better one, and the resumed run repeats that epoch.
    if state.get("best_global_step") and best != checkpoint and best.exists() and _damage(best):
        return f"{best.name}, the best so far"
    return None


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, checkpoints: Path) -> None:
    """Write weights (safetensors), config and tokenizer into `folder`, whole; then delete the checkpoints."""

    def write() -> None:
        with whole(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        shutil.rmtree(checkpoints, ignore_errors=True)

    device.first_alone(write)


def refuse_collapse(logits: np.ndarray, labels: np.ndarray, remedy: str = TRAIN_OTHERWISE) -> None:
    """Stop when a model's (n, 2) validation logits predict one class only, or are no better than chance.

    Better than chance means a balanced accuracy more than two standard errors above one half. A model that follows the
    majority is refused. One that beats chance, but is less accurate than always saying the frequent class, gets a
    warning.
    """
    scores, only, common = metrics.describe(labels, logits), metrics.only_class(logits), int(labels.mean() >= 0.5)
    share, majority, minority = scores["majority_share"], LABELS[common], LABELS[1 - common]
    skewed = share > metrics.SKEWED and only in (common, None)
    if skewed:  # another training would follow the majority again
        remedy = f"add {minority} reviews to the train file or drop {majority} ones; else {remedy}"
    if only is not None:
        why = f", as {share:.0%} of them are" if skewed else " (it collapsed)"
        stop(f"the model calls every validation review {LABELS[only]}{why}: {remedy}")
    if metrics.standard_errors_above_chance(labels, logits) < 2:
        few = f"; {len(labels)} reviews show little: raise --validation-samples" if len(labels) < 100 else ""
        stop(f"validation accuracy is {metrics.in_words(scores)}, no better than chance: {remedy}{few}")
    if scores["accuracy"] <= share:
        print(f"warning: the model has accuracy {scores['accuracy']:.3f}, and always saying {majority} has {share:.3f}")
