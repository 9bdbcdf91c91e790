#!/usr/bin/env python
"""05: one table of all models in outputs/ with accuracy, latency, throughput and size.

Latency is the median time of one review, from text to label (MLPerf's SingleStream). Throughput is the rate of all
reviews at once, from texts to labels (MLPerf's Offline). Each model warms up first, and the clock waits for the GPU.
Parameters and bytes of weights are counted. Every model reads the same test reviews, but the LLM only a stratified part
of them. Memory is freed between models.

Reads   the test reviews and the finished folders of steps 01 to 04b, any subset of them
Writes  outputs/05_benchmark/  benchmark.csv  benchmark.md  accuracy_latency.png  predictions.parquet
        environment.json  run.json
Takes   on one T4: planned 18 to 23 minutes (results/gpu/plan.csv), not measured yet

    python 05_benchmark.py
    python 05_benchmark.py --max-test-samples 2000 --max-llm-samples 500 --force
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from common import artifacts, data, device, memory, metrics, models, report, scoring, settings, verbalizer

STEP = "05_benchmark"
WARM_UP_REVIEWS = 16
TEACHER, CONTROL = "teacher, fine-tuned", "control, no teacher"
STUDENTS = {"04a_student_from_roberta": "student, white-box", "04b_student_from_mistral": "student, black-box"}
UNCALIBRATED = {"calibration": "none (no 04b)", "bias": 0.0, "calibration_temperature": 1.0}


@dataclass
class Loaded:
    """A model ready to read texts."""

    logits: Callable[[list[str]], np.ndarray]  # texts to (n, 2)
    parameters: int
    weight_bytes: int
    facts: dict = field(default_factory=dict)  # more columns of its row: precision, max_length, calibration


@dataclass
class Contender:
    """A row of the table before it is measured."""

    name: str
    kind: str
    load: Callable[[], Loaded]
    is_llm: bool = False


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = settings.make_parser(__doc__, reads=("test",))
    add = parser.add_argument
    add("--max-llm-samples", type=settings.positive_int, default=1000, help="test reviews for the LLM, stratified")
    add("--latency-samples", type=settings.positive_int, default=100, help="reviews timed one at a time")
    add("--batch-tokens", type=settings.count_or_auto, default="auto", help=settings.BATCH_TOKENS_HELP)
    return settings.parse(parser, STEP, argv)


def load_bag_of_words(folder: Path) -> Loaded:
    from common.baseline import load_baseline

    model = load_baseline(folder)
    return Loaded(model.logits, *model.count(), {"precision": "fp32", "device": "cpu"})


def load_encoder(args: argparse.Namespace, hardware: device.Hardware, folder: Path, max_length: int) -> Loaded:
    tokenizer, model = models.load_tokenizer(str(folder)), models.load_classifier(str(folder))
    parameters, weight_bytes = models.count(model)
    model = models.prepare_for_scoring(model, hardware)

    def logits(texts: list[str]) -> np.ndarray:
        ids = data.encode(tokenizer, texts, max_length)
        return scoring.score_encoder(model, ids, tokenizer.pad_token_id, hardware, args.batch_tokens)["scores"]

    facts = {"precision": hardware.precision, "device": hardware.device, "max_length": max_length}
    return Loaded(logits, parameters, weight_bytes, facts)


def load_mistral(
    args: argparse.Namespace, hardware: device.Hardware, adapter: Path | None, facts: dict, calibration: dict
) -> Loaded:
    base = facts["base"]
    tokenizer, model = models.load_tokenizer(base), models.load_llm(base, hardware, adapter)
    label_ids = verbalizer.label_token_ids(tokenizer, facts["prompt"], facts["label_words"])

    def logits(texts: list[str]) -> np.ndarray:
        ids = verbalizer.encode_prompts(tokenizer, texts, facts["prompt"], facts["max_length"])
        log_p = scoring.score_llm(model, ids, label_ids, tokenizer.pad_token_id, hardware, args.batch_tokens)
        log_odds = verbalizer.log_odds(log_p)
        return verbalizer.teacher_logits(log_odds, calibration["bias"], calibration["calibration_temperature"])

    row_facts = {
        "precision": f"nf4, {hardware.precision}",
        "device": hardware.device,
        "max_length": facts["max_length"],
        "calibration": calibration["calibration"],
    }
    return Loaded(logits, *models.count(model), row_facts)


def find_contenders(args: argparse.Namespace, hardware: device.Hardware, runs: dict[str, dict]) -> list[Contender]:
    """One contender per model of the finished steps, in the order of the steps."""
    root, facts = Path(args.output_dir), {step: run["facts"] for step, run in runs.items()}
    contenders = []
    if "01_baseline" in runs:
        for name, folder in (("TF-IDF + naive Bayes", "naive_bayes"), ("NB-SVM (logistic)", "nb_svm")):
            contenders.append(Contender(name, "baseline", partial(load_bag_of_words, root / "01_baseline" / folder)))
    if "02_roberta" in runs:
        load = partial(load_encoder, args, hardware, root / "02_roberta" / "model", facts["02_roberta"]["max_length"])
        contenders.append(Contender(settings.short(facts["02_roberta"]["teacher"]), TEACHER, load))
    from_llm = facts.get("04b_student_from_mistral")
    if "03_mistral" in runs:
        calibration = from_llm if from_llm and from_llm["llm"]["adapter"] else UNCALIBRATED
        load = partial(load_mistral, args, hardware, root / "03_mistral" / "adapter", facts["03_mistral"], calibration)
        contenders.append(
            Contender(settings.short(facts["03_mistral"]["base"]), "teacher, 4-bit + LoRA", load, is_llm=True)
        )
    if from_llm and not from_llm["llm"]["adapter"]:
        load = partial(load_mistral, args, hardware, None, from_llm["llm"], from_llm)
        contenders.append(
            Contender(settings.short(from_llm["llm"]["base"]), "teacher, 4-bit zero-shot", load, is_llm=True)
        )
    for step, kind in STUDENTS.items():
        if step in runs:
            student, teacher = settings.short(facts[step]["student"]), settings.short(facts[step]["teacher"])
            rows = {"model": (f"{student} from {teacher}", kind), "control": (f"{student} control", CONTROL)}
            for folder, (name, row_kind) in rows.items():
                if folder == "model" or (root / step / folder).is_dir():
                    load = partial(load_encoder, args, hardware, root / step / folder, facts[step]["max_length"])
                    contenders.append(Contender(name, row_kind, load))
    # Predictions are stored by name, so names must differ. Kaggle's folders may all end in a version number.
    names = [contender.name for contender in contenders] + 2 * ["example_id", "label"]
    for contender in contenders:
        if names.count(contender.name) > 1:
            contender.name = f"{contender.name} ({contender.kind})"
    return contenders


def time_one_by_one(loaded: Loaded, texts: list[str], hardware: device.Hardware) -> np.ndarray:
    """Milliseconds of each review by itself, from text to label."""
    times = []
    for text in texts[: WARM_UP_REVIEWS // 4] + texts:
        hardware.synchronize()
        started = time.perf_counter()
        loaded.logits([text]).argmax()
        hardware.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return np.array(times[-len(texts) :])


def measure(
    contender: Contender, test: pd.DataFrame, latency_texts: list[str], hardware: device.Hardware
) -> tuple[dict, np.ndarray]:
    """The row of one model on `test`, and its (n, 2) logits."""
    loaded = contender.load()
    texts = test["text"].tolist()
    loaded.logits(texts[:WARM_UP_REVIEWS])
    hardware.synchronize()
    started = time.perf_counter()
    logits = loaded.logits(texts)
    hardware.synchronize()
    seconds = time.perf_counter() - started
    latency = time_one_by_one(loaded, latency_texts, hardware)
    quality = metrics.describe(test["label"].to_numpy(), logits)
    row = {
        "Model": contender.name,
        "Type": contender.kind,
        "Accuracy": quality.pop("accuracy"),
        "Latency (ms)": round(statistics.median(latency), 3),
        "Throughput (samp/s)": round(len(texts) / seconds, 2),
        "Speedup (x)": None,
        "Size (MB)": round(loaded.weight_bytes / 1e6, 2),
        "Params (M)": round(loaded.parameters / 1e6, 3),
        **quality,
        "latency_p90_ms": round(float(np.percentile(latency, 90)), 3),
        "latency_n": len(latency),
        "peak_gpu_memory_mb": round(memory.peak_mb()) if hardware.device == "cuda" else None,
        **loaded.facts,
        "status": "ok",
    }
    return row, logits


def keep(file: Path, row: dict, logits: np.ndarray, measured_on: dict) -> None:
    """Write a measured row and its logits, so that an interrupted benchmark does not measure it again."""
    with artifacts.whole(file) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, logits=logits, about=json.dumps({"row": row, "measured_on": measured_on}))


def read_kept(file: Path, measured_on: dict) -> tuple[dict, np.ndarray] | None:
    """A kept row and its (n, 2) logits, if it was measured in the same environment; else None."""
    if not zipfile.is_zipfile(file):
        return None
    with np.load(file, allow_pickle=False) as kept:
        record = json.loads(str(kept["about"]))
        return (record["row"], kept["logits"]) if record["measured_on"] == measured_on else None


def measure_all(
    contenders: list[Contender], test: pd.DataFrame, args: argparse.Namespace, hardware: device.Hardware, folder: Path
) -> tuple[list[dict], pd.DataFrame]:
    """A row for each contender, and each model's log-odds of the reviews.

    A model that fails gets a row with its error, and the others are still measured. An interrupted run's rows count.
    """
    order = data.stratified_order(test["label"], args.seed)
    llm_rows = np.sort(order[: args.max_llm_samples])
    latency_texts = test["text"].iloc[order[: args.latency_samples]].tolist()
    predictions, rows, measured = test[["example_id", "label"]].copy(), [], False
    batch_tokens = args.batch_tokens or hardware.batch_tokens
    measured_on = environment(hardware) | artifacts.made_with()["versions"] | {"batch_tokens": batch_tokens}
    for number, contender in enumerate(contenders, start=1):
        part = test.iloc[llm_rows] if contender.is_llm else test
        file = folder / "rows" / f"{number}.npz"
        kept = read_kept(file, measured_on)
        print(f"{'kept: ' if kept else 'measuring '}{contender.name} ({contender.kind})", flush=True)
        try:
            row, logits = kept or measure(contender, part, latency_texts, hardware)
        except (Exception, settings.Stop) as problem:
            if not isinstance(problem, settings.Stop):  # which has printed its sentence
                traceback.print_exc()
            status = f"failed: {type(problem).__name__}: {problem}"
            rows.append({"Model": contender.name, "Type": contender.kind, "status": status})
        else:
            rows.append(row)
            predictions.loc[part.index, contender.name] = logits[:, 1] - logits[:, 0]
            if kept is None:
                keep(file, row, logits, measured_on)
                measured = True
        memory.free()
        # Not before a new row is kept: a model that fails would end every run at the same place.
        if measured and number < len(contenders) and device.out_of_time():
            device.stop_for_time()
    return rows, predictions


def compare(table: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Add speed-ups over 02's model, and McNemar's p against the control on the reviews that both models read."""
    teacher = table[(table["Type"] == TEACHER) & (table["status"] == "ok")]
    if len(teacher):
        table["Speedup (x)"] = (teacher["Latency (ms)"].item() / table["Latency (ms)"]).round(2)
        table["throughput_speedup"] = (table["Throughput (samp/s)"] / teacher["Throughput (samp/s)"].item()).round(2)
    control = table.loc[(table["Type"] == CONTROL) & (table["status"] == "ok"), "Model"]
    if len(control):
        control = control.iloc[0]  # 04a's
        labels, correct = predictions["label"] == 1, {}
        for name in table.loc[table["status"] == "ok", "Model"]:
            correct[name] = ((predictions[name] > 0) == labels).where(predictions[name].notna())
        for row, name in table["Model"].items():
            if name in correct and name != control:
                shared = correct[name].notna()
                pair = (correct[model][shared].to_numpy(bool) for model in (name, control))
                table.loc[row, "mcnemar_p_control"] = metrics.mcnemar_p(*pair)
    return table


