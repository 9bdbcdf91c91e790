"""A model's row of the benchmark and all that was measured for it, kept for the next run of 05."""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd

from common import artifacts, data, machine, models, storage
from common.classifiers import Contender
from common.measuring import Measured

FORMAT = 2  # of a kept row; raise it when 05 measures something else


def file_of(args: argparse.Namespace, folder: Path, contender: Contender, part: pd.DataFrame) -> Path:
    """Where a contender's row on the reviews `part` is kept.

    The name is a digest of all that the row depends on: the model's files, the reviews, the settings, the machine and
    the packages that run the model. A base LLM counts by its name, and a folder of one by parts of its files.
    """
    base, versions = contender.facts.get("base"), artifacts.versions()
    own = contender.files.exists() and (base is None or contender.files != Path(base))
    names = ("latency_samples", "latency_seconds", "injection_samples", "batch_tokens")
    about = {
        "format": FORMAT,
        "model": artifacts.digest(contender.files) if own else None,
        "row": [contender.name, contender.kind, contender.facts],
        "reviews": data.fingerprint(part),
        "settings": {name: getattr(args, name) for name in names},
        "base": base and models.sampled_digest(base),
        "machine": machine.environment(contender.hardware) | {name: versions[name] for name in contender.packages},
    }
    return folder / f"{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}.npz"


def keep(file: Path, measured: Measured) -> None:
    """Write what one model gave, so that no later run measures it again."""
    about = {"row": measured.row, "sweep": measured.sweep, "injection": measured.injection}
    with storage.whole(file) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, logits=measured.logits, latency=measured.latency, about=json.dumps(about))


def read(file: Path) -> Measured | None:
    """What an earlier run kept; None if there is nothing, or a damaged file."""
    kept = storage.intact_arrays(file)
    return kept and Measured(logits=kept["logits"], latency=kept["latency"], **json.loads(str(kept["about"])))
