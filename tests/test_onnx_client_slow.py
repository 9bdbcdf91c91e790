"""The ONNX form loads in npm's @huggingface/transformers, and its labels there are Python's: about a minute."""

import json
import shutil
import subprocess

import pytest
from test_export import LENGTH, clear_reviews, save_student

from common import data, encoding, export, models

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
def test_the_javascript_client_gives_pythons_labels(client, tiny, tmp_path):
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
