"""The pictures of 05: a PNG for a README, and inline SVGs for report.html. They need the files of 05 alone."""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.storage import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

LONGEST_NAME = 48  # characters in the picture
COLOURS = {
    "baseline": "tab:gray",
    "teacher": "tab:blue",
    "student": "tab:green",
    "control": "tab:orange",
    "form": "tab:purple",
    "cascade": "tab:red",
}
INK = "#010203"  # stands for the page's own colour of text
SVG = {"font.size": 10, "legend.fontsize": 9, "svg.fonttype": "none", "text.parse_math": False} | dict.fromkeys(
    ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK
)
FEW = 20  # reviews in a bin of the reliability curve, below which it is left out


def pareto_front(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that are more accurate than every faster row, the fastest first."""
    ordered = table.sort_values(["Latency (ms)", "Accuracy"], ascending=[True, False])
    best_before = ordered["Accuracy"].cummax().shift(fill_value=-np.inf)
    return ordered[ordered["Accuracy"] > best_before]


def short_name(row: pd.Series) -> str:
    """A row's name in a picture. A form and a cascade drop the student's own name, a long one its middle."""
    name = str(row["Model"])
    if row["Type"].startswith(("form", "cascade")) and " from " in name:
        name = "from " + name.partition(" from ")[2]
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME // 2]}…{name[1 - LONGEST_NAME // 2 :]}"


def wrap(name: str, width: int) -> str:
    """A name in lines of at most `width` characters, cut at hyphens only if a word is longer."""
    return textwrap.fill(name, width, break_on_hyphens=any(len(word) > width for word in name.split()))


def draw_accuracy_latency(table: pd.DataFrame, file: Path) -> None:
    """Draw accuracy with its 95% interval against the latency of one review, and the Pareto front, as a PNG."""
    from matplotlib.figure import Figure

    shown = table[table["status"] == "ok"]
    figure = Figure(figsize=(8, 4.8 if len(shown) <= 9 else 7), dpi=150, layout="constrained")
    accuracy_latency(figure, shown, [short_name(row) for _, row in shown.iterrows()], 7.5)
    with whole(file) as temporary:
        figure.savefig(temporary, format="png")


def accuracy_latency(figure: "Figure", table: pd.DataFrame, names: list[str], fontsize: float) -> None:
    """Accuracy against latency. The front leaves out rows that read fewer reviews, and controls. Forms are hollow."""
    axes = figure.subplots()
    # A control is its student's network: noise alone decides which of the two is faster.
    front = pareto_front(table[(table["n"] == table["n"].max()) & ~table["Type"].str.startswith("control")])
    axes.plot(front["Latency (ms)"], front["Accuracy"], color="gray", alpha=0.5, zorder=0, label="Pareto front")
    for kind, colour in COLOURS.items():
        rows = table[table["Type"].str.startswith(kind)]
        bars = [rows["Accuracy"] - rows["ci_low"], rows["ci_high"] - rows["Accuracy"]]
        fill = "none" if kind == "form" else colour
        if len(rows):
            look = {"fmt": "o", "mfc": fill, "capsize": 3, "color": colour, "label": kind}
            axes.errorbar(rows["Latency (ms)"], rows["Accuracy"], yerr=bars, **look)
    axes.set(xlabel="latency of one review, ms (log scale)", ylabel="accuracy, 95% interval", xscale="log")
    axes.margins(x=0.25, y=0.15)
    axes.grid(alpha=0.3)
    plain_log(axes.xaxis)
    figure.legend(loc="outside upper center", ncols=4 if fontsize > 8 else 7, fontsize=max(8, fontsize), frameon=False)
    label_points(axes, table, names, fontsize)


def label_points(axes: "Axes", table: pd.DataFrame, names: list[str], fontsize: float) -> "list[Bbox]":
    """Write each row's name near its point, where it covers no interval and no other name. Returns pixel boxes."""
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()  # fixes the layout, so that positions in pixels are final
    ends = [axes.transData.transform(table[["Latency (ms)", end]].to_numpy(float)) for end in ("ci_low", "ci_high")]
    boxes, pixels = [], figure.dpi / 72  # pixels per point
    taken = [Bbox([low, high]).padded(6 * pixels) for low, high in zip(*ends)]
    offsets = itertools.product((10, -10, 30, -30, 60, -60), range(-120, 121, 6))
    offsets = sorted(offsets, key=lambda offset: math.hypot(*offset))
    for (_, row), words in sorted(zip(table.iterrows(), names), key=lambda pair: -pair[0][1]["Accuracy"]):
        spot = (row["Latency (ms)"], row["Accuracy"])
        name = axes.annotate(
            words, spot, (0, 0), textcoords="offset points", fontsize=fontsize, va="center", parse_math=False,
            arrowprops={"arrowstyle": "-", "color": "gray", "alpha": 0.5, "shrinkB": 5},
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
        taken.append(box.padded(2 * pixels))
        boxes.append(box)
    return boxes


def plain_log(axis: "Axis") -> None:
    """Write 1, 10, 100 on a log axis, and 2 and 5 between them where there is room."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())


def latencies(figure: "Figure", table: pd.DataFrame, rows: pd.DataFrame) -> None:
    """One bar per model over its reviews' milliseconds: 1% to 99%, 25% to 75%, and the median."""
    shares = rows.groupby("Model")["ms"].quantile([0.01, 0.25, 0.5, 0.75, 0.99]).unstack()
    table = table[table["Model"].isin(shares.index)]
    shares, colours, heights = shares.loc[table["Model"]], table["colour"], range(len(table))
    figure.set_figheight(1 + 0.42 * len(table))
    axes = figure.subplots()
    axes.hlines(heights, shares[0.01], shares[0.99], colours)
    axes.hlines(heights, shares[0.25], shares[0.75], colours, linewidth=8, alpha=0.6)
    axes.plot(shares[0.5], heights, "|", color=INK, markersize=10)
    axes.set_yticks(heights, [wrap(short_name(row), 24) for _, row in table.iterrows()], fontsize=9)
    axes.set(xscale="log", xlabel="ms a review (log scale)", ylim=(len(table) - 0.4, -0.6))
    plain_log(axes.xaxis)
    axes.grid(alpha=0.3, axis="x")


def sweep(figure: "Figure", table: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Reviews a second against tokens a batch. A ring marks the size that was chosen."""
    figure.set_figheight(3.4 + 0.2 * rows["Model"].nunique())
    axes = figure.subplots()
    for number, (name, part) in enumerate(rows.sort_values("batch_tokens", kind="stable").groupby("Model", sort=False)):
        look = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
        axes.plot(part["batch_tokens"], part["reviews_per_s"], "o", ms=3, label=wrap(name, 60), **look)
        best = part[part["chosen"].astype(bool)]
        axes.plot(best["batch_tokens"], best["reviews_per_s"], "o", ms=9, mfc="none", color=look["color"])
    axes.set(xscale="log", yscale="log", xlabel="tokens a batch (log scale)", ylabel="reviews/s (log scale)")
    for axis in (axes.xaxis, axes.yaxis):
        plain_log(axis)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower left", frameon=False)


def reliability(figure: "Figure", table: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Share of positive reviews against p(positive) in 15 equal-width bins, one panel per model."""
    names, colours = table.loc[table["has_curve"], "Model"], table.set_index("Model")["colour"]
    figure.set_figheight(0.6 + 2.1 * math.ceil(len(names) / 3))
    panels = figure.subplots(math.ceil(len(names) / 3), 3, sharex=True, sharey=True, squeeze=False).flat
    for panel, name in itertools.zip_longest(panels, names):
        if name is None:
            panel.set_axis_off()
            continue
        read = rows[rows[name].notna()]
        p = 1 / (1 + np.exp(-read[name].clip(-80, 80)))
        bins = pd.DataFrame({"p": p, "label": read["label"]}).groupby((p * 15).astype(int).clip(upper=14))
        means = bins.mean()[bins.size() >= FEW]
        panel.plot([0, 1], [0, 1], color="gray", alpha=0.5)
        panel.plot(means["p"], means["label"], "o-", ms=3, color=colours[name])
        panel.tick_params(labelbottom=True)
        panel.set_title(wrap(name, 22), fontsize=9)
        panel.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], aspect="equal")
    figure.supxlabel("p(positive)")
    figure.supylabel("share that is positive")


def cascade(figure: "Figure", table: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Test accuracy against mean ms a review, as the student hands on more reviews. A ring marks the chosen share."""
    axes = figure.subplots()
    for number, (name, part) in enumerate(rows.sort_values("ms", kind="stable").groupby("Model", sort=False)):
        colour = f"C{number}"
        axes.plot(part["ms"], part["test_accuracy"], "o-", ms=3, color=colour, label=wrap(name, 60))
        best = part[part["chosen"].astype(bool)]
        axes.plot(best["ms"], best["test_accuracy"], "o", color=colour, mfc="none", ms=11)
    for line, (_, row) in zip(("--", ":", "-."), table[table["Type"].str.startswith("teacher")].iterrows()):
        axes.axhline(row["Accuracy"], color=INK, alpha=0.6, linestyle=line, label=f"{row['Model']} alone")
    axes.set(xscale="log", xlabel="mean ms a review (log scale)", ylabel="test accuracy")
    plain_log(axes.xaxis)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower left", frameon=False)


def as_svg(name: str, alt: str, draw: "Callable[[Figure], None]") -> str:
    """The SVG of what `draw` draws, to stand inside a page: the same bytes each time, and ids that no other one has."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(SVG | {"svg.hashsalt": name}):
        figure = Figure(figsize=(5, 5), layout="constrained")
        draw(figure)
        unnamed = dict.fromkeys(["Creator", "Date", "Format", "Type"])  # no version and no clock
        figure.savefig(buffer, format="svg", transparent=True, metadata=unnamed)
    svg = buffer.getvalue().partition("<svg ")[2].replace(INK, "currentColor")
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return f'<svg role="img" aria-label="{escape(alt)}" {svg}'


def all_figures(table: pd.DataFrame, files: dict[str, pd.DataFrame]) -> str:
    """The report's pictures with their captions, as HTML. A picture whose file is missing, so empty, is left out."""
    shown = table.assign(number=range(1, len(table) + 1))[table["status"] == "ok"]
    # A form has no reliability curve: it would repeat its student's.
    has_curve = shown["Model"].isin(list(files["predictions"])) & ~shown["Type"].str.startswith("form")
    shown = shown.assign(colour=shown["Type"].str.split(",").str[0].map(COLOURS).fillna(INK), has_curve=has_curve)
    named = "; ".join(f"{row['number']}. {short_name(row)}" for _, row in shown.iterrows())

    def numbered(figure: "Figure", table: pd.DataFrame, rows: pd.DataFrame) -> None:  # names need a wider screen
        accuracy_latency(figure, table, rows["number"].astype(str).tolist(), 10)

    captions = {
        "Accuracy against latency": (numbered, shown, "The line joins the rows that are more accurate than every "
            "faster one, of those that read all reviews, without controls. Forms are hollow. Each time is of the row's "
            f"own device; a cascade's is a mean. {named}."),
        "Latency of single reviews": (latencies, files["latency"], "The thin line holds 98% of the times, the thick "
            "one half of them, and the mark is the median."),
        "Throughput against batch size": (sweep, files["sweep"], "The ring marks the size that was chosen."),
        "Reliability": (reliability, files["predictions"], "On the grey line, 70% of the reviews with p = 0.7 are "
            f"positive. Bins with fewer than {FEW} reviews are left out."),
        "Cascade": (cascade, files["cascade"], "The student reads all reviews and hands the least certain ones on. The "
            "ring marks the rule above."),
    }  # fmt: skip
    drawn = []
    for title, (draw, rows, caption) in captions.items():
        rows = rows[rows["Model"].isin(shown["Model"])] if "Model" in rows else rows
        if not len(rows) or (draw is reliability and not shown["has_curve"].any()):
            continue
        svg = as_svg(f"picture{len(drawn) + 1}", title, partial(draw, table=shown, rows=rows))
        drawn.append(f"<figure><h3>{title}</h3>{svg}<figcaption>{escape(caption)}</figcaption></figure>")
    return "\n".join(drawn)
