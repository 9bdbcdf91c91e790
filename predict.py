#!/usr/bin/env python
"""Label a file of reviews with a saved model: a student, the control, or the encoder that taught them.

The model reads a long review as in training, a quarter from its head and the rest from its tail. Probabilities are
calibrated by the temperature that was fitted on validation. With --escalate, a second model reads the reviews of which
the first one is unsure.

Reads   a model folder, and a file of reviews: CSV, TSV, JSON, parquet or Excel, with a column text or review
Writes  a CSV with a row per review, in the file's order: row, label, p_positive, model, and the cleaned text

    python predict.py outputs/04a_student_from_roberta/model reviews.csv
    python predict.py outputs/04a_student_from_roberta/model reviews.csv --escalate outputs/02_roberta/model
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from common import artifacts, classifiers, data, device, files, metrics, models, settings, storage

UNSURE = (0.1, 0.9)  # probabilities between which a review is escalated
CHUNK = 4000  # reviews in memory at once
Judge = Callable[[list[str]], np.ndarray]  # the calibrated probability that each review is positive


def load(folder: str, hardware: device.Hardware) -> Judge:
    """A model of 02, 04a or 04b; stops at any other one."""
    from scipy.special import expit

    if not Path(folder).is_dir():
        settings.stop(f"{folder} is no folder: pass one that 02, 04a or 04b has written")
    if (Path(folder) / "onnx").is_dir():
        settings.stop(f"{folder} holds an ONNX form, which this script does not read: pass the student's own folder")
    # A base checkpoint would get a new head and guess; another model may number its labels the other way round.
    temperature = getattr(models.load_config(folder), "calibration_temperature", None)
    if temperature is None:
        settings.stop(f"{folder} is no model of 02, 04a or 04b (its config.json has no calibration_temperature)")
    artifacts.verify(Path(folder))
    model = classifiers.encoder_classifier(Path(folder), hardware)
    return lambda texts: expit(metrics.log_odds(model.logits(texts)) / temperature)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model_folder", help="a folder that 02, 04a or 04b has written, such as .../04a_student_from_roberta/model")
    add("file", type=Path, help="file of reviews")
    add("--text-column", help="column of the texts (default: text, review, sentence or another common name)")
    add("--output", type=Path, help="CSV to write (default: FILE_labels.csv beside the file)")
    add("--escalate", metavar="MODEL_FOLDER", help="model that reads the reviews of which the first one is unsure")
    unsure = f"probabilities between which a review is escalated (default: {UNSURE[0]} {UNSURE[1]})"
    add("--unsure", nargs=2, type=settings.fraction, metavar=("LOW", "HIGH"), help=unsure)
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="arithmetic (default: auto)")
    add("--force", action="store_true", help="replace an existing output file")
    args = parser.parse_args(argv)
    if args.unsure and not args.escalate:
        parser.error("--unsure says which reviews go to the model of --escalate: pass both")
    return args


def label(table: pd.DataFrame, student: Judge, teacher: Judge | None, unsure: tuple[float, float]) -> pd.DataFrame:
    """The rows of `table` with label, p_positive and the model that decided. An empty text gets none."""
    columns, read = ["row", "label", "p_positive", "model", "text"], table[table["text"] != ""].copy()
    if not len(read):
        return table.reindex(columns=columns)
    read["p_positive"], read["model"] = student(read["text"].tolist()), "student"
    doubtful = read["p_positive"].between(*sorted(unsure))
    if teacher and doubtful.any():
        read.loc[doubtful, "p_positive"] = teacher(read.loc[doubtful, "text"].tolist())
        read.loc[doubtful, "model"] = "teacher"
    read["label"] = np.where(read["p_positive"] > 0.5, *reversed(data.LABELS))
    read["p_positive"] = read["p_positive"].round(4)
    return table.join(read[["label", "p_positive", "model"]])[columns]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.file.exists():
        settings.stop(f"{args.file} does not exist: check the path")
    unpacked = args.file.with_suffix("") if args.file.suffix.lower() in files.PACKED else args.file
    output = args.output or args.file.with_name(f"{unpacked.stem}_labels.csv")
    if output.is_dir() or output.suffix.lower() != ".csv":
        settings.stop(f"{output} is no name of a CSV: pass --output one that ends in .csv")
    if output.exists() and output.samefile(args.file):
        settings.stop(f"{output} is the file of the reviews: pass another --output")
    if output.exists() and not args.force:
        settings.stop(f"{output} exists: pass another --output, or --force")
    # Stops before a model is loaded if the file cannot be read.
    chunks = data.read_in_chunks(args.file, CHUNK, args.text_column)
    first = next(chunks, None)  # of a parquet file without rows there is none
    if first is None or not len(first):
        settings.stop(f"{args.file} holds no reviews")
    hardware = device.detect(args)
    student = load(args.model_folder, hardware)
    teacher = load(args.escalate, hardware) if args.escalate else None
    started, done, counts = time.monotonic(), 0, pd.Series(dtype=int)
    with storage.whole(output) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        for number, table in enumerate(itertools.chain([first], chunks)):
            labelled = label(table, student, teacher, args.unsure or UNSURE)
            labelled.to_csv(file, header=number == 0, index=False)
            done += len(labelled)
            counts = counts.add(labelled["label"].value_counts(), fill_value=0)
            print(f"{done:,} reviews, {done / (time.monotonic() - started):.1f}/s", file=sys.stderr, flush=True)
    words = ", ".join(f"{int(count):,} {name}" for name, count in counts.items())
    print(f"{output}: {words}")


if __name__ == "__main__":
    main()
