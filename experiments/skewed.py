#!/usr/bin/env python
"""What each calibration of 04b costs a teacher on skewed classes, from the committed log-odds of two real LLMs.

Each draw takes validation and unlabelled reviews at the share, and scores the others. There the accuracy at a share is
the weighed mean of both classes' accuracies, so that all of them count.

    python experiments/skewed.py    # writes results/unlabelled/skewed.csv, half a minute
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, verbalizer

RESULTS = Path(__file__).parent.parent / "results"
LLMS = {"untuned": ("distillation", "zero_shot_teacher-42"), "tuned": ("unlabelled", "tuned_teacher-42")}
SHARES, VALIDATION, UNLABELLED, DRAWS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95), (200, 400), 300, 20


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

    def accuracy(name: str) -> float:
        negative, positive = ((log_odds[rows] > made[name].bias).mean() for rows in of_class)
        return (1 - share) * (1 - negative) + share * positive

    none = accuracy("none")
    return {name: accuracy(name) - none for name in made} | {"none": none, "auto": accuracy(best) - none, "takes": best}


def main() -> None:
    rows = []
    for llm, (folder, column) in LLMS.items():
        table = pd.read_parquet(RESULTS / folder / "predictions.parquet").query("split == 'test'").dropna(subset=column)
        log_odds, labels = table[column].to_numpy(float), table["label"].to_numpy()
        for n, share in ((n, share) for n in VALIDATION for share in SHARES):
            draws = pd.DataFrame([one_draw(log_odds, labels, share, n, seed) for seed in range(DRAWS)])
            row = {"llm": llm, "validation": n, "positive": share, "without": draws["none"].mean()}
            for name in ("auto", "batch", "fitted"):
                row |= {name: draws[name].mean(), f"worst {name}": draws[name].min()}
            rows.append(row | {f"took {name}": (draws["takes"] == name).sum() for name in ("none", "batch", "fitted")})
    artifacts.write_table(RESULTS / "unlabelled" / "skewed.csv", pd.DataFrame(rows).round(4))


if __name__ == "__main__":
    main()
