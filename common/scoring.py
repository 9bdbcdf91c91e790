"""Score many reviews fast: sorted by length, batched by tokens, shared between processes, resumable."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common import device, encoding, llms, memory, metrics, models
from common.device import Hardware
from common.settings import stop
from common.storage import intact_arrays, intact_json, read_json, read_table, whole, write_json, write_table
from common.verbalizer import encode_prompts, label_log_probabilities, label_token_ids

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LOGITS = ("logit_negative", "logit_positive")  # columns of an encoder's soft labels
LOG_PROBABILITIES = ("log_p_negative", "log_p_positive")  # columns of an LLM's soft labels: raw, per label word


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


def score_encoder(
    model: "PreTrainedModel", ids: list[np.ndarray], pad_id: int, hardware: Hardware, batch_tokens, feature_layers=()
) -> dict[str, np.ndarray]:
    """`scores`, (n, 2) float32 logits, and `features`, (n, layers, 2, width) float16, in the order of `ids`.

    Layer 0 is the embeddings' output; layer i is the i-th block's output.
    """
    import torch

    def forward(input_ids, mask):
        output = model(input_ids=input_ids, attention_mask=mask, output_hidden_states=bool(feature_layers))
        if not feature_layers:
            return [output.logits.float()]
        pooled = [models.pool(output.hidden_states[layer].float(), mask) for layer in feature_layers]
        return [output.logits.float(), torch.stack(pooled, dim=1).half()]

    return dict(zip(("scores", "features"), in_batches(forward, ids, pad_id, hardware, batch_tokens)))


def score_llm(
    model: "PreTrainedModel", ids: list[np.ndarray], label_ids: list[int], pad_id: int, hardware: Hardware, batch_tokens
) -> np.ndarray:
    """Raw log-probabilities of the label words, (n, 2) float32, in the order of `ids`."""

    def forward(input_ids, mask):
        return [label_log_probabilities(llms.last_logits(model, input_ids, mask), label_ids)]

    with llms.exact_logits(model, label_ids):
        return in_batches(forward, ids, pad_id, hardware, batch_tokens)[0]


def score_prompts(
    folder: Path,
    split: str,
    reviews: pd.DataFrame,
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerFast",
    llm: dict,
    hardware: Hardware,
    batch_tokens: int | None,
) -> None:
    """Save an LLM's raw label log-probabilities of a split, `in_chunks`. `llm` has prompt, label_words, max_length."""
    label_ids = label_token_ids(tokenizer, llm["prompt"], llm["label_words"])

    def score(texts: list[str]) -> dict[str, np.ndarray]:
        ids = encode_prompts(tokenizer, texts, llm["prompt"], llm["max_length"])
        return {"scores": score_llm(model, ids, label_ids, tokenizer.pad_token_id, hardware, batch_tokens)}

    in_chunks(folder, split, reviews, LOG_PROBABILITIES, score, chunk=250)


def in_batches(
    forward: Callable, ids: list[np.ndarray], pad_id: int, hardware: Hardware, batch_tokens: int | None
) -> list[np.ndarray]:
    """The arrays that `forward` makes of each batch's ids and mask, joined in the order of `ids`; scores come first."""
    import torch

    batches = batches_by_length(np.array([len(review) for review in ids]), batch_tokens or hardware.batch_tokens)
    outputs = []  # stay on the device until the end, so that no batch waits for a copy
    with torch.inference_mode(), hardware.autocast():
        for rows in batches:
            tensors = encoding.pad([ids[row] for row in rows], pad_id)
            if hardware.device == "cuda":  # from pinned memory: the GPU computes while the next batch is copied
                tensors = (tensor.pin_memory().to("cuda", non_blocking=True) for tensor in tensors)
            outputs.append(forward(*tensors))
    arrays = [in_order(parts, batches) for parts in zip(*outputs)]
    if bad := int((~np.isfinite(arrays[0]).all(axis=1)).sum()):
        remedy = "pass --precision fp32; if it was fp32, train the model again"
        stop(f"{bad} of {len(ids)} reviews scored NaN or infinite: {remedy}")
    return arrays


def in_order(parts: "tuple[torch.Tensor, ...]", order: list[np.ndarray]) -> np.ndarray:
    """The rows of all parts in the order of the reviews; `order` holds each part's row numbers."""
    import torch

    return torch.cat(parts).cpu().numpy()[np.argsort(np.concatenate(order))]


