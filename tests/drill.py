"""Break the six scripts as machines do, run the same command again, and print what was tried, survived and detected.

- Damage: every file of every finished step, with one bit flipped, cut, emptied or deleted. Each script that reads it
  must name a remedy with exit code 2, or give the same result. In each part of a step one remedy is obeyed.
- Kills and time limits at random moments, half under --force; some also damage a checkpoint or a chunk.
- Full disks: no file may grow beyond a random size. Two copies of one script. A folder that cannot be written.

After each of the last four the same command must end with the same weights and predictions, to the bit.

    python tests/drill.py
    python tests/drill.py --kills 5 --damages 20 --disks 2 --seed 3
"""

import argparse
import importlib
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pandas as pd
from conftest import TINY_SIZES, load_script, quick_preset, write_reviews

from common import artifacts, settings
from demo import make

READERS = {"02_roberta": "04a_student_from_roberta", "03_mistral": "04b_student_from_mistral"}  # beside 05
*_, BENCHMARK = STEPS = tuple(artifacts.SCRIPTS)
SAMPLES = {  # several chunks of scores, and seconds of training
    "validation_samples": 60, "03_mistral.max_train_samples": "120",
    "04a_student_from_roberta.max_transfer_samples": 120, "04b_student_from_mistral.max_transfer_samples": 600,
}  # fmt: skip
LOG = 20_000  # bytes that no script prints
FORK = get_context("fork")  # a run starts with all imports done
IMPORTS = "common.training common.distill common.baseline peft bitsandbytes onnxruntime matplotlib.pyplot sklearn.svm"


KINDS = ("flipped", "cut", "emptied", "deleted")


