#!/usr/bin/env python
"""This project's scoring against a loop over single reviews, `pipeline` and `generate`: reviews/s and accuracy.

All methods read the same reviews in the same precision. Truncation is alike (an encoder's head; an LLM's prompt as in
03), but for "ours, head and tail", which keeps both ends as the numbered scripts do. Methods take turns: in each round
every method scores the same few reviews, so that a disturbance of the machine falls on all.

    common="--dataset path/to/imdb --output results/scoring/scoring.csv"
    python experiments/scoring.py $common --encoder outputs/02_roberta/model
    python experiments/scoring.py $common --llm path/to/base --adapter outputs/03_mistral/adapter

Rows of the same model are replaced, others stay.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, data, device, metrics, models, scoring, settings, verbalizer

WARM_UP = 4
Methods = dict[str, Callable[[list[str]], np.ndarray]]  # from texts to labels


def encoder_methods(args: argparse.Namespace, hardware: device.Hardware) -> Methods:
    """Several ways to run the same encoder."""
    import torch
    from transformers import pipeline

    tokenizer = models.load_tokenizer(args.encoder)
    model = models.load_classifier(args.encoder).to(hardware.device).eval()
    prepared = models.prepare_for_scoring(copy.deepcopy(model), hardware)
    head_only = {"truncation": True, "max_length": args.max_length}

    def score(ids: list[np.ndarray], scorer=prepared) -> np.ndarray:
        batch_tokens = args.batch_tokens
        return scoring.score_encoder(scorer, ids, tokenizer.pad_token_id, hardware, batch_tokens)["scores"].argmax(1)

    def ours(texts: list[str], scorer=prepared) -> np.ndarray:
        return score([np.array(one, dtype=np.int32) for one in tokenizer(texts, **head_only)["input_ids"]], scorer)

    def one_by_one(texts: list[str]) -> np.ndarray:
        labels = []
        for text in texts:
            with torch.inference_mode(), hardware.autocast():
                batch = tokenizer(text, return_tensors="pt", **head_only).to(hardware.device)
                labels.append(int(model(**batch).logits.argmax()))
        return np.array(labels)

    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, batch_size=32)

    def with_pipeline(texts: list[str]) -> np.ndarray:
        with hardware.autocast():
            return np.array([data.LABELS.index(one["label"]) for one in classify(texts, **head_only)])

    return {
        "ours": ours,
        "ours, head and tail": lambda texts: score(data.encode(tokenizer, texts, args.max_length)),
        "ours, weights cast at every call": lambda texts: ours(texts, model),
        "ours, one review at a time": lambda texts: np.concatenate([ours([text]) for text in texts]),
        "ours, one at a time, cast at every call": lambda texts: np.concatenate(
            [ours([text], model) for text in texts]
        ),
        "one review at a time": one_by_one,
        "pipeline(batch_size=32)": with_pipeline,
    }


def llm_methods(args: argparse.Namespace, hardware: device.Hardware) -> Methods:
    """One forward pass a batch, and five generated tokens a review."""
    import torch

    tokenizer, model = models.load_tokenizer(args.llm), models.load_llm(args.llm, hardware, args.adapter)
    words = verbalizer.LABEL_WORDS
    label_ids = verbalizer.label_token_ids(tokenizer, verbalizer.PROMPT, words)

    def ours(texts: list[str]) -> np.ndarray:
        ids = verbalizer.encode_prompts(tokenizer, texts, verbalizer.PROMPT, args.max_length)
        return scoring.score_llm(model, ids, label_ids, tokenizer.pad_token_id, hardware, args.batch_tokens).argmax(1)

    def generate(texts: list[str]) -> np.ndarray:
        labels, options = [], {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        for ids in verbalizer.encode_prompts(tokenizer, texts, verbalizer.PROMPT, args.max_length):
            prompt = torch.tensor(ids[None].astype(np.int64), device=hardware.device)
            with torch.inference_mode(), hardware.autocast():
                made = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
            answer = tokenizer.decode(made[0, len(ids) :])
            labels.append(next((label for label, word in enumerate(words) if word in answer), -1))
        return np.array(labels)

    return {"ours": ours, "generate(max_new_tokens=5)": generate}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = settings.make_parser(__doc__, reads=("test",))
    parser.set_defaults(max_test_samples=200)
    add, which = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--encoder", help="folder of a fine-tuned encoder")
    which.add_argument("--llm", help="hub name or folder of a causal LM")
    add("--adapter", type=Path, help="03's, for the LLM")
    add("--max-length", type=settings.positive_int, default=512, help="tokens")
    add("--batch-tokens", type=settings.count_or_auto, default="auto", help=settings.BATCH_TOKENS_HELP)
    add("--rounds", type=settings.positive_int, default=2, help="turns that the reviews are shared out to")
    add("--output", type=Path, required=True, help="the CSV to write")
    return settings.parse(parser, "scoring", argv)


def time_methods(
    methods: Methods, texts: list[str], rounds: int, hardware: device.Hardware
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Seconds and labels of all texts by each method."""
    seconds, labels = dict.fromkeys(methods, 0.0), {name: [] for name in methods}
    for method in methods.values():
        method(texts[:WARM_UP])
    for part in np.array_split(np.array(texts, dtype=object), rounds):
        for name, method in methods.items():
            hardware.synchronize()
            started = time.perf_counter()
            labels[name].append(method(list(part)))
            hardware.synchronize()
            seconds[name] += time.perf_counter() - started
        print({name: round(spent, 1) for name, spent in seconds.items()}, flush=True)
    return seconds, {name: np.concatenate(parts) for name, parts in labels.items()}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    hardware = device.detect(args)
    test = data.load_reviews(args, reads=("test",)).test.sample(frac=1, random_state=args.seed)
    methods = encoder_methods(args, hardware) if args.encoder else llm_methods(args, hardware)
    seconds, labels = time_methods(methods, test["text"].tolist(), args.rounds, hardware)
    folder, rows = Path(args.encoder or args.llm), []
    for name, called in labels.items():
        right = called == test["label"].to_numpy()
        low, high = metrics.wilson_interval(int(right.sum()), len(test))
        row = {"model": folder.name if args.llm else folder.parent.name, "method": name, "reviews": len(test)}
        row["reviews_per_second"] = round(len(test) / seconds[name], 3)
        row["ratio_to_ours"] = round(seconds["ours"] / seconds[name], 3)
        row["same_labels"] = round(float((called == labels["ours"]).mean()), 4)
        row |= {"precision": hardware.precision, "max_length": args.max_length, "hardware": hardware.name}
        rows.append(row | {"accuracy": right.mean(), "ci_low": round(low, 6), "ci_high": round(high, 6)})
    table = pd.DataFrame(rows)
    if args.output.exists():
        before = pd.read_csv(args.output)
        table = pd.concat([before[~before["model"].isin(table["model"])], table])
    artifacts.write_table(args.output, table)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
