#!/usr/bin/env python
"""What each calibration of 04b costs a teacher on skewed classes, from the committed log-odds of two real LLMs.

python experiments/skewed.py    # writes results/skewed/skewed.csv, half a minute
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import storage, verbalizer

RESULTS = Path(__file__).parent.parent / "results"
LLMS = {"untuned": ("distillation", "zero_shot_teacher-42"), "tuned": ("unlabelled", "tuned_teacher-42")}
SHARES, VALIDATION, UNLABELLED, DRAWS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95), (200, 400), 300, 20


def read(folder: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """An LLM's log-odds of the test reviews that it has read, and their labels."""
    table = pd.read_parquet(RESULTS / folder / "predictions.parquet").query("split == 'test'").dropna(subset=column)
    return table[column].to_numpy(float), table["label"].to_numpy()


def one_draw(log_odds: np.ndarray, labels: np.ndarray, share: float, n: int, seed: int) -> dict[str, object]:
    """The accuracy without calibration (none), what each other one adds to it, and which one auto takes."""
    rng, parts = np.random.default_rng(seed), []
    of_class = [rng.permutation(np.flatnonzero(labels == label)) for label in (0, 1)]
    for size in (n, UNLABELLED):
        counts = (size - round(size * share), round(size * share))
        parts.append(np.concatenate([rows[:count] for rows, count in zip(of_class, counts)]))
        of_class = [rows[count:] for rows, count in zip(of_class, counts)]
    validation, unlabelled = parts
    made = verbalizer.calibrations(log_odds[validation], labels[validation], log_odds[unlabelled])
    best = verbalizer.best_calibration(made, log_odds[validation], labels[validation], log_odds[unlabelled])
    # All other reviews are scored: the accuracy at the share is the weighed mean of both classes' accuracies.
    verdicts = {name: [(log_odds[rows] > one.bias).mean() for rows in of_class] for name, one in made.items()}
    accuracy = {name: (1 - share) * (1 - wrong) + share * right for name, (wrong, right) in verdicts.items()}
    gains = {name: value - accuracy["none"] for name, value in accuracy.items()}
    return gains | {"none": accuracy["none"], "auto": gains[best], "takes": best}


def main() -> None:
    rows = []
    for llm, (folder, column) in LLMS.items():
        log_odds, labels = read(folder, column)
        for n, share in ((n, share) for n in VALIDATION for share in SHARES):
            draws = pd.DataFrame([one_draw(log_odds, labels, share, n, seed) for seed in range(DRAWS)])
            row = {"llm": llm, "validation": n, "positive": share, "without": draws["none"].mean()}
            for name in ("auto", "batch", "fitted"):
                row |= {name: draws[name].mean(), f"worst {name}": draws[name].min()}
            rows.append(row | {f"took {name}": (draws["takes"] == name).sum() for name in ("none", "batch", "fitted")})
    storage.write_table(RESULTS / "skewed" / "skewed.csv", pd.DataFrame(rows).round(4))


if __name__ == "__main__":
    main()
