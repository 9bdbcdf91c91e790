#!/usr/bin/env python
"""05: one table of all models in outputs/ with accuracy, latency, throughput, size and memory; and what to deploy.

Latency is the median time of one review, from text to label (MLPerf's SingleStream). The same 200 reviews repeat until
the median's interval is within 3%; otherwise the row says "noisy". Throughput is the rate of all reviews at once, from
texts to labels (MLPerf's Offline), in the smallest batches within 3% of a sweep's fastest. Each model warms up first,
the clock waits for the GPU, and memory is freed between models. Models read the same test reviews; the LLM, and the
students' deployable forms on the CPU, read a stratified part of them. A row is kept from an earlier run if its model,
reviews, settings and machine are the same.

Reads   the test reviews and the finished folders of steps 01 to 04b, any subset of them
Writes  outputs/05_benchmark/  benchmark.csv  report.html  benchmark.md  accuracy_latency.png  predictions.parquet
        latency.parquet  sweep.csv  injection.csv  cascade.csv  errors.csv  environment.json  deploy/  rows/  run.json
Takes   on one T4: planned 66 to 76 minutes (results/gpu/plan.csv), not measured yet; it prints its own plan first

    python 05_benchmark.py
    python 05_benchmark.py --max-test-samples 2000 --max-llm-samples 500
    python 05_benchmark.py --report-only
"""

import argparse
import math
import sys
import textwrap
import time
import traceback
from pathlib import Path

import pandas as pd

from common import artifacts, comparison, data, device, machine, measuring, memory, report, settings, storage
from common.contenders import STUDENTS, Contender, find_contenders, form_folder
from common.measuring import Measured

STEP = "05_benchmark"
KEPT = ("rows", "deploy", "environment.json")  # of an earlier run, each checked before it is used


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = settings.make_parser(__doc__, reads=("test",))
    add = parser.add_argument
    add("--max-llm-samples", type=settings.positive_int, default=1000, help="test reviews for the LLM, stratified")
    add("--latency-samples", type=settings.positive_int, default=200, help="reviews timed one at a time, stratified")
    limit = "time limit of a model's latency, after each pass"
    add("--latency-seconds", type=settings.positive, default=300, help=limit)
    add("--injection-samples", type=settings.positive_int, default=200, help="reviews to which attacks are appended")
    forms = "students whose deployable forms are made and measured; best: the one that validation prefers"
    add("--forms", choices=("best", "all", "none"), default="best", help=forms)
    add("--form-samples", type=settings.positive_int, default=2000, help="test reviews for the forms, stratified")
    batch_tokens = "padded tokens per scoring batch; auto: the fastest of a sweep"
    add("--batch-tokens", type=settings.count_or_auto, default="auto", help=batch_tokens)
    add("--price-per-hour", type=settings.positive, help="price of the machine, for the price of a million reviews")
    add("--report-only", action="store_true", help="draw the report again from the files of the last run")
    args = settings.parse(parser, STEP, argv)
    if args.report_only and args.price_per_hour:
        parser.error("--report-only measures and counts nothing: pass --price-per-hour without it, kept rows stay")
    return args


def measure_all(
    args: argparse.Namespace, folder: Path, contenders: list[Contender], test: pd.DataFrame
) -> tuple[list[tuple[Contender, pd.DataFrame, Measured]], list[dict], dict]:
    """Measure each contender, or take what an earlier run kept of it.

    Returns what was measured, with its reviews; the rows without figures; the run's facts. A model that fails gets a
    row with its error, and the others are still measured.
    """
    order = data.stratified_order(test["label"], args.seed)
    parts = {one.name: test.iloc[order[: one.samples or len(test)]] for one in contenders}
    files = {one.name: measuring.kept_file(args, folder / "rows", one, parts[one.name]) for one in contenders}
    kept = {name: measuring.read_kept(file) for name, file in files.items()}
    new = [one for one in contenders if kept[one.name] is None and not one.absent]
    peaks = {hardware: machine.matrix_peak(hardware) for hardware in {one.hardware for one in new}}
    planned = measuring.planned_minutes(new, parts, peaks, args)
    print(f"{len(new)} of {len(contenders)} models to measure: planned {planned:.0f} minutes", flush=True)
    done, without, started = [], [], time.monotonic()
    measuring.warm_up(new, parts)
    for contender in contenders:
        name, part, measured = contender.name, parts[contender.name], kept[contender.name]
        row = {"Model": name, "Type": contender.kind}
        if contender.absent:
            without.append(row | {"status": f"absent: {contender.absent}"})
            continue
        # Not before a new row is kept: a model that fails would end every run at the same place.
        if device.seconds_left() < math.inf and contender in new and any(one in new for one, _, _ in done):
            needed = 60 * measuring.planned_minutes([contender], parts, peaks, args)
            if device.out_of_time(needed):
                device.stop_for_time()
        print(f"{'measuring' if contender in new else 'kept:'} {name} ({contender.kind})", flush=True)
        try:
            # For a kept row too: its files may be gone.
            contender.prepare() if contender.prepare else artifacts.verify(contender.files)
            measured = measured or measuring.measure(contender, part, args, peaks[contender.hardware])
        except (Exception, settings.Stop) as problem:
            print_failure(name, problem)
            without.append(row | {"status": f"failed: {type(problem).__name__}: {problem}"})
        else:
            done.append((contender, part, measured))
            if contender in new:
                measured.keep(files[name])
        memory.free()
    gflops = {f"{one.precision} {one.device}": round(peak / 1e9, 1) for one, peak in peaks.items()}
    facts = {
        "measured_models": len(new),
        "matrix_peak_gflops": gflops,
        "planned_minutes": round(planned, 1),
        "drift": measuring.drift(done, new, args),
        "measured_minutes": round((time.monotonic() - started) / 60, 1),
    }
    return done, without, facts


