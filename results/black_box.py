#!/usr/bin/env python
"""The proof of the black-box method: students of a 4-bit LLM, as it is and tuned by 03, on real reviews and weights.

The same gold reviews, student and control as results/distillation.py, whose functions and folder this uses; the LLM
scores as in 04b. Three more runs repeat, one at a time, the mistakes by which earlier versions of this recipe reached
0.51; no flag of the product leads to them. An interrupted part continues where it stopped. 03's folder under
--output-dir is made by 03_finetune_mistral.py with the same subsets.

    common="--dataset path/to/imdb --output-dir outputs/results --student-model results/weights/minilm-l6"
    common="$common --tables outputs/results/tables"
    python results/black_box.py $common --runs tuned --seeds 1
    python results/tables.py --tables outputs/results/tables
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, data, device, memory, models, scoring, settings, verbalizer
from results import distillation, tables
from results.true_size import script

OTHER_PROMPT = "Review: {review}\nThe sentiment of this review is"
# A teacher: whose scores (a folder), and how its log-odds are calibrated.
TEACHERS = {
    "zero_shot": ("as_it_is", "none"),
    "zero_shot_batch": ("as_it_is", "batch"),
    "tuned": ("tuned", "batch"),
    "other_prompt": ("other_prompt", "batch"),  # scored by another prompt than 03 trained with
    "whole_prompt": ("whole_prompt", "batch"),  # trained on the loss over the whole prompt, review included
}
RUNS = {"control": distillation.RUNS["control"]} | dict.fromkeys(TEACHERS, distillation.FINAL)
RUNS["tuned_label_sorted"] = distillation.RUNS["label_sorted"]  # a slice of a label-sorted file


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = distillation.make_parser(__doc__, RUNS)
    distillation.add_read_test(parser)
    parser.set_defaults(max_transfer_samples=4000)
    parser.add_argument("--llm-test-samples", type=settings.positive_int, default=2000, help="test reviews it reads")
    return distillation.parse(parser, "black_box", argv)


def teacher_name(run: str) -> str:
    """The teacher of a run's student."""
    return run if run in TEACHERS else "tuned"


def adapter_of(args, who: str, folder: Path) -> Path | None:
    """Where the adapter lies by which a teacher differs from the LLM as it is (None)."""
    if who == "as_it_is":
        return None
    return (
        folder / "whole_prompt_adapter" / "adapter"
        if who == "whole_prompt"
        else Path(args.output_dir, "03_mistral", "adapter")
    )


