"""The six scripts with the names that they have by default, from a hub on loopback; and what a hub can refuse."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, write_reviews
from hub import Hub

NUMBERS = ("01", "02", "03", "04a", "04b", "05")
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
TRAINED = "--validation-samples 40 --learning-rate 1e-3 --batch-size 8 --epochs 4".split()
SMALL = {
    "01": ["--validation-samples", "40"],
    "02": [*TRAINED, *"--max-length 40 --student-layers 2".split()],
    "03": [*TRAINED, *"--max-length 96".split()],
    "04a": [*TRAINED, *"--max-length 32".split()],
    "04b": [*TRAINED, *"--max-length 32 --max-transfer-samples 50".split()],
    "05": "--max-llm-samples 20 --latency-samples 5".split(),
}


def environment(address: str, home: Path, offline: bool = False) -> dict[str, str]:
    """For a script that may ask the hub at `address` and, with it as its proxy, nobody else."""
    private = re.compile("(HF|HUGGING|TRANSFORMERS)_.*|.*_proxy", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if not private.fullmatch(name)} | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HTTP_PROXY": address,
        "HTTPS_PROXY": address,
        "NO_PROXY": "127.0.0.1",
    }


def run(number: str, output: Path, env: dict[str, str], *more: str) -> subprocess.CompletedProcess:
    """One script as its own process, without a flag that names a model or data."""
    script = next(ROOT.glob(f"{number}_*.py"))
    command = [sys.executable, str(script), "--output-dir", str(output), "--seed", "5", *SMALL[number], *more]
    return subprocess.run(command, env=env, cwd=output.parent, capture_output=True, text=True)


@pytest.fixture(scope="module")
def repositories(tiny, tmp_path_factory) -> dict[str, Path]:
    """Tiny models and a few reviews under the names of the large ones, in the hub's layout."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("repositories")
    imdb = root / "imdb"
    reviews = write_reviews(root / "reviews", *(SPLITS[split] for split in ("train", "test", "unsupervised")))
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
def after(repositories, tmp_path_factory) -> tuple[Path, Path, Hub]:
    """What the six scripts leave: their outputs, the hub's cache, and a hub that is not up any more."""
    root = tmp_path_factory.mktemp("default_names")
    with Hub(repositories) as hub:
        for number in NUMBERS:
            ended = run(number, root / "outputs", environment(hub.address, root / "home"))
            assert ended.returncode == 0, f"{number}:\n{ended.stdout}\n{ended.stderr}"
    return root / "outputs", root / "home", hub


def check_benchmark(outputs: Path) -> None:
    table = pd.read_csv(outputs / "05_benchmark" / "benchmark.csv")
    student = "distilbert-base-uncased"
    assert table["Model"].tolist() == [
        "TF-IDF + naive Bayes", "NB-SVM (logistic)", "roberta-large", "Mistral-7B-v0.1",
        f"{student} from roberta-large", f"{student} control", f"{student} from Mistral-7B-v0.1",
    ]  # fmt: skip
    assert table["status"].tolist() == ["ok"] * 7
    assert table["n"].tolist() == [40, 40, 40, 20, 40, 40, 40]


def test_without_a_name_the_six_scripts_end_in_the_benchmark_of_seven_models(after):
    outputs, _, _ = after
    check_benchmark(outputs)
    for step in outputs.glob("0*"):
        assert json.loads((step / "run.json").read_text())["settings"]["dataset"] == "stanfordnlp/imdb"
    transfer = pd.read_parquet(outputs / "02_roberta" / "soft_labels" / "transfer.parquet")
    assert len(transfer) == SPLITS["unsupervised"]


def test_each_file_comes_once_and_from_nobody_but_the_hub(after):
    _, _, hub = after
    files = [line for line in hub.asked if line.startswith("GET") and "/resolve/" in line]
    weights = [line.split("/resolve/")[0] for line in files if line.endswith((".safetensors", ".parquet"))]
    assert sorted(set(weights)) == [
        "GET /FacebookAI/roberta-large", "GET /datasets/stanfordnlp/imdb", "GET /distilbert/distilbert-base-uncased",
        "GET /mistralai/Mistral-7B-v0.1",
    ]  # fmt: skip
    assert len(files) == len(set(files))
    # `datasets` asks for a summary that another host of the hub keeps, and does without it.
    assert all("//datasets-server." in asked for asked in hub.strangers), hub.strangers


def test_with_a_full_cache_and_no_hub_a_script_still_runs_offline(after):
    outputs, home, hub = after
    ended = run("05", outputs, environment(hub.address, home, offline=True), "--force")
    assert ended.returncode == 0, ended.stderr
    check_benchmark(outputs)


# The libraries wait for up to half a minute between their tries; this process does not.
LOAD = """
import sys, time
time.sleep = lambda seconds: None
from common import data, models
load = {
    "dataset": lambda name: data._read_hub(name, ["train", "test"]),
    "config": models.load_config, "tokenizer": models.load_tokenizer, "weights": models.load_classifier,
}
for case in sys.argv[1:]:
    what, _, name = case.partition(" ")
    print("case", case, file=sys.stderr)
    try:
        load[what](name)
    except SystemExit as left:
        print("exit code", left.code, file=sys.stderr)
    except Exception as problem:  # the other cases still have their say
        print("uncaught", repr(problem), file=sys.stderr)
"""


