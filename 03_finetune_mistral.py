#!/usr/bin/env python
"""03: the black-box teacher. Trains a causal LM in 4 bits to answer one prompt with one of two words (QLoRA).

The base is quantised to nf4 and frozen. LoRA adapters on all linear projections learn. The prompt asks for the
sentiment, and only the review inside it is truncated. The loss is on the next token only, the label word.

Reads   the reviews (a stratified subset)
Writes  outputs/03_mistral/  adapter/  validation.parquet (scores)  metrics.json  run.json
Takes   on two T4s: planned 78 to 101 minutes (results/gpu/plan.csv), not measured yet

    python 03_finetune_mistral.py
    python 03_finetune_mistral.py --mistral-model path/to/any-causal-lm --max-train-samples 2000
"""

import argparse
from pathlib import Path

import pandas as pd

from common import artifacts, checks, data, device, encoding, llms, memory, metrics, scoring, settings, verbalizer

STEP = "03_mistral"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = settings.make_parser(__doc__, reads=("train",))
    parser.set_defaults(max_train_samples="6000")
    add = parser.add_argument
    add("--mistral-model", help="hub name or folder of the causal LM")
    add("--prompt", default=verbalizer.PROMPT, help="question to the LLM, with {review} in the place of the review")
    words = "words for negative and positive"
    add("--label-words", nargs=2, default=list(verbalizer.LABEL_WORDS), metavar="WORD", help=words)
    add("--max-length", type=settings.positive_int, default=512, help="tokens of the prompt with its review")
    settings.add_training_flags(parser, epochs=1, learning_rate=2e-4, batch_size=16, micro_batch_size=4)
    add("--lora-r", type=settings.positive_int, default=16, help="rank of the adapters")
    add("--lora-alpha", type=settings.positive_int, default=32, help="numerator of the adapters' scale, lora_alpha / r")
    add("--lora-dropout", type=settings.fraction, default=0.05, help="dropout on the adapters' input")
    slower = "recompute activations: less memory, a third slower"
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True, help=slower)
    add("--batch-tokens", type=settings.count_or_auto, default="auto", help=settings.BATCH_TOKENS_HELP)
    return settings.parse(parser, STEP, argv)


def with_lora(args: argparse.Namespace, model):
    """The frozen 4-bit model with trainable adapters on every linear projection but the head."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
    )
    model = get_peft_model(model, config)
    config.target_modules = sorted(config.target_modules)  # a set, which the adapter's file would hold in any order
    return model


def finetune(
    args: argparse.Namespace, hardware: device.Hardware, folder: Path, reviews: data.Reviews, tokenizer
) -> None:
    """Train the adapters and save the best epoch's on validation."""
    from common import training

    train, validation = (
        encoding.ReviewDataset(
            verbalizer.encode_prompts(tokenizer, part["text"].tolist(), args.prompt, args.max_length), part["label"]
        )
        for part in (reviews.train, reviews.validation)
    )
    device.seed_everything(args.seed)
    model = with_lora(args, llms.load_llm(args.mistral_model, hardware))
    model.print_trainable_parameters()
    checkpoints = folder / "checkpoints"
    trainer = training.LabelWordTrainer(
        label_ids=verbalizer.label_token_ids(tokenizer, args.prompt, args.label_words),
        model=model,
        args=training.training_arguments(args, hardware, checkpoints, len(train)),
        train_dataset=train,
        eval_dataset=validation.longest_first(),
        data_collator=encoding.Collator(tokenizer.pad_token_id),
        compute_metrics=training.validation_accuracy,
    )
    training.train(trainer, hardware)
    training.save(model, tokenizer, folder / "adapter", checkpoints)


def score_validation(
    args: argparse.Namespace, hardware: device.Hardware, folder: Path, reviews: pd.DataFrame, tokenizer
) -> dict[str, float]:
    """The adapter's figures on validation. It is reloaded onto a new 4-bit base, as in 04b and 05."""
    from common import training

    model = llms.load_llm(args.mistral_model, hardware, folder / "adapter")
    scoring.score_prompts(folder, "validation", reviews, model, tokenizer, vars(args), hardware, args.batch_tokens)
    log_p, _ = scoring.read_scores(folder, "validation", reviews, artifacts.SCRIPTS[STEP])
    labels = reviews["label"].to_numpy()
    training.refuse_collapse(log_p, labels)
    return metrics.describe(labels, log_p) | {"label_mass": round(verbalizer.label_mass(log_p), 6)}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    hardware = device.start(args, __file__)
    reviews = data.load_reviews(args, reads=("train",))
    tokenizer = checks.check_llm(args.mistral_model, args.max_length, reviews.train["text"])
    checks.check_prompt(tokenizer, args.prompt, args.label_words, args.max_length)
    folder = artifacts.begin(args, STEP, inputs=reviews.fingerprints)
    device.one_process_per_gpu(args, hardware, __file__, argv)

    if not device.share((folder / "adapter").exists()):
        finetune(args, hardware, folder, reviews, tokenizer)
        memory.free()
    scores = score_validation(args, hardware, folder, reviews.validation, tokenizer)

    facts = {
        "base": args.mistral_model,
        "prompt": args.prompt,
        "label_words": args.label_words,
        "max_length": args.max_length,
        "validation_accuracy": scores["accuracy"],
    }
    artifacts.finish(args, folder, facts, {"validation": scores})
    print(f"validation accuracy {metrics.in_words(scores)}")
    print(f"next: {settings.next_command('04b_distill_from_mistral.py')}")


if __name__ == "__main__":
    main()
