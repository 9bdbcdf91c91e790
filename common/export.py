"""What a saved encoder needs to be used elsewhere: its trained length, a fitted temperature and a model card."""

import argparse
from pathlib import Path

import numpy as np

from common import artifacts, data, device, metrics, settings

CARD = """\
---
library_name: transformers
pipeline_tag: text-classification
{front}metrics:
- accuracy
---

# {title}

{role} It judges whether a review is negative or positive.

| | |
| --- | --- |
{rows}

The accuracy has a 95% interval (Wilson). The checkpoint was chosen on these reviews: expect slightly less on others.

## Use

```python
from transformers import pipeline

classify = pipeline("text-classification", "PATH/TO/THIS/FOLDER", truncation=True)
```

`pipeline` keeps the first {max_length} tokens of a long review. In training the model read a quarter from the head and
the rest from the tail. The project's `predict.py` does that too, and divides the logits by the
`calibration_temperature` of `config.json`.

## Limits

Two classes, and reviews like those above. Other languages, other subjects and short messages were not measured.
"""


def student_rows(args: argparse.Namespace, reviews: data.Reviews) -> dict[str, object]:
    """The rows of a student's card beside those of every model's."""
    loss = {"unlabelled_reviews": f"{len(reviews.transfer):,}", "epochs": args.epochs}
    return loss | {name: getattr(args, name) for name in ("soft_labels", "soft_loss", "alpha", "temperature")}


def describe_model(
    args: argparse.Namespace,
    folder: Path,
    role: str,
    base: str,
    reviews: data.Reviews,
    logits: np.ndarray,
    **more: object,
) -> None:
    """Write a saved encoder's `calibration_temperature` into its config, and its card (README.md).

    `role` says in a sentence what the model is, and `base` names the model that it was trained from. `logits` (n, 2)
    are of the validation reviews. `more` are further rows of the card.
    """
    labels = reviews.validation["label"].to_numpy()
    temperature = metrics.fit_temperature(labels, logits)
    figures = metrics.describe(labels, logits / temperature)
    flags = ("learning_rate", "batch_size", "max_length", "seed")
    rows = {
        "trained from": settings.short(base),
        "data": f"{settings.short(args.dataset)}: {len(reviews.train):,} labelled reviews",
        **{name.replace("_", " "): value for name, value in more.items()},
        "recipe": ", ".join(f"{name.replace('_', ' ')} {getattr(args, name)}" for name in flags),
        "accuracy on validation": metrics.in_words(figures),
        "NLL, ECE on validation": f"{figures['nll']:.3f}, {figures['ece']:.3f} at temperature {temperature:.2f}",
    }
    named = {"base_model": base, "datasets": args.dataset}  # a card may link what the hub has
    on_hub = {key: name for key, name in named.items() if name.count("/") == 1 and not Path(name).exists()}
    text = CARD.format(
        front="".join(f"{key}:\n- {name}\n" for key, name in on_hub.items()),
        title=f"{settings.short(base)}, {folder.parent.name}/{folder.name}",
        role=role,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        max_length=args.max_length,
    )

    def write() -> None:
        config = artifacts.read_json(folder / "config.json")
        artifacts.write_json(folder / "config.json", config | {"calibration_temperature": round(temperature, 4)})
        with artifacts.whole(folder / "README.md") as temporary:
            temporary.write_text(text, encoding="utf-8")

    device.first_alone(write)