def print_failure(name: str, problem: BaseException) -> None:
    """Print why a model could not be measured: a sentence for a missing package, a traceback for a fault of 05."""
    if isinstance(problem, ImportError):
        print(f"error: {name} cannot be measured: {problem}", file=sys.stderr)
    elif not isinstance(problem, settings.Stop):  # which has printed its sentence
        traceback.print_exception(problem)


def read_runs(args: argparse.Namespace, reviews: data.Reviews) -> dict[str, dict]:
    """The run.json of each finished step; warns if a step that it read was made again.

    Stops if a step read other reviews or numbered its labels otherwise.
    """
    runs = {step: artifacts.read_run(args, step) for step in artifacts.finished_steps(args)}
    if not runs:
        settings.stop(f"{args.output_dir}/ holds no finished step: run 01_baseline.py or another script first")
    for step, run in runs.items():
        artifacts.refuse_conflict(args, run, reviews.fingerprints, same=())
        if step in STUDENTS:
            artifacts.verify(Path(args.output_dir, step, "validation.parquet"))  # which chooses the cascade's rule
        for earlier in artifacts.made_again(args, run):
            print(f"warning: {step} is of an earlier {earlier}: run {artifacts.SCRIPTS[step]} --force")
    return runs


def delete_other_forms(deployed: Path, contenders: list[Contender]) -> None:
    """Delete the forms of an earlier run that this one does not measure: their student may be another one now."""
    current = {form_folder(deployed, one.student) for one in contenders if one.student}
    for folder in set(deployed.glob("*")) - current:
        print(f"{folder}: deleted, as --forms {'none' if not current else 'leaves it out'}")
        storage.delete(folder)


def show(folder: Path) -> pd.DataFrame:
    """Draw the report of the files in `folder`, and print the table and the advice; returns the table."""
    table = report.read(folder)
    advice = (
        textwrap.fill(line, 98, initial_indent="- ", subsequent_indent="  ") for line in report.what_to_deploy(table)
    )
    print(report.as_text(table), "", *advice, sep="\n")
    try:
        report.write_report(folder)
    except ModuleNotFoundError as problem:
        remedy = "pip install -r requirements.txt, then run 05_benchmark.py --report-only"
        settings.stop(f"the report needs {problem.name}, which is not installed: {remedy}")
    return table


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    folder = Path(args.output_dir, STEP)
    written = "table: {0}/benchmark.csv, report: {0}/report.html"
    if args.report_only:
        if not (folder / "benchmark.csv").exists():
            settings.stop(f"{folder / 'benchmark.csv'} is missing: run 05_benchmark.py without --report-only first")
        artifacts.lock(folder)
        artifacts.verify(folder, "run 05_benchmark.py without --report-only to make it again")
        show(folder)
        print(written.format(folder))
        return 0
    hardware = device.start(args, __file__)
    reviews = data.load_reviews(args, reads=("test",))
    runs = read_runs(args, reviews)
    inputs = reviews.fingerprints | {step: artifacts.fingerprint(args, step) for step in runs}
    work = artifacts.begin(args, STEP, inputs, keep=() if args.force else KEPT, again=True)

    contenders = find_contenders(args, hardware, runs, work / "deploy")
    delete_other_forms(work / "deploy", contenders)
    done, without, facts = measure_all(args, work, contenders, reviews.test)

    if facts["measured_models"] or not (work / "environment.json").exists():
        storage.write_json(work / "environment.json", machine.environment(hardware) | facts)
    comparison.write_tables(args, work, reviews.test, done, without)
    table = show(work)
    failed = table[table["status"].str.startswith("failed")]
    if len(failed):
        print(written.format(work))
        names = f"{len(failed)} of {len(table)} models failed ({', '.join(failed['Model'])})"
        print(f"error: {names}; see above", file=sys.stderr)
        return 2 if failed["status"].str.startswith("failed: Stop").all() else 1  # 2: each has printed its remedy
    artifacts.finish(args, work, {})
    print(written.format(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
