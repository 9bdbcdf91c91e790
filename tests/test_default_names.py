"""The six scripts with the names that they have by default, from a hub on loopback; and what a hub can refuse."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, write_reviews
from hub import Hub

from common import files, models

SPLITS = {"train": 140, "test": 40, "unsupervised": 60}
# As on the hub: without it `datasets` would not find the unsupervised split.
CARD = """---
dataset_info:
  config_name: plain_text
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': neg, '1': pos}}}}
configs:
- config_name: plain_text
  default: true
  data_files:
  - {split: train, path: plain_text/train-*}
  - {split: test, path: plain_text/test-*}
  - {split: unsupervised, path: plain_text/unsupervised-*}
---
"""
TRAINED = "--validation-samples 40 --learning-rate 1e-3 --batch-size 8 --epochs 3"
SCRIPTS = {
    "01_baseline.py": "--validation-samples 40",
    "02_finetune_roberta.py": f"{TRAINED} --max-length 40 --student-layers 2",
    "03_finetune_mistral.py": f"{TRAINED} --max-length 96 --epochs 2 --learning-rate 3e-3",
    "04a_distill_from_roberta.py": f"{TRAINED} --max-length 32",
    "04b_distill_from_mistral.py": f"{TRAINED} --max-length 32 --max-transfer-samples 50",
    "05_benchmark.py": "--max-llm-samples 20 --latency-samples 5 --latency-seconds 0.05 --forms none "
    "--injection-samples 6 --batch-tokens 512",
}
# Each argument is a command, or a thing to load. The libraries wait between their tries; this process does not.
PROCESS = """
import gc, runpy, shlex, sys, time
time.sleep = lambda seconds: None
from common import files, models

def script(command):
    from common import training
    gc.collect()
    gc.freeze()  # as in conftest.py
    sys.argv = shlex.split(command)
    runpy.run_path(sys.argv[0], run_name="__main__")

do = {"script": script, "dataset": files._open_hub}
do |= {"config": models.load_config, "tokenizer": models.load_tokenizer, "weights": models.load_classifier}
for case in sys.argv[1:]:
    print("case", case, file=sys.stderr)
    what, _, name = case.partition(" ")
    try:
        do[what](name)
    except SystemExit as left:
        print("exit code", left.code, file=sys.stderr)
    except Exception as problem:  # the other cases still have their say
        print("uncaught", repr(problem), file=sys.stderr)
"""


def told(cases: list[str], address: str, home: Path, offline: bool = False) -> dict[str, list[str]]:
    """Standard error by case, of a process that may ask the hub at `address` and, with it as its proxy, nobody else."""
    private = re.compile("(HF|HUGGING|TRANSFORMERS)_.*|.*_proxy", re.IGNORECASE)
    env = {name: value for name, value in os.environ.items() if not private.fullmatch(name)}
    env |= {"HF_ENDPOINT": address, "HTTP_PROXY": address, "HTTPS_PROXY": address, "NO_PROXY": "127.0.0.1"}
    env |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    ended = subprocess.run([sys.executable, "-c", PROCESS, *cases], env=env, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    by_case: dict[str, list[str]] = {}
    for line in ended.stderr.splitlines():
        if line.startswith("case "):
            lines = by_case[line.removeprefix("case ")] = []
        else:
            lines.append(line)
    return by_case


def command(script: str, outputs: Path) -> str:
    """A script without a flag that names a model or data."""
    return f"script {script} --seed 5 {SCRIPTS[script]} --output-dir {shlex.quote(str(outputs))}"


@pytest.fixture(scope="module")
def repositories(tiny, tmp_path_factory) -> dict[str, Path]:
    """Tiny models and a few reviews under the names of the large ones, in the hub's layout."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("repositories")
    imdb = root / "imdb"
    reviews = write_reviews(root / "reviews", *SPLITS.values())
    (imdb / "plain_text").mkdir(parents=True)
    (imdb / "README.md").write_text(CARD)
    for split in SPLITS:
        shutil.copy(reviews / f"{split}.parquet", imdb / "plain_text" / f"{split}-00000-of-00001.parquet")
    mistral = root / "mistral"  # in shards, as it is on the hub
    AutoModelForCausalLM.from_pretrained(tiny / "mistral").save_pretrained(mistral, max_shard_size="2MB")
    assert len(list(mistral.glob("*.safetensors"))) > 1
    for file in (tiny / "mistral").glob("*token*"):
        shutil.copy(file, mistral)
    return {
        "FacebookAI/roberta-large": tiny / "roberta",
        "mistralai/Mistral-7B-v0.1": mistral,
        "distilbert/distilbert-base-uncased": tiny / "distilbert",
        "stanfordnlp/imdb": imdb,
    }


@pytest.fixture(scope="module")
def after(repositories, tmp_path_factory) -> tuple[Path, Hub]:
    """The outputs of the five scripts on a hub, and of the benchmark with the full cache and no hub; and the hub."""
    root = tmp_path_factory.mktemp("default_names")
    *made, benchmark = [command(script, root / "outputs") for script in SCRIPTS]
    with Hub(repositories) as hub:
        lines = told(made, hub.address, root / "home")
    lines |= told([benchmark], hub.address, root / "home", offline=True)
    assert [line for line in lines.pop(benchmark) if line.startswith(("error", "uncaught"))] == []
    assert not any("exit code" in line or "uncaught" in line for said in lines.values() for line in said), lines
    return root / "outputs", hub


