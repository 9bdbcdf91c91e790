"""The benchmark's tables and its picture, made from benchmark.csv alone."""

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.artifacts import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

COLUMNS = ["Model", "Type", "Accuracy", "Latency (ms)", "Throughput (samp/s)", "Speedup (x)", "Size (MB)", "Params (M)"]
LONGEST_NAME = 48  # characters in the picture
COLOURS = {"baseline": "tab:gray", "teacher": "tab:blue", "student": "tab:green", "control": "tab:orange"}


def as_markdown(table: pd.DataFrame) -> str:
    """A Markdown table of COLUMNS and n, with the accuracy's interval."""
    shown = table[COLUMNS].copy()
    shown["Accuracy"] = [
        f"{a:.4f} [{lo:.4f}, {hi:.4f}]" for a, lo, hi in zip(table["Accuracy"], table["ci_low"], table["ci_high"])
    ]
    shown["n"] = table["n"]
    return markdown(shown)


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table of any cells, padded so that an editor shows its columns aligned."""
    rows = ([("" if pd.isna(v) else str(v)) for v in row] for row in table.to_numpy(object))
    cells = [list(map(str, table.columns)), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def as_text(table: pd.DataFrame) -> str:
    """The table for a console, at most 100 characters wide, so that a notebook does not wrap it."""
    heads = ("Model", "Type", "Accuracy", "ms", "reviews/s", "x", "MB", "n")
    rows = [heads]
    for _, row in table.iterrows():
        name = str(row["Model"]).partition(" from ")[0].removesuffix(" control")  # the type shows the rest
        if row["status"] != "ok":
            rows.append((name, str(row["Type"]), "failed", *[""] * 5))
            continue
        accuracy = f"{row['Accuracy']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        numbers = ("" if pd.isna(row[column]) else f"{row[column]:,.1f}" for column in COLUMNS[3:7])
        rows.append((name, row["Type"], accuracy, *numbers, f"{row['n']:,.0f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    widths[0] = min(widths[0], 99 - sum(widths[1:]) - len(heads))
    lines = []
    for row in rows:
        left = (cell[:width].ljust(width) for cell, width in zip(row[:3], widths))
        right = (cell.rjust(width) for cell, width in zip(row[3:], widths[3:]))
        lines.append(" ".join([*left, *right]).rstrip())
    return "\n".join(lines)


def pareto_front(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that are more accurate than every faster row, the fastest first."""
    ordered = table.sort_values(["Latency (ms)", "Accuracy"], ascending=[True, False])
    best_before = ordered["Accuracy"].cummax().shift(fill_value=-np.inf)
    return ordered[ordered["Accuracy"] > best_before]


def draw_accuracy_latency(table: pd.DataFrame, file: Path) -> None:
    """Draw accuracy with its 95% interval against the latency of one review, and the Pareto front, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown = table[table["status"] == "ok"]
    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=150, layout="constrained")
    front = pareto_front(shown)
    axes.plot(front["Latency (ms)"], front["Accuracy"], color="lightgray", zorder=0, label="Pareto front")
    for kind, colour in COLOURS.items():
        rows = shown[shown["Type"].str.startswith(kind)]
        bars = [rows["Accuracy"] - rows["ci_low"], rows["ci_high"] - rows["Accuracy"]]
        axes.errorbar(rows["Latency (ms)"], rows["Accuracy"], yerr=bars, fmt="o", capsize=3, color=colour, label=kind)
    axes.set(xscale="log", xlabel="latency of one review, ms (log scale)", ylabel="accuracy, 95% interval")
    axes.margins(x=0.25, y=0.15)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    label_points(axes, shown)
    with whole(file) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def label_points(axes: "Axes", table: pd.DataFrame) -> "list[Bbox]":
    """Write each model's name near its point, where it covers no interval and no other name. Returns pixel boxes."""
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()  # fixes the layout, so that positions in pixels are final
    ends = [axes.transData.transform(table[["Latency (ms)", end]].to_numpy(float)) for end in ("ci_low", "ci_high")]
    taken = [Bbox([low, high]).padded(12) for low, high in zip(*ends)]
    boxes, pixels = [], figure.dpi / 72  # pixels per point
    offsets = itertools.product((10, -10, 30, -30, 60, -60), range(-120, 121, 6))
    offsets = sorted(offsets, key=lambda offset: math.hypot(*offset))
    for _, row in table.sort_values("Accuracy", ascending=False).iterrows():
        spot = (row["Latency (ms)"], row["Accuracy"])
        words = row["Model"] if len(row["Model"]) <= LONGEST_NAME else f"{row['Model'][: LONGEST_NAME - 1]}…"
        name = axes.annotate(
            words, spot, (0, 0), textcoords="offset points", fontsize=7.5, va="center", parse_math=False,
            arrowprops={"arrowstyle": "-", "color": "lightgray", "shrinkB": 5},
        )  # fmt: skip
        width, height = name.get_window_extent().size
        x, y = axes.transData.transform(spot)
        for right, up in offsets:
            left = x + right * pixels - (width if right < 0 else 0)
            box = Bbox.from_bounds(left, y + up * pixels - height / 2, width, height)
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not any(box.overlaps(other) for other in taken):
                break
        name.set(position=(right, up), horizontalalignment="left" if right > 0 else "right")
        taken.append(box.padded(4))
        boxes.append(box)
    return boxes
