"""common/export.py: the ONNX form gives the model's logits, and is written whole or not at all."""

from pathlib import Path

import pytest

from common import data, export, models

LENGTH = 64
TEXTS = ["good", "the plot is dull", "not bad " * 7, "the cast is warm. " * 4, "good " * 500]


def save_student(base: Path, folder: Path) -> Path:
    """A saved model of a tiny base."""
    import torch

    torch.manual_seed(0)
    tokenizer = models.load_tokenizer(str(base))
    tokenizer.model_max_length = LENGTH
    models.load_classifier(str(base)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("base", ["distilbert", "roberta"])
def test_one_file_has_the_models_logits_and_the_other_nearly(base, tiny, tmp_path):
    pytest.importorskip("onnxruntime.quantization")
    import torch

    student, target = save_student(tiny / base, tmp_path / "model"), tmp_path / "deploy" / "student"
    export.export_onnx(student, target)
    made = {str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()}
    assert made == {"README.md", "config.json", "tokenizer.json", "tokenizer_config.json", *export.ONNX_FILES.values()}
    assert (target / "config.json").read_bytes() == (student / "config.json").read_bytes()
    tokenizer, model = models.load_tokenizer(str(target)), models.load_classifier(str(student)).eval()
    ids = data.encode(tokenizer, TEXTS, LENGTH)
    fp32, int8 = (export.onnx_logits(target / file, threads=1) for file in export.ONNX_FILES.values())
    for rows in (ids, ids[:1], ids[-1:], ids[1:4]):
        batch = data.pad(rows, tokenizer.pad_token_id)
        with torch.inference_mode():
            expected = model(*batch).logits
        assert torch.allclose(fp32(*batch), expected, atol=1e-4)
        assert 0 < (int8(*batch) - expected).abs().max() < 0.5


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
