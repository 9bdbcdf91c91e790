"""What tests share: the scripts as modules, a small corpus, tiny checkpoints of the three architectures."""

import argparse
import gc
import importlib.util
import os
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import device, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are so small that a second thread only waits
ROOT = Path(__file__).parent.parent
TINY_SIZES = {"train": 200, "test": 2, "unsupervised": 200}
CPU = device.Hardware("cpu", "fp32", "test")


BRIEFLY = {"max_llm_samples": 20, "form_samples": 10, "latency_samples": 5, "latency_seconds": 0.05}
BRIEFLY |= {"injection_samples": 6, "batch_tokens": 512}


def quick_preset(bases: Path) -> dict[str, object]:
    """A preset with which the six scripts take seconds each, on the demo's base checkpoints in `bases`."""
    flags = {"roberta": "roberta_model", "mistral": "03_mistral.mistral_model", "distilbert": "student_model"}
    preset = {flag: str(bases / f"demo-{base}") for base, flag in flags.items()}
    preset |= {"learning_rate": 1e-3, "batch_size": 8, "epochs": 4, "max_length": 32}
    preset |= {"02_roberta.max_length": 40, "02_roberta.student_layers": 2}
    preset |= {"03_mistral.max_length": 96, "03_mistral.epochs": 2, "03_mistral.learning_rate": 3e-3}
    return preset | {f"05_benchmark.{name}": value for name, value in BRIEFLY.items()}


def training_args(**changes: object) -> argparse.Namespace:
    """The flags of a training of few reviews."""
    flags = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": 4, "seed": 1}
    return argparse.Namespace(**flags | {"weight_decay": 0.0, "warmup_fraction": 0.0} | changes)


def load_script(number: str):
    """Load a numbered script by its beginning ("04a"); its name is no identifier, so import cannot."""
    file = next(ROOT.glob(f"{number}_*.py"))
    spec = importlib.util.spec_from_file_location(f"script_{number}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def pytest_collection_finish() -> None:
    """Pass over all imports when garbage is collected, as scripts do between models: else it takes 0.3 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def script():
    """`load_script`."""
    return load_script


def write_reviews(folder: Path, train: int = 80, test: int = 20, transfer: int = 30) -> Path:
    """A folder of label-sorted parquet files whose texts name their split and row."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", train), ("test", test), ("unsupervised", transfer)):
        labels = [-1] * n if split == "unsupervised" else [0] * (n // 2) + [1] * (n - n // 2)
        words = ("dull weak silly", "funny warm fresh")
        # Lengths vary, but not with the label: training groups reviews by length. Unlabelled ones are of both kinds.
        texts = [
            f"{words[row % 2 if label < 0 else label]} film {'film ' * (row * 7 % 5)}, {split} {row}"
            for row, label in enumerate(labels)
        ]
        pd.DataFrame({"text": texts, "label": labels}).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def reviews_folder(tmp_path):
    return write_reviews(tmp_path / "reviews")


@pytest.fixture
def data_args(reviews_folder):
    """The flags that load_reviews reads, for a small folder; set attributes to change them."""
    parser = settings.make_parser(None, reads=("train", "transfer", "test"))
    return parser.parse_args(["--dataset", str(reviews_folder), "--seed", "1", "--validation-samples", "20"])


@pytest.fixture
def stops(capsys):
    """Assert that a call tells a user error in one line (with these words) and leaves with exit code 2."""

    def check(call, *words: str) -> str:
        with pytest.raises(SystemExit) as left:
            call()
        message = capsys.readouterr().err.strip()
        assert left.value.code == 2
        assert len(message.splitlines()) == 1, message
        for word in words:
            assert word in message, message
        return message

    return check


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The demo's three base checkpoints, hardly pre-trained: enough for everything but accuracy."""
    from demo import make

    folder = tmp_path_factory.mktemp("tiny") / "demo"
    make.make(folder, sizes=TINY_SIZES, effort=0.01)
    for role in ("roberta", "mistral", "distilbert"):
        (folder / role).symlink_to(f"demo-{role}")
    pytest_collection_finish()  # of what making them has imported
    return folder


@pytest.fixture
def with_lora(tiny):
    """Make the tiny LLM with 03's adapters. Their second matrices are zero at first, and here random."""
    import torch

    from common import llms

    def make(std: float = 0.02, **changes):
        torch.manual_seed(0)
        flags = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "gradient_checkpointing": False} | changes
        model = load_script("03").with_lora(argparse.Namespace(**flags), llms.load_llm(str(tiny / "mistral"), CPU))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=std)
        return model

    return make
