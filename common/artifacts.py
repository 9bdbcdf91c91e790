"""Every path under outputs/: how a step is begun, continued, replaced, finished, required and verified.

A step's folder gets started.json first and run.json last. run.json holds the digest of every file, and of itself.
Nothing is written into a finished step: its successor grows in STEP.new/ beside it. When that is finished, two renames
put it in its place. Until then the old one serves.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from common import device, memory
from common.data import LABELS
from common.settings import NOT_COMPARED, default_of, in_words, stop
from common.storage import delete, explained, intact_json, read_json, sha256, whole, write_json

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
AGAIN = "pass --force to make it again"
NEW, OLD = ".new", ".old"  # a finished step's successor; the step itself while the two are swapped
RECORDS = ("started.json", "run.json")
# No script reads these: a model's card, 05's report. Their owner may edit them, so they have no digest.
FOR_PEOPLE = (".md", ".html", ".png")
_process_started = time.time()
_locks: dict[Path, object] = {}  # held by this process


# --- a step is begun, continued, replaced and finished ---


def begin(
    args: argparse.Namespace, step: str, inputs: dict[str, str], keep: tuple[str, ...] = (), again: bool = False
) -> Path:
    """Open the folder in which a step is made: STEP/, or STEP.new/ beside a finished one; returns that folder.

    | found                     | without --force                     | with --force                            |
    | ---                       | ---                                 | ---                                     |
    | nothing                   | begins                              | begins                                  |
    | unfinished, same command  | continues                           | continues, if begun with --force        |
    | unfinished, other command | exits with code 2                   | begins anew, but for the parts in `keep`|
    | finished, same settings   | exits with code 0, 2 if damaged     | begins STEP.new/, takes over `keep`     |
    | finished, other settings  | exits with code 2                   | begins STEP.new/, takes over `keep`     |

    `inputs` maps each dataset split and earlier step that is read to its fingerprint. The step itself checks what the
    parts in `keep` were made from. A step that checks all its parts so passes `again`: it never exits here, and its
    unfinished work is continued whatever the settings were. Rank 0 opens the folder, and every process must see it.
    """
    folder = Path(args.output_dir, step)
    if not device.begun_by_parent():
        device.first_alone(lambda: _begin(args, folder, inputs, keep, again))
    work = _work(folder)
    if not (work / "started.json").exists():
        stop(f"process {device.rank()} cannot see {work}/: pass an --output-dir on a disk that all machines share")
    return work


def _begin(args: argparse.Namespace, folder: Path, inputs: dict[str, str], keep: tuple[str, ...], again: bool) -> None:
    current = json.loads(json.dumps({"step": folder.name, "settings": vars(args), "inputs": inputs}))
    redo = args.force or again
    swapping = _beside(folder, OLD).exists() or (_beside(folder, NEW) / "run.json").exists()
    if not redo and not swapping:
        _exit_if_finished(folder, current)  # without the lock: any number of processes may find this
    lock(folder)
    _swap(folder)  # what a kill has left of it
    if not redo:
        _exit_if_finished(folder, current)  # by a process that held the lock until now
    work = _work(folder)
    begun = intact_json(work / "started.json")
    # The same command: with --force, precision counts too, because another one is a remedy for a loss of NaN.
    if begun and not _changed(begun, current, but={"max_hours"} if args.force else NOT_COMPARED):
        print(f"{work}/ was interrupted; continuing.")
        return
    if args.force:
        _clear(work, keep)
    elif not again:
        _refuse_other(work, "begun", begun or current, current)
        if work.exists() and any(path.name not in keep for path in work.iterdir()):
            stop(f"{work}/ holds files of an unknown run (no started.json): pass --force or another --output-dir")
    if work != folder:
        print(f"{folder}/ stays until {work}/ is finished")
        _take_over(folder, work, keep)
    write_json(work / "started.json", current)


def _exit_if_finished(folder: Path, current: dict) -> None:
    """Exit if the step is finished: with code 0 with these settings and inputs, with code 2 with others."""
    if (folder / "run.json").exists():
        _refuse_other(folder, "finished", _read_run(folder, AGAIN), current)
        verify(folder, AGAIN)
        print(f"{folder}/ is finished with these settings; --force redoes it.")
        raise SystemExit(0)


def _refuse_other(folder: Path, state: str, recorded: dict, current: dict) -> None:
    changed = "; ".join(_changed(recorded, current))
    if changed:
        stop(f"{folder}/ was {state} with other settings ({changed}): pass --force or another --output-dir")


def _changed(recorded: dict, current: dict, but: set[str] = NOT_COMPARED) -> list[str]:
    old, new = (run.get("settings", {}) | run.get("inputs", {}) for run in (recorded, current))
    names = sorted((old | new).keys() - but)
    # A flag that is newer than the run had its default there: a new version of a script refuses no finished step.
    pairs = [(name, old.get(name, default_of(name, "absent")), new.get(name, "absent")) for name in names]
    return [f"{name} was {in_words(name, was)}, is {in_words(name, now)}" for name, was, now in pairs if was != now]


def _clear(work: Path, keep: tuple[str, ...]) -> None:
    """Delete an unfinished step but `keep`. Without started.json, which goes first, only --force opens it."""
    if work.exists():
        print(f"--force: deleting {work}/, which was not finished{', but for '.join(['', *keep])}")
        (work / "started.json").unlink(missing_ok=True)
        for path in work.iterdir():
            if path.name not in keep:
                delete(path)


def _take_over(folder: Path, work: Path, keep: tuple[str, ...]) -> None:
    """Link the undamaged files of a finished step's parts into its successor, unless it has these parts.

    Every write replaces a file, so no write into the successor reaches the old one.
    """
    entries = (intact_json(folder / "run.json") or {}).get("files", {})
    for part in (part for part in keep if not (work / part).exists()):
        names = [name for name in _files(folder) if name.partition("/")[0] == part]
        sound = [name for name in names if name.endswith(FOR_PEOPLE) or _is_sound(folder / name, entries.get(name))]
        for name in sorted({*names} - {*sound}):
            print(f"{folder / name} is damaged: it is made again")
        if sound:
            with whole(work / part) as temporary:
                for name in sound:
                    _link(folder / name, temporary / Path(name).relative_to(part))


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except OSError:  # a disk without hard links
        shutil.copyfile(file, target)


def finish(args: argparse.Namespace, folder: Path, facts: dict, figures: dict | None = None) -> None:
    """Write metrics.json, then run.json, whose presence means "finished"; a successor then takes its place.

    All processes call it; rank 0 writes. `facts` are what later steps must match. `figures` are what this step
    measured.
    """
    peak_mb = max(device.gather(memory.highest_peak_mb(), last=True))
    if device.rank() > 0:
        return
    if figures is not None:
        write_json(folder / "metrics.json", figures)
    for leftover in [*folder.glob("*checkpoints"), *folder.rglob("*.partial")]:  # of a kill
        delete(leftover)  # some lie in others
    files = [name for name in _files(folder) if not name.endswith(FOR_PEOPLE)]
    run = read_json(folder / "started.json") | {
        "settings": dict(sorted(vars(args).items())),
        "facts": {"labels": LABELS} | facts,
        "seed": args.seed,
        "versions": versions(),
        "git_commit": _commit(),
        "wall_time_s": round(time.time() - _process_started, 1),
        "peak_memory_mb": round(peak_mb),
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in files},
    }
    write_json(folder / "run.json", run | {"sha256": _digest_of(run)})
    folder = folder.with_name(folder.name.removesuffix(NEW))
    _swap(folder)
    print(f"{folder}/ is finished in {run['wall_time_s']:.0f} s, peak memory {run['peak_memory_mb']:,} MB.")


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def _work(folder: Path) -> Path:
    """Where a step is made: in its folder until it is finished, then in its successor's."""
    return _beside(folder, NEW) if (folder / "run.json").exists() else folder


