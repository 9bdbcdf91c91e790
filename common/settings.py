"""The flags that scripts share, the presets, and the exit after a user error. Standard library only."""

import argparse
import json
import math
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

T = TypeVar("T")
# Precedence: shared default < script default < preset < explicit flag. "02_roberta.epochs" applies to that step only.
PRESETS: dict[str, dict[str, object]] = {
    "kaggle": {
        "dataset": "stanfordnlp/imdb",
        "roberta_model": "FacebookAI/roberta-large",
        "student_model": "distilbert/distilbert-base-uncased",
        "03_mistral.mistral_model": "mistralai/Mistral-7B-v0.1",
    },
    "demo": {
        "dataset": "outputs/demo/reviews",
        "roberta_model": "outputs/demo/demo-roberta",
        "student_model": "outputs/demo/demo-distilbert",
        "validation_samples": 300,
        "max_length": 128,
        "weight_decay": 0.0,
        "02_roberta.epochs": 4,
        "02_roberta.learning_rate": 3e-4,
        "02_roberta.batch_size": 16,
        "02_roberta.micro_batch_size": 16,
        "02_roberta.student_layers": 2,
        "03_mistral.mistral_model": "outputs/demo/demo-mistral",
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
        "05_benchmark.latency_seconds": 10,
        "05_benchmark.form_samples": 500,
    },
}

# How a review set is read. The fingerprints of the reviews say what came of it.
READING = ("text_column", "label_column", "negative_labels", "positive_labels")
# These decide how or where a result is computed, not which one is asked for: a finished step stays finished. The names
# of files are among them, because inputs hold fingerprints of their contents.
NOT_COMPARED = {
    "preset", "output_dir", "force", "precision", "num_processes", "micro_batch_size", "batch_tokens",
    "gradient_checkpointing", "max_hours", "dataset", "teacher_scores", *READING,
}  # fmt: skip
BATCH_TOKENS_HELP = "padded tokens per scoring batch; auto: 8192 on a GPU, 2048 on a CPU"
_defaults: dict[str, object] = {}  # of the last `parse`, with the preset's values
_typed: dict[str, object] = {}  # what the last `parse` found that differs from them


class Stop(SystemExit):
    """A user error; its text is the message, and the exit code is 2, like argparse's."""

    def __init__(self, message: str):
        super().__init__(message)
        self.code = 2


