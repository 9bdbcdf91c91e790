#!/usr/bin/env python
"""The proof of the black-box method: students of a 4-bit LLM, as it is and tuned by 03, on real reviews and weights.

The same subsets, student and control as results/distillation.py, whose functions this uses; the LLM scores them as 04b
does. An interrupted part continues where it stopped. 03's folder under --output-dir is made by 03_finetune_mistral.py
with the same subsets.

    common="--dataset path/to/imdb --output-dir outputs/results --student-model results/weights/minilm-l6"
    python results/black_box.py $common --mistral-model results/weights/smollm2-135m

Writes results/distillation/black_box.csv, one row a run.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, data, device, memory, models, scoring, settings, verbalizer
from results import distillation

TABLE = Path(__file__).parent / "distillation" / "black_box.csv"
# A teacher: with 03's adapter or without, and how its log-odds are calibrated.
TEACHERS = {"zero_shot": (False, "none"), "zero_shot_batch": (False, "batch"), "tuned": (True, "batch")}
RUNS = {"control": distillation.RUNS["control"]} | dict.fromkeys(TEACHERS, distillation.RUNS["logits"])
# One old mistake at a time, at the tuned teacher: a slice of a label-sorted file.
RUNS["label_sorted"] = distillation.RUNS["label_sorted"]


def parse_args() -> argparse.Namespace:
    parser = distillation.make_parser(__doc__, RUNS)
    parser.add_argument("--mistral-model", help="hub name or folder of the LLM")
    parser.add_argument("--llm-test-samples", type=settings.positive_int, default=1000, help="test reviews it reads")
    return settings.parse(parser, "black_box", None)


def score_llm(args, reviews: data.Reviews, test: pd.DataFrame, adapter: Path | None, hardware, folder: Path) -> None:
    """Raw label log-probabilities of every split, on disk, by the LLM with 03's prompt."""
    tables = {"validation": reviews.validation, "train": reviews.train, "transfer": reviews.transfer, "test": test}
    if all(scoring.is_scored(folder, split, len(table)) for split, table in tables.items()):
        return
    tokenizer = models.load_tokenizer(args.mistral_model)
    label_ids = verbalizer.label_token_ids(tokenizer, verbalizer.PROMPT, verbalizer.LABEL_WORDS)
    model = models.load_llm(args.mistral_model, hardware, adapter)

    def score(texts: list[str]) -> dict[str, np.ndarray]:
        ids = verbalizer.encode_prompts(tokenizer, texts, verbalizer.PROMPT, args.max_length)
        log_p = scoring.score_llm(model, ids, label_ids, tokenizer.pad_token_id, hardware, args.batch_tokens)
        return {"scores": log_p}

    for split, table in tables.items():
        scoring.in_chunks(folder, split, table, scoring.LOG_PROBABILITIES, score, chunk=250)


def read_teacher(folder: Path, calibration: str) -> dict[str, np.ndarray]:
    """The teacher's calibrated logits of each split."""
    log_odds = {
        split: verbalizer.log_odds(scoring.read_scores(folder, split, scoring.LOG_PROBABILITIES)[1])
        for split in ("validation", "train", "transfer", "test")
    }
    bias = verbalizer.batch_calibration(log_odds["transfer"]) if calibration == "batch" else 0.0
    return {split: verbalizer.teacher_logits(odds, bias) for split, odds in log_odds.items()}


def main() -> None:
    args = parse_args()
    hardware = device.detect(args)
    reviews = data.load_reviews(args, reads=("train", "transfer", "test"))
    order = data.stratified_order(reviews.test["label"], args.seed)
    llm_rows = np.sort(order[: args.llm_test_samples])
    folder = Path(args.output_dir, "black_box")
    teachers = {}
    for name, (tuned, calibration) in TEACHERS.items():
        adapter = artifacts.require(args, "03_mistral", "adapter") if tuned else None
        of_teacher = folder / ("tuned" if tuned else "as_it_is")
        score_llm(args, reviews, reviews.test.iloc[llm_rows], adapter, hardware, of_teacher)
        memory.free()
        teachers[name] = read_teacher(of_teacher, calibration)
    tokenizer = models.load_tokenizer(args.student_model)
    ids = {
        split: models.encode(tokenizer, getattr(reviews, split)["text"].tolist(), args.max_length)
        for split in ("train", "validation", "transfer")
    }
    labels = reviews.test["label"].to_numpy()
    for seed in args.seeds:
        for name in args.runs:
            teacher = teachers["tuned" if name in ("control", "label_sorted") else name]
            soft = {split: (teacher[split], None) for split in ("train", "transfer")}
            distillation.make_run(args, hardware, RUNS[name], name, seed, folder, reviews, ids, soft)
            tuned = np.full((len(labels), 2), np.nan, np.float32)
            tuned[llm_rows] = teachers["tuned"]["test"]
            rows = [
                distillation.describe_teacher(args, f"{one}_teacher", labels[llm_rows], teachers[one]["test"])
                for one in TEACHERS
            ]
            table = pd.concat([pd.DataFrame(rows), distillation.make_table(args, folder, labels, RUNS, tuned)])
            artifacts.write_table(TABLE, table[distillation.COLUMNS].round(6))
            print(table[distillation.COLUMNS].to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
