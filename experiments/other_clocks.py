#!/usr/bin/env python
"""Do other tools' clocks agree with 05's, and how does a student's cost grow?

All tools read the same student folder and stratified test reviews with the same threads. They take turns, so that other
work on the machine slows all alike. LoadGen is MLPerf's (pip install mlcommons-loadgen) and optional.

    OMP_NUM_THREADS=1 python experiments/other_clocks.py outputs/04a_student_from_roberta/model path/to/imdb

Takes 15 minutes, and writes clocks.csv, growth.csv, growth.png and environment.json.
"""

import argparse
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import artifacts, classifiers, data, device
from experiments import growth
from experiments.plan import script

REVIEWS, ONE_BY_ONE, AT_ONCE = 200, 20, 50  # in all, and those of a turn
TIMES = 2  # that the turns of AT_ONCE are repeated
OURS, PASSES, PIPELINE_BATCH, MAX_LENGTH = "05_benchmark.py", 3, 8, 512
COLUMNS = "workload tool p50_ms p90_ms reviews_per_s ratio lowest highest ratio_p90 reviews turns note".split()


def by_timer(label: Callable, texts: list[str]) -> list[float]:
    """Milliseconds by torch.utils.benchmark: the median of each review, as short ones are repeated more often."""
    import torch
    from torch.utils.benchmark import Timer

    make = partial(Timer, "label([text])", num_threads=torch.get_num_threads())  # its default is one
    blocks = [make(globals={"label": label, "text": text}).blocked_autorange(min_run_time=0.1) for text in texts]
    return [1000 * block.median for block in blocks]


def by_loadgen(scenario: str, label: Callable, texts: list[str]) -> list[float]:
    """Milliseconds of each review by LoadGen's own clock; it issues each once."""
    import mlperf_loadgen as loadgen

    def answer(queries: list) -> None:
        label([texts[query.index] for query in queries])
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(query.id, 0, 0) for query in queries])

    test, log, output = loadgen.TestSettings(), loadgen.LogSettings(), loadgen.LogOutputSettings()
    test.scenario, test.mode = getattr(loadgen.TestScenario, scenario), loadgen.TestMode.PerformanceOnly
    test.min_query_count = test.max_query_count = n = len(texts)
    test.min_duration_ms, test.performance_issue_unique = 0, scenario == "SingleStream"
    with tempfile.TemporaryDirectory() as folder:
        output.outdir, log.log_output, log.enable_trace = folder, output, True
        tested, reviews = loadgen.ConstructSUT(answer, bool), loadgen.ConstructQSL(n, n, bool, bool)
        loadgen.StartTestWithLogSettings(tested, reviews, test, log)
        trace = Path(folder, "mlperf_log_trace.json").read_text()
    times = [(int(end) - int(start)) / 1e6 for start, end in re.findall(r'_start_ns":(\d+),"complete_ns":(\d+)', trace)]
    assert len(times) == n
    return times


def rate(label: Callable, texts: list[str]) -> float:
    started = time.perf_counter()
    label(texts)
    return len(texts) / (time.perf_counter() - started)


