"""Saved models of any kind, loaded ready to read texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from common import device, encoding, export, llms, metrics, models, scoring, verbalizer
from common.device import Hardware


@dataclass
class Classifier:
    """A loaded model, in two parts, so that each can be timed."""

    encode: Callable[[list[str]], Sequence]  # texts to token ids, or to n-gram counts
    score: Callable[[Sequence, int | None], np.ndarray]  # those, and the tokens of a batch, to (n, 2) logits
    parameters: int
    weight_bytes: int
    flops: tuple[int, int] | None = None  # of models.forward_flops
    facts: dict = field(default_factory=dict)  # precision, device, max_length, calibration
    batch_tokens: int | None = None  # the only batch that keeps its logits exact; None: any

    def logits(self, texts: list[str], batch_tokens: int | None = None) -> np.ndarray:
        """(n, 2) float32 logits of the texts."""
        return self.score(self.encode(texts), batch_tokens)


def baseline_classifier(folder: Path) -> Classifier:
    """A model of 01."""
    from common.baseline import load_baseline

    model = load_baseline(folder)
    facts = {"precision": "fp32", "device": "cpu"}
    return Classifier(model.vectorizer.transform, lambda counts, _: model.score(counts), *model.count(), facts=facts)


def encoder_classifier(folder: Path, hardware: Hardware, max_length: int | None = None) -> Classifier:
    """A model of 02, 04a or 04b. Without `max_length` it reads the length that its tokenizer carries."""
    tokenizer, model = models.load_tokenizer(str(folder)), models.load_classifier(str(folder))
    parameters, weight_bytes = models.count(model)
    model, flops = models.prepare_for_scoring(model, hardware), models.forward_flops(model)
    max_length = max_length or tokenizer.model_max_length

    def score(ids: list[np.ndarray], batch_tokens: int | None) -> np.ndarray:
        return scoring.score_encoder(model, ids, tokenizer.pad_token_id, hardware, batch_tokens)["scores"]

    facts = {"precision": hardware.precision, "device": hardware.device, "max_length": max_length}
    encode = partial(encoding.encode, tokenizer, max_length=max_length)
    return Classifier(encode, score, parameters, weight_bytes, flops, facts)


def llm_classifier(adapter: Path | None, hardware: Hardware, llm: dict) -> Classifier:
    """The 4-bit LLM of 03 with its adapter, or zero-shot. `llm` holds its prompt, length and 04b's calibration."""
    base, prompt, max_length = llm["base"], llm["prompt"], llm["max_length"]
    tokenizer, model = models.load_tokenizer(base), llms.load_llm(base, hardware, adapter)
    label_ids = verbalizer.label_token_ids(tokenizer, prompt, llm["label_words"])

    def score(ids: list[np.ndarray], batch_tokens: int | None) -> np.ndarray:
        log_p = scoring.score_llm(model, ids, label_ids, tokenizer.pad_token_id, hardware, batch_tokens)
        log_odds = metrics.log_odds(log_p)
        return metrics.two_logits(log_odds, llm["bias"], llm["calibration_temperature"])

    kind = llms.quantisation(model)["type"]
    facts = {"precision": f"{kind}, {hardware.precision}", "device": hardware.device, "max_length": max_length}
    facts["calibration"] = llm["calibration"]
    encode = partial(verbalizer.encode_prompts, tokenizer, prompt=prompt, max_length=max_length)
    return Classifier(encode, score, *models.count(model), models.forward_flops(model), facts)


def onnx_classifier(folder: Path, precision: str, max_length: int) -> Classifier:
    """A student that `deploy` has written, run by ONNX Runtime on the CPU. `precision` is one of export.ONNX_FILES."""
    import torch

    tokenizer, file = models.load_tokenizer(str(folder)), folder / export.ONNX_FILES[precision]
    run, cpu = export.onnx_logits(file, torch.get_num_threads()), device.cpu("fp32")

    def score(ids: list[np.ndarray], batch_tokens: int | None) -> np.ndarray:
        return scoring.in_batches(lambda *batch: [run(*batch)], ids, tokenizer.pad_token_id, cpu, batch_tokens)[0]

    parameters, flops = models.planned_size(str(folder))
    facts = {"precision": precision, "device": "cpu", "max_length": max_length}
    encode = partial(encoding.encode, tokenizer, max_length=max_length)
    alone = 1 if precision == "int8" else None  # one review at a time: a batch would share its scales
    return Classifier(encode, score, parameters, file.stat().st_size, flops, facts, alone)