def test_without_a_name_the_scripts_end_in_the_benchmark_of_seven_models_which_runs_offline(after):
    outputs, _ = after
    table = pd.read_csv(outputs / "05_benchmark" / "benchmark.csv")
    student = "distilbert-base-uncased"
    assert table["Model"].tolist() == [
        "TF-IDF + naive Bayes", "NB-SVM (logistic)", "roberta-large", "Mistral-7B-v0.1",
        f"{student} from roberta-large", f"{student} control", f"{student} from Mistral-7B-v0.1",
    ]  # fmt: skip
    assert table["status"].tolist() == ["ok"] * 7
    assert table["n"].tolist() == [40, 40, 40, 20, 40, 40, 40]
    for step in outputs.glob("0*"):
        assert json.loads((step / "run.json").read_text())["settings"]["dataset"] == "stanfordnlp/imdb"
    transfer = pd.read_parquet(outputs / "02_roberta" / "soft_labels" / "transfer.parquet")
    assert len(transfer) == SPLITS["unsupervised"]


def test_each_file_comes_once_and_from_nobody_but_the_hub(after):
    _, hub = after
    files = [line for line in hub.asked if line.startswith("GET") and "/resolve/" in line]
    weights = [line.split("/resolve/")[0] for line in files if line.endswith((".safetensors", ".parquet"))]
    assert sorted(set(weights)) == [
        "GET /FacebookAI/roberta-large", "GET /datasets/stanfordnlp/imdb", "GET /distilbert/distilbert-base-uncased",
        "GET /mistralai/Mistral-7B-v0.1",
    ]  # fmt: skip
    assert len(files) == len(set(files))
    # `datasets` asks for a summary that another host of the hub keeps, and does without it.
    assert all("//datasets-server." in asked for asked in hub.strangers), hub.strangers


GATED = ("is gated", "accept its terms", "hf auth login", "HF_TOKEN")
KINDS = {"dataset": "pass --dataset a folder", "config": "pass a local folder", "tokenizer": "pass a local folder"}
REFUSED = {  # by name: status, X-Error-Code, and words of the sentence
    "gated/401": (401, "GatedRepo", GATED),
    "gated/403": (403, "GatedRepo", GATED),
    "missing/404": (404, "RepoNotFound", ("not on the hub", "private", "check the name")),
    "revision/404": (404, "RevisionNotFound", ("cannot be",)),
    "login/401": (401, "", ("401", "renew the login")),
    "broken/500": (500, "", ("500", "try again later")),
    "busy/429": (429, "", ("429", "try again later")),
    "cut/200": (200, "cut", ("does not answer", "try again")),
    "off/000": (0, "off", ("does not answer", "http://127.0.0.1", "network")),  # and from then on the hub is gone
}
INCOMPLETE = {
    "config file/404": ("check the name and its files",),
    "dataset file/404": ("cannot be read", "pass --dataset a folder"),
    "weights no/weights": ("model.safetensors",),
    "tokenizer no/tokenizer": ("tokenizer",),
}


@pytest.fixture(scope="module")
def refused(repositories, tmp_path_factory) -> dict[str, list[str]]:
    """What loading said of a hub that refuses each name in its own way."""
    root = tmp_path_factory.mktemp("refused")
    roberta, imdb = repositories["FacebookAI/roberta-large"], repositories["stanfordnlp/imdb"]
    shutil.copytree(roberta, root / "both")
    shutil.copytree(imdb, root / "both", dirs_exist_ok=True)
    for name, needed in (("weights", "*.json"), ("tokenizer", "config.json")):
        (root / name).mkdir()
        for file in roberta.glob(needed):
            shutil.copy(file, root / name)
    answers = {name: (status, code) for name, (status, code, _) in REFUSED.items()} | {
        "file/404": (404, "EntryNotFound")
    }
    served = dict.fromkeys(answers, root / "both") | {f"no/{name}": root / name for name in ("weights", "tokenizer")}
    cases = [command("02_finetune_roberta.py", root / "outputs"), *INCOMPLETE]
    cases += [f"{kind} {name}" for name in REFUSED for kind in KINDS]
    gated = {"FacebookAI/roberta-large": (401, "GatedRepo")}
    with Hub(served | {"stanfordnlp/imdb": imdb, **dict.fromkeys(gated, roberta)}, answers | gated) as hub:
        lines = told(cases, hub.address, root / "home")
    return lines | {"script": lines.pop(cases[0])}


SENTENCES = INCOMPLETE | {"script": ("FacebookAI/roberta-large", *GATED)}
for name, (_, _, words) in REFUSED.items():
    SENTENCES |= {f"{kind} {name}": (name, *words, *([] if words is GATED else [KINDS[kind]])) for kind in KINDS}


@pytest.mark.parametrize("case", SENTENCES)
def test_what_the_hub_refuses_or_lacks_is_one_sentence_with_its_remedy(refused, case):
    lines = refused[case]
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1] == "exit code 2", lines
    for word in SENTENCES[case]:
        assert word in lines[0]


def test_offline_an_empty_cache_is_one_sentence(stops):
    load = {"dataset": files._open_hub}
    load |= {"config": models.load_config, "tokenizer": models.load_tokenizer}
    for kind, instead in KINDS.items():
        stops(lambda kind=kind: load[kind]("some/name"), "some/name", "not in the cache", "HF_HUB_OFFLINE", instead)