def loaded(env: dict[str, str], cases: list[str]) -> dict[str, list[str]]:
    """What one process that loads each case ("dataset some/name") said on standard error, by case."""
    ended = subprocess.run([sys.executable, "-c", LOAD, *cases], env=env, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    said: dict[str, list[str]] = {}
    for line in ended.stderr.splitlines():
        if line.startswith("case "):
            lines = said[line.removeprefix("case ")] = []
        else:
            lines.append(line)
    return said


def check_sentence(lines: list[str], *words: str) -> None:
    """One line that begins with "error: " and holds the words, and exit code 2."""
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1] == "exit code 2", lines
    for word in words:
        assert word in lines[0]


ANSWERS = {
    "gated/401": (401, "GatedRepo"),
    "gated/403": (403, "GatedRepo"),
    "missing/404": (404, "RepoNotFound"),
    "revision/404": (404, "RevisionNotFound"),
    "file/404": (404, "EntryNotFound"),
    "login/401": (401, ""),
    "broken/500": (500, ""),
    "busy/503": (503, ""),
    "cut/200": (200, "cut"),
}
KINDS = {"dataset": "pass --dataset a folder", "config": "pass a local folder", "tokenizer": "pass a local folder"}
REMEDIES = {
    "gated/401": ("is gated", "accept its terms", "hf auth login", "HF_TOKEN"),
    "gated/403": ("is gated", "accept its terms", "hf auth login", "HF_TOKEN"),
    "missing/404": ("not on the hub", "check the name"),
    "hidden/401": ("not on the hub", "private", "check the name"),
    "revision/404": ("no branch main", "check the name"),
    "login/401": ("401", "renew the login"),
    "broken/500": ("500", "try again later"),
    "busy/503": ("503", "try again later"),
    "cut/200": ("no answer", "try again"),
}


@pytest.fixture(scope="module")
def refused(repositories, tmp_path_factory) -> dict[str, list[str]]:
    """What loading said of a hub that refuses each name in its own way."""
    root = tmp_path_factory.mktemp("refused")
    roberta, imdb = repositories["FacebookAI/roberta-large"], repositories["stanfordnlp/imdb"]
    for name, needed in (("no_weights", "*.json"), ("no_tokenizer", "config.json")):
        (root / name).mkdir()
        for file in roberta.glob(needed):
            shutil.copy(file, root / name)
    incomplete = {"no/weights": root / "no_weights", "no/tokenizer": root / "no_tokenizer"}
    names = [name for name in ANSWERS if name != "file/404"] + ["hidden/401"]
    env = {"home": root / "home"}
    with Hub(dict.fromkeys(ANSWERS, roberta) | incomplete, ANSWERS) as hub:
        cases = [f"{kind} {name}" for name in names for kind in ("config", "tokenizer")]
        cases += ["config file/404", "weights no/weights", "tokenizer no/tokenizer"]
        said = loaded(environment(hub.address, **env), cases)
    with Hub(dict.fromkeys(ANSWERS, imdb), ANSWERS) as hub:
        return said | loaded(environment(hub.address, **env), [f"dataset {name}" for name in [*names, "file/404"]])


@pytest.mark.parametrize("name", REMEDIES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_hub_refuses_is_one_sentence_with_its_remedy(refused, kind, name):
    instead = () if name.startswith("gated") else (KINDS[kind],)
    check_sentence(refused[f"{kind} {name}"], name, *REMEDIES[name], *instead)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("config file/404", "check the name and its files"),
        ("weights no/weights", "model.safetensors"),
        ("tokenizer no/tokenizer", "tokenizer"),
        ("dataset file/404", "train-00000-of-00001.parquet"),
    ],
)
def test_a_file_that_the_hub_lacks_is_one_sentence(refused, case, words):
    check_sentence(refused[case], words)


@pytest.mark.parametrize(
    ("offline", "words"),
    [(True, ("not in the cache", "HF_HUB_OFFLINE")), (False, ("no answer from http://127.0.0.1", "network"))],
)
def test_offline_or_without_a_connection_an_empty_cache_is_one_sentence(tmp_path, offline, words):
    hub = Hub({})
    hub.server.server_close()  # its port refuses the connection
    said = loaded(environment(hub.address, tmp_path, offline), [f"{kind} some/name" for kind in KINDS])
    for kind, instead in KINDS.items():
        check_sentence(said[f"{kind} some/name"], "some/name", *words, instead)


def test_a_script_says_the_sentence_and_nothing_else(repositories, tmp_path):
    gated = {"FacebookAI/roberta-large": (401, "GatedRepo")}
    with Hub(repositories, gated) as hub:
        ended = run("02", tmp_path / "outputs", environment(hub.address, tmp_path / "home"))
        offline = run("01", tmp_path / "outputs", environment(hub.address, tmp_path / "empty", offline=True))
    check_sentence([*ended.stderr.splitlines(), f"exit code {ended.returncode}"], "roberta-large is gated", "HF_TOKEN")
    check_sentence([*offline.stderr.splitlines(), f"exit code {offline.returncode}"], "imdb", "--dataset a folder")
