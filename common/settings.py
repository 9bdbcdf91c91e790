"""The flags that scripts share, the presets, and how a person's mistake is told. Standard library only."""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import NoReturn

# Precedence: shared default < script default < preset < explicit flag. "02_roberta.epochs" is for that step alone.
PRESETS: dict[str, dict[str, object]] = {
    "kaggle": {
        "dataset": "stanfordnlp/imdb",
        "roberta_model": "FacebookAI/roberta-large",
        "mistral_model": "mistralai/Mistral-7B-v0.1",
        "student_model": "distilbert/distilbert-base-uncased",
    },
    "demo": {
        "dataset": "demo:reviews",
        "roberta_model": "demo:roberta",
        "mistral_model": "demo:mistral",
        "student_model": "demo:distilbert",
        "validation_samples": 300,
        "max_length": 128,
        "weight_decay": 0.0,
        "02_roberta.epochs": 4,
        "02_roberta.learning_rate": 3e-4,
        "02_roberta.batch_size": 16,
        "02_roberta.micro_batch_size": 16,
        "02_roberta.student_layers": 2,
        "03_mistral.max_train_samples": "600",
        "03_mistral.epochs": 2,
        "03_mistral.learning_rate": 2e-3,
        "03_mistral.micro_batch_size": 16,
        "03_mistral.gradient_checkpointing": False,
        "04a_student_from_roberta.epochs": 3,
        "04a_student_from_roberta.learning_rate": 5e-4,
        "04b_student_from_mistral.epochs": 3,
        "04b_student_from_mistral.learning_rate": 5e-4,
        "05_benchmark.max_llm_samples": 500,
    },
}

# These change how a result is computed or where it lies, not what it is: a finished step stays finished under others.
NOT_COMPARED = {
    "preset", "output_dir", "force", "precision", "num_processes", "micro_batch_size", "batch_tokens",
    "gradient_checkpointing", "max_hours",
}  # fmt: skip


BATCH_TOKENS_HELP = "padded tokens a batch in scoring; auto: 8192 on a GPU, 2048 on a CPU"


class Stop(SystemExit):
    """A person's mistake: exit code 2, argparse's own."""

    def __init__(self, message: str):
        super().__init__(2)
        self.message = message

    def __str__(self) -> str:
        return self.message


def stop(message: str) -> NoReturn:
    """Tell a person's mistake in one sentence, with its remedy, and leave with exit code 2.

    Of several processes that all stop for the same reason the first one tells it; one that stops alone tells it late.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(30)  # the first process's end ends this one before, on a busy machine too
    print(f"error: {message}", file=sys.stderr)
    raise Stop(message)


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def samples(text: str) -> int | None:
    """A number of reviews, or "all" (None)."""
    return None if text == "all" else positive_int(text)


def count_or_auto(text: str) -> int | None:
    """A number of at least 1, or "auto" (None)."""
    return None if text == "auto" else positive_int(text)


count_or_auto.__name__ = "number or 'auto'"
samples.__name__ = "number or 'all'"  # argparse names the type in its error


def non_negative(text: str) -> float:
    """A finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = non_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 is not above 0")
    return value


def hours(text: str) -> float | None:
    """A number of hours above 0, or "unlimited" (None)."""
    return None if text == "unlimited" else positive(text)


hours.__name__ = "number of hours or 'unlimited'"


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = non_negative(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as written, and each flag with its default."""


def make_parser(description: str | None, reads: tuple[str, ...], precision: bool = True) -> argparse.ArgumentParser:
    """A parser with the shared flags; `reads` names the splits (train, transfer, test) that the script reads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help, allow_abbrev=False)
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="kaggle", help="which table of defaults applies")
    add("--dataset", help="hub name, or a folder of train/test/unsupervised files (parquet, CSV, JSON lines)")
    add("--output-dir", default="outputs", help="where every step reads and writes")
    add("--seed", type=int, default=42, help="of splits, subsets, initial heads and the order of training")
    if precision:
        add(
            "--precision",
            choices=("auto", "fp32", "bf16", "fp16"),
            default="auto",
            help="of the arithmetic; auto: the hardware's",
        )
    add("--max-hours", type=hours, default="unlimited", help="time after which the script stops, to be continued")
    add("--force", action=argparse.BooleanOptionalAction, default=False, help="redo this step, deleting its results")
    if "train" in reads:
        add("--validation-samples", type=positive_int, default=2500, help="reviews of train that choose checkpoints")
        add("--max-train-samples", type=samples, default="all", help="labelled reviews, stratified; or 'all'")
    if "transfer" in reads:
        add("--max-transfer-samples", type=samples, default="all", help="unlabelled reviews for the teacher; or 'all'")
    if "test" in reads:
        add("--max-test-samples", type=samples, default="all", help="test reviews, stratified; or 'all'")
    return parser


def add_training_flags(
    parser: argparse.ArgumentParser, *, epochs: float, learning_rate: float, batch_size: int, micro_batch_size: int
) -> None:
    """The flags of every training script, with that script's defaults."""
    add = parser.add_argument
    add("--epochs", type=positive, default=epochs, help="passes over the training reviews")
    add("--learning-rate", type=positive, default=learning_rate, help="peak, after the warm-up")
    add("--batch-size", type=positive_int, default=batch_size, help="reviews a step, over accumulation")
    add("--micro-batch-size", type=positive_int, default=micro_batch_size, help="reviews in memory at once, at most")
    add("--weight-decay", type=non_negative, default=0.01, help="of AdamW")
    add(
        "--num-processes", type=count_or_auto, default="auto", help="how many work together; auto: one per GPU in sight"
    )
    add("--warmup-fraction", type=fraction, default=0.06, help="share of the steps with a rising learning rate")


def parse(parser: argparse.ArgumentParser, step: str, argv: list[str] | None) -> argparse.Namespace:
    """Parse `argv` with the chosen preset's values for `step` as defaults (also in --help)."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", default="kaggle")
    preset = PRESETS.get(chooser.parse_known_args(argv)[0].preset, {})
    flags = {action.dest for action in parser._actions}
    for key in sorted(preset, key=lambda key: "." in key):  # a step's own value comes last and wins
        owner, _, name = key.rpartition(".")
        if owner in ("", step) and name in flags:
            parser.set_defaults(**{name: preset[key]})
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error("--seed must be at least 0")
    return args


def show(args: argparse.Namespace) -> None:
    """Print the resolved settings, a line each."""
    nothing = {"num_processes": "auto", "batch_tokens": "auto", "max_hours": "unlimited"}
    for name, value in sorted(vars(args).items()):
        print(f"  {name} = {nothing.get(name, 'all') if value is None else json.dumps(value)}")
    sys.stdout.flush()


def next_command(args: argparse.Namespace, script: str) -> str:
    """The command of a later script, with the flags that it must share with this one."""
    usual = {"preset": "kaggle", "dataset": PRESETS[args.preset]["dataset"], "output_dir": "outputs"}
    own = {name: getattr(args, name) for name, value in usual.items() if getattr(args, name) != value}
    return " ".join(["python", script, *(f"--{name.replace('_', '-')} {shlex.quote(v)}" for name, v in own.items())])


def locate(args: argparse.Namespace, name: str) -> str:
    """A model's or dataset's folder or hub name; "demo:roberta" lies in the demo's folder under --output-dir."""
    return str(Path(args.output_dir, "demo", name.removeprefix("demo:"))) if name.startswith("demo:") else name
