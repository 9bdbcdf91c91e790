"""common/export.py: the ONNX form gives the model's logits, and is written whole or not at all."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from common import data, encoding, export, models
from demo import make as demo

LENGTH = 64
CLIENT = "@huggingface/transformers@4.3.1"
SCRIPT = """\
import { readFileSync } from "node:fs";
import { env, pipeline } from "@huggingface/transformers";

const [folder, name, dtype] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = folder;
const classify = await pipeline("text-classification", name, { dtype });
const found = [];
for (const text of JSON.parse(readFileSync("texts.json", "utf8"))) found.push((await classify(text))[0]);
console.log(JSON.stringify(found));
"""


def clear_reviews(n: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Texts whose opinions all agree, and their labels; the two classes alternate."""
    rng, labels = random.Random(seed), np.arange(n) % 2
    texts = []
    for label in labels:
        said = ((rng.choice(demo.ASPECTS), rng.choice(demo.ADJECTIVES[label])) for _ in range(rng.randint(1, 9)))
        texts.append(". ".join(f"the {aspect} is {adjective}" for aspect, adjective in said))
    return texts, labels


def save_student(base: Path, folder: Path, steps: int = 0) -> Path:
    """A saved model of a tiny base. After 60 training steps the logits of clear reviews are well apart."""
    import torch

    torch.manual_seed(0)
    model, tokenizer = models.load_classifier(str(base)), models.load_tokenizer(str(base))
    tokenizer.model_max_length = LENGTH
    texts, labels = clear_reviews(64, seed=0)
    batch = encoding.pad(encoding.encode(tokenizer, texts, LENGTH), tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(*batch).logits, torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("base", "steps"), [("distilbert", 60), ("roberta", 0)])
def test_both_files_have_the_models_labels_and_one_its_logits(base, steps, tiny, tmp_path):
    pytest.importorskip("onnxruntime.quantization")
    import torch

    student, target = save_student(tiny / base, tmp_path / "model", steps), tmp_path / "deploy" / "student"
    export.export_onnx(student, target)
    made = {str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()}
    assert made == {"README.md", "config.json", "tokenizer.json", "tokenizer_config.json", *export.ONNX_FILES.values()}
    assert (target / "config.json").read_bytes() == (student / "config.json").read_bytes()
    tokenizer, model = models.load_tokenizer(str(target)), models.load_classifier(str(student)).eval()
    texts, labels = clear_reviews(40, seed=1)
    ids = encoding.encode(tokenizer, [*texts, "good " * 500], LENGTH)
    fp32, int8 = (export.onnx_logits(target / file, threads=1) for file in export.ONNX_FILES.values())
    for rows in (ids, ids[:1], ids[-1:], ids[3:8]):
        batch = encoding.pad(rows, tokenizer.pad_token_id)
        with torch.inference_mode():
            expected = model(*batch).logits
        assert torch.allclose(fp32(*batch), expected, atol=1e-4)
        assert 0 < (int8(*batch) - expected).abs().max() < 0.5
    for logits in (fp32, int8) if steps else ():
        assert list(logits(*encoding.pad(ids[:-1], tokenizer.pad_token_id)).argmax(1)) == list(labels)


def test_a_failed_export_leaves_nothing_and_spares_an_earlier_one(tiny, tmp_path, monkeypatch, stops):
    quantization = pytest.importorskip("onnxruntime.quantization")
    student, target = save_student(tiny / "distilbert", tmp_path / "model"), tmp_path / "deploy" / "student"
    target.mkdir(parents=True)
    (target / "earlier").write_text("form")
    monkeypatch.setattr(export.tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(export, "MAX_DIFFERENCE", -1.0)
        stops(lambda: export.export_onnx(student, target), "distilbert", "differs from the model", "constraints.txt")
    monkeypatch.setattr(quantization, "quantize_dynamic", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.export_onnx(student, target)
    left = {file.name for file in tmp_path.rglob("*")} - {file.name for file in student.iterdir()}
    assert left == {"model", "deploy", "student", "earlier"}


def test_absent_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    for absent, end in (([], ""), (["onnx"], "onnx"), (["onnx", "onnxruntime"], "onnx onnxruntime")):
        monkeypatch.setattr(export.importlib.util, "find_spec", lambda name, absent=absent: name not in absent or None)
        missing = export.missing_for_onnx()
        assert missing.endswith(f": pip install {end}") if absent else missing is None


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A folder with the installed npm package and a script that labels texts.json."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no node or no npm")
    if missing := export.missing_for_onnx():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("client")
    install = subprocess.run(["npm", "install", "--ignore-scripts", CLIENT], cwd=folder, capture_output=True, text=True)
    if install.returncode:
        pytest.skip(f"npm cannot install {CLIENT}: {install.stderr.strip().splitlines()[-1]}")
    (folder / "label.mjs").write_text(SCRIPT)
    return folder


@pytest.mark.slow
def test_the_onnx_form_loads_in_npms_transformers_with_pythons_labels(client, tiny, tmp_path):  # about a minute
    # A trained head: the clear reviews' logits are further apart than two versions of onnxruntime can differ.
    student = save_student(tiny / "distilbert", tmp_path / "model", steps=60)
    export.export_onnx(student, tmp_path / "deploy" / "student")
    texts, labels = clear_reviews(100, seed=1)
    (client / "texts.json").write_text(json.dumps(texts))
    tokenizer = models.load_tokenizer(str(student))
    ids = encoding.encode(tokenizer, texts, LENGTH)
    for dtype, file in zip(("fp32", "q8"), export.ONNX_FILES.values()):
        command = ["node", "label.mjs", str(tmp_path / "deploy"), "student", dtype]
        run = subprocess.run(command, cwd=client, capture_output=True, text=True, check=True)
        found = json.loads(run.stdout.strip().splitlines()[-1])
        logits = export.onnx_logits(tmp_path / "deploy" / "student" / file, threads=1)
        batches = (encoding.pad([row], tokenizer.pad_token_id) for row in ids)  # one by one, as the client reads them
        expected = [logits(*batch)[0].softmax(0) for batch in batches]
        assert [answer["label"] for answer in found] == [data.LABELS[int(row.argmax())] for row in expected]
        assert [answer["score"] for answer in found] == pytest.approx([float(row.max()) for row in expected], abs=0.02)
        assert len(set(labels)) == 2 and [data.LABELS.index(answer["label"]) for answer in found] == list(labels)
