"""A short drill of tests/drill.py; and no process outlives its parent."""

import os
import random
import signal
import subprocess
import time

import drill
import pytest


@pytest.mark.slow
def test_whatever_breaks_the_same_command_ends_with_the_same_results_or_a_remedy(tiny, tmp_path):
    seed = random.randrange(10**6)
    done = drill.drill(tmp_path, tiny, seed, kills=6, damages=24, disks=3)
    print(f"--seed {seed}", done.report(), sep="\n")
    assert not done.faults
    counts = done.counts["damaged files"]
    assert counts["tried"] == 24 and counts["detected"] >= 12  # the others are for people, or records of a start


@pytest.mark.slow
def test_no_process_outlives_a_killed_parent_and_a_signal_ends_all(tiny, tmp_path):
    command = drill.commands(tmp_path, tiny)["02_roberta"]
    for number, sent in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)):
        process = drill.start(command, tmp_path / str(number), "--num-processes", "2", "--epochs", "50")
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
