"""A short drill of tests/drill.py; and no process outlives its parent."""

import os
import signal
import subprocess
import sys
import time

import drill
import pytest
from conftest import ROOT, write_reviews


@pytest.mark.slow
def test_whatever_breaks_the_same_command_ends_with_the_same_results_or_a_remedy():
    command = [sys.executable, "tests/drill.py", *"--kills 6 --damages 24 --disks 3".split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tried, survived, detected = map(int, done.stdout.partition("damaged files      ")[2].split()[:3])
    assert tried == survived == 24 and detected >= 12  # the others are for people, or records of a start


@pytest.mark.slow
def test_no_process_outlives_a_killed_parent_and_a_signal_ends_all(tiny, tmp_path):
    flags = drill.commands(write_reviews(tmp_path / "reviews", train=240), tiny)["02_roberta"]
    command = [sys.executable, "02_finetune_roberta.py", *flags, "--num-processes", "2", "--epochs", "50"]
    for number, sent in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)):
        output, pipe = tmp_path / str(number), subprocess.PIPE
        process = subprocess.Popen([*command, "--output-dir", str(output)], cwd=ROOT, stdout=pipe, stderr=pipe)
        deadline = time.monotonic() + 120
        while len(ranks := children(process.pid)) < 2 or not output.exists():
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
