"""Distillation: the losses, the one trainer of 04a and 04b, its datasets, and the checks of a teacher's outputs."""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from common import device, encoding, metrics, models, scoring, settings, training
from common.data import LABELS, Reviews
from common.encoding import ReviewDataset
from common.settings import stop

IGNORED = -100  # the label of a review without a gold label, as in torch's cross_entropy


def soft_label_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """T²·KL(teacher ‖ student) of softmax(logits / T) for each review, (n,) (Hinton et al. 2015, section 2.1).

    Both logits are (n, classes). The factor T² keeps the gradient's size when the temperature changes.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def hard_label_loss(student_logits: torch.Tensor, hard_labels: torch.Tensor, labelled_share: float) -> torch.Tensor:
    """Cross-entropy summed over a batch's labelled reviews, divided by batch size × labelled share of the whole set.

    The divisor is the expected number of labelled reviews, not this batch's number. So the mean over micro-batches and
    processes equals the mean over the batch, wherever the labelled reviews fall.
    """
    total = F.cross_entropy(student_logits, hard_labels, ignore_index=IGNORED, reduction="sum")
    return total / (len(hard_labels) * labelled_share)


def feature_loss(student_features: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
    """Squared distance of L2-normalised pooled states, summed over the width (PKD, Sun et al. 2019, equation 7).

    Both are (n, layers, poolings, width), the student's after its projection. The mean is over all axes but the width.
    A mean over 1,024 dimensions would make this term vanish next to the others.
    """
    student, teacher = F.normalize(student_features, dim=-1), F.normalize(teacher_features, dim=-1)
    return (student - teacher).square().sum(dim=-1).mean()


def mapped_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher's layer for each student layer i = 1…n: round(i·N/n), so that the last meets the last."""
    return [round(layer * teacher_layers / student_layers) for layer in range(1, student_layers + 1)]


class Student(nn.Module):
    """The student. To learn from features it gets one projection per layer into the teacher's width."""

    def __init__(self, model: PreTrainedModel, teacher_width: int | None = None):
        super().__init__()
        self.model, self.projections = model, nn.ModuleList()
        if teacher_width is not None:
            sizes = model.config.get_text_config()
            width, layers = sizes.hidden_size, sizes.num_hidden_layers
            self.projections.extend(nn.Linear(width, teacher_width, bias=False) for _ in range(layers))

    # No **kwargs: with them Trainer would not divide the loss by the accumulation steps.
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """`logits` (n, 2); in training with projections also `features` (n, layers, 2, teacher width)."""
        with_features = self.training and len(self.projections) > 0
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=with_features)
        if not with_features:
            return {"logits": output.logits}
        layers = zip(self.projections, output.hidden_states[1:], strict=True)
        projected = [projection(models.pool(hidden, attention_mask)) for projection, hidden in layers]
        return {"logits": output.logits, "features": torch.stack(projected, dim=1)}


