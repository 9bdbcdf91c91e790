"""The names that the six scripts have by default, loaded from a hub on loopback; and what a hub can refuse."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_reviews
from hub import Hub

from common import artifacts, files, models

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
LOADED = {  # by name, as the scripts load it
    "stanfordnlp/imdb": "dataset",
    "FacebookAI/roberta-large": "encoder",
    "mistralai/Mistral-7B-v0.1": "llm",
    "distilbert/distilbert-base-uncased": "encoder",
}
# Each argument is a command, or a thing to load. The libraries wait between their tries; this process does not.
PROCESS = """
import runpy, shlex, sys, time
time.sleep = lambda seconds: None
from common import checks, device, files, llms, models

def script(command):
    sys.argv = shlex.split(command)
    runpy.run_path(sys.argv[0], run_name="__main__")

def dataset(name):
    splits, read = files._open_hub(name)
    print("rows", *(len(read(split)) for names in splits.values() for split in names), file=sys.stderr)

def llm(name):
    checks.check_llm(name, 64, ["good"])
    llms.load_llm(name, device.cpu("fp32"))

do = {"script": script, "dataset": dataset, "llm": llm}
do |= {"encoder": lambda name: checks.check_encoder(name, 32, ["good"], device.cpu("fp32"))}
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
    parts = f"\n{ended.stderr}".split("\ncase ")[1:]
    return {case: lines for case, *lines in map(str.splitlines, parts)}


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


def test_the_names_that_the_scripts_have_by_default_are_loaded_once_from_the_hub_alone_and_then_offline(
    repositories, script, tmp_path
):
    flags = ("dataset", "roberta_model", "mistral_model", "student_model")
    scripts = [vars(script(file.partition("_")[0]).parse_args([])) for file in artifacts.SCRIPTS.values()]
    assert {args.get(flag) for args in scripts for flag in flags} - {None} == set(LOADED)
    cases = [f"{what} {name}" for name, what in LOADED.items()]
    with Hub(repositories) as hub:
        online = told(cases, hub.address, tmp_path)
    offline = told(cases, hub.address, tmp_path, offline=True)
    for said in (online, offline):
        assert said.pop(cases[0])[-1] == "rows 140 40 60"  # the unsupervised split too
        assert not [line for lines in said.values() for line in lines if "exit code" in line or "uncaught" in line]
    files = [line for line in hub.asked if line.startswith("GET") and "/resolve/" in line]
    assert len(files) == len(set(files))
    weights = {line.split("/resolve/")[0] for line in files if line.endswith((".safetensors", ".parquet"))}
    assert {line.removeprefix("GET /").removeprefix("datasets/") for line in weights} == set(LOADED)
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
    command = f"script 02_finetune_roberta.py --output-dir {shlex.quote(str(root / 'outputs'))}"
    cases = [command, *INCOMPLETE]
    cases += [f"{kind} {name}" for name in REFUSED for kind in KINDS]
    gated = {"FacebookAI/roberta-large": (401, "GatedRepo")}
    with Hub(served | {"stanfordnlp/imdb": imdb, **dict.fromkeys(gated, roberta)}, answers | gated) as hub:
        lines = told(cases, hub.address, root / "home")
    return lines | {"script": lines.pop(command)}


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
