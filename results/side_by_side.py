#!/usr/bin/env python
"""Our student training and TextBrewer's, side by side: seconds per 1,000 reviews and test accuracy.

Same teacher (02's), student, reviews, batch size, learning rate, weight decay, loss terms and epochs, one after the
other. TextBrewer runs its teacher at every step, ours reads what one scoring pass has saved, whose time is a row of its
own. The other rows tell where the difference comes from: padding to the longest of the batch, and batches of similar
length; and what both tools take when the student's attention has no dropout. Both tools write one checkpoint and log
nothing while the clock runs. What still differs: TextBrewer's projections have a bias and another initial scale, and it
clips the student's gradient without theirs.

    pip install tensorboard && pip install --no-deps textbrewer==0.2.1.post1
    python results/side_by_side.py --dataset path/to/imdb --output-dir outputs/results \
        --student-model results/weights/minilm-l6

Writes results/distillation/textbrewer.csv once all rows are there. Finished rows are not made again; --runs makes some.
"""

import argparse
import importlib.metadata
import importlib.util
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, data, device, metrics, models, scoring, settings
from results import distillation

# tool, the teacher's part in a training step, whether reviews of similar length come together, padded to what, and
# whether the student's attention has dropout
RUNS = {
    "textbrewer, padded to the limit": ("textbrewer", "online", "given order", "limit", "as configured"),
    "textbrewer": ("textbrewer", "online", "given order", "longest", "as configured"),
    "scoring pass": ("ours", "scoring", "grouped", "longest", "as configured"),
    "ours, padded to the limit": ("ours", "saved", "given order", "limit", "as configured"),
    "ours, in the same order": ("ours", "saved", "given order", "longest", "as configured"),
    "ours": ("ours", "saved", "grouped", "longest", "as configured"),
    "textbrewer, no attention dropout": ("textbrewer", "online", "given order", "longest", "none"),
    "ours, no attention dropout": ("ours", "saved", "grouped", "longest", "none"),
}
ALPHA, FEATURE_WEIGHT = 0.9, 0.1
# Beside device, precision and models, what decides a time or an accuracy of a table.
DECIDE = ("seeds", "temperature", "micro_batch_size", "batch_tokens")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = distillation.make_parser(__doc__, RUNS)
    parser.set_defaults(max_length=256, epochs=1, seeds=[1])
    args = distillation.parse(parser, "side_by_side", argv)
    if len(args.seeds) > 1:
        parser.error("the tools are compared with one of --seeds")
    return args


def same_order(n: int, seed: int) -> np.ndarray:
    """The order of both tools' reviews where length does not decide it."""
    return np.random.default_rng(seed).permutation(n)


def collator(pad_id: int, limit: int | None):
    """Pads a batch to its longest review, or to `limit` tokens."""
    import torch

    from common import training

    class ToTheLimit(training.Collator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            missing = limit - batch["input_ids"].shape[1]
            batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, missing), value=pad_id)
            batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, missing))
            return batch

    return training.Collator(pad_id) if limit is None else ToTheLimit(pad_id)


def load_student(name: str, attention_dropout: str):
    """The student, with its own dropout in attention or with "none", by which attention has a fused kernel on a CPU."""
    student = models.load_classifier(name)
    if attention_dropout == "none":
        found = [module for module in student.modules() if type(module).__name__.endswith("SelfAttention")]
        assert found, f"{type(student).__name__} names its attention otherwise"
        for module in found:
            module.dropout.p = 0.0
    return student