def compare(workload: str, figures: list[str], tools: dict[str, Callable], turns: list[list[str]]) -> pd.DataFrame:
    """A row a tool: medians over the turns of its figures, and of their ratios to 05's of the same turn."""
    present = importlib.util.find_spec("mlperf_loadgen") is not None
    found = {name: [] for name in tools if present or not name.startswith("LoadGen")}
    for turn, texts in enumerate(turns):
        for name in np.roll(list(found), -turn):
            measured = tools[name](texts)
            found[name].append(np.percentile(measured, [50, 90]) if len(figures) == 2 else [measured])
        print(f"{workload}: {turn + 1} of {len(turns)} turns", flush=True)
    rows = []
    for name in tools:
        row = {"workload": workload, "tool": name, "note": "absent: mlcommons-loadgen is not installed"}
        if name in found:
            ratios = np.array(found[name]) / np.array(found[OURS])
            row |= dict(zip(figures, np.median(found[name], axis=0).round(2)))
            row |= dict(zip(["ratio", "ratio_p90"], np.median(ratios, axis=0).round(3)))
            row |= {"lowest": ratios[:, 0].min().round(3), "highest": ratios[:, 0].max().round(3)}
            row |= {"reviews": len({text for texts in turns for text in texts}), "turns": len(turns), "note": ""}
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def clocks(student: str, classifier: classifiers.Classifier, texts: list[str]) -> pd.DataFrame:
    """Both workloads, one by one and all at once."""
    from transformers import pipeline

    batch_tokens, five = growth.chosen_batch(classifier, texts[:REVIEWS]), script("05")
    pipe = pipeline("text-classification", model=student, dtype="float32", device="cpu")
    label = lambda texts: classifier.logits(texts, batch_tokens).argmax(axis=1)  # noqa: E731
    in_batches = partial(pipe, batch_size=PIPELINE_BATCH, truncation=True)
    one_pass = lambda texts: five.time_one_by_one(classifier, texts, growth.CPU, seconds=0)[0].ravel()  # noqa: E731
    single_stream = partial(by_loadgen, "SingleStream", label)
    one_by_one = {
        OURS: lambda texts: np.concatenate([one_pass(texts) for _ in range(PASSES)]),
        "torch.utils.benchmark": partial(by_timer, label),
        "LoadGen SingleStream": lambda texts: sum((single_stream(texts) for _ in range(PASSES)), []),
        "pipeline": partial(by_timer, partial(pipe, truncation=True)),
    }
    at_once = {
        OURS: partial(rate, label),
        "LoadGen Offline": lambda texts: 1000 * len(texts) / max(by_loadgen("Offline", label, texts)),
        "pipeline, sorted by length": lambda texts: rate(in_batches, sorted(texts, key=len, reverse=True)),
        "pipeline, in the given order": partial(rate, in_batches),
    }
    singles, bulks = ([texts[at : at + n] for at in range(0, REVIEWS, n)] for n in (ONE_BY_ONE, AT_ONCE))
    latency = compare("one by one", ["p50_ms", "p90_ms"], one_by_one, singles)
    return pd.concat([latency, compare("all at once", ["reviews_per_s"], at_once, TIMES * bulks)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="folder of a student")
    parser.add_argument("dataset", help="folder of the reviews")
    parser.add_argument("--out", type=Path, default="results/benchmark", help="folder of the tables")
    args = parser.parse_args(argv, argparse.Namespace(seed=42, max_test_samples=None))
    started, load, made = time.time(), os.getloadavg()[0], artifacts.made_with()
    test = data.load_reviews(args, reads=("test",)).test
    texts = test["text"].iloc[data.stratified_order(test["label"], args.seed)].tolist()
    with tempfile.TemporaryDirectory() as onnx:
        forms = growth.forms(Path(args.student), Path(onnx, "form"))
        table = clocks(args.student, forms["eager fp32"](MAX_LENGTH), texts)
        artifacts.write_table(args.out / "clocks.csv", table.assign(commit=made["git_commit"]))
        table = growth.measure(forms, texts)
    artifacts.write_table(args.out / "growth.csv", table.assign(commit=made["git_commit"]))
    growth.draw(table, args.out / "growth.png")
    optional = {"onnxruntime": "onnxruntime", "mlperf_loadgen": "mlcommons-loadgen"}
    made["versions"] |= {name: version(name) for module, name in optional.items() if importlib.util.find_spec(module)}
    facts = device.environment(growth.CPU) | made | {"load_average": [load, os.getloadavg()[0]]}
    command = f"OMP_NUM_THREADS={facts['torch_threads']} python experiments/other_clocks.py STUDENT IMDB"
    facts |= {"command": command, "minutes": round((time.time() - started) / 60, 1)}
    artifacts.write_json(args.out / "environment.json", facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