def stop(message: str) -> NoReturn:
    """Print a user error and its remedy in one sentence, and exit with code 2.

    If all processes fail alike, only rank 0 prints. One that fails alone prints after 30 seconds.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(30)  # long enough, on a busy machine too, for the end of rank 0 to end this process
    print(f"error: {message}", file=sys.stderr)
    raise Stop(message)


def short(name: str) -> str:
    """The last part of a hub name or folder."""
    return name.rstrip("/").split("/")[-1]


def _number(kind: type, accepts: Callable[[float], bool], wrong: str) -> Callable[[str], float]:
    """An argparse type: a number that `accepts` allows; the error about another one ends in `wrong`."""

    def convert(text: str) -> float:
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text} {wrong}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"  # argparse names the type in its error
    return convert


positive_int = _number(int, lambda value: value >= 1, "is not at least 1")
non_negative = _number(float, lambda value: 0 <= value < math.inf, "is not a number of at least 0")
positive = _number(float, lambda value: 0 < value < math.inf, "is not a number above 0")
fraction = _number(float, lambda value: 0 <= value <= 1, "is not a number from 0 to 1")


def _or_word(kind: Callable[[str], T], noun: str, word: str) -> Callable[[str], T | None]:
    """An argparse type: `word` is None, and any other text is of this `kind`."""

    def convert(text: str) -> T | None:
        return None if text == word else kind(text)

    convert.__name__ = f"{noun} or '{word}'"  # argparse names the type in its error
    return convert


samples = _or_word(positive_int, "number", "all")
count_or_auto = _or_word(positive_int, "number", "auto")
hours = _or_word(positive, "number of hours", "unlimited")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as written, and the default of each flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser(description: str | None, reads: tuple[str, ...], precision: bool = True) -> argparse.ArgumentParser:
    """A parser with the shared flags; `reads` names the splits (train, transfer, test) that the script reads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help, allow_abbrev=False)
    add, precisions = parser.add_argument, ("auto", "fp32", "bf16", "fp16")
    add("--preset", choices=sorted(PRESETS), default="kaggle", help="table of defaults")
    forms = "file or folder of reviews: train, test, and if there are some validation and unsupervised files, or one "
    forms += "file without a split (CSV, TSV, JSON, JSON lines, parquet, Excel, also .gz and .zip; pos/ and neg/ "
    forms += "folders; save_to_disk); or hub name, as OWNER/NAME or OWNER/NAME:CONFIGURATION"
    add("--dataset", help=forms)
    add("--text-column", help="column of the texts; default: text, review, sentence or another common name")
    add("--label-column", help="column of the labels; default: label, sentiment or another common name")
    meaning = "labels that mean {}, where it is not clear; reviews with other labels are left out"
    for name in ("negative", "positive"):
        add(f"--{name}-labels", nargs="+", metavar="LABEL", help=meaning.format(name))
    add("--output-dir", default="outputs", help="folder that every step reads and writes")
    add("--seed", type=int, default=42, help="seed of splits, subsets, new heads and the order of training")
    if precision:
        add("--precision", choices=precisions, default="auto", help="arithmetic; auto: bf16, on T4s fp16, on CPUs fp32")
    limit = "time limit in hours; the same command then continues" if precision else "without effect: it takes minutes"
    add("--max-hours", type=hours, default="unlimited", help=limit)
    add("--force", action=argparse.BooleanOptionalAction, default=False, help="make this step again beside its results")
    if "train" in reads:
        validation = "reviews that choose checkpoints, 16 to 2,500; auto: the validation file, or a tenth of train"
        add("--validation-samples", type=count_or_auto, default="auto", help=validation)
        add("--max-train-samples", type=samples, default="all", help="number of labelled reviews, stratified; or 'all'")
    if "transfer" in reads:
        add("--max-transfer-samples", type=samples, default="all", help="number of unlabelled reviews; or 'all'")
    if "test" in reads:
        add("--max-test-samples", type=samples, default="all", help="number of test reviews, stratified; or 'all'")
    return parser


def add_training_flags(
    parser: argparse.ArgumentParser, *, epochs: float, learning_rate: float, batch_size: int, micro_batch_size: int
) -> None:
    """Add the flags of every training script, with that script's defaults."""
    add = parser.add_argument
    add("--epochs", type=positive, default=epochs, help="passes over the training reviews")
    add("--learning-rate", type=positive, default=learning_rate, help="peak learning rate, after the warm-up")
    add("--batch-size", type=positive_int, default=batch_size, help="reviews per optimizer step, on all processes")
    add("--micro-batch-size", type=positive_int, default=micro_batch_size, help="most reviews in memory at once")
    add("--weight-decay", type=non_negative, default=0.01, help="AdamW's weight decay")
    add("--num-processes", type=count_or_auto, default="auto", help="number of processes; auto: one per GPU in sight")
    add("--warmup-fraction", type=fraction, default=0.06, help="share of the steps in which the learning rate rises")


