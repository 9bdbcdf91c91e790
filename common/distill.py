"""Distillation: the losses, the student with its projections, and the one trainer of 04a and 04b."""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from common import device, models, scoring, settings, training
from common.data import LABELS

IGNORED = -100  # the label of a review without a gold label, as in torch's cross_entropy


def soft_label_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """T²·KL(teacher ‖ student) of softmax(logits / T), averaged over the batch (Hinton et al. 2015, section 2.1).

    Both logits are (n, classes). The factor T² keeps the gradient's size when the temperature changes.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def margin_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the log-odds, which are all that two classes' logits say (cf. Ba & Caruana 2014).

    It weighs a confident teacher's log-odds in full, where the KL term's gradient vanishes with its saturated softmax.
    """
    student, teacher = (logits[:, 1] - logits[:, 0] for logits in (student_logits, teacher_logits))
    return F.mse_loss(student, teacher)


def hard_label_loss(student_logits: torch.Tensor, hard_labels: torch.Tensor, labelled_share: float) -> torch.Tensor:
    """Cross-entropy summed over a batch's labelled reviews, divided by batch size × labelled share of the whole set.

    Dividing by the expected number of labelled reviews, not by this batch's, makes the mean over micro-batches and
    processes equal to that over the batch, however the labelled reviews fall.
    """
    total = F.cross_entropy(student_logits, hard_labels, ignore_index=IGNORED, reduction="sum")
    return total / (len(hard_labels) * labelled_share)