def whole_prompt_loss(model, inputs: dict, label_ids: list[int]):
    """Cross-entropy over all tokens of left-padded prompts, each followed by its label word."""
    import torch
    import torch.nn.functional as F

    words = torch.tensor(label_ids, device=inputs["labels"].device)[inputs["labels"]].unsqueeze(1)
    ids = torch.cat([inputs["input_ids"], words], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(words)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    counted = (mask[:, 1:] * mask[:, :-1]).bool()
    return F.cross_entropy(logits[:, :-1][counted].float(), ids[:, 1:][counted])


def tune_on_whole_prompts(args, hardware: device.Hardware, reviews: data.Reviews, adapter: Path) -> None:
    """Train an adapter as 03's was, but for the loss: over all tokens of the prompt, the label word being one."""
    of_03 = artifacts.read_run(args, "03_mistral")
    about = {"settings": of_03["settings"], "train": data.fingerprint(reviews.train)}
    distillation.begin(adapter.parent, about)
    if adapter.exists():
        return
    from common import training

    class WholePrompt(training.ReviewTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return whole_prompt_loss(model, inputs, label_ids)

    trained = argparse.Namespace(**of_03["settings"])
    base = trained.mistral_model
    tokenizer = models.load_tokenizer(base)
    label_ids = verbalizer.label_token_ids(tokenizer, trained.prompt, trained.label_words)
    texts = reviews.train["text"].tolist()
    ids = verbalizer.encode_prompts(tokenizer, texts, trained.prompt, trained.max_length)
    device.seed_everything(trained.seed)
    model = script("03").with_lora(trained, models.load_llm(base, hardware))
    checkpoints = adapter.with_name("checkpoints")
    trainer = WholePrompt(
        model=model,
        args=training.training_arguments(trained, hardware, checkpoints, len(ids), **training.WITHOUT_VALIDATION),
        train_dataset=training.ReviewDataset(ids, reviews.train["label"]),
        data_collator=training.Collator(tokenizer.pad_token_id, left=True),
    )
    trainer.model_accepts_loss_kwargs = False  # as in 03: the loss is a mean over its micro-batch, Trainer must divide
    training.train(trainer, hardware)
    training.save(model, tokenizer, adapter, checkpoints)
    memory.free()


def asked_by(args, who: str) -> dict:
    """Which LLM a teacher is, and by what prompt, label words and length it is asked: as 03's, but for one mistake."""
    facts = artifacts.read_run(args, "03_mistral")["facts"]
    asked = {name: facts[name] for name in ("base", "prompt", "label_words", "max_length")}
    return asked | ({"prompt": OTHER_PROMPT} if who == "other_prompt" else {})


def score_llm(
    args, hardware: device.Hardware, who: str, reviews: data.Reviews, folder: Path, splits: dict[str, pd.DataFrame]
) -> None:
    """Raw label log-probabilities of the named splits by one LLM, on disk; another LLM's or sample's are deleted."""
    adapter, origin = adapter_of(args, who, folder), asked_by(args, who)
    if who == "whole_prompt":
        tune_on_whole_prompts(args, hardware, reviews, adapter)
    origin["weights"] = models.weights_digest(adapter) if adapter else "no adapter"
    for split, table in splits.items():
        scoring.delete_unless_made_from(folder / who, split, origin | {"texts": data.fingerprint(table)})
    if all(scoring.is_scored(folder / who, split, len(table)) for split, table in splits.items()):
        return
    base = origin["base"]
    tokenizer = models.load_tokenizer(base)
    label_ids = verbalizer.label_token_ids(tokenizer, origin["prompt"], origin["label_words"])
    model = models.load_llm(base, hardware, adapter)

    def score(texts: list[str]) -> dict[str, np.ndarray]:
        ids = verbalizer.encode_prompts(tokenizer, texts, origin["prompt"], origin["max_length"])
        log_p = scoring.score_llm(model, ids, label_ids, tokenizer.pad_token_id, hardware, args.batch_tokens)
        return {"scores": log_p}

    for split, table in splits.items():
        scoring.in_chunks(folder / who, split, table, scoring.LOG_PROBABILITIES, score, chunk=250)
    memory.free()


def read_teacher(folder: Path, calibration: str, splits: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The teacher's calibrated logits of each split."""
    log_odds = {
        split: verbalizer.log_odds(scoring.read_scores(folder, split, scoring.LOG_PROBABILITIES)[1])
        for split in (*splits, "transfer")
    }
    bias = verbalizer.batch_calibration(log_odds["transfer"]) if calibration == "batch" else 0.0
    return {split: verbalizer.teacher_logits(odds, bias) for split, odds in log_odds.items()}


def keep_teacher(
    args, hardware: device.Hardware, name: str, reviews: data.Reviews, scored: Path, runs: Path, test: bool
) -> dict:
    """What a teacher says of each split, calibrated, in `runs`; made there unless it is there.

    Of test it reads --llm-test-samples reviews; NaN of the others.
    """
    splits = {"train": reviews.train, "transfer": reviews.transfer}
    if test:
        rows = np.sort(data.stratified_order(reviews.test["label"], args.seed)[: args.llm_test_samples])
        splits["test"] = reviews.test.iloc[rows]
    of = {split: data.fingerprint(table) for split, table in splits.items()}
    who, calibration = TEACHERS[name]
    adapter = adapter_of(args, who, scored)
    weights = "no adapter" if adapter is None else models.weights_digest(adapter) if adapter.exists() else None
    kept = tables.read_run(runs, f"{name}_teacher", args.seed)
    if kept:
        asked = asked_by(args, who) if Path(args.output_dir, "03_mistral", "run.json").exists() else None
        distillation.refuse_other_teacher(kept, of, weights, asked)
        if of.keys() <= kept["reviews"].keys():
            return kept
    artifacts.refuse_conflict(args, artifacts.read_run(args, "03_mistral"), reviews.fingerprints, distillation.SAME)
    score_llm(args, hardware, who, reviews, scored, splits)
    scores = read_teacher(scored / who, calibration, tuple(splits))
    if test:
        every = np.full((len(reviews.test), 2), np.nan, np.float32)
        every[rows] = scores["test"]
        scores["test"] = every
    about = {"gold": len(reviews.train) if adapter else 0, "transfer": 0, "teacher": None, "seconds": None}
    about |= {"reviews": of, "weights": models.weights_digest(adapter) if adapter else "no adapter"}
    about["asked"] = asked_by(args, who)
    tables.keep(runs, f"{name}_teacher", args.seed, about, scores)
    return tables.read_run(runs, f"{name}_teacher", args.seed)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    hardware = device.detect(args)
    reviews, runs = data.load_reviews(args, reads=("train", "transfer", "test")), args.tables / "runs"
    tables.keep_labels(runs, distillation.splits_to_keep(args, reviews))
    ids, scored = distillation.encode_reviews(args, reviews), Path(args.output_dir, "black_box")
    proof = distillation.Proof(args, hardware, reviews, ids, Path(args.output_dir, "distillation"), runs)
    for seed in args.seeds:
        for name in args.runs:
            soft, teacher = {}, None
            if name != "control":
                teacher = f"{teacher_name(name)}_teacher"
                kept = keep_teacher(args, hardware, teacher_name(name), reviews, scored, runs, args.read_test)
                soft = {split: kept["scores"][split] for split in ("train", "transfer")}
            distillation.make_run(proof, name, RUNS[name], seed, soft, teacher)


if __name__ == "__main__":
    main()
