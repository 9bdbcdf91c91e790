"""How a student's cost grows with tokens and with the number of reviews; other_clocks.py writes it."""

import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import classifiers, device, export
from experiments.plan import script

CPU, TURNS, SWEPT = device.Hardware("cpu", "fp32", "CPU"), 2, 200
TOKENS, OF = (64, 128, 256, 512), 100  # tokens; reviews for each of these
NUMBERS, OF_TOKENS = (100, 400, 1600), 128  # reviews; tokens for each of these


def forms(student: Path, target: Path) -> dict[str, Callable[[int], classifiers.Classifier]]:
    """Each form by its name, as a function of the most tokens of a review; `target` is a folder for ONNX's."""
    found = {"eager fp32": partial(classifiers.load_encoder, student, CPU)}
    if not export.missing_for_onnx():
        classifiers.deploy(student, target)
        found["ONNX int8"] = partial(classifiers.load_onnx, target, "int8")
    return found


def chosen_batch(classifier: classifiers.Classifier, texts: list[str]) -> int:
    """Tokens of a batch: the only one that the model may have, or the fastest of 05's sweep."""
    if classifier.batch_tokens:
        return classifier.batch_tokens
    sweep = script("05").sweep_batches(classifier, classifier.encode(texts), CPU)
    return next(row["batch_tokens"] for row in sweep if row["chosen"])


def measure(forms: dict[str, Callable], texts: list[str]) -> pd.DataFrame:
    """Each form's speed by tokens, then by number of reviews: medians of TURNS. `forms` maps a length to a model."""
    batches = {form: chosen_batch(load(TOKENS[-1]), texts[:SWEPT]) for form, load in forms.items()}
    cells, rows = [("tokens", length, OF) for length in TOKENS], []
    cells += [("reviews", OF_TOKENS, number) for number in NUMBERS]
    for turn in range(TURNS):
        for (against, length, number), (form, load) in itertools.product(cells, forms.items()):
            classifier, peak = load(length), device.matrix_peak(CPU)
            classifier.logits(texts[:4])
            started = time.perf_counter()
            ids = classifier.encode(texts[:number])
            encoded = time.perf_counter()
            classifier.score(ids, batches[form])
            ended = time.perf_counter()
            peak = max(peak, device.matrix_peak(CPU)) / 1e9
            work = script("05").rates(classifier.flops, ids, batches[form], ended - started, ended - encoded)
            row = {"against": against, "form": form, "max_length": length, "reviews": len(ids)}
            row["batch_tokens"] = batches[form]
            row |= {"reviews_per_s": len(ids) / (ended - started), "mean_tokens": np.mean(list(map(len, ids)))} | work
            rows.append(row | {"fp32_peak_gflops": peak, "share_of_fp32_peak": work["gflops"] / peak})
        print(f"growth: {turn + 1} of {TURNS} turns", flush=True)
    keys = ["against", "form", "max_length", "reviews"]
    return pd.DataFrame(rows).groupby([*keys, "batch_tokens"], sort=False).median().round(3).reset_index()


def draw(table: pd.DataFrame, file: Path) -> None:
    """Two panels: reviews/s against tokens, and against the number of reviews."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    names = {"tokens": ("max_length", "tokens at most"), "reviews": ("reviews", f"reviews of {OF_TOKENS} tokens")}
    for axes, (against, (column, words)) in zip(figure.subplots(1, 2), names.items()):
        for form, rows in table[table["against"] == against].groupby("form", sort=False):
            axes.semilogx(rows[column], rows["reviews_per_s"], marker="o", label=form)
            axes.set_xticks(rows[column], rows[column].astype(str), minor=False)
        axes.set(xlabel=words, ylabel="reviews/s", ylim=(0, 1.05 * table["reviews_per_s"].max()))
        axes.xaxis.minorticks_off()
        axes.legend()
    figure.savefig(file)
