#!/usr/bin/env python
"""Reviews a second of this project's scoring, against a loop over single reviews and against `pipeline`.

All methods read the same reviews, cut alike (an encoder's head; an LLM's prompt as in 03), in the same precision, by
turns: in each round every method scores the same few reviews, so that a disturbance of the machine falls on all.

    python results/scoring.py --dataset path/to/imdb --output scoring.csv --encoder outputs/02_roberta/model
    python results/scoring.py --dataset path/to/imdb --output scoring.csv --llm path/to/base --adapter path/to/adapter

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
from common import artifacts, data, device, models, scoring, settings, verbalizer

WARM_UP = 4


def encoder_methods(
    args: argparse.Namespace, hardware: device.Hardware
) -> dict[str, Callable[[list[str]], np.ndarray]]:
    """Labels of texts by several ways to run the same encoder."""
    import torch
    from transformers import pipeline

    tokenizer = models.load_tokenizer(args.encoder)
    model = models.load_classifier(args.encoder).to(hardware.device).eval()
    prepared = models.prepare_for_scoring(copy.deepcopy(model), hardware)
    head_only = {"truncation": True, "max_length": args.max_length}

    def ours(texts: list[str], scored=prepared) -> np.ndarray:
        ids = [np.array(one, dtype=np.int32) for one in tokenizer(texts, **head_only)["input_ids"]]
        pad_id = tokenizer.pad_token_id
        return scoring.score_encoder(scored, ids, pad_id, hardware, args.batch_tokens)["scores"].argmax(1)

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
        "ours, weights cast at every call": lambda texts: ours(texts, model),
        "ours, one review at a time": lambda texts: np.concatenate([ours([text]) for text in texts]),
        "ours, one at a time, weights cast at every call": lambda texts: np.concatenate(
            [ours([text], model) for text in texts]
        ),
        "one review at a time": one_by_one,
        "pipeline(batch_size=32)": with_pipeline,
    }


def llm_methods(args: argparse.Namespace, hardware: device.Hardware) -> dict[str, Callable[[list[str]], np.ndarray]]:
    """Labels of texts by one forward pass a batch, and by generating five tokens a review."""
    import torch

    tokenizer, model = models.load_tokenizer(args.llm), models.load_llm(args.llm, hardware, args.adapter)
    words = verbalizer.LABEL_WORDS
    label_ids = verbalizer.label_token_ids(tokenizer, verbalizer.PROMPT, words)

    def ours(texts: list[str]) -> np.ndarray:
        ids = verbalizer.encode_prompts(tokenizer, texts, verbalizer.PROMPT, args.max_length)
        log_p = scoring.score_llm(model, ids, label_ids, tokenizer.pad_token_id, hardware, args.batch_tokens)
        return log_p.argmax(axis=1)

    def generate(texts: list[str]) -> np.ndarray:
        labels = []
        for text in texts:
            (ids,) = verbalizer.encode_prompts(tokenizer, [text], verbalizer.PROMPT, args.max_length)
            prompt = torch.tensor(ids[None].astype(np.int64), device=hardware.device)
            with torch.inference_mode(), hardware.autocast():
                made = model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=5,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
            answer = tokenizer.decode(made[0, len(ids) :])
            labels.append(next((label for label, word in enumerate(words) if word in answer), -1))
        return np.array(labels)

    return {"ours": ours, "generate(max_new_tokens=5)": generate}


def main() -> None:
    parser = settings.make_parser(__doc__, reads=("test",))
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--encoder", help="folder of a fine-tuned encoder")
    which.add_argument("--llm", help="hub name or folder of a causal LM")
    parser.add_argument("--adapter", type=Path, help="03's, for the LLM")
    parser.add_argument("--max-length", type=settings.positive_int, default=512, help="tokens")
    parser.add_argument("--batch-tokens", type=settings.count_or_auto, default="auto", help=settings.BATCH_TOKENS_HELP)
    parser.add_argument("--reviews", type=settings.positive_int, default=200, help="stratified test reviews")
    parser.add_argument(
        "--rounds", type=settings.positive_int, default=2, help="turns that the reviews are shared out to"
    )
    parser.add_argument("--output", type=Path, required=True, help="the CSV to write")
    args: argparse.Namespace = settings.parse(parser, "scoring", None)
    args.max_test_samples = args.reviews
    hardware = device.detect(args)
    texts = data.load_reviews(args, reads=("test",)).test["text"].sample(frac=1, random_state=args.seed).tolist()
    methods = encoder_methods(args, hardware) if args.encoder else llm_methods(args, hardware)

    seconds, labels = dict.fromkeys(methods, 0.0), {name: [] for name in methods}
    for method in methods.values():
        method(texts[:WARM_UP])
    for part in np.array_split(np.array(texts, dtype=object), args.rounds):
        for name, method in methods.items():
            hardware.synchronize()
            started = time.perf_counter()
            labels[name].append(method(list(part)))
            hardware.synchronize()
            seconds[name] += time.perf_counter() - started
        print({name: round(spent, 1) for name, spent in seconds.items()}, flush=True)

    ours = np.concatenate(labels["ours"])
    table = pd.DataFrame(
        {
            "model": Path(args.encoder or args.llm).name if args.llm else Path(args.encoder).parent.name,
            "method": name,
            "reviews": len(texts),
            "reviews_per_second": round(len(texts) / seconds[name], 3),
            "ratio_to_ours": round(seconds["ours"] / seconds[name], 3),
            "same_labels": round(float((np.concatenate(labels[name]) == ours).mean()), 4),
            "precision": hardware.precision,
            "max_length": args.max_length,
            "hardware": hardware.name,
        }
        for name in methods
    )
    if args.output.exists():
        before = pd.read_csv(args.output)
        table = pd.concat([before[~before["model"].isin(table["model"])], table])
    artifacts.write_table(args.output, table)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