def _swap(folder: Path) -> None:
    """Put a finished successor, if there is one, in the place of `folder`; only the holder of the lock may do it.

    A kill between the renames leaves both steps finished, and `_settled` does the second one.
    """
    if (_beside(folder, NEW) / "run.json").exists() and folder.exists():
        shutil.rmtree(_beside(folder, OLD), ignore_errors=True)
        os.replace(folder, _beside(folder, OLD))
    if (_settled(folder) / "run.json").exists():
        shutil.rmtree(_beside(folder, OLD), ignore_errors=True)


def _settled(folder: Path) -> Path:
    """`folder`, after the second rename of a swap that a kill has cut in two."""
    if not folder.exists() and (_beside(folder, NEW) / "run.json").exists():
        with explained(folder), suppress(FileNotFoundError):  # another process was faster
            os.replace(_beside(folder, NEW), folder)
    return folder


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


# --- a finished step is required, verified and identified ---


def require(args: argparse.Namespace, step: str, *parts: str) -> Path:
    """The path of a finished step's result, verified; if it is missing, stops with the name of its script."""
    folder, script = _settled(Path(args.output_dir, step)), SCRIPTS.get(step, OTHER)
    path = folder.joinpath(*parts)
    if _is_interrupted(folder):
        stop(f"{folder}/ is not finished: run {script} again to continue it")
    shown = f"{path}{'' if path.suffix else '/'}"
    if not (folder / "run.json").exists():
        stop(f"{shown} is missing: run {script} first")
    if not path.exists():
        stop(f"{shown} is missing though its step is finished: {_make_again(step)}")
    if parts:
        verify(path)
    return path


