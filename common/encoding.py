"""Texts to token ids, datasets and padded batches."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from common.settings import stop

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

# Sun et al. 2019 (How to Fine-Tune BERT), 5.3.1: on IMDB 128 head and 382 tail tokens beat 510 tokens of either.
HEAD_SHARE = 0.25
# A special token that a reviewer typed is plain text. Long texts get no warning: they are truncated next.
PLAIN_TEXT = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}


def token_ids(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> Iterator[list[int]]:
    """The ids of each text, without special tokens."""
    without = {"return_attention_mask": False, "return_token_type_ids": False}
    for start in range(0, len(texts), 1000):  # Python ints of all 75,000 reviews at once would take gigabytes
        yield from tokenizer(texts[start : start + 1000], **PLAIN_TEXT, **without)["input_ids"]


def head_and_tail(ids: list[int], budget: int) -> list[int]:
    """At most `budget` ids: a quarter from the beginning and the rest from the end."""
    if len(ids) <= budget:
        return ids
    head = int(budget * HEAD_SHARE)
    return ids[:head] + ids[len(ids) - (budget - head) :]


def special_ids(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text. XLNet's all come after it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = [at for at in range(len(whole)) if whole[at : at + len(bare)] == bare]
    if not bare or not starts:
        stop("the tokenizer reads a text otherwise with special tokens than without: pass a model with another")
    return whole[: starts[0]], whole[starts[0] + len(bare) :]


def encode(tokenizer: "PreTrainedTokenizerFast", texts: list[str], max_length: int) -> list[np.ndarray]:
    """Each text as at most `max_length` int32 ids: the tokenizer's special tokens around head+tail of the review."""
    before, after = special_ids(tokenizer)
    budget = max_length - len(before) - len(after)
    reviews = (head_and_tail(ids, budget) for ids in token_ids(tokenizer, texts))
    return [np.array([*before, *review, *after], dtype=np.int32) for review in reviews]


def pad(ids: list[np.ndarray], pad_id: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """One (n, longest) int64 tensor of ids, padded at the end, and its attention mask."""
    import torch

    longest = max(map(len, ids))
    padded = np.full((len(ids), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(ids), longest), dtype=np.int64)
    for row, review in enumerate(ids):
        padded[row, : len(review)], mask[row, : len(review)] = review, 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


class ReviewDataset:
    """Token ids and labels by row, with optional arrays such as a teacher's logits and memory-mapped features."""

    def __init__(self, ids: list[np.ndarray], labels: np.ndarray, **arrays: np.ndarray):
        self.ids, self.labels, self.arrays = ids, np.asarray(labels), arrays

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {"input_ids": self.ids[row], "labels": self.labels[row]} | {k: a[row] for k, a in self.arrays.items()}

    def longest_first(self) -> "ReviewDataset":
        """The same reviews without their arrays, in the order with the least padding: evaluation needs no order."""
        order = sorted(range(len(self)), key=lambda row: -len(self.ids[row]))
        return ReviewDataset([self.ids[row] for row in order], self.labels[order])


class Collator:
    """Pads a micro-batch to its longest review and stacks the other arrays."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: list[dict[str, np.ndarray]]) -> dict[str, "torch.Tensor"]:
        import torch

        input_ids, mask = pad([row["input_ids"] for row in rows], self.pad_id)
        others = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0] if key != "input_ids"}
        return {"input_ids": input_ids, "attention_mask": mask, **others}