class DistillationTrainer(training.ReviewTrainer):
    """Minimises alpha·soft + (1 − alpha)·CE + feature_weight·features; no teacher model is loaded.

    The teacher's outputs are arrays of the dataset; the soft term is T²·KL. With `soft_labels` "transfer", each review
    has one of the first two terms: CE where there is a gold label, the soft one elsewhere. Then alpha weighs nothing.
    For the control, alpha is 0 and the dataset has no teacher.
    """

    def __init__(self, *args, alpha, temperature, feature_weight=0.0, soft_labels="all", **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha, self.temperature, self.feature_weight = alpha, temperature, feature_weight
        self.labelled_share = float(np.mean(self.train_dataset.labels != IGNORED))
        self.one_term = soft_labels == "transfer"
        self._terms: dict[str, list[torch.Tensor]] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted sum in training. Evaluation has no teacher: there it is the mean cross-entropy."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logits, hard_labels = outputs["logits"].float(), inputs["labels"]
        if not model.training:
            loss = F.cross_entropy(logits, hard_labels)
            return (loss, outputs) if return_outputs else loss
        terms = {}
        if self.one_term:  # a mean over all reviews
            soft = soft_label_loss(logits, inputs["teacher_logits"], self.temperature)
            terms["kl"] = (soft * (hard_labels == IGNORED)).mean()
            terms["ce"] = hard_label_loss(logits, hard_labels, labelled_share=1.0)
        else:
            if self.alpha > 0:
                soft = soft_label_loss(logits, inputs["teacher_logits"], self.temperature)
                terms["kl"] = self.alpha * soft.mean()
            if self.alpha < 1:
                terms["ce"] = (1 - self.alpha) * hard_label_loss(logits, hard_labels, self.labelled_share)
        if "features" in outputs:
            distance = feature_loss(outputs["features"].float(), inputs["teacher_features"].float())
            terms["features"] = self.feature_weight * distance
        for name, term in terms.items():
            self._terms.setdefault(name, []).append(term.detach())
        loss = sum(terms.values())
        return (loss, outputs) if return_outputs else loss

    def train(self, *args, **kwargs):
        """Train, without the loss terms that the memory trial has left."""
        self._terms.clear()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add each weighted loss term's mean since the last log: of this process, while `loss` is of all."""
        if "loss" in logs:
            logs |= {name: round(torch.stack(terms).mean().item(), 4) for name, terms in self._terms.items()}
            self._terms.clear()
        super().log(logs, *args, **kwargs)


def student_datasets(
    args: argparse.Namespace, reviews: Reviews, teacher: dict[str, np.ndarray]
) -> tuple[ReviewDataset, ReviewDataset, ReviewDataset]:
    """The student's dataset, the control's and validation's, with the ids of the student's tokenizer.

    The student's holds the labelled reviews, then the transfer set, and the teacher's arrays in this order. The
    control's holds the labelled reviews alone.
    """
    tokenizer = models.load_tokenizer(args.student_model)
    gold_ids, transfer_ids, validation_ids = (
        encoding.encode(tokenizer, table["text"].tolist(), args.max_length)
        for table in (reviews.train, reviews.transfer, reviews.validation)
    )
    gold = reviews.train["label"].to_numpy()
    hard_labels = np.concatenate([gold, np.full(len(transfer_ids), IGNORED)])
    one_term = settings.reviews_with_soft_labels(args, len(reviews.transfer)) == "transfer"
    loss = "one of the two label losses each, which --alpha does not weigh" if one_term else f"alpha {args.alpha}"
    print(f"student: {len(gold):,} labelled and {len(transfer_ids):,} unlabelled reviews, {loss}", flush=True)
    return (
        ReviewDataset(gold_ids + transfer_ids, hard_labels, **teacher),
        ReviewDataset(gold_ids, gold),
        ReviewDataset(validation_ids, reviews.validation["label"]),
    )


def train_student(
    args: argparse.Namespace,
    hardware: device.Hardware,
    target: Path,
    train: ReviewDataset,
    validation: ReviewDataset | None,
    *,
    epochs: float,
    teacher_width: int | None = None,
    **loss: float | str,
) -> np.ndarray | None:
    """Train a student (or the control: alpha 0, no teacher), save it, and return its (n, 2) validation logits.

    `loss` is DistillationTrainer's: alpha, feature_weight, soft_labels. A student that `target` already holds is only
    scored. If `validation` is None (experiments/few_labels.py), it keeps the last epoch's weights.
    """
    tokenizer = models.load_tokenizer(args.student_model)
    if not device.share(target.exists()):
        device.seed_everything(args.seed)
        student = Student(models.load_classifier(args.student_model, tokenizer), teacher_width)
        checkpoints = target.with_name(f"{target.name}_checkpoints")
        overrides = {"num_train_epochs": epochs} | (training.WITHOUT_VALIDATION if validation is None else {})
        trainer = DistillationTrainer(
            model=student,
            args=training.training_arguments(args, hardware, checkpoints, len(train), **overrides),
            train_dataset=train,
            eval_dataset=None if validation is None else validation.longest_first(),
            data_collator=encoding.Collator(tokenizer.pad_token_id),
            compute_metrics=training.validation_accuracy,
            temperature=args.temperature,
            **loss,
        )
        training.train(trainer, hardware)
        tokenizer.model_max_length = args.max_length  # to which it truncates, if it is asked to
        training.save(student.model, tokenizer, target, checkpoints)
    if validation is None:
        return None
    model = models.prepare_for_scoring(models.load_classifier(str(target)), hardware)
    return scoring.score_encoder(model, validation.ids, tokenizer.pad_token_id, hardware, None)["scores"]


class FeatureRows:
    """The teacher's pooled states by training row, read from memory-mapped files on demand.

    `parts` are pairs of an array (n, saved layers, 2, width) and its rows, in training order. `layers` are indices of
    saved layers.
    """

    def __init__(self, parts: list[tuple[np.ndarray, np.ndarray]], layers: list[int]):
        self.places = [(array, file_row) for array, rows in parts for file_row in rows]
        self.layers = layers

    def __getitem__(self, row: int) -> np.ndarray:
        array, file_row = self.places[row]
        return array[file_row, self.layers]


def refuse_bad_teacher(teacher_logits: np.ndarray, labels: np.ndarray, split: str) -> None:
    """Stop when soft labels cannot teach: not finite, constant, or the opposite of the gold labels."""
    _refuse_not_finite(teacher_logits, split)
    if float(np.ptp(metrics.log_odds(teacher_logits))) < 1e-6:
        stop(f"the teacher's logits on {split} are constant: run the teacher's step again with --force")
    if metrics.standard_errors_above_chance(labels, teacher_logits) < -2:
        accuracy = metrics.describe(labels, teacher_logits)["balanced_accuracy"]
        stop(f"the teacher's balanced accuracy on {split} is {accuracy:.3f}, below chance: its label order is swapped")


def refuse_one_class(teacher_logits: np.ndarray, labels: np.ndarray) -> None:
    """Stop when a class is absent from the teacher's transfer set: a student would hardly ever predict it."""
    _refuse_not_finite(teacher_logits, "transfer")
    absent = metrics.absent_class(teacher_logits, labels)
    if absent is not None:
        called, gold = np.mean(teacher_logits.argmax(axis=1) != absent), np.mean(labels != absent)
        what = f"{called:.0%} of the transfer set {LABELS[1 - absent]}, and {gold:.0%} of the labelled reviews are"
        remedy = "pass a --dataset whose unlabelled reviews hold both classes, or check its calibration"
        stop(f"the teacher calls {what}: {remedy}")


def _refuse_not_finite(teacher_logits: np.ndarray, split: str) -> None:
    if not np.isfinite(teacher_logits).all():
        stop(f"the teacher's logits on {split} are not all finite: run its step again with --force")
