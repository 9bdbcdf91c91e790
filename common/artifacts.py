"""Every path under outputs/: atomic writes, started.json and run.json, and errors that name the script to run."""

import argparse
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd

from common import device, memory
from common.data import LABELS
from common.settings import NOT_COMPARED, default_of, stop

SCRIPTS = {
    "01_baseline": "01_baseline.py",
    "02_roberta": "02_finetune_roberta.py",
    "03_mistral": "03_finetune_mistral.py",
    "04a_student_from_roberta": "04a_distill_from_roberta.py",
    "04b_student_from_mistral": "04b_distill_from_mistral.py",
    "05_benchmark": "05_benchmark.py",
}
OTHER = "the command that makes it"  # a step of experiments/
PACKAGES = "torch transformers tokenizers datasets accelerate peft bitsandbytes scikit-learn pandas numpy".split()
PACKAGES += ["onnx", "onnxruntime"]
REWRITE = "run the script that wrote it with --force"
_process_started = time.time()
_locks: dict[Path, object] = {}  # held by this process


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder; it is renamed to `path` when all of it is on disk."""
    temporary = path.with_name(path.name + ".partial")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
    except OSError as problem:
        # shutil.Error, of a copied folder, has no number. EFBIG is a limit on the size of files.
        if problem.errno in (errno.ENOSPC, errno.EFBIG) or "No space left" in str(problem):
            shutil.rmtree(temporary, ignore_errors=True)  # what was written so far is as large as a folder
            stop(f"the disk is full ({path}): make room, then the same command continues")
        raise
    for file in filter(Path.is_file, [temporary, *temporary.rglob("*")]):
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(temporary, path)


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """Read a JSON file of an earlier step; stop if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        stop(f"{path} is damaged: delete its folder, then run the script that wrote it")


def read_array(path: Path, rows: int) -> np.ndarray:
    """Memory-map a .npy file of an earlier step; stop unless it has as many rows as its table."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as problem:
        stop(f"{path} is damaged ({problem}): {REWRITE}")
    if len(array) != rows:
        stop(f"{path} has {len(array)} rows and its table has {rows}: {REWRITE}")
    return array


def read_table(path: Path) -> pd.DataFrame:
    """Read a parquet table of an earlier step; stop if it is damaged."""
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as problem:  # pyarrow's errors are ValueErrors
        stop(f"{path} is damaged ({problem}): {REWRITE}")


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV or parquet (by the suffix of `path`), whole or not at all."""
    write = table.to_csv if path.suffix == ".csv" else table.to_parquet
    with whole(path) as temporary:
        write(temporary, index=False)


def require(args: argparse.Namespace, step: str, *parts: str) -> Path:
    """The path of a finished step's result; if it is missing, stops with the name of its script."""
    folder, script = Path(args.output_dir, step), SCRIPTS.get(step, OTHER)
    path = folder.joinpath(*parts)
    if _is_interrupted(folder):
        stop(f"{folder}/ is not finished: run {script} again to continue it")
    shown = f"{path}{'' if path.suffix else '/'}"
    if not (folder / "run.json").exists():
        stop(f"{shown} is missing: run {script} first")
    if not path.exists():
        stop(f"{shown} is missing though its step is finished: run {script} --force to make it again")
    _refuse_missing(folder, path, f"run {script} --force")
    return path


def read_run(args: argparse.Namespace, step: str) -> dict:
    """The run.json of a finished step."""
    path = require(args, step, "run.json")
    run = read_json(path)
    if not {"step", "settings", "inputs", "facts"} <= run.keys() or "labels" not in run["facts"]:
        stop(f"{path} is damaged: run {SCRIPTS.get(step, OTHER)} again with --force")
    return run


def fingerprint(args: argparse.Namespace, step: str) -> str:
    """The identity of a finished step: a SHA-256 of its run.json, which covers settings, inputs and file sizes."""
    return hashlib.sha256(require(args, step, "run.json").read_bytes()).hexdigest()[:16]


def finished_steps(args: argparse.Namespace) -> list[str]:
    """The finished steps before the benchmark, in order; prints the name of each unfinished one."""
    folders = {step: Path(args.output_dir, step) for step in SCRIPTS if step != "05_benchmark"}
    for step, folder in folders.items():
        if _is_interrupted(folder):
            print(f"{folder}/ is not finished and is left out: run {SCRIPTS[step]} again to continue it")
    return [step for step, folder in folders.items() if (folder / "run.json").exists()]