def in_chunks(
    folder: Path, split: str, reviews: pd.DataFrame, columns: tuple[str, str], score: Callable, chunk=1000, arrays=()
) -> None:
    """Score a split in chunks on disk and join them: `scores` into `split`.parquet, `arrays` into `split`_KEY.npy.

    `score` maps texts to `scores` and the named `arrays`, with a row for each text. The processes take turns with the
    chunks, and rank 0 joins them. A restart keeps complete chunks of any process: `delete_unless_made_from` has deleted
    those of another model, prompt, truncation or texts. The table is written last and means that the split is finished.
    Host memory holds one chunk, whatever the number of reviews.
    """
    n, chunks = len(reviews), folder / f"{split}_chunks"
    if n == 0 or device.share(is_scored(folder, split, n, arrays)):
        # Chunks remain after a kill between the table and their deletion.
        device.first_alone(lambda: shutil.rmtree(chunks, ignore_errors=True))
        return
    started, scored = time.time(), 0
    turn_size = chunk * device.world_size()
    for turn in range(0, n, turn_size):  # every process takes every turn, because all check the time together
        begin = turn + chunk * device.rank()
        texts = reviews["text"].iloc[begin : begin + chunk].tolist()
        file = chunks / f"{begin:07d}.npz"
        if texts and intact_arrays(file) is None:
            try:
                scored_texts = score(texts)
            except (RuntimeError, MemoryError) as problem:
                if not memory.is_lacking(problem):
                    raise
                stop("a batch does not fit in memory for scoring: pass a smaller --batch-tokens")
            with whole(file) as temporary, open(temporary, "wb") as handle:
                np.savez(handle, **scored_texts)
            scored += len(texts)
            rate = scored / (time.time() - started) * device.world_size()
            done = min(n, chunk * len(list(chunks.glob("*.npz"))))
            left = (n - done) / rate / 60
            print(f"  {split}: {done:,} of {n:,} scored, {rate:.1f} reviews/s, {left:.0f} min left", flush=True)
        # Each run scores at least one chunk, so that even very short runs finish some time.
        if turn + turn_size < n and device.out_of_time() and any(device.gather(scored)):
            device.stop_for_time()
    device.gather(None)  # waits for the last chunks
    device.first_alone(lambda: _join(folder, split, chunks, reviews["example_id"], columns, arrays))


def _join(folder: Path, split: str, chunks: Path, example_ids: pd.Series, columns, arrays) -> None:
    """Join the chunks into a table, and into one .npy file for each of `arrays`; then delete them."""
    files = sorted(chunks.glob("*.npz"))
    for key in arrays:
        sample = next(_arrays(files, key))
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


def is_scored(folder: Path, split: str, n: int, arrays=()) -> bool:
    """Whether a split's table and its `arrays` are there and have n rows."""
    try:
        lengths = {len(pd.read_parquet(folder / f"{split}.parquet"))}
        files = [folder / f"{split}_{key}.npy" for key in arrays]
        lengths |= {len(np.load(file, mmap_mode="r", allow_pickle=False)) for file in files}
    except (OSError, ValueError, EOFError):  # absent, or damaged
        return False
    return lengths == {n}


def delete_unless_made_from(folder: Path, split: str, origin: dict[str, object]) -> None:
    """Record the origin of a split's soft labels in `folder`, and delete soft labels of another origin.

    `origin` names everything that decides a score: the weights' digest, the prompt, the truncation and the texts.
    """

    def check() -> None:
        record = folder / "made_from.json"
        recorded = intact_json(record) or {}
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
            change = f"{recorded.get(name)}, now {value}"
            stop(f"{folder}/{split}.parquet was made with other {name} ({change}): run {script} --force")


def read_scores(folder: Path, split: str, reviews: pd.DataFrame, script: str) -> tuple[np.ndarray, np.ndarray]:
    """The (n, 2) float32 scores that `in_chunks` wrote, in the order of `reviews`, and their rows in the file.

    Stops, and names the `script` to run, if an example_id is missing or comes twice.
    """
    table = read_table(folder / f"{split}.parquet").set_index("example_id")
    if not table.index.is_unique:
        stop(f"the soft labels of {split} hold an example_id twice: run {script} --force")
    rows = table.index.get_indexer(reviews["example_id"])
    if missing := int((rows < 0).sum()):
        stop(f"{missing} of {len(rows)} {split} reviews have no soft label: run {script} with the same sample counts")
    scores = table[[name for name in (*LOGITS, *LOG_PROBABILITIES) if name in table]]
    return scores.to_numpy(np.float32)[rows], rows


def save_validation(folder: Path, validation: pd.DataFrame, **logits: np.ndarray) -> None:
    """Write validation.parquet: the log-odds of each named (n, 2) logits, from which 05 chooses a cascade's rule."""
    odds = {name: metrics.log_odds(scores) for name, scores in logits.items()}
    table = validation[["example_id", "label"]].assign(**odds)
    device.first_alone(lambda: write_table(folder / "validation.parquet", table))