def add_student_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that 04a and 04b share: the student, its training, and how it learns from soft labels."""
    add = parser.add_argument
    add("--student-model", help="hub name or folder of the encoder that becomes the student")
    add("--max-length", type=positive_int, default=512, help="tokens of a review, head and tail kept")
    add_training_flags(parser, epochs=4, learning_rate=5e-5, batch_size=32, micro_batch_size=32)
    soft_labels = "reviews with a soft-label term; transfer: labelled reviews learn from their gold label alone, by a "
    soft_labels += "loss with one term per review; without a transfer set this means all"
    add("--soft-labels", choices=("all", "transfer"), default="all", help=soft_labels)
    alpha = "weight of the soft labels where a review has both terms; 1 - alpha is cross-entropy's"
    add("--alpha", type=fraction, default=0.9, help=alpha)
    add("--temperature", type=positive, default=2.0, help="temperature of both softmaxes in the KL term")


def reviews_with_soft_labels(args: argparse.Namespace, unlabelled: int) -> str:
    """--soft-labels: "all", or "transfer" if there are `unlabelled` reviews."""
    return args.soft_labels if unlabelled else "all"


def refuse_no_teacher(args: argparse.Namespace, unlabelled: int) -> None:
    """Stop when no term of a student's loss reads the teacher: that is 04a's control."""
    one_term = reviews_with_soft_labels(args, unlabelled) == "transfer"
    if not one_term and args.alpha == 0 and not getattr(args, "feature_weight", 0):
        stop("with --alpha 0 the loss uses no teacher, which only 04a's control does: raise --alpha")


def parse(parser: argparse.ArgumentParser, step: str, argv: list[str] | None) -> argparse.Namespace:
    """Parse `argv`; the chosen preset's values for `step` are the defaults, in --help too."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", default="kaggle")
    preset = PRESETS.get(chooser.parse_known_args(argv)[0].preset, {})
    flags = {action.dest for action in parser._actions}
    for key in sorted(preset, key=lambda key: "." in key):  # a value for one step comes last and wins
        owner, _, name = key.rpartition(".")
        if owner in ("", step) and name in flags:
            parser.set_defaults(**{name: preset[key]})
    _defaults.clear()
    _defaults.update(vars(parser.parse_args([])))
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error("--seed must be at least 0")
    if "negative_labels" in args and (args.negative_labels is None) != (args.positive_labels is None):
        parser.error("--negative-labels and --positive-labels belong together: pass both")
    _typed.clear()
    _typed.update({name: value for name, value in vars(args).items() if value != _defaults.get(name)})
    return args


def default_of(name: str, otherwise: object) -> object:
    """The default of a flag of this script, or `otherwise` if it has no such flag."""
    return _defaults.get(name, otherwise)


def in_words(name: str, value: object) -> object:
    """A flag's value for printing; None is a word."""
    if value is not None:
        return value
    none = ("price_per_hour", "teacher_scores", "teacher_name", "negative_labels", "positive_labels")
    words = {"max_hours": "unlimited"} | dict.fromkeys(none, "none")
    return words.get(name, "all" if name.startswith("max_") else "auto")


def start(args: argparse.Namespace, script: str) -> None:
    """Print the script's name and its settings; those that differ from the defaults come first."""
    changed, unchanged = [], []
    for name, value in sorted(vars(args).items()):
        line = f"{name} = {in_words(name, None) if value is None else json.dumps(value, ensure_ascii=False)}"
        (unchanged if _defaults.get(name) == value else changed).append(line)
    defaults = textwrap.fill(", ".join(unchanged), 98, initial_indent="  ", subsequent_indent="  ")
    print(f"{Path(script).name} with", *changed, sep="\n  ")
    print("and the defaults", defaults, sep="\n", flush=True)
    for name, value in PRESETS["demo"].items():
        if vars(args).get(name) == value and str(value).startswith("outputs/demo/") and not Path(value).exists():
            stop(f"{value}/ is missing: run python demo/make.py first")


def next_command(script: str, *more: str) -> str:
    """The command of a later script, with those flags of this one that both must share; `more` names further ones."""
    names = ["preset", "dataset", *READING, "output_dir", "seed", *more]
    if not script.startswith("05"):
        names.append("validation_samples")
    words = ["python", script]
    for name in (name for name in names if name in _typed):
        value = in_words(name, _typed[name])
        words += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join(words)