def damage(file: Path, kind: str, rng: random.Random) -> None:
    """Flip one bit of a file, cut it in half, empty it or delete it."""
    content = bytearray(file.read_bytes())
    if kind == "flipped" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.unlink()  # it may be linked
    if kind != "deleted":
        file.write_bytes(content[: {"cut": len(content) // 2, "emptied": 0}.get(kind)])


def run(script: str, flags: list[str], log: Path, largest: int) -> None:
    """Run a script in this process. It prints into `log`, and no file may become larger than `largest` bytes."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    raise SystemExit(load_script(script.partition("_")[0]).main(flags))


def difference(whole: Path, made: Path) -> str:
    """What differs between two folders of one step: a missing file, weights, predictions; empty if nothing does."""
    if made.name == BENCHMARK:  # its clock never gives the same figures
        pair = [pd.read_parquet(folder / "predictions.parquet") for folder in (whole, made)]
        return "" if pair[0].equals(pair[1]) else "other predictions"
    names = [{name for name in artifacts._files(folder) if Path(name).suffix != ".md"} for folder in (whole, made)]
    exact = [name for name in names[0] & names[1] if name.endswith((".safetensors", ".npy", ".parquet"))]
    changed = [name for name in exact if (whole / name).read_bytes() != (made / name).read_bytes()]
    return " ".join([*sorted(names[0] ^ names[1]), *changed])


class Drill:
    """Finished steps to compare with, a folder to break, and what came of it."""

    def __init__(self, folder: Path, seed: int):
        bases, self.rng = FORK.Process(target=make.make, args=(folder / "bases", TINY_SIZES, 0.01)), random.Random(seed)
        bases.start()
        self.whole, self.broken, self.counts, self.faults, self.seconds = folder / "whole", folder / "whole", {}, [], {}
        reviews = write_reviews(folder / "reviews", train=240, test=40, transfer=1300)
        self.flags = ["--preset", "demo", "--dataset", str(reviews), "--seed", "5"]
        settings.PRESETS["demo"] = quick_preset(folder / "bases") | SAMPLES  # which forked processes inherit
        for script in artifacts.SCRIPTS.values():
            load_script(script.partition("_")[0])
        for module in IMPORTS.split():
            importlib.import_module(module)
        bases.join()
        for step in STEPS:
            began = time.monotonic()
            code, told = self.end(self.start(step))
            assert code == 0, told
            self.seconds[step] = time.monotonic() - began
        self.broken = folder / "broken"

    def start(self, step: str, *more: str, largest: int = -1) -> tuple[BaseProcess, Path]:
        """A running script, and the file into which it prints."""
        flags = [*self.flags, "--output-dir", str(self.broken), *more]
        log = self.whole.with_name(f"log{time.monotonic_ns()}")
        process = FORK.Process(target=run, args=(artifacts.SCRIPTS[step], flags, log, largest))
        process.start()
        return process, log

    def end(self, started: tuple[BaseProcess, Path], after: float | None = None) -> tuple[int, str]:
        """A script's exit code and what it printed; it is killed if it has not ended `after` so many seconds."""
        process, log = started
        process.join(after)
        process.kill()
        process.join()
        return process.exitcode, log.read_text() if log.exists() else ""

    def count(self, part: str, case: str, fault: str = "", detected: bool = False, times: int = 1) -> None:
        self.counts.setdefault(part, Counter()).update(tried=times, survived=times * (not fault), detected=detected)
        print(f"{part}: {case}{', detected' if detected else ''}", flush=True)
        if fault:
            self.faults.append(f"FAULT {part}: {case}: {fault[-2000:]}")
            print(self.faults[-1], flush=True)

    def fresh(self, step: str, finished: bool = False) -> Path:
        """A folder with all other steps finished, and `step` too if `finished`; returns the step's folder."""
        shutil.rmtree(self.broken, ignore_errors=True)
        for other in STEPS:
            if finished or other != step:  # no script changes a file in place
                shutil.copytree(self.whole / other, self.broken / other, copy_function=os.link)
        return self.broken / step

    def damage_files(self, at_most: int | None) -> None:
        """Damage each file of each step; run the step again, and the scripts that read it."""
        files = [file.relative_to(self.whole) for file in sorted(self.whole.glob("*/**/*")) if file.is_file()]
        cases, obeyed = [(file, kind) for file in files for kind in KINDS], set()
        for file, kind in sorted(self.rng.sample(cases, min(at_most or len(cases), len(cases)))):
            step, fault, found = file.parts[0], "", []
            self.fresh(step, finished=True)
            damage(self.broken / file, kind, self.rng)
            readers = [(step,), (READERS.get(step, step),)]
            if step == BENCHMARK:
                readers = [(step, "--report-only"), (step,)]
            elif kind == "flipped" and self.rng.random() < 0.33:  # 05 takes seconds, one function notices all
                readers.append((BENCHMARK,))
            for reader in dict.fromkeys(readers):
                code, told = self.end(self.start(*reader))
                found += [(reader, told)] if code == 2 or "is damaged" in told else []
                if code not in (0, 2) or "Traceback" in told or (code == 2 and "error: " not in told):
                    fault = f"{reader} left with {code}: {told}"
                elif code == 0:
                    fault = fault or difference(self.whole / reader[0], self.broken / reader[0])
            part = file.parts[0 if step == BENCHMARK else 1]
            if found and "error: " in found[-1][1] and (step, part) not in obeyed:
                obeyed.add((step, part))
                fault = fault or self.obey(*found[-1])
            self.count("damaged files", f"{file} {kind}", fault, bool(found))

    def obey(self, reader: tuple[str, ...], told: str) -> str:
        """Do what an error says, then run its script again; what went wrong."""
        named = re.search(r"run (0\w+\.py)", told)
        scripts = {script: step for step, script in artifacts.SCRIPTS.items()}
        remedy = (scripts[named[1]] if named else reader[0], *(["--force"] if "--force" in told else []))
        ends = [self.end(self.start(*command)) for command in (remedy, reader)]
        return "" if ends[0][0] == ends[1][0] == 0 else f"the remedy {remedy} of {reader} does not help: {told}{ends}"

    def ends_well(self, part: str, case: str, step: str, *more: str, fault="", detected=False, times=1) -> None:
        """Run the same command to its end, and compare what it has made."""
        code, told = self.end(self.start(step, *more))
        left = [path.name for path in self.broken.iterdir() if path.suffix in (artifacts.NEW, artifacts.OLD)]
        fault = fault or (told if code else difference(self.whole / step, self.broken / step) or " ".join(left))
        self.count(part, case, fault, detected or "is damaged" in told, times)

    def kill(self, kills: int) -> None:
        """End steps at random moments, by kill or time limit, one to three times; every second time under --force."""
        more = ()
        while kills > 0:
            step, times = self.rng.choice(STEPS), self.rng.randint(1, min(3, kills))
            folder, happened, fault = self.fresh(step, finished=bool(more)), [], ""
            for _ in range(times):
                moment = self.rng.uniform(0, self.seconds[step])
                limit = self.rng.choice([(), ("--max-hours", str(moment / 3600))])
                code, told = self.end(self.start(step, *more, *limit), after=None if limit else moment)
                if limit and code not in (0, 3):
                    fault = told
                if more and not (artifacts._settled(folder) / "run.json").exists():
                    fault = "the finished step is gone"
                happened += [f"{moment:.1f} s", *self.damage_work(artifacts._work(folder))]
            kills -= times
            case = f"{step} {' '.join(more)} of {self.seconds[step]:.0f} s: {', '.join(happened)}"
            self.ends_well("kills", case, step, *more, fault=fault, times=times)
            more = () if more else ("--force",)

    def damage_work(self, work: Path) -> list[str]:
        """Damage a checkpoint or a chunk of an unfinished step, half of the times; returns what was done."""
        files = filter(Path.is_file, sorted(work.rglob("*")))
        files = [file for file in files if re.search("/checkpoint-|_chunks/", str(file))]
        if not files or self.rng.random() < 0.5:
            return []
        file, kind = self.rng.choice(files), self.rng.choice(KINDS[1:])
        damage(file, kind, self.rng)
        return [f"{file.name} {kind}"]

    def fill_disks(self, times: int) -> None:
        """Limit the size of files at random, which fails like a full disk in the middle of a write."""
        sizes = {step: [file.stat().st_size for file in (self.whole / step).rglob("*")] for step in STEPS}
        # What a script prints is a file too: of a few thousand bytes.
        sizes = {step: sorted({size for size in all_of if size > LOG}) for step, all_of in sizes.items()}
        steps = [step for step, large in sizes.items() if large]
        for number in range(times):
            step = steps[number % len(steps)]
            self.fresh(step)
            largest = self.rng.choice(sizes[step]) - 100
            code, told = self.end(self.start(step, largest=largest))
            full = "disk is full" in told
            fault = told if code not in (0, 2) or "Traceback" in told or full != (code == 2) else ""
            self.ends_well("full disks", f"{step}, files up to {largest} bytes", step, fault=fault, detected=full)

    def run_twice(self) -> None:
        """Two copies of each script at once: one works, and the other one says so."""
        for step in STEPS:
            self.fresh(step)
            pair = [self.start(step), self.start(step)]
            (first, told), (second, more) = sorted(map(self.end, pair))
            refused = "another process is at work" in more
            fault = "" if (first, second) in ((0, 0), (0, 2)) and refused == (second == 2) else told + more
            self.count("two copies", step, fault or difference(self.whole / step, self.broken / step), refused)

    def forbid_writing(self) -> None:
        """A folder that cannot be written. It is left out for root, who can write everywhere."""
        for step in STEPS if os.geteuid() else ():
            self.fresh(step)
            self.broken.chmod(0o555)
            code, told = self.end(self.start(step))
            self.broken.chmod(0o755)
            refused = code == 2 and "cannot be written" in told
            self.count("read-only folders", step, "" if refused else told, refused)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seed", type=int, default=random.randrange(10**6), help="seed of moments, files and bits")
    add("--kills", type=int, default=50, help="number of kills")
    add("--damages", type=int, help="number of damaged files; default: all, four times")
    add("--disks", type=int, default=12, help="number of full disks")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    print(f"--seed {args.seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        drill = Drill(Path(folder), args.seed)
        parts = (drill.damage_files, args.damages), (drill.kill, args.kills), (drill.fill_disks, args.disks)
        for part, *numbers in (*parts, (drill.run_twice,), (drill.forbid_writing,)):
            part(*numbers)
            print(f"{(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    print(f"{'':<18}", *(f"{word:>8}" for word in ("tried", "survived", "detected")))
    for name, counts in drill.counts.items():
        print(f"{name:<18}", *(f"{counts[word]:>8}" for word in ("tried", "survived", "detected")))
    print(*drill.faults, sep="\n")
    return 1 if drill.faults else 0


if __name__ == "__main__":
    sys.exit(main())
