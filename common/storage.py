"""Files and folders: written whole or not at all; read, or refused as damaged with a remedy."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from common.settings import Stop, stop

REWRITE = "run the script that wrote it with --force"


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk and of a folder that cannot be written into one sentence about `path`."""
    try:
        yield
    except Exception as problem:
        # EFBIG is a limit on the size of files. numpy, torch and what is written in Rust give no number.
        number, told = getattr(problem, "errno", None), str(problem)
        words = r"No space left|File too large|\d requested and \d+ written|unexpected pos|StreamWriter failed"
        if number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or re.search(words, told):
            stop(f"the disk is full ({path}): make room, then the same command continues")
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            stop(f"{problem.filename or path} cannot be written ({problem.strerror}): write to another folder")
        raise


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder; it is renamed to `path` when all of it is on disk."""
    temporary = path.with_name(path.name + ".partial")
    with explained(path):
        delete(temporary)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            for file in filter(Path.is_file, [temporary, *temporary.rglob("*")]):
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        except (Exception, Stop):
            delete(temporary)  # on a full disk it may be as large as all that is missing
            raise
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV or parquet (by the suffix of `path`), whole or not at all."""
    write = table.to_csv if path.suffix == ".csv" else table.to_parquet
    with whole(path) as temporary:
        write(temporary, index=False)


def intact_json(path: Path) -> dict | None:
    """A JSON file's content; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_json(path: Path) -> dict:
    """Read a JSON file of a step; stop if it is missing or damaged."""
    content = intact_json(path)
    if content is None:
        stop(f"{path} is missing or damaged: {REWRITE}")
    return content


def intact_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a .npz file; None if it is missing or damaged. Each array has a checksum."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        return None
    except Exception as problem:  # zipfile, zlib and numpy have a dozen kinds
        print(f"{path} is damaged ({problem}): it is made again")
        return None


def read_table(path: Path) -> pd.DataFrame:
    """Read a parquet table of an earlier step; stop if it is damaged."""
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as problem:  # pyarrow's errors are ValueErrors
        stop(f"{path} is damaged ({problem}): {REWRITE}")


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def delete(path: Path) -> None:
    """Delete a file or folder, if there is one."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
