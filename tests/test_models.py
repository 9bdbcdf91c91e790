import numpy as np
import pytest

from common import encoding, models


@pytest.mark.parametrize(("role", "typed"), [("roberta", "</s> <mask>"), ("distilbert", "[SEP] [MASK]")])
def test_an_input_is_what_its_own_tokenizer_makes_of_a_short_text_but_typed_special_tokens_are_text(tiny, role, typed):
    tokenizer = models.load_tokenizer(str(tiny / role))
    texts = ["The plot is dull.", "", "😀 Привет 世界", f"good {typed} bad"]
    *encoded, plain = encoding.encode(tokenizer, texts, 64)
    assert [ids.tolist() for ids in encoded] == tokenizer(texts[:3])["input_ids"]
    assert not set(plain[1:-1].tolist()) & (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})


def test_truncation_keeps_a_quarter_of_the_head_and_the_rest_of_the_tail(tiny):
    assert encoding.head_and_tail(list(range(100)), 8) == [0, 1, 94, 95, 96, 97, 98, 99]
    assert encoding.head_and_tail([1, 2], 8) == [1, 2]
    tokenizer = models.load_tokenizer(str(tiny / "distilbert"))
    (ids,) = encoding.encode(tokenizer, ["dull " * 400], 32)
    assert len(ids) == 32 and ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id


def test_parameters_and_bytes_are_counted(tiny):
    model = models.load_classifier(str(tiny / "roberta"))
    parameters = sum(np.prod(tensor.shape) for tensor in model.state_dict().values() if tensor.is_floating_point())
    assert models.count(model) == (parameters, 4 * parameters)


def test_a_large_file_is_known_by_its_name_its_size_its_ends_and_its_middle(tmp_path):
    mib, digests = 2**20, []
    whole = bytes(8 * mib)
    changed = [whole[:place] + b"x" + whole[place + 1 :] for place in (0, len(whole) // 2, len(whole) - 1)]
    for content in (whole, *changed, bytes(9 * mib), bytes(10 * mib)):
        (tmp_path / "model.safetensors").write_bytes(content)
        digests.append(models.sampled_digest(str(tmp_path)))
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / ".cache").mkdir()
    digests.append(models.sampled_digest(str(tmp_path)))
    assert len(set(digests)) == len(digests) == 7 and models.sampled_digest("a/hub-name") is None


def test_a_folder_that_is_no_model_and_a_missing_folder_are_told_apart(tmp_path, stops):
    stops(lambda: models.load_tokenizer(str(tmp_path)), "no config.json")
    stops(lambda: models.load_classifier("./nowhere"), "does not exist")
