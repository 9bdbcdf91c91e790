"""Score many reviews fast: sorted by length, batched by tokens, shared between processes, resumable."""

import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common import data, device, models
from common.artifacts import read_json, read_table, whole, write_json, write_table
from common.device import Hardware
from common.settings import stop
from common.verbalizer import label_log_probabilities

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LOGITS = ("logit_negative", "logit_positive")  # columns of an encoder's soft labels
LOG_PROBABILITIES = ("log_p_negative", "log_p_positive")  # columns of an LLM's soft labels: raw, per label word

# Maps texts to named arrays with one row per text: `scores` (n, 2), and `features` if requested.
Score = Callable[[list[str]], dict[str, np.ndarray]]


def batches_by_length(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Row numbers in batches of similar length. A batch has at most `batch_tokens` padded tokens, or one review.

    The longest reviews come first, so that a lack of memory shows early.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def padded_batches(
    ids: list[np.ndarray], pad_id: int, hardware: Hardware, batch_tokens: int | None
) -> Iterator[tuple[np.ndarray, "torch.Tensor", "torch.Tensor"]]:
    """The row numbers, ids and mask of each batch, on the device.

    Copies from pinned memory let a GPU compute while the next batch is padded and copied.
    """
    for rows in batches_by_length(np.array([len(review) for review in ids]), batch_tokens or hardware.batch_tokens):
        tensors = data.pad([ids[row] for row in rows], pad_id)
        if hardware.device == "cuda":
            tensors = (tensor.pin_memory().to("cuda", non_blocking=True) for tensor in tensors)
        yield rows, *tensors


def in_order(batches: list["torch.Tensor"], order: list[np.ndarray]) -> np.ndarray:
    """The rows of all batches in the order of the reviews; `order` holds each batch's row numbers."""
    import torch

    return torch.cat(batches).cpu().numpy()[np.argsort(np.concatenate(order))]


def score_encoder(
    model: "PreTrainedModel",
    ids: list[np.ndarray],
    pad_id: int,
    hardware: Hardware,
    batch_tokens: int | None,
    feature_layers: list[int] | None = None,
) -> dict[str, np.ndarray]:
    """`scores`, (n, 2) float32 logits, and `features`, (n, layers, 2, width) float16, in the order of `ids`.

    Layer 0 is the embeddings' output; layer i is the i-th block's output.
    """
    import torch

    order, logits, features = [], [], []  # stay on the device until the end, so that no batch waits for a copy
    with torch.inference_mode(), hardware.autocast():
        for rows, input_ids, mask in padded_batches(ids, pad_id, hardware, batch_tokens):
            output = model(input_ids=input_ids, attention_mask=mask, output_hidden_states=bool(feature_layers))
            order.append(rows)
            logits.append(output.logits.float())
            if feature_layers:
                pooled = [models.pool(output.hidden_states[layer].float(), mask) for layer in feature_layers]
                features.append(torch.stack(pooled, dim=1).half())
    scores = {"scores": in_order(logits, order)}
    _require_finite(scores["scores"])
    return scores | {"features": in_order(features, order)} if features else scores


def score_llm(
    model: "PreTrainedModel",
    ids: list[np.ndarray],
    label_ids: list[int],
    pad_id: int,
    hardware: Hardware,
    batch_tokens: int | None,
) -> np.ndarray:
    """Raw log-probabilities of the label words, (n, 2) float32, in the order of `ids`."""
    import torch

    order, log_p = [], []
    with torch.inference_mode(), hardware.autocast(), models.exact_logits(model, label_ids):
        for rows, input_ids, mask in padded_batches(ids, pad_id, hardware, batch_tokens):
            order.append(rows)
            log_p.append(label_log_probabilities(models.last_logits(model, input_ids, mask), label_ids))
    scores = in_order(log_p, order)
    _require_finite(scores)
    return scores


def _require_finite(scores: np.ndarray) -> None:
    bad = int((~np.isfinite(scores).all(axis=1)).sum())
    if bad:
        raise FloatingPointError(f"{bad} of {len(scores)} reviews scored NaN or infinite: try --precision fp32")


def in_chunks(
    folder: Path, split: str, reviews: pd.DataFrame, columns: tuple[str, str], score: Score, chunk: int = 1000
) -> None:
    """Score a split in chunks on disk and join them: `scores` into `split`.parquet, others into `split`_KEY.npy.

    The processes take turns with the chunks, and rank 0 joins them. A restart keeps complete chunks of any process.
    They are of this model, prompt, truncation and texts: `delete_unless_made_from` has deleted all others. The table is
    written last and means that the split is finished. Host memory holds one chunk, whatever the number of reviews.
    """
    n, chunks = len(reviews), folder / f"{split}_chunks"
    if n == 0 or device.share(is_scored(folder, split, n)):
        # Chunks remain after a kill between the table and their deletion.
        device.first_alone(lambda: shutil.rmtree(chunks, ignore_errors=True))
        return
    started, scored = time.time(), 0
    turn_size = chunk * device.world_size()
    for turn in range(0, n, turn_size):  # every process takes every turn, because all check the time together
        begin = turn + chunk * device.rank()
        texts = reviews["text"].iloc[begin : begin + chunk].tolist()
        file = chunks / f"{begin:07d}.npz"
        if texts and not zipfile.is_zipfile(file):
            if file.exists():
                print(f"{file} is damaged: scoring its reviews again")
            arrays = score(texts)
            with whole(file) as temporary, open(temporary, "wb") as handle:
                np.savez(handle, **arrays)
            scored += len(texts)
            rate = scored / (time.time() - started) * device.world_size()
            done = min(n, chunk * len(list(chunks.glob("*.npz"))))
            print(
                f"  {split}: {done:,} of {n:,} scored, {rate:.1f} reviews/s, {(n - done) / rate / 60:.0f} min left",
                flush=True,
            )
        # Each run scores at least one chunk, so that even very short runs finish some time.
        if turn + turn_size < n and device.out_of_time() and any(device.gather(scored)):
            device.stop_for_time()
    device.gather(None)  # waits for the last chunks
    device.first_alone(lambda: _join(folder, split, chunks, reviews["example_id"], columns))


def _join(folder: Path, split: str, chunks: Path, example_ids: pd.Series, columns: tuple[str, str]) -> None:
    """Join the chunks into a table, and into one .npy file per further array; then delete them."""
    files = sorted(chunks.glob("*.npz"))
    with np.load(files[0], allow_pickle=False) as first:
        others = {key: first[key] for key in first.files if key != "scores"}
    for key, sample in others.items():
        header = {"descr": sample.dtype.str, "fortran_order": False, "shape": (len(example_ids), *sample.shape[1:])}
        with whole(folder / f"{split}_{key}.npy") as temporary, open(temporary, "wb") as handle:
            # Written chunk by chunk, because the pages of a memory map would count as this process's memory.
            np.lib.format.write_array_header_1_0(handle, header)
            for array in _arrays(files, key):
                array.tofile(handle)
    table = pd.DataFrame(np.concatenate(list(_arrays(files, "scores"))), columns=list(columns))
    table.insert(0, "example_id", example_ids.to_numpy())
    write_table(folder / f"{split}.parquet", table)
    shutil.rmtree(chunks)


def _arrays(files: list[Path], key: str) -> Iterator[np.ndarray]:
    for file in files:
        with np.load(file, allow_pickle=False) as arrays:
            yield arrays[key]


def is_scored(folder: Path, split: str, n: int) -> bool:
    """Whether a split's table and arrays are complete; a damaged table is deleted with a notice."""
    table = folder / f"{split}.parquet"
    if not table.exists():
        return False
    try:
        lengths = {len(pd.read_parquet(table))}
        lengths |= {len(np.load(file, mmap_mode="r", allow_pickle=False)) for file in folder.glob(f"{split}_*.npy")}
    except (OSError, ValueError, EOFError):
        lengths = set()
    if lengths == {n}:
        return True
    if device.rank() == 0:
        print(f"{table} or its arrays are damaged: scoring {split} again")
        table.unlink()
    return False


def delete_unless_made_from(folder: Path, split: str, origin: dict[str, object]) -> None:
    """Record the origin of a split's soft labels in `folder`, and delete soft labels of another origin.

    `origin` names everything that decides a score: the weights' digest, the prompt, the truncation and the texts.
    """

    def check() -> None:
        record = folder / "made_from.json"
        recorded = read_json(record) if record.exists() else {}
        if recorded.get(split) == origin:
            return
        for path in folder.glob(f"{split}[._]*"):
            print(f"deleting {path}: its weights, texts or settings are others, or unknown")
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(record, recorded | {split: origin})

    device.first_alone(check)


def refuse_stale(folder: Path, split: str, origin: dict[str, object], script: str) -> None:
    """Stop when a split's soft labels are of another origin; only the keys of `origin` are compared."""
    recorded = read_json(folder / "made_from.json").get(split, {})
    for name, value in origin.items():
        if recorded.get(name) != value:
            stop(
                f"{folder}/{split}.parquet was made with other {name} ({recorded.get(name)}, now {value}): "
                f"run {script} --force"
            )


def read_scores(folder: Path, split: str, columns: tuple[str, str]) -> tuple[pd.Index, np.ndarray]:
    """The example_ids and the (n, 2) float32 scores that `in_chunks` wrote."""
    table = read_table(folder / f"{split}.parquet")
    return pd.Index(table["example_id"]), table[list(columns)].to_numpy(np.float32)
