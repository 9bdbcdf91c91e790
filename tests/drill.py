"""Break the six scripts as machines do, run the same command again, and print what was tried, survived and detected.

- Damage: every file of every finished step, with one bit flipped, cut, emptied or deleted. Each script that reads it
  must name a remedy with exit code 2, or give the same result.
- Kills at random moments, of a new step and under --force; some also damage a checkpoint or a chunk.
- Full disks: no file may grow beyond a random size. Two copies of one script. A folder that cannot be written.

After each of the last four the same command must end with the same weights and predictions, to the bit.

    python tests/drill.py
    python tests/drill.py --kills 5 --damages 20 --disks 2 --seed 3
"""

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pandas as pd
from conftest import ROOT, TINY_SIZES, load_script, write_reviews

from common import artifacts
from demo import make

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
READERS = {"02_roberta": "04a_student_from_roberta", "03_mistral": "04b_student_from_mistral"}  # beside 05
BENCHMARK = "05_benchmark"


def write(file: Path, change) -> None:
    file.write_bytes(change(file.read_bytes()))


def flip(content: bytes) -> bytes:
    place = random.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << random.randrange(8))]) + content[place + 1 :]


CUTS = {
    "cut": lambda file: write(file, lambda content: content[: len(content) // 2]),
    "emptied": lambda file: write(file, lambda content: b""),
    "deleted": lambda file: file.unlink(),
}
DAMAGES = {"flipped": lambda file: write(file, flip), **CUTS}


def commands(folder: Path, bases: Path) -> dict[str, list[str]]:
    """Each step's command line without --output-dir: seconds of training, and scoring in several chunks."""
    reviews = write_reviews(folder / "reviews", train=240, test=40, transfer=1300)
    shared = ["--preset", "demo", "--dataset", str(reviews), "--seed", "5"]
    trained = [*shared, *"--validation-samples 60 --learning-rate 1e-3 --batch-size 8 --epochs 3".split()]
    student = [*trained, "--student-model", str(bases / "demo-distilbert"), "--max-length", "32"]
    roberta = ["--roberta-model", str(bases / "demo-roberta"), "--max-length", "40"]
    llm = ["--mistral-model", str(bases / "demo-mistral"), *"--max-length 96 --learning-rate 3e-3".split()]
    briefly = "--max-llm-samples 20 --form-samples 10 --latency-samples 5 --latency-seconds 0.05 --injection-samples 6"
    flags = {
        "01_baseline": [*shared, "--validation-samples", "60"],
        "02_roberta": [*trained, *roberta],
        "03_mistral": [*trained, *llm, "--max-train-samples", "120"],
        "04a_student_from_roberta": [*student, "--max-transfer-samples", "120"],
        "04b_student_from_mistral": [*student, "--max-transfer-samples", "600"],
        BENCHMARK: [*shared, *briefly.split(), "--batch-tokens", "512"],
    }
    return {step: [artifacts.SCRIPTS[step], *flags[step]] for step in flags}


def start(command: list[str], folder: Path, *more: str, largest: int | None = None) -> subprocess.Popen:
    """The command as a process; no file of it may become larger than `largest` bytes."""
    limit = None if largest is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    line, pipe = [sys.executable, *command, "--output-dir", str(folder), *more], subprocess.PIPE
    return subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True, preexec_fn=limit)


def difference(whole: Path, made: Path) -> str:
    """What differs between two folders of one step: a missing file, weights, predictions; empty if nothing does."""
    if made.name == BENCHMARK:  # its clock never gives the same figure
        tables = [pd.read_csv(folder / "benchmark.csv") for folder in (whole, made)]
        tables = [table.loc[table["Type"] != "cascade", ["Model", "Accuracy", "n", "status"]] for table in tables]
        predictions = [pd.read_parquet(folder / "predictions.parquet") for folder in (whole, made)]
        same = tables[0].equals(tables[1]) and predictions[0].equals(predictions[1])
        return "" if same else "another table"
    names = [{Path(name) for name in artifacts._files(folder)} for folder in (whole, made)]
    names = [{name for name in files if name.suffix not in artifacts.FOR_PEOPLE} for files in names]
    if names[0] != names[1]:
        return f"other files: {names[0] ^ names[1]}"
    exact = [name for name in names[0] if name.suffix in (".safetensors", ".npy", ".parquet")]
    return ", ".join(str(name) for name in exact if (whole / name).read_bytes() != (made / name).read_bytes())


class Drill:
    """Finished steps to compare with, a folder to break, and what came of it."""

    def __init__(self, folder: Path, bases: Path, rng: random.Random):
        self.rng, self.commands = rng, commands(folder, bases)
        self.whole, self.broken = folder / "whole", folder / "broken"
        self.counts, self.faults, self.seconds = {}, [], {}
        for step, command in self.commands.items():
            began = time.monotonic()
            self.end(start(command, self.whole))
            self.seconds[step] = time.monotonic() - began

    def end(self, process: subprocess.Popen) -> str:
        """What a process that must succeed has printed."""
        out, told = process.communicate()
        assert process.returncode == 0, told
        return out + told

    def count(self, part: str, case: str, fault: str = "", detected: bool = False) -> None:
        counts = self.counts.setdefault(part, Counter())
        counts.update(tried=1, survived=not fault, detected=detected)
        if fault:
            self.faults.append(f"{part}, {case}: {fault}")
            print(f"FAULT {self.faults[-1]}", flush=True)

    def fresh(self, step: str, finished: bool = False) -> Path:
        """A folder with all other steps finished, and `step` too if `finished`; returns the step's folder."""
        shutil.rmtree(self.broken, ignore_errors=True)
        self.broken.mkdir()
        for other in self.commands:
            if other != step:
                (self.broken / other).symlink_to(self.whole / other)
        if finished:
            shutil.copytree(self.whole / step, self.broken / step)
        return self.broken / step

    def run_here(self, step: str, *more: str) -> tuple[int, str, str]:
        """The exit code, output and error messages of a script in this process, which saves its imports."""
        script, *flags = self.commands[step]
        out, told = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
            try:
                code = load_script(script.partition("_")[0]).main([*flags, "--output-dir", str(self.broken), *more])
            except SystemExit as left:
                code = left.code
            except BaseException:
                code = 1
                traceback.print_exc()
        artifacts._locks.clear()  # as at the end of a process
        return code or 0, out.getvalue(), told.getvalue()

    def damage_files(self, at_most: int | None) -> None:
        """Damage each file of each step; run the step again, and the scripts that read it."""
        files = [
            (step, file.relative_to(self.whole / step), kind)
            for step in self.commands
            for file in sorted((self.whole / step).rglob("*"))
            for kind in DAMAGES
            if file.is_file()
        ]
        for step, name, kind in sorted(self.rng.sample(files, min(at_most or len(files), len(files)))):
            folder, detected, fault = self.fresh(step, finished=True), False, ""
            random.seed(f"{self.rng.random()}")
            DAMAGES[kind](folder / name)
            readers = [(step,)] if step != BENCHMARK else [(step, "--report-only"), (step,)]
            readers += [(READERS[step],)] if step in READERS else []
            if step != BENCHMARK and kind == "flipped":  # it takes seconds, and the same function notices the others
                (self.broken / BENCHMARK).unlink()
                shutil.copytree(self.whole / BENCHMARK, self.broken / BENCHMARK)
                readers.append((BENCHMARK,))
            for reader in readers:
                code, out, told = self.run_here(*reader)
                errors = [line for line in told.splitlines() if line.startswith("error: ")]
                detected |= code == 2 or "is damaged" in out
                if code not in (0, 2) or "Traceback" in told or (code == 2 and not errors):
                    fault = f"{' '.join(reader)} left with {code}: {told[-2000:]}"
                elif code == 0:
                    fault = fault or difference(self.whole / reader[0], self.broken / reader[0])
            self.count("damaged files", f"{step}/{name} {kind}", fault, detected)
            print(f"{'detected' if detected else 'harmless'}: {step}/{name} {kind}", flush=True)

    def ends_as_uninterrupted(self, part: str, case: str, step: str, *more: str, detected: bool = False) -> None:
        """Run the same command to its end, and compare what it has made."""
        process = start(self.commands[step], self.broken, *more)
        out, told = process.communicate()
        fault = told[-2000:] if process.returncode else difference(self.whole / step, self.broken / step)
        left = [path.name for path in self.broken.iterdir() if path.name.endswith((artifacts.NEW, artifacts.OLD))]
        self.count(part, case, fault or ", ".join(left), detected or "is damaged" in out)

    def kill(self, kills: int) -> None:
        """Kill steps at random moments, one to three times in a row."""
        while kills > 0:
            step = self.rng.choice(list(self.commands))
            more = self.rng.choice([(), (), ("--force",)])
            folder, happened = self.fresh(step, finished=bool(more)), []
            times = self.rng.randint(1, min(3, kills))
            for _ in range(times):
                moment = self.rng.uniform(0.2, 1) * self.seconds[step]
                process = start(self.commands[step], self.broken, *more)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=moment)
                process.kill()
                process.communicate()
                happened += [f"{moment:.1f} s", *self.damage_work(folder, *more)]
            kills -= times
            case = f"{step} {' '.join(more)} of {self.seconds[step]:.0f} s: {', '.join(happened)}"
            print(f"kill: {case}", flush=True)
            self.ends_as_uninterrupted("kills", case, step, *more)
            self.counts["kills"].update(dict.fromkeys(("tried", "survived"), times - 1))

    def damage_work(self, folder: Path, *more: str) -> list[str]:
        """Damage a checkpoint or a chunk of an unfinished step, half of the times; returns what was done."""
        if more and not (artifacts._settled(folder) / "run.json").exists():
            self.count("kills", f"{folder.name} {more}", "the finished step is gone")
        work = folder.with_name(folder.name + artifacts.NEW) if more else folder
        kept = [file for file in work.rglob("*") if file.is_file() and "checkpoint" in str(file.relative_to(work))]
        kept = sorted([*kept, *work.rglob("*.npz")])
        if not kept or self.rng.random() < 0.5:
            return []
        file, kind = self.rng.choice(kept), self.rng.choice(list(CUTS))
        CUTS[kind](file)
        return [f"{file.name} {kind}"]

    def fill_disks(self, times: int) -> None:
        """Limit the size of files at random, which fails like a full disk in the middle of a write."""
        for number in range(times):
            step = list(self.commands)[number % len(self.commands)]
            folder = self.fresh(step)
            sizes = sorted(file.stat().st_size for file in (self.whole / step).rglob("*") if file.is_file())
            largest = self.rng.choice([size for size in sizes if size > 200]) - 100
            process = start(self.commands[step], self.broken, largest=largest)
            _, told = process.communicate()
            case, full = f"{step} with files up to {largest} bytes", "disk is full" in told
            print(f"disk: {case}, exit code {process.returncode}", flush=True)
            if process.returncode not in (0, 2) or "Traceback" in told or (process.returncode == 2 and not full):
                self.count("full disks", case, told[-3000:])
            self.ends_as_uninterrupted("full disks", case, step, detected=full)
            assert folder.exists()

    def run_twice(self) -> None:
        """Two copies of each script at once: one works, and the other one says so."""
        for step, command in self.commands.items():
            self.fresh(step)
            pair = [start(command, self.broken), start(command, self.broken)]
            told = [process.communicate() for process in pair]
            codes = sorted(process.returncode for process in pair)
            refused = any("another process is at work" in error for _, error in told)
            fault = (
                "" if codes in ([0, 0], [0, 2]) and refused == (codes[1] == 2) else f"{codes} {told[0][1]}{told[1][1]}"
            )
            fault = fault or difference(self.whole / step, self.broken / step)
            self.count("two copies", step, fault, refused)

    def forbid_writing(self) -> None:
        """A folder that cannot be written; root can write everywhere."""
        if os.geteuid() == 0:
            print("read-only folders are left out: root can write them")
            return
        for step, command in self.commands.items():
            self.fresh(step)
            self.broken.chmod(0o555)
            process = start(command, self.broken)
            _, told = process.communicate()
            self.broken.chmod(0o755)
            refused = process.returncode == 2 and "cannot be written" in told
            self.count("read-only folders", step, "" if refused else told, refused)

    def report(self) -> str:
        """A line a part: tried, survived, detected."""
        lines = [f"{'':<18} {'tried':>8} {'survived':>8} {'detected':>8}"]
        lines += [
            f"{part:<18} {counts['tried']:>8} {counts['survived']:>8} {counts['detected']:>8}"
            for part, counts in self.counts.items()
        ]
        return "\n".join([*lines, *(f"FAULT {fault}" for fault in self.faults)])


def drill(folder: Path, bases: Path, seed: int, kills: int, damages: int | None, disks: int) -> Drill:
    """Everything, in `folder`, with the three base checkpoints of the demo in `bases`."""
    one = Drill(folder, bases, random.Random(seed))
    one.damage_files(damages)
    one.kill(kills)
    one.fill_disks(disks)
    one.run_twice()
    one.forbid_writing()
    return one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=None, help="seed of moments, files and bits")
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--damages", type=int, default=None, help="number of damaged files; default: all, four times")
    parser.add_argument("--disks", type=int, default=18, help="number of full disks")
    args = parser.parse_args()
    seed = random.randrange(10**6) if args.seed is None else args.seed
    print(f"--seed {seed}")
    with tempfile.TemporaryDirectory() as folder:
        make.make(Path(folder, "bases"), sizes=TINY_SIZES, effort=0.01)
        one = drill(Path(folder), Path(folder, "bases"), seed, args.kills, args.damages, args.disks)
    print(one.report())
    return 1 if one.faults else 0


if __name__ == "__main__":
    sys.exit(main())
