"""Many reviews through one model, fast: sorted by length, batched by tokens, in chunks that a restart continues."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.artifacts import read_table, whole, write_table
from common.device import Hardware
from common.verbalizer import label_log_probabilities

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LOGITS = ("logit_negative", "logit_positive")  # columns of an encoder's soft labels
LOG_PROBABILITIES = ("log_p_negative", "log_p_positive")  # columns of an LLM's: raw, of the two label words

# From texts to named arrays with a row a text: `scores` (n, 2), and `features` where asked for.
Score = Callable[[list[str]], dict[str, np.ndarray]]


def batches_by_length(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Row numbers in batches of similar length, the longest first (memory fails early); padded, each has at most
    `batch_tokens` tokens, or one review."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def pad(ids: list[np.ndarray], pad_id: int, left: bool = False) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Arrays of ids as one (n, longest) int64 tensor and its attention mask."""
    import torch

    longest = max(map(len, ids))
    padded = np.full((len(ids), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(ids), longest), dtype=np.int64)
    for row, one in enumerate(ids):
        place = slice(longest - len(one), None) if left else slice(len(one))
        padded[row, place], mask[row, place] = one, 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


def pool(hidden: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """(n, tokens, width) hidden states to (n, 2, width): the first token's, and the mean over real tokens.

    Two tokenizers' positions do not correspond, so single positions are never matched between teacher and student.
    """
    import torch

    weights = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    return torch.stack([hidden[:, 0], mean], dim=1)


def score_encoder(
    model: "PreTrainedModel",
    ids: list[np.ndarray],
    pad_id: int,
    hardware: Hardware,
    batch_tokens: int,
    feature_layers: list[int] | None = None,
) -> dict[str, np.ndarray]:
    """`scores`: (n, 2) float32 logits in the order of `ids`; `features`: (n, layers, 2, width) float16 of named layers.

    Layer 0 is the embeddings' output, layer i the i-th block's.
    """
    import torch

    logits, features = np.empty((len(ids), 2), np.float32), None
    with torch.inference_mode(), hardware.autocast():
        for rows in batches_by_length(np.array([len(one) for one in ids]), batch_tokens):
            input_ids, mask = (tensor.to(hardware.device) for tensor in pad([ids[row] for row in rows], pad_id))
            output = model(input_ids=input_ids, attention_mask=mask, output_hidden_states=bool(feature_layers))
            logits[rows] = output.logits.float().cpu().numpy()
            if feature_layers:
                pooled = torch.stack(
                    [pool(output.hidden_states[layer].float(), mask) for layer in feature_layers], dim=1
                )
                if features is None:
                    features = np.empty((len(ids), *pooled.shape[1:]), np.float16)
                features[rows] = pooled.half().cpu().numpy()
    _require_finite(logits)
    return {"scores": logits} if features is None else {"scores": logits, "features": features}


def last_logits(model: "PreTrainedModel", input_ids: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """(n, vocabulary) next-token logits after left-padded prompts: one pass, the head on the last position alone."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, use_cache=False
    ).logits[:, -1]


def score_llm(
    model: "PreTrainedModel",
    ids: list[np.ndarray],
    label_ids: list[int],
    pad_id: int,
    hardware: Hardware,
    batch_tokens: int,
) -> np.ndarray:
    """Raw label log-probabilities, (n, 2) float32, in the order of `ids`."""
    import torch

    scores = np.empty((len(ids), 2), np.float32)
    with torch.inference_mode(), hardware.autocast():
        for rows in batches_by_length(np.array([len(one) for one in ids]), batch_tokens):
            input_ids, mask = (t.to(hardware.device) for t in pad([ids[row] for row in rows], pad_id, left=True))
            logits = last_logits(model, input_ids, mask)
            scores[rows] = label_log_probabilities(logits, label_ids).cpu().numpy()
    _require_finite(scores)
    return scores


def _require_finite(scores: np.ndarray) -> None:
    if not np.isfinite(scores).all():
        bad = int((~np.isfinite(scores).all(axis=1)).sum())
        raise FloatingPointError(f"{bad} of {len(scores)} reviews scored NaN or infinite: try --precision fp32")


def in_chunks(
    folder: Path, split: str, reviews: pd.DataFrame, columns: tuple[str, str], score: Score, chunk: int = 1000
) -> None:
    """Score a split in chunks on disk and join them: `scores` into `split`.parquet, others into `split`_KEY.npy.

    A restart keeps whole chunks; the caller vouches (started.json does) that model, prompt, truncation and reviews are
    those of the earlier ones. The table, written last, means that the split is finished. Host memory holds one chunk,
    whatever the number of reviews.
    """
    n, parts = len(reviews), folder / f"{split}_chunks"
    if (folder / f"{split}.parquet").exists() or n == 0:
        shutil.rmtree(parts, ignore_errors=True)  # of a run that was killed between the table and this
        return
    started, scored = time.time(), 0
    for begin in range(0, n, chunk):
        end, part = min(begin + chunk, n), parts / f"{begin:07d}.npz"
        if part.exists():
            continue
        arrays = score(reviews["text"].iloc[begin:end].tolist())
        with whole(part) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, **arrays)
        scored += end - begin
        rate = scored / (time.time() - started)
        print(
            f"  {split}: {end:,} of {n:,} scored, {rate:.1f} reviews/s, {(n - end) / rate / 60:.0f} min left",
            flush=True,
        )
    joined = {key: _join(parts, folder / f"{split}_{key}.npy", key, n) for key in _keys(parts)}
    table = pd.DataFrame(joined["scores"], columns=list(columns))
    table.insert(0, "example_id", reviews["example_id"].to_numpy())
    write_table(folder / f"{split}.parquet", table)
    shutil.rmtree(parts)


def _keys(parts: Path) -> list[str]:
    with np.load(min(parts.glob("*.npz")), allow_pickle=False) as first:
        return list(first.files)


def _join(parts: Path, target: Path, key: str, n: int) -> np.ndarray | None:
    """One array of all chunks: `scores` in memory (the table's), any other copied chunk by chunk into its file."""
    files = sorted(parts.glob("*.npz"))
    with np.load(files[0], allow_pickle=False) as first:
        shape, dtype = (n, *first[key].shape[1:]), first[key].dtype
    if key == "scores":
        joined = np.empty(shape, dtype)
        _fill(joined, files, key)
        return joined
    with whole(target) as temporary:
        joined = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        _fill(joined, files, key)
        joined.flush()
    return None


def _fill(joined: np.ndarray, files: list[Path], key: str) -> None:
    for file in files:
        with np.load(file, allow_pickle=False) as part:
            begin = int(file.stem)
            joined[begin : begin + len(part[key])] = part[key]


def read_scores(folder: Path, split: str, columns: tuple[str, str]) -> tuple[pd.Index, np.ndarray]:
    """The example_ids and the (n, 2) float32 scores that `in_chunks` wrote."""
    table = read_table(folder / f"{split}.parquet")
    return pd.Index(table["example_id"]), table[list(columns)].to_numpy(np.float32)