def train_textbrewer(
    args, hardware, teacher_folder: Path, folder: Path, train: pd.DataFrame, limit: int | None, attention_dropout: str
):
    """A student by TextBrewer's GeneralDistiller with its teacher online; its seconds."""
    import torch
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
    from torch.utils.data import DataLoader
    from transformers import get_linear_schedule_with_warmup

    from common import distill

    teacher = models.load_classifier(str(teacher_folder))
    device.seed_everything(args.seeds[0])
    student = load_student(args.student_model, attention_dropout)
    tokenizers = {"teacher": models.load_tokenizer(str(teacher_folder))}
    tokenizers["student"] = models.load_tokenizer(args.student_model)
    ids = {who: models.encode(one, train["text"].tolist(), args.max_length) for who, one in tokenizers.items()}
    pad = {who: collator(one.pad_token_id, limit) for who, one in tokenizers.items()}
    labels = train["label"].to_numpy()

    def collate(rows: list[int]) -> dict:
        both = {who: pad[who]([{"input_ids": ids[who][row]} for row in rows]) for who in pad}
        both["student"]["labels"] = torch.from_numpy(labels[rows])
        return both

    def adapt(batch, output) -> dict:
        pooled = [models.pool(hidden, batch["attention_mask"]).flatten(0, 1) for hidden in output.hidden_states]
        adapted = {"logits": output.logits, "hidden": pooled}  # its "pkd" takes rows: first tokens and means, as ours
        return adapted | ({"losses": output.loss} if output.loss is not None else {})

    class InMixedPrecision(GeneralDistiller):
        """Autocast around a step, not around the training: it would keep its first copy of the weights."""

        def train_on_batch(self, batch, args):
            with hardware.autocast():
                return super().train_on_batch(batch, args)

    depth, deep = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    widths = [student.config.hidden_size, teacher.config.hidden_size]
    matches = [
        {"layer_S": layer, "layer_T": of_teacher, "feature": "hidden", "loss": "pkd", "weight": FEATURE_WEIGHT / depth}
        | {"proj": ["linear", *widths]}
        for layer, of_teacher in enumerate(distill.mapped_layers(depth, deep), start=1)
    ]
    loss = {
        "hard_label_weight": 1 - ALPHA,
        "kd_loss_weight": ALPHA * args.temperature**2,
        "temperature": args.temperature,
    }
    distiller = InMixedPrecision(
        TrainingConfig(device=hardware.device, output_dir=str(folder / "pickles")),
        DistillationConfig(kd_loss_type="ce", intermediate_matches=matches, **loss),
        teacher,
        student,
        adapt,
        adapt,
    )
    loader = DataLoader(same_order(len(train), args.seeds[0]).tolist(), args.batch_size, collate_fn=collate)
    steps = args.epochs * len(loader)
    decays = {True: [], False: []}  # as Trainer does: biases and LayerNorms do not decay
    for parameter in student.parameters():
        decays[parameter.ndim > 1].append(parameter)
    groups = [{"params": decays[True]}, {"params": decays[False], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.learning_rate, weight_decay=args.weight_decay)
    schedule = {"num_warmup_steps": int(args.warmup_fraction * steps), "num_training_steps": steps}
    started = time.time()
    with distiller:
        distiller.train(
            optimizer,
            loader,
            num_epochs=args.epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args=schedule,
            max_grad_norm=1.0,
            output_hidden_states=True,
        )
    seconds = time.time() - started
    student.save_pretrained(folder / "model")
    tokenizers["student"].save_pretrained(folder / "model")
    return seconds


def train_ours(
    args,
    hardware,
    scored: Path,
    folder: Path,
    train: pd.DataFrame,
    order: str,
    limit: int | None,
    attention_dropout: str,
):
    """A student by our trainer from the saved scores; its seconds."""
    from torch.utils.data import SequentialSampler

    from common import callbacks, distill, training

    class InTheSameOrder(distill.DistillationTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    rows = np.arange(len(train)) if order == "grouped" else same_order(len(train), args.seeds[0])
    _, logits = scoring.read_scores(scored, "train", scoring.LOGITS)
    features = artifacts.read_array(scored / "train_features.npy", len(train))
    tokenizer = models.load_tokenizer(args.student_model)
    ids = models.encode(tokenizer, train["text"].iloc[rows].tolist(), args.max_length)
    layers = list(range(features.shape[1]))
    arrays = {"teacher_logits": logits[rows], "teacher_features": distill.FeatureRows([(features, rows)], layers)}
    options = argparse.Namespace(**vars(args) | {"seed": args.seeds[0]})
    device.seed_everything(options.seed)
    student = distill.Student(load_student(args.student_model, attention_dropout), features.shape[-1])
    once = training.WITHOUT_VALIDATION | {"save_strategy": "epoch", "logging_steps": 10**9}
    trainer = (distill.DistillationTrainer if order == "grouped" else InTheSameOrder)(
        model=student,
        args=training.training_arguments(options, hardware, folder / "checkpoints", len(train), **once),
        train_dataset=training.ReviewDataset(ids, train["label"].to_numpy()[rows], **arrays),
        data_collator=collator(tokenizer.pad_token_id, limit),
        alpha=ALPHA,
        temperature=args.temperature,
        feature_weight=FEATURE_WEIGHT,
    )
    trainer.remove_callback(callbacks.SaveOften)
    started = time.time()
    trainer.train()
    seconds = time.time() - started
    training.save(student.model, tokenizer, folder / "model", folder / "checkpoints")
    return seconds


def score_teacher(args, hardware, teacher_folder: Path, scored: Path, train: pd.DataFrame) -> float:
    """02's scoring pass over the training reviews, on disk; its seconds."""
    from common import distill

    model = models.prepare_for_scoring(models.load_classifier(str(teacher_folder)), hardware)
    tokenizer = models.load_tokenizer(str(teacher_folder))
    depth = models.load_config(args.student_model).num_hidden_layers
    layers = distill.mapped_layers(depth, model.config.num_hidden_layers)

    def score(texts: list[str]) -> dict[str, np.ndarray]:
        ids = models.encode(tokenizer, texts, args.max_length)
        return scoring.score_encoder(model, ids, tokenizer.pad_token_id, hardware, args.batch_tokens, layers)

    started = time.time()
    scoring.in_chunks(scored, "train", train, scoring.LOGITS, score)
    return time.time() - started


def make_row(args, hardware, name: str, teacher: Path, folder: Path, reviews: data.Reviews) -> dict:
    """A row's seconds per 1,000 reviews and test accuracy."""
    tool, of_teacher, order, padded, dropout = RUNS[name]
    here = folder / name.replace(", ", "_").replace(" ", "_")
    limit, scored = args.max_length if padded == "limit" else None, folder / "soft_labels"
    row = {"tool": tool, "teacher": of_teacher, "order": order, "padded_to": padded, "attention_dropout": dropout}
    print(name, flush=True)
    shutil.rmtree(scored if of_teacher == "scoring" else here, ignore_errors=True)  # a part of a run has no time
    if of_teacher == "scoring":
        seconds = score_teacher(args, hardware, teacher, scored, reviews.train)
        return row | {"seconds_per_1000": 1000 * seconds / len(reviews.train), "accuracy": None}
    if tool == "textbrewer":
        seconds = train_textbrewer(args, hardware, teacher, here, reviews.train, limit, dropout)
    else:
        seconds = train_ours(args, hardware, scored, here, reviews.train, order, limit, dropout)
    logits = distillation.score(args, hardware, here / "model", reviews.test)
    accuracy = metrics.accuracy(reviews.test["label"].to_numpy(), logits.argmax(axis=1))
    return row | {"seconds_per_1000": 1000 * seconds / args.epochs / len(reviews.train), "accuracy": accuracy}


def with_ratios(made: dict[str, dict]) -> pd.DataFrame:
    """A row a run, and two that count the scoring pass into our epochs: into one, and shared by three.

    `ratio` is TextBrewer's time over the row's: of its rows with the same dropout the faster one, however it pads. The
    scoring pass trains nothing and has none.
    """
    rows = dict(made)
    if {"ours", "scoring pass"} <= made.keys():
        for epochs in (1, 3):
            both = made["ours"]["seconds_per_1000"] + made["scoring pass"]["seconds_per_1000"] / epochs
            counted = {"teacher": f"scored once for {epochs}", "seconds_per_1000": both, "accuracy": None}
            rows[f"of {epochs}"] = made["ours"] | counted
    table = pd.DataFrame(rows.values())
    theirs = table[table["tool"] == "textbrewer"].groupby("attention_dropout")["seconds_per_1000"].min()
    table.insert(6, "ratio", table["attention_dropout"].map(theirs) / table["seconds_per_1000"])
    table.loc[table["teacher"] == "scoring", "ratio"] = np.nan
    return table


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    hardware = device.detect(args)
    reviews = data.load_reviews(args, reads=("train", "transfer", "test"))
    teacher = artifacts.require(args, "02_roberta", "model")
    for name in (str(teacher), args.student_model):
        models.check_length(args.max_length, name)
    folder = Path(args.output_dir, "side_by_side")
    if importlib.util.find_spec("textbrewer") is None:
        settings.stop(
            "TextBrewer is not installed: pip install tensorboard, pip install --no-deps textbrewer==0.2.1.post1"
        )
    of_this = {name: getattr(args, name) for name in (*DECIDE, *distillation.TRAINING)}
    of_this |= {"device": hardware.name, "precision": hardware.precision, "teacher": models.weights_digest(teacher)}
    of_this |= {split: data.fingerprint(getattr(reviews, split)) for split in ("train", "test")}
    of_this["textbrewer"] = importlib.metadata.version("textbrewer")
    distillation.begin(folder, of_this)
    for name in args.runs:
        file = folder / f"{name}.json"
        if RUNS[name][1] == "saved" and not (folder / "scoring pass.json").exists():
            settings.stop(f"{name} reads what the scoring pass saves: put it first")
        if not file.exists():
            artifacts.write_json(file, make_row(args, hardware, name, teacher, folder, reviews))
    made = {name: folder / f"{name}.json" for name in RUNS if (folder / f"{name}.json").exists()}
    table = with_ratios({name: artifacts.read_json(file) for name, file in made.items()})
    table["n_train"], table["n_test"] = len(reviews.train), len(reviews.test)
    print(table.round(4).to_string(index=False))
    if made.keys() == RUNS.keys():
        artifacts.write_table(args.tables / "textbrewer.csv", table.round(4))
    else:
        print(f"textbrewer.csv is written when all rows are there; missing: {'; '.join(RUNS.keys() - made.keys())}")


if __name__ == "__main__":
    main()