def feature_loss(student_features: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
    """Squared distance of L2-normalised pooled states, summed over the width (PKD, Sun et al. 2019, equation 7).

    Both are (n, layers, poolings, width), the student's after its projection; the mean is over all but the width.
    A mean over 1,024 dimensions too would make the term vanish beside the others.
    """
    student, teacher = F.normalize(student_features, dim=-1), F.normalize(teacher_features, dim=-1)
    return (student - teacher).square().sum(dim=-1).mean()


def mapped_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher's layer for each student layer i = 1…n: round(i·N/n), so that the last meets the last."""
    return [round(layer * teacher_layers / student_layers) for layer in range(1, student_layers + 1)]


class Student(nn.Module):
    """The student, and while it learns from features one projection per layer into the teacher's width."""

    def __init__(self, model: PreTrainedModel, teacher_width: int | None = None):
        super().__init__()
        self.model = model
        self.accepts_loss_kwargs = False  # see common/models.py: else Trainer skips the division by accumulation
        width, layers = model.config.hidden_size, model.config.num_hidden_layers
        count = layers if teacher_width is not None else 0
        self.projections = nn.ModuleList(nn.Linear(width, teacher_width or 0, bias=False) for _ in range(count))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`logits` (n, 2), and in training with projections `features` (n, layers, 2, teacher width)."""
        wanted = self.training and len(self.projections) > 0
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=wanted)
        if not wanted:
            return {"logits": output.logits}
        layers = zip(self.projections, output.hidden_states[1:], strict=True)
        projected = [projection(models.pool(hidden, attention_mask)) for projection, hidden in layers]
        return {"logits": output.logits, "features": torch.stack(projected, dim=1)}


class DistillationTrainer(training.ReviewTrainer):
    """alpha·soft + (1 − alpha)·CE + feature_weight·features, from a teacher's outputs in the dataset.

    `soft_loss` is "kl" (T²·KL) or "margin". The control is the same trainer with alpha 0 and no teacher in the dataset.
    No teacher model is ever loaded.
    """

    def __init__(self, *args, alpha: float, temperature: float, feature_weight: float, soft_loss: str = "kl", **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha, self.temperature, self.feature_weight = alpha, temperature, feature_weight
        self.soft_loss = soft_loss
        self.labelled_share = float(np.mean(self.train_dataset.labels != IGNORED))
        self._terms: dict[str, list[torch.Tensor]] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: object = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum in training; in evaluation, which has no teacher, the mean cross-entropy."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logits = outputs["logits"].float()
        if not model.training:
            loss = F.cross_entropy(logits, inputs["labels"])
            return (loss, outputs) if return_outputs else loss
        terms = {}
        if self.alpha > 0 and self.soft_loss == "kl":
            terms["kl"] = self.alpha * soft_label_loss(logits, inputs["teacher_logits"], self.temperature)
        elif self.alpha > 0:
            terms["margin"] = self.alpha * margin_loss(logits, inputs["teacher_logits"].float())
        if self.alpha < 1:
            terms["ce"] = (1 - self.alpha) * hard_label_loss(logits, inputs["labels"], self.labelled_share)
        if "features" in outputs:
            distance = feature_loss(outputs["features"].float(), inputs["teacher_features"].float())
            terms["features"] = self.feature_weight * distance
        for name, term in terms.items():
            self._terms.setdefault(name, []).append(term.detach())
        loss = sum(terms.values())
        return (loss, outputs) if return_outputs else loss

    def train(self, *args, **kwargs):
        """Train; the terms of the trial step before it are none of the training's."""
        self._terms.clear()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add each weighted loss term's mean since the last log."""
        if "loss" in logs:
            logs |= {name: round(torch.stack(terms).mean().item(), 4) for name, terms in self._terms.items()}
            self._terms.clear()
        super().log(logs, *args, **kwargs)


def teacher_rows(in_file: pd.Index, wanted: pd.Series, split: str, script: str) -> np.ndarray:
    """Where each wanted example_id stands in a file of soft labels."""
    if not in_file.is_unique:
        settings.stop(f"the soft labels of {split} hold an example_id twice: run {script} --force")
    rows = in_file.get_indexer(wanted)
    if (rows < 0).any():
        missing = int((rows < 0).sum())
        settings.stop(
            f"{missing} of {len(wanted)} {split} reviews have no soft label: run {script} with the same sample counts"
        )
    return rows


class FeatureRows:
    """The teacher's pooled states by training row, read from memory-mapped files as they are needed.

    `parts` are (array (n, saved layers, 2, width), rows) pairs, one after the other; `layers` picks the mapped ones.
    """

    def __init__(self, parts: list[tuple[np.ndarray, np.ndarray]], layers: list[int]):
        self.files = [array for array, _ in parts]
        self.place = [(part, row) for part, (_, rows) in enumerate(parts) for row in rows]
        self.layers = layers

    def __getitem__(self, row: int) -> np.ndarray:
        part, place = self.place[row]
        return self.files[part][place, self.layers]


def refuse_bad_teacher(teacher_logits: np.ndarray, labels: np.ndarray, split: str) -> None:
    """Stop when soft labels cannot teach: not numbers, constant, or against the gold labels (swapped order)."""
    if not np.isfinite(teacher_logits).all():
        settings.stop(f"the teacher's logits on {split} are not all finite: redo the teacher's step with --force")
    if float(np.ptp(teacher_logits[:, 1] - teacher_logits[:, 0])) < 1e-6:
        settings.stop(
            f"the teacher's logits on {split} are constant: its scoring or training failed; redo the teacher's step"
        )
    accuracy = float((teacher_logits.argmax(axis=1) == labels).mean())
    if accuracy < 0.5 - 1 / np.sqrt(len(labels)):
        settings.stop(f"the teacher's {split} accuracy is {accuracy:.3f}, below chance: its label order is swapped")


def refuse_one_class(teacher_logits: np.ndarray) -> None:
    """Stop when the teacher calls (nearly) all of the transfer set one class: a student would learn to say it always.

    A label-sorted slice did so in earlier versions of this recipe: 0.51.
    """
    if not np.isfinite(teacher_logits).all():
        settings.stop("the teacher's logits on transfer are not all finite: redo the teacher's step with --force")
    share = float((teacher_logits.argmax(axis=1) == 1).mean())
    if not 0.02 <= share <= 0.98:
        settings.stop(
            f"the teacher calls {max(share, 1 - share):.0%} of the transfer set {LABELS[round(share)]}: pass a "
            "--dataset whose unlabelled reviews are of both kinds, or look at the teacher's calibration"
        )


def train_student(
    args: argparse.Namespace,
    hardware: device.Hardware,
    target: Path,
    train: training.ReviewDataset,
    validation: training.ReviewDataset | None,
    *,
    epochs: float,
    alpha: float,
    feature_weight: float = 0.0,
    teacher_width: int | None = None,
) -> np.ndarray | None:
    """Train a student (alpha 0, no teacher: the control), save it to `target` and return its (n, 2) validation logits.

    A student that is saved already is only scored. Without validation reviews the last epoch's weights are kept.
    """
    name = settings.locate(args, args.student_model)
    tokenizer = models.load_tokenizer(name)
    if not target.exists():
        device.seed_everything(args.seed)
        student = Student(models.load_classifier(name), teacher_width)
        checkpoints = target.with_name(f"{target.name}_checkpoints")
        own = {"num_train_epochs": epochs} | (training.WITHOUT_VALIDATION if validation is None else {})
        trainer = DistillationTrainer(
            model=student,
            args=training.training_arguments(args, hardware, checkpoints, len(train), **own),
            train_dataset=train,
            eval_dataset=None if validation is None else validation.longest_first(),
            data_collator=training.Collator(tokenizer.pad_token_id),
            compute_metrics=training.validation_accuracy,
            alpha=alpha,
            temperature=args.temperature,
            feature_weight=feature_weight,
            soft_loss=args.soft_loss,
        )
        training.train(trainer, hardware)
        training.save(student.model, tokenizer, target, checkpoints)
    if validation is None:
        return None
    model = models.prepare_for_scoring(models.load_classifier(str(target)), hardware)
    return scoring.score_encoder(model, validation.ids, tokenizer.pad_token_id, hardware, None)["scores"]
