"""kaggle.ipynb without running the pipeline: the file itself, and its cells on stand-ins for the scripts."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "kaggle.ipynb"


@pytest.fixture
def cells():
    """The sources of the code cells by id."""
    return {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"}


@pytest.fixture
def names(tmp_path):
    """What the first cells define, with a project of stand-ins: a first step that works, a second that fails."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "requirements.txt").write_text("# a comment\ntorch>=2.6\nscikit-learn>=1.5\n")
    (project / "01_works.py").write_text("import sys; print('args', sys.argv[1:])")
    (project / "demo").mkdir()
    (project / "demo" / "make.py").write_text("print('the demo')")
    (project / "02_fails.py").write_text("import sys; print('its cause', file=sys.stderr); sys.exit(2)")
    (tmp_path / "input").mkdir()
    return {
        "Path": lambda name: tmp_path / "input" if name == "/kaggle/input" else Path(name), "subprocess": subprocess,
        "shutil": shutil, "os": os, "time": time, "session_began": time.time(),
        "PRESET": "demo", "STEPS": ["01"], "FLAGS": {}, "EARLIER_OUTPUTS": None, "HOURS": 1.0, "DATASET": None,
        "project": project, "outputs": tmp_path / "outputs",
    }  # fmt: skip


def test_the_notebook_is_valid_committed_without_outputs_and_names_only_files_that_exist(cells):
    notebook = nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    text = NOTEBOOK.read_text(encoding="utf-8")
    for name in set(re.findall(r"\w+\.(?:py|txt|md)\b", text)):
        assert list(ROOT.glob(f"**/{name}")), name
    settings = {}
    exec(cells["settings"], settings)
    assert [len(list(ROOT.glob(f"{step}_*.py"))) for step in settings["STEPS"]] == [1] * 6


def test_steps_run_in_order_with_their_flags_and_a_failure_ends_them(cells, names, capfd):
    exec(cells["install"], names)
    names["FLAGS"] = {"all": "--seed 1", "01": "--dataset 'a b'"}
    exec(cells["run"], names)
    given = f"['--preset', 'demo', '--output-dir', '{names['outputs']}', '--max-hours', '1.00', '--seed', '1', "
    assert f"args {given}'--dataset', 'a b']" in capfd.readouterr().out
    names["STEPS"] = ["01", "02", "01"]
    with pytest.raises(RuntimeError, match="02_fails.py stopped with exit code 2.*run this cell again"):
        exec(cells["run"], names)
    out = capfd.readouterr().out
    assert "its cause" in out and out.count("01_works.py") == 1
    names["STEPS"] = ["4a"]
    with pytest.raises(ValueError, match="4a"):
        exec(cells["run"], names)


@pytest.mark.parametrize("folder", ["imdb-dataset-of-50k-movie-reviews", "datasets/someone/imdb"])
def test_kaggles_imdb_file_is_found_and_a_named_dataset_or_flag_goes_before_it(cells, names, tmp_path, capfd, folder):
    def run(preset="kaggle", dataset=None, flags=None) -> str:
        exec(cells["run"], names | {"PRESET": preset, "DATASET": dataset, "FLAGS": flags or {}})
        return capfd.readouterr().out

    exec(cells["install"], names)
    assert "'--dataset'" not in run()  # nothing is attached
    file = tmp_path / "input" / folder / "IMDB Dataset.csv"
    file.parent.mkdir(parents=True)
    file.touch()
    assert f"'--dataset', '{file}'" in run() and "'--dataset'" not in run("demo")
    assert "'--dataset', 'mine'" in run(dataset="mine") and str(file) not in run(dataset="mine")
    assert "'--dataset', 'flag']" in run(flags={"all": "--dataset flag"})  # the last one counts