def environment(hardware: device.Hardware) -> dict:
    """The machine on which the figures are measured."""
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "device": hardware.name,
        "precision": hardware.precision,
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "logical_cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cuda": torch.version.cuda,
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    hardware = device.start(args, __file__)
    finished = artifacts.finished_steps(args)
    if not finished:
        settings.stop(f"{args.output_dir}/ holds no finished step: run 01_baseline.py or another script first")
    reviews = data.load_reviews(args, reads=("test",))
    runs = {step: artifacts.read_run(args, step) for step in finished}
    for run in runs.values():
        artifacts.refuse_conflict(args, run, reviews.fingerprints, same=())
        artifacts.refuse_stale(args, run)
    folder = artifacts.begin(
        args, STEP, reviews.fingerprints | {step: artifacts.fingerprint(args, step) for step in finished}
    )

    rows, predictions = measure_all(find_contenders(args, hardware, runs), reviews.test, args, hardware, folder)
    columns = dict.fromkeys([*report.COLUMNS, "n", "ci_low", "ci_high", *(key for row in rows for key in row)])
    table = compare(pd.DataFrame(rows).reindex(columns=list(columns)), predictions)
    artifacts.write_table(folder / "benchmark.csv", table)
    artifacts.write_table(folder / "predictions.parquet", predictions)
    artifacts.write_json(folder / "environment.json", environment(hardware))
    with artifacts.whole(folder / "benchmark.md") as temporary:
        temporary.write_text(report.as_markdown(table), encoding="utf-8")
    report.draw_accuracy_latency(table, folder / "accuracy_latency.png")
    print(report.as_text(table))
    failed = [row["Model"] for row in rows if row["status"] != "ok"]
    if failed:
        print(f"error: {len(failed)} of {len(rows)} models failed ({', '.join(failed)}); see above", file=sys.stderr)
        return 1
    shutil.rmtree(folder / "rows")
    artifacts.finish(args, folder, {})
    print(f"table: {folder / 'benchmark.csv'}, picture: {folder / 'accuracy_latency.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
