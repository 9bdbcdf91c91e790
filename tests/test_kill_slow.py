"""kill -9 at random moments, then the same command: as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, write_reviews

from common import artifacts

KILLS = 3
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def commands(tiny, tmp_path_factory):
    """Steps of some 20 to 40 seconds: half in training, half in scoring."""
    reviews = write_reviews(tmp_path_factory.mktemp("kill") / "reviews", train=700, test=20, transfer=3000)
    shared = ["--dataset", str(reviews), *"--seed 5 --validation-samples 60 --learning-rate 5e-4".split()]
    shared += "--batch-size 8 --batch-tokens 200".split()
    encoder = "--max-length 40 --student-layers 2 --epochs 3".split()
    llm = "--max-length 96 --epochs 2 --max-train-samples 200".split()
    student = "--max-length 32 --epochs 2 --max-train-samples 200 --max-transfer-samples 1000".split()
    scripts = {
        "02_roberta": [*shared, *encoder, "--roberta-model", str(tiny / "roberta")],
        "03_mistral": [*shared, *llm, "--mistral-model", str(tiny / "mistral")],
        "04b_student_from_mistral": [*shared, *student, "--student-model", str(tiny / "distilbert")],
    }
    return {step: [artifacts.SCRIPTS[step], *flags] for step, flags in scripts.items()}


def start(command: list[str], folder) -> subprocess.Popen:
    whole = [sys.executable, *command, "--output-dir", str(folder)]
    return subprocess.Popen(whole, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_killed_steps_end_with_the_weights_and_soft_labels_of_uninterrupted_ones(commands, tmp_path):
    chance = random.Random()
    for step, command in commands.items():
        began = time.monotonic()
        process = start(command, tmp_path / "whole")
        _, told = process.communicate()
        assert process.returncode == 0, told.decode()
        seconds = time.monotonic() - began
        moments = [chance.uniform(0.2, 0.9) * seconds for _ in range(KILLS)]
        for moment in moments:
            process = start(command, tmp_path / "killed")
            try:
                process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
        process = start(command, tmp_path / "killed")
        _, told = process.communicate()
        where = f"{step} of {seconds:.0f} s, killed after {', '.join(f'{moment:.1f}' for moment in moments)} s"
        print(where)
        assert process.returncode == 0, where + told.decode()
        whole, killed = tmp_path / "whole" / step, tmp_path / "killed" / step
        files = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
        assert files == {str(path.relative_to(killed)) for path in killed.rglob("*") if path.is_file()}, where
        for name in sorted(files):
            if name.endswith((".safetensors", ".npy")):
                assert (whole / name).read_bytes() == (killed / name).read_bytes(), f"{where}: {name}"
            if name.endswith(".parquet"):
                tables = [pd.read_parquet(folder / name) for folder in (whole, killed)]
                assert tables[1]["example_id"].is_unique
                pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert np.load(tmp_path / "killed" / "02_roberta" / "soft_labels" / "transfer_features.npy").shape[0] == 3000


@pytest.mark.slow
def test_no_process_outlives_a_killed_parent_and_a_signal_ends_all(commands, tmp_path):
    for number, sent in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)):
        process = start([*commands["02_roberta"], "--num-processes", "2", "--epochs", "50"], tmp_path / str(number))
        deadline = time.monotonic() + 120
        while len(ranks := children(process.pid)) < 2 or not (tmp_path / str(number)).exists():
            assert time.monotonic() < deadline, "two processes never started"
            time.sleep(0.2)
        time.sleep(8)  # into the training
        process.send_signal(sent)
        process.communicate(timeout=60)
        assert process.returncode == (-9 if sent == signal.SIGKILL else 128 + sent)
        deadline = time.monotonic() + 30
        while any(os.path.exists(f"/proc/{rank}") for rank in ranks):
            assert time.monotonic() < deadline, f"{sent}: orphans"
            time.sleep(0.2)


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(one) for one in found if "defunct" not in one]