def test_steps_share_the_hours_since_the_settings_first_run_and_a_session_without_time_ends_well(cells, names, capfd):
    settings = {"session_began": 5.0}
    exec(cells["settings"], settings)
    assert settings["session_began"] == 5.0 and settings["HOURS"] < 12
    exec(cells["install"], names)
    names |= {"STEPS": ["01", "03", "01"], "session_began": time.time() - 900}
    (names["project"] / "03_stops.py").write_text("import sys; sys.exit(3)")
    exec(cells["run"], names)  # raises nothing
    out = capfd.readouterr().out
    assert "'--max-hours', '0.75'" in out and out.count("01_works.py") == 1
    assert "before 03_stops.py was finished" in out and "EARLIER_OUTPUTS" in out
    names |= {"STEPS": ["01"], "session_began": time.time() - 2500}  # 18 minutes are left
    exec(cells["run"], names)
    out = capfd.readouterr().out
    assert "args" not in out and "before 01_works.py was finished" in out


def test_only_what_is_missing_or_too_old_is_installed_and_torch_is_held(cells, names, tmp_path, monkeypatch, capsys):
    wheel = tmp_path / "input" / "wheels" / "no_such_package.whl"
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    requirements = names["project"] / "requirements.txt"
    requirements.write_text("torch>=2.6\nno-such-package>=1\nscikit-learn>=99\nnumpy>=2.0\n")
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, len(commands) - 1, "", "no route")

    monkeypatch.setattr(subprocess, "run", run)
    exec(cells["install"], names)
    *_, attached, missing, too_old, torch = commands[0]
    assert (missing, too_old) == ("no-such-package>=1", "scikit-learn>=99") and torch.startswith("torch==")
    assert attached == f"--find-links={wheel.parent}"  # so numpy, which is there, is not installed
    assert "no-such-package>=1" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="pip download .*no-such-package>=1.*attach it"):
        exec(cells["install"], names)
    requirements.write_text("torch>=99\n")
    with pytest.raises(ModuleNotFoundError, match="torch is missing or too old"):
        exec(cells["install"], names)


def test_an_earlier_sessions_steps_are_copied_once_and_can_be_written(cells, names, tmp_path):
    earlier, outputs = tmp_path / "earlier", names["outputs"]
    for name in ("01_baseline/run.json", "02_roberta/checkpoints/checkpoint-5/optimizer.pt", ".01_baseline.lock"):
        (earlier / name).parent.mkdir(parents=True, exist_ok=True)
        (earlier / name).write_text("earlier")
    for path in earlier.glob("**/*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (outputs / "01_baseline").mkdir(parents=True)
    (outputs / ".02_roberta.copying").mkdir()  # of a copy that was interrupted
    names["EARLIER_OUTPUTS"] = str(earlier)
    exec(cells["earlier"], names)
    exec(cells["earlier"], names)
    assert sorted(path.name for path in outputs.iterdir()) == ["01_baseline", "02_roberta"]
    assert list((outputs / "01_baseline").iterdir()) == []
    copy = outputs / "02_roberta" / "checkpoints" / "checkpoint-5" / "optimizer.pt"
    assert copy.read_text() == "earlier"
    assert all(path.stat().st_mode & 0o200 for path in (copy, copy.parent, outputs / "02_roberta"))
    (tmp_path / "no_outputs").mkdir()
    names["EARLIER_OUTPUTS"] = str(tmp_path / "no_outputs")
    with pytest.raises(FileNotFoundError, match="above 01_baseline/"):
        exec(cells["earlier"], names)


def test_kaggles_secret_becomes_the_hub_token_and_its_absence_is_told(cells, names, tmp_path, monkeypatch, capsys):
    (tmp_path / "kaggle_secrets.py").write_text(
        "secrets = {}\nclass UserSecretsClient:\n    def get_secret(self, name): return secrets[name]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kaggle_secrets", raising=False)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.delenv("HF_TOKEN")
    names |= {"PRESET": "kaggle", "STEPS": ["03"]}
    exec("from importlib.util import find_spec\n" + cells["token"], names)
    out = capsys.readouterr().out
    assert "KeyError" in out and "gated" in out and "--mistral-model" in out
    sys.modules["kaggle_secrets"].secrets["HF_TOKEN"] = "hf_secret"
    exec(cells["token"], names)
    assert os.environ["HF_TOKEN"] == "hf_secret"
    assert "hf_secret" not in capsys.readouterr().out