def verify(path: Path, remedy: str = "") -> None:
    """Stop unless the files under `path`, a step's folder or a part of one, are those that its run.json records.

    A path of no finished step is taken as it is. With several processes the first one reads the digests, once.
    """
    folder = next((parent for parent in [path, *path.parents][:3] if (parent / "run.json").exists()), None)
    if folder is None:
        return
    remedy = remedy or _make_again(folder.name)
    for name, entry in _read_run(folder, remedy)["files"].items():
        if (folder / name).is_relative_to(path) and not _is_sound(folder / name, entry):
            stop(f"{folder / name} is missing or damaged though its step is finished: {remedy}")


def read_run(args: argparse.Namespace, step: str) -> dict:
    """The run.json of a finished step."""
    return _read_run(require(args, step), _make_again(step))


def fingerprint(args: argparse.Namespace, step: str) -> str:
    """The identity of a finished step: a digest of inputs, facts and files. Made again to the bit, it is the same."""
    run = read_run(args, step)
    return _digest_of({name: run[name] for name in ("inputs", "facts", "files")})[:16]


def finished_steps(args: argparse.Namespace) -> list[str]:
    """The finished steps before the benchmark, in order; prints the name of each unfinished one."""
    folders = {step: _settled(Path(args.output_dir, step)) for step in SCRIPTS if step != "05_benchmark"}
    for step, folder in folders.items():
        if _is_interrupted(folder):
            print(f"{folder}/ is not finished and is left out: run {SCRIPTS[step]} again to continue it")
    return [step for step, folder in folders.items() if (folder / "run.json").exists()]


def made_again(args: argparse.Namespace, run: dict) -> list[str]:
    """The steps that `run` read and that have been made again since then."""
    finished = [step for step in SCRIPTS if Path(args.output_dir, step, "run.json").exists()]
    return [step for step in finished if run["inputs"].get(step, "") not in ("", fingerprint(args, step))]


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
    for name in _files(folder):
        if Path(name).name not in ("README.md", but):
            total.update(name.encode() + bytes.fromhex(sha256(folder / name)))
    return total.hexdigest()[:16]


def _make_again(step: str) -> str:
    return f"run {SCRIPTS.get(step, OTHER)} --force to make it again"


def _is_interrupted(folder: Path) -> bool:
    return (folder / "started.json").exists() and not (folder / "run.json").exists()


def _files(folder: Path) -> list[str]:
    """The names of a step's files, in order, without its two records."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [name for name in (path.relative_to(folder).as_posix() for path in files) if name not in RECORDS]


def _is_sound(file: Path, entry: dict | None) -> bool:
    """Whether a file is as its step has left it, by its entry in run.json."""
    if not entry or not file.is_file() or file.stat().st_size != entry.get("bytes"):
        return False
    elsewhere = device.rank() > 0 or device.begun_by_parent()  # another process reads the digest
    return elsewhere or sha256(file) == entry.get("sha256")


def _digest_of(run: dict) -> str:
    """SHA-256 of a run.json's content without this digest."""
    content = {name: value for name, value in json.loads(json.dumps(run)).items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_run(folder: Path, remedy: str) -> dict:
    """A step's run.json; stops if it is damaged."""
    run = intact_json(folder / "run.json") or {}
    if run.get("sha256") != _digest_of(run):
        stop(f"{folder / 'run.json'} is damaged: {remedy}")
    return run


def versions() -> dict[str, str | None]:
    """The versions of Python and PACKAGES; an absent package's is None."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]} | dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> str | None:
    """The commit of the scripts ("+" marks uncommitted changes); None outside a git checkout."""
    describe = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        described = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return described.stdout.strip()
    return None
