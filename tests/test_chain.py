"""A stranger's review file through all six scripts, by nothing but the commands that they print."""

import shlex

import numpy as np
import pandas as pd
from conftest import write_reviews

from common import artifacts, settings, storage

QUICK = {"learning_rate": 1e-3, "batch_size": 8, "epochs": 4, "max_length": 32}
QUICK |= {"02_roberta.max_length": 40, "02_roberta.student_layers": 2}
QUICK |= {"03_mistral.max_length": 96, "03_mistral.epochs": 2, "03_mistral.learning_rate": 3e-3}
BRIEFLY = {"max_llm_samples": 20, "forms": "none", "latency_samples": 5, "latency_seconds": 0.05}
BRIEFLY |= {"injection_samples": 6, "batch_tokens": 512}


def write_awkward(root):
    """One semicolon file of stars with odd names, no test split, in a folder whose name needs quotes."""
    folder = root / "my reviews, 2026"
    source = write_reviews(root / "source", train=140, transfer=40)
    folder.mkdir()
    for split, name in (("train", "All of them.CSV"), ("unsupervised", "unlabelled.csv")):
        table = pd.read_parquet(source / f"{split}.parquet")
        stars = (table["label"] * 3 + 1 + table.index % 2).where(np.arange(len(table)) % 9 > 0, 3)
        table = pd.DataFrame({"Title": "a; title", "What they wrote": table["text"], "Their stars": stars})
        table.to_csv(folder / name, sep=";", index=False)
    return folder


def test_the_printed_commands_alone_lead_to_the_benchmark(tiny, script, tmp_path, monkeypatch, capsys):
    names = {"roberta": "roberta", "mistral": "mistral", "student": "distilbert"}
    models = {f"{role}_model": str(tiny / name) for role, name in names.items()}
    quick = models | {"04b_student_from_mistral.mistral_model": None} | QUICK
    quick |= {f"05_benchmark.{name}": value for name, value in BRIEFLY.items()}
    monkeypatch.setitem(settings.PRESETS, "demo", quick)
    flags = ["--dataset", str(write_awkward(tmp_path)), "--output-dir", str(tmp_path / "my outputs"), "--seed", "5"]
    flags += "--negative-labels 1 2 --positive-labels 4 5 --preset demo".split()
    flags += ["--text-column", "what they wrote", "--label-column", "their stars"]
    printed, done = [shlex.join(["python", "01_baseline.py", *flags])], []
    while waiting := sorted(line for line in printed if line.split()[1] not in done):
        _, name, *given = shlex.split(waiting[0])  # the earliest step
        assert script(name.partition("_")[0]).main(given) in (None, 0), waiting[0]
        done.append(name)
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        printed += [line.partition(": ")[2] for line in lines if line.startswith(("next: ", "or: "))]
    assert done == list(artifacts.SCRIPTS.values())
    table = pd.read_csv(tmp_path / "my outputs" / "05_benchmark" / "benchmark.csv")
    assert (table["status"] == "ok").all() and {"control, no teacher", "student, black-box"} <= set(table["Type"])
    train = storage.read_json(tmp_path / "my outputs" / "02_roberta" / "run.json")["settings"]
    assert train["validation_samples"] == 16 and train["negative_labels"] == ["1", "2"]