def _is_interrupted(folder: Path) -> bool:
    return (folder / "started.json").exists() and not (folder / "run.json").exists()


def refuse_conflict(
    args: argparse.Namespace, run: dict, fingerprints: dict[str, str], same=("seed", "validation_samples")
) -> None:
    """Stop when an earlier step used other reviews, another split or another label order than this step.

    `run` is the earlier step's run.json. With other reviews its example_ids name other texts. With another split it
    trained on this step's validation reviews. With another label order its logits mean the opposite.
    """
    script, labels = SCRIPTS[run["step"]], run["facts"].get("labels")
    if labels != list(LABELS):
        stop(f"{script} numbered the labels {labels}, not {list(LABELS)}: run it again")
    for split, current in fingerprints.items():
        if run["inputs"].get(split, current) != current:
            stop(f"{script} read other reviews ({split} differs): pass the --dataset that it read, or run it again")
    for name in same:
        earlier, current, flag = run["settings"][name], getattr(args, name), f"--{name.replace('_', '-')}"
        if earlier != current:
            stop(f"{script} ran with {flag} {earlier} and this step with {current}: pass {flag} {earlier}")


def digest(folder: Path, but: str = "") -> str:
    """SHA-256 over the names and contents of a folder's files, without `but` and without a card: it may be edited."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ("README.md", but)):
        with open(file, "rb") as handle:
            total.update(str(file.relative_to(folder)).encode() + hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()[:16]


def reopen(args: argparse.Namespace, step: str, inputs: dict[str, str], forget: tuple[str, ...]) -> None:
    """Open the folder of a step that keeps its own parts by digest, whatever its settings were before.

    --force deletes the parts named in `forget`.
    """
    folder = Path(args.output_dir, step)
    lock(folder)
    if _is_interrupted(folder):
        print(f"{folder}/ was interrupted; continuing.")
    for part in forget if args.force else ():
        shutil.rmtree(folder / part, ignore_errors=True)
    write_json(folder / "started.json", _current(args, folder, inputs))
    (folder / "run.json").unlink(missing_ok=True)


def made_again(args: argparse.Namespace, run: dict) -> list[str]:
    """The steps that `run` read and that have been made again since then."""
    finished = [step for step in SCRIPTS if Path(args.output_dir, step, "run.json").exists()]
    return [step for step in finished if run["inputs"].get(step, "") not in ("", fingerprint(args, step))]


def begin(args: argparse.Namespace, step: str, inputs: dict[str, str], keep: str | None = None) -> Path:
    """Open the step's folder: a new one, or an interrupted one with the same settings and inputs.

    Exits with code 0 if the step is finished, and with code 2 if it was made with other settings. `inputs` maps each
    dataset split and earlier step that is read to its fingerprint. `keep` names a subfolder that --force spares,
    because the step itself checks it. Rank 0 opens the folder, and every process must see it.
    """
    folder = Path(args.output_dir, step)
    if not device.begun_by_parent():
        device.first_alone(lambda: _begin(args, folder, inputs, keep))
    if not (folder / "started.json").exists():
        stop(f"process {device.rank()} cannot see {folder}/: pass an --output-dir on a disk that all machines share")
    return folder


def _begin(args: argparse.Namespace, folder: Path, inputs: dict[str, str], keep: str | None) -> None:
    current = _current(args, folder, inputs)
    if not args.force:
        _exit_if_finished(folder, current)  # without the lock: any number of processes may find this
    lock(folder)
    if args.force and folder.exists():
        print(f"--force: deleting {folder}/{f' except {keep}/' if keep else ''}")
        _delete(folder, keep)
    _exit_if_finished(folder, current)  # by a process that held the lock until now
    if (folder / "started.json").exists():
        _refuse_other(folder, "begun", read_json(folder / "started.json"), current)
        print(f"{folder}/ was interrupted; continuing.")
        return
    if folder.exists() and any(path.name != keep for path in folder.iterdir()):
        stop(f"{folder}/ holds files of an unknown run (no started.json): pass --force or another --output-dir")
    write_json(folder / "started.json", current)


def _current(args: argparse.Namespace, folder: Path, inputs: dict[str, str]) -> dict:
    settings = {name: value for name, value in sorted(vars(args).items()) if name not in NOT_COMPARED}
    return {"step": folder.name, "settings": settings, "inputs": inputs}


def _exit_if_finished(folder: Path, current: dict) -> None:
    """Exit with code 0 if the step is finished with the current settings and inputs, with code 2 if with others."""
    if (folder / "run.json").exists():
        _refuse_other(folder, "finished", read_json(folder / "run.json"), current)
        _refuse_missing(folder, folder, "pass --force")
        print(f"{folder}/ is finished with these settings; --force redoes it.")
        raise SystemExit(0)


def lock(folder: Path) -> None:
    """Lock `folder` until this process ends; stop if another process holds the lock."""
    path = folder.with_name(f".{folder.name}.lock")
    if path in _locks:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "w")  # noqa: SIM115 - open until the process ends
    except OSError as problem:
        stop(f"{path.parent}/ cannot be written ({problem.strerror}): pass another --output-dir")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stop(f"another process is at work in {folder}/: wait for it, or pass another --output-dir")
    _locks[path] = handle


def _delete(folder: Path, keep: str | None) -> None:
    """Delete a step's results. They are renamed first, so that a kill leaves nothing that looks like results."""
    deleted = folder.with_name(f".{folder.name}.deleted")
    if deleted.exists():
        shutil.rmtree(deleted)
    os.replace(folder, deleted)
    if keep is not None and (deleted / keep).exists():
        folder.mkdir()
        os.replace(deleted / keep, folder / keep)
    shutil.rmtree(deleted)


