#!/usr/bin/env python
"""02: the white-box teacher. Fine-tunes RoBERTa-large and saves its outputs for a student.

It trains on the labelled reviews (head+tail truncation) and keeps the checkpoint with the best validation accuracy.
Then it scores train, validation and the transfer set once. It saves raw logits, and pooled hidden states of the layers
that 04a maps.

Reads   the reviews
Writes  outputs/02_roberta/  model/  soft_labels/ (tables; features of train, transfer)  metrics.json  run.json
Takes   on two T4s: planned 51 to 62 minutes (results/gpu/plan.csv), not measured yet

    python 02_finetune_roberta.py
    python 02_finetune_roberta.py --roberta-model path/to/folder --max-length 256
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from common import artifacts, checks, data, device, encoding, export, memory, metrics, models, scoring, settings

STEP = "02_roberta"
COLLAPSED = "pass --force with a smaller --learning-rate, a larger --warmup-fraction or more --epochs"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = settings.make_parser(__doc__, reads=("train", "transfer"))
    add = parser.add_argument
    add("--roberta-model", help="hub name or folder of the encoder to fine-tune")
    add("--max-length", type=settings.positive_int, default=512, help="tokens of a review, head and tail kept")
    settings.add_training_flags(parser, epochs=3, learning_rate=1e-5, batch_size=32, micro_batch_size=8)
    add("--student-layers", type=settings.positive_int, default=6, help="student's depth; decides the layers to save")
    add("--batch-tokens", type=settings.count_or_auto, default="auto", help=settings.BATCH_TOKENS_HELP)
    return settings.parse(parser, STEP, argv)


def finetune(
    args: argparse.Namespace, hardware: device.Hardware, folder: Path, reviews: data.Reviews, tokenizer
) -> None:
    """Fine-tune the encoder and save the weights of its best epoch on validation."""
    from common import training

    device.seed_everything(args.seed)
    model = models.load_classifier(args.roberta_model, tokenizer)
    train, validation = (
        encoding.ReviewDataset(encoding.encode(tokenizer, part["text"].tolist(), args.max_length), part["label"])
        for part in (reviews.train, reviews.validation)
    )
    trainer = training.ReviewTrainer(
        model=model,
        args=training.training_arguments(args, hardware, folder / "checkpoints", len(train)),
        train_dataset=train,
        eval_dataset=validation.longest_first(),
        data_collator=encoding.Collator(tokenizer.pad_token_id),
        compute_metrics=training.validation_accuracy,
    )
    training.train(trainer, hardware)
    tokenizer.model_max_length = args.max_length  # to which it truncates, if it is asked to
    training.save(model, tokenizer, folder / "model", folder / "checkpoints")


def save_soft_labels(
    args: argparse.Namespace, hardware: device.Hardware, folder: Path, reviews: data.Reviews, tokenizer
) -> tuple[np.ndarray, dict]:
    """Save raw logits by example_id for every split, and pooled states of the mapped layers for train and transfer.

    Returns the (n, 2) validation logits, and the facts that 04a needs. Stops if the teacher has learned nothing.
    """
    from common import distill, training

    model = models.prepare_for_scoring(models.load_classifier(str(folder / "model")), hardware)
    sizes = model.config.get_text_config()
    layers = distill.mapped_layers(args.student_layers, sizes.num_hidden_layers)
    origin = {"weights": models.weights_digest(folder / "model"), "max_length": args.max_length}
    soft_labels = folder / "soft_labels"

    def score(texts: list[str], layers: list[int]) -> dict[str, np.ndarray]:
        ids = encoding.encode(tokenizer, texts, args.max_length)
        return scoring.score_encoder(model, ids, tokenizer.pad_token_id, hardware, args.batch_tokens, layers)

    def save(split: str, layers: list[int]) -> None:
        table, arrays = getattr(reviews, split), ("features",) if layers else ()
        split_origin = origin | {"feature_layers": layers, "texts": data.fingerprint(table)}
        scoring.delete_unless_made_from(soft_labels, split, split_origin)
        scoring.in_chunks(soft_labels, split, table, scoring.LOGITS, partial(score, layers=layers), arrays=arrays)

    save("validation", [])  # first, so that a collapsed teacher is refused before it scores 70,000 reviews
    logits, _ = scoring.read_scores(soft_labels, "validation", reviews.validation, artifacts.SCRIPTS[STEP])
    training.refuse_collapse(logits, reviews.validation["label"].to_numpy(), COLLAPSED)
    for split in ("train", "transfer"):
        save(split, layers)
    facts = {"feature_layers": layers, "teacher_layers": sizes.num_hidden_layers, "teacher_width": sizes.hidden_size}
    return logits, facts


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    hardware = device.start(args, __file__)
    reviews = data.load_reviews(args, reads=("train", "transfer"))
    tokenizer = checks.check_encoder(args.roberta_model, args.max_length, reviews.train["text"], hardware)
    folder = artifacts.begin(args, STEP, inputs=reviews.fingerprints, keep=("soft_labels",))
    device.one_process_per_gpu(args, hardware, __file__, argv)
    if not device.share((folder / "model").exists()):
        finetune(args, hardware, folder, reviews, tokenizer)
        memory.free()

    logits, layer_facts = save_soft_labels(args, hardware, folder, reviews, tokenizer)
    export.add_temperature_and_card(
        args, folder / "model", "A fine-tuned encoder.", args.roberta_model, reviews, logits, epochs=args.epochs
    )
    scores = metrics.describe(reviews.validation["label"].to_numpy(), logits)

    facts = {"teacher": args.roberta_model, "max_length": args.max_length} | layer_facts
    artifacts.finish(args, folder, facts, {"validation": scores})
    print(f"validation accuracy {metrics.in_words(scores)}")
    counts = ("max_train_samples", "max_transfer_samples")  # 04a needs 02's soft labels of its reviews
    print(f"next: {settings.next_command('04a_distill_from_roberta.py', *counts)}")
    print(f"  or: {settings.next_command('03_finetune_mistral.py')}")


if __name__ == "__main__":
    main()
