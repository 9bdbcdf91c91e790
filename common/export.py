"""What a saved encoder needs to be used elsewhere: a fitted temperature, a model card, and its ONNX form."""

import argparse
import importlib.util
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import artifacts, data, device, encoding, metrics, models, settings, storage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ONNX_PACKAGES = ("onnx", "onnxruntime")
# Where the hub's clients look for the two files. transformers.js calls them dtype "fp32" and "q8".
ONNX_FILES = {"fp32": "onnx/model.onnx", "int8": "onnx/model_quantized.onnx"}
OPSET = 20  # the first one with Gelu as one operation
ONNX_CARD = """\
# A sentiment classifier for ONNX Runtime

`onnx/model.onnx` is fp32, and `onnx/model_quantized.onnx` is int8. Both take `input_ids` and `attention_mask` (int64)
and give `logits`: negative, positive. Score int8 one review at a time: in a batch the reviews share their scales.

```python
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")
session = onnxruntime.InferenceSession("PATH/TO/THIS/FOLDER/onnx/model_quantized.onnx")
batch = tokenizer(["Not bad at all."], truncation=True, return_tensors="np", return_token_type_ids=False)
print(session.run(["logits"], dict(batch)))
```

In JavaScript: `pipeline("text-classification", "NAME", { dtype: "q8" })` of `@huggingface/transformers`.
"""
MAX_DIFFERENCE = 1e-3  # of logits, between a file without quantisation and the model
CHECKED_TEXT = "Not the disaster I expected: by the end I was moved. "

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
    one_term = settings.reviews_with_soft_labels(args, len(reviews.transfer)) == "transfer"
    loss = {"unlabelled_reviews": f"{len(reviews.transfer):,}", "epochs": args.epochs, "temperature": args.temperature}
    return loss | ({"soft_labels": "of unlabelled reviews alone"} if one_term else {"alpha": args.alpha})


def add_temperature_and_card(
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
    named = {"base_model": base, "datasets": args.dataset.partition(":")[0]}  # a card may link what the hub has
    on_hub = {key: name for key, name in named.items() if name.count("/") == 1 and not Path(name).exists()}
    text = CARD.format(
        front="".join(f"{key}:\n- {name}\n" for key, name in on_hub.items()),
        title=f"{settings.short(base)}, {folder.parent.name.removesuffix(artifacts.NEW)}/{folder.name}",
        role=role,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        max_length=args.max_length,
    )

    def write() -> None:
        config = storage.read_json(folder / "config.json")
        storage.write_json(folder / "config.json", config | {"calibration_temperature": round(temperature, 4)})
        with storage.whole(folder / "README.md") as temporary:
            temporary.write_text(text, encoding="utf-8")

    device.first_alone(write)


def missing_for_onnx() -> str | None:
    """A sentence that names the absent packages of the ONNX form and how to install them, or None."""
    absent = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    return f"the ONNX form needs {' and '.join(absent)}: pip install {' '.join(absent)}" if absent else None


def export_onnx(model_folder: Path, target: Path) -> None:
    """Write a saved encoder's ONNX form to `target`, whole or not at all: ONNX_FILES, config and tokenizer.

    TorchScript at opset 20, fused attention and scales per channel were the fastest in a trial that was not kept.
    results/deploy has what 05 measured. The fp32 file has standard operations only. transformers 5.0 slices its mask,
    so there attention is not fused.
    """
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    model, tokenizer = models.load_classifier(str(model_folder)).eval(), models.load_tokenizer(str(model_folder))
    sizes = {"num_heads": model.config.num_attention_heads, "hidden_size": model.config.hidden_size}
    # The second option is needed because shape inference does not know the fused operations.
    options = {"per_channel": True, "extra_options": {"DefaultTensorType": TensorProto.FLOAT}}
    ignored = warnings.catch_warnings(action="ignore")
    with storage.explained(target), tempfile.TemporaryDirectory() as work, ignored:
        made, fused = Path(work, "made"), Path(work, "fused.onnx")
        plain, int8 = (made / name for name in ONNX_FILES.values())
        plain.parent.mkdir(parents=True)
        _trace(model, tokenizer, plain)
        logging.disable(logging.WARNING)  # the libraries advise a pre-processing that changed no result
        try:
            optimizer.optimize_model(str(plain), "bert", **sizes, opt_level=0).save_model_to_file(str(fused))
            for file in (plain, fused):
                _refuse_difference(model, tokenizer, file)
            quantize_dynamic(fused, int8, weight_type=QuantType.QInt8, **options)
        finally:
            logging.disable(logging.NOTSET)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model_folder / name, made)
        (made / "README.md").write_text(ONNX_CARD, encoding="utf-8")
        with storage.whole(target) as temporary:
            shutil.copytree(made, temporary)


def _trace(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", file: Path) -> None:
    import torch

    model.set_attn_implementation("eager")  # the optimizer knows its pattern
    ids = encoding.encode(tokenizer, [CHECKED_TEXT, CHECKED_TEXT * 2], tokenizer.model_max_length)
    batch = dict(zip(("input_ids", "attention_mask"), encoding.pad(ids, tokenizer.pad_token_id)))
    axes = dict.fromkeys(batch, {0: "batch", 1: "length"}) | {"logits": {0: "batch"}}
    with torch.inference_mode():
        torch.onnx.export(
            model, (), str(file), kwargs=batch | {"return_dict": False}, input_names=list(batch),
            output_names=["logits"], dynamic_axes=axes, opset_version=OPSET, dynamo=False,
        )  # fmt: skip


def _refuse_difference(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", file: Path) -> None:
    """Stop unless the file's logits are the model's, on texts of other lengths and numbers than it was traced with."""
    import torch

    ids = encoding.encode(tokenizer, [CHECKED_TEXT * times for times in (1, 3, 9, 60)], tokenizer.model_max_length)
    for rows in (ids, ids[:1], ids[1:3]):
        batch = encoding.pad(rows, tokenizer.pad_token_id)
        with torch.inference_mode():
            difference = float((model(*batch).logits - onnx_logits(file, 1)(*batch)).abs().max())
        if not difference <= MAX_DIFFERENCE:  # NaN too
            problem = f"the ONNX form of {model.config.model_type} differs from the model by {difference:.2g} in logits"
            settings.stop(f"{problem}: try the versions of constraints.txt, or use the model's folder as it is")


def onnx_logits(file: Path, threads: int) -> Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]:
    """A function from a batch's input_ids and attention_mask to its logits, by one of ONNX_FILES."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Waiting threads would spin, which slowed int8 by a third on two busy cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def logits(input_ids: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
        batch = {"input_ids": input_ids.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(session.run(["logits"], batch)[0])

    return logits