def _refuse_missing(folder: Path, part: Path, remedy: str) -> None:
    """Stop when a file under `part` that the finished step in `folder` wrote is missing or has another size."""
    for name, size in read_json(folder / "run.json").get("files", {}).items():
        file = folder / name
        if file.is_relative_to(part) and (not file.is_file() or file.stat().st_size != size):
            stop(f"{file} is missing or damaged though its step is finished: {remedy} to make it again")


def _refuse_other(folder: Path, state: str, recorded: dict, current: dict) -> None:
    old, new = (run.get("settings", {}) | run.get("inputs", {}) for run in (recorded, current))
    names = sorted((old | new).keys() - NOT_COMPARED)
    # A flag that is newer than the run had its default there.
    pairs = [(name, old.get(name, default_of(name, "absent")), new.get(name, "absent")) for name in names]
    changed = [f"{name} was {was}, is {now}" for name, was, now in pairs if was != now]
    if changed:
        stop(f"{folder}/ was {state} with other settings ({'; '.join(changed)}): pass --force or another --output-dir")


def finish(args: argparse.Namespace, folder: Path, facts: dict, figures: dict | None = None) -> None:
    """Write metrics.json, then run.json, whose presence means "finished". All processes call it; rank 0 writes.

    `facts` are what later steps must match. `figures` are what this step measured.
    """
    peak_mb = max(device.gather(memory.highest_peak_mb(), last=True))
    if device.rank() > 0:
        return
    if figures is not None:
        write_json(folder / "metrics.json", figures)
    for leftover in folder.glob("*checkpoints"):  # from a kill between saving the model and deleting its checkpoints
        shutil.rmtree(leftover)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if path.name not in ("run.json", "README.md")]  # a model's card may be edited
    run = read_json(folder / "started.json") | {
        "settings": dict(sorted(vars(args).items())),
        "facts": facts,
        "seed": args.seed,
        **made_with(),
        "wall_time_s": round(time.time() - _process_started, 1),
        "peak_memory_mb": round(peak_mb),
        "files": {str(path.relative_to(folder)): path.stat().st_size for path in files},
    }
    write_json(folder / "run.json", run)
    print(f"{folder}/ is finished in {run['wall_time_s']:.0f} s, peak memory {run['peak_memory_mb']:,} MB.")


def versions() -> dict[str, str | None]:
    """The versions of Python and PACKAGES; an absent package's is None."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]} | dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def made_with() -> dict:
    """The versions, and the commit of the scripts ("+" marks uncommitted changes; None outside a git checkout)."""
    commit, describe = None, ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        described = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        commit = described.stdout.strip()
    return {"versions": versions(), "git_commit": commit}
