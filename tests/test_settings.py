import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from common import artifacts, settings

NUMBERS = {step.partition("_")[0]: step for step in artifacts.SCRIPTS}


@pytest.mark.parametrize("preset", settings.PRESETS)
def test_each_preset_key_is_a_real_flag(preset, script):
    flags = {step: vars(script(number).parse_args(["--preset", preset])) for number, step in NUMBERS.items()}
    for key in settings.PRESETS[preset]:
        owner, _, name = key.rpartition(".")
        owners = [owner] if owner else list(flags)
        assert any(name in flags[step] for step in owners), key


@pytest.mark.parametrize("number", NUMBERS)
def test_a_flag_beats_the_preset_and_the_preset_beats_the_default(number, script):
    parse = script(number).parse_args
    assert parse([]).dataset == "stanfordnlp/imdb"
    assert parse(["--preset", "demo"]).dataset == "outputs/demo/reviews"
    assert parse(["--preset=demo"]).dataset == "outputs/demo/reviews"
    assert parse(["--preset", "demo", "--dataset", "mine"]).dataset == "mine"


def test_a_value_for_one_step_beats_the_presets_shared_value(monkeypatch):
    parser = settings.make_parser("", reads=("train",))
    monkeypatch.setitem(settings.PRESETS, "demo", {"02_roberta.validation_samples": 7, "validation_samples": 9})
    assert settings.parse(parser, "02_roberta", ["--preset", "demo"]).validation_samples == 7
    assert settings.parse(settings.make_parser("", reads=("train",)), "x", ["--preset", "demo"]).validation_samples == 9


def test_help_shows_every_default_and_imports_no_torch():
    code = "import sys, runpy\nfor name in sys.argv[1:]:\n    sys.argv = [name, '--preset', 'demo', '--help']\n"
    code += "    try: runpy.run_path(name, run_name='__main__')\n    except SystemExit: print('END')\n"
    code += "assert not {'torch', 'transformers', 'sklearn'} & set(sys.modules)"
    command = [sys.executable, "-c", code, *artifacts.SCRIPTS.values()]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    *pages, rest = " ".join(shown.stdout.split()).split("END")
    assert len(pages) == 6 and not rest
    for page in pages:
        assert "(default: outputs/demo/reviews)" in page and "(default: None)" not in page


@pytest.mark.parametrize(
    ("number", "flags", "words"),
    [
        ("02", ["--presett", "demo"], "unrecognized"),
        ("02", ["--preset", "big"], "invalid choice"),
        ("02", ["--max-train-samples", "0"], "not at least 1"),
        ("02", ["--epochs", "-1"], "above 0"),
        ("02", ["--warmup-fraction", "2"], "from 0 to 1"),
        ("02", ["--seed", "-3"], "at least 0"),
        ("02", ["--negative-labels", "1", "2"], "belong together"),
        ("02", ["--max-hours", "soon"], "invalid number of hours"),
    ],
)
def test_a_wrong_value_is_told_with_exit_code_2(number, flags, words, script, capsys):
    with pytest.raises(SystemExit) as left:
        script(number).parse_args(flags)
    assert left.value.code == 2 and words in capsys.readouterr().err


def test_the_next_command_carries_what_the_scripts_must_share(script):
    args = script("02").parse_args([])
    args.validation_samples = 20  # decided by the reviews, not typed
    assert settings.next_command("05_benchmark.py") == "python 05_benchmark.py"
    assert settings.next_command("04a.py", "max_train_samples") == "python 04a.py"
    words = "--preset demo --dataset 'my reviews, all' --text-column 'Review Text' --negative-labels -1 'no way' "
    words += "--positive-labels 1 --output-dir elsewhere --seed 7"
    script("02").parse_args(shlex.split(f"{words} --validation-samples 500 --max-train-samples 90 --epochs 2"))
    assert settings.next_command("05.py") == f"python 05.py {words}"
    assert settings.next_command("02.py") == f"python 02.py {words} --validation-samples 500"
    counts = settings.next_command("04a.py", "max_train_samples", "max_transfer_samples")
    assert counts == f"python 04a.py {words} --max-train-samples 90 --validation-samples 500"
    script("03").parse_args(["--max-train-samples", "all"])
    assert settings.next_command("04b.py", "max_train_samples") == "python 04b.py --max-train-samples all"


@pytest.mark.parametrize(
    ("number", "flags", "unlabelled", "refused"),
    [
        ("04a", ["--feature-weight", "0"], 9, True),
        ("04a", [], 9, False),  # hidden states are a teacher's too
        ("04a", ["--feature-weight", "0", "--soft-labels", "transfer"], 9, False),
        ("04b", [], 9, False),  # one term per review, which alpha does not weigh
        ("04b", [], 0, True),
        ("04b", ["--soft-labels", "all"], 9, True),
    ],
)
def test_alpha_0_is_refused_where_the_loss_would_use_no_teacher(number, flags, unlabelled, refused, script, stops):
    args = script(number).parse_args(["--alpha", "0", *flags])
    if refused:
        stops(lambda: settings.refuse_no_teacher(args, unlabelled), "--alpha 0", "control")
    else:
        settings.refuse_no_teacher(args, unlabelled)


def test_settings_that_differ_from_the_defaults_come_first(script, capsys):
    settings.start(script("02").parse_args(["--epochs", "7", "--max-hours", "2"]), "/somewhere/02_finetune_roberta.py")
    changed, defaults = capsys.readouterr().out.split("and the defaults")
    assert changed.splitlines() == ["02_finetune_roberta.py with", "  epochs = 7.0", "  max_hours = 2.0"]
    assert "max_train_samples = all" in defaults and "epochs" not in defaults


def test_without_the_demo_its_preset_names_what_makes_it(script, stops, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = script("02").parse_args(["--preset", "demo", "--dataset", "mine"])
    stops(lambda: settings.start(args, "02.py"), "outputs/demo/demo-roberta", "run python demo/make.py first")
    settings.start(script("02").parse_args(["--preset", "demo", "--dataset", "a", "--roberta-model", "b"]), "02.py")
