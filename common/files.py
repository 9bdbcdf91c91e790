"""Review sets in the forms that people have: the files of each split, found and read into tables."""

import argparse
import codecs
import csv
import gzip
import io
import itertools
import json
import re
import textwrap
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pandas as pd
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from common import columns, hub
from common.settings import stop

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing"),
    "transfer": ("unsupervised", "unsup", "unlabelled", "unlabeled", "transfer"),
}
SEPARATED, PACKED = (".csv", ".tsv", ".txt"), (".gz", ".zip")
FORMATS = (".parquet", *SEPARATED, ".json", ".jsonl", ".ndjson", ".xlsx", ".arrow")
NOT_REVIEWS = "readme license licence notice citation requirements state package config metadata dataset-metadata"
NOT_REVIEWS += " dataset_info dataset_infos dataset_dict"
FOREIGN_SHARE = 0.15  # of bytes above 127: Western European text in cp1252 has a third of it, other alphabets more
REMEDY = "pass --dataset a file with columns text and label, or a folder with such train and test files"
REMEDY += f" ({', '.join(FORMATS[:-1])}, also .gz)"


def read(args: argparse.Namespace, reads: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    """The table of each split that is there: `text` as it stands, and `label` (0, 1, or -1 for none).

    The index is the row in the split's files. `reads` names splits. Test is always read, train where there is no test,
    and validation with train. Stops, with what is there and what to do, if the reviews cannot be read rightly.
    """
    path = Path(args.dataset).expanduser()
    if path.exists():
        found, load = _find(path) if path.is_dir() else {"train": [path]}, lambda source: next(tables(source))
    else:
        found, load = _open_hub(args.dataset)
    if not found.keys() & ({"train"} if "train" in reads else {"train", "test"}):
        held = [f"{entry.name}{'/' if entry.is_dir() else ''}" for entry in sorted(path.iterdir())]
        stop(f"{path} has no train file (it holds {_short(held) or 'nothing'}): {REMEDY}")
    needed = {*reads, "test", *(["validation"] if "train" in reads else []), *([] if "test" in found else ["train"])}
    by_split = {}
    for split in (split for split in SPLITS if split in needed & found.keys()):
        parts = []
        for source in found[split]:
            table, shown = load(source), str(source).removeprefix(f"{path}/").replace(str(path), path.name)
            print(f"{shown}: {len(table):,} rows, {split}")
            parts.append(columns.text_and_label(table, shown, args, split))
        by_split[split] = pd.concat(parts, ignore_index=True)
    if "transfer" in needed - found.keys():
        print(f"{args.dataset} has no unlabelled reviews (unsupervised.*), from which a teacher helps most")
        by_split["transfer"] = pd.DataFrame({"text": [], "label": []})
    return columns.number_labels(by_split, args.negative_labels, args.positive_labels)


# Finding


def _find(folder: Path, depth: int = 3) -> dict[str, list[Path]]:
    """The files of each split in a folder, or else in the only one of its folders that has some; empty: none."""
    if _is_saved(folder):
        return {"train": [folder]}
    files, folders = _entries(folder)
    below = (sub for inner in folders if _parse(inner.name).split for sub in _entries(inner)[1])
    folders += [sub for sub in below if _parse(sub.name).split == "transfer"]  # Stanford's train/unsup
    held = {file.name: [file] for file in files if not _is_text(file) or _parse(file.name).split}
    classes = _class_folders(folder)
    for inner in (inner for inner in folders if inner not in classes):
        is_set = _parse(inner.name).split or _is_saved(inner)
        held[f"{inner.relative_to(folder)}/"] = _only_table(inner) if is_set else []
    splits = _choose(held, str(folder))
    if splits.keys() <= {"transfer"}:
        whole = _only_table(folder, splits.get("transfer", []))
        inside = {inner.name: sets for inner in folders if depth and not whole and (sets := _find(inner, depth - 1))}
        if len(inside) > 1:
            stop(f"{folder} holds several review sets ({_short(inside)}): pass one of these folders as --dataset")
        if not whole:
            return splits | next(iter(inside.values()), {})
        splits["train"] = whole
    read = {path for paths in splits.values() for path in paths}
    left = [name for name, paths in held.items() if read.isdisjoint(paths)]
    if left:
        print(f"left out: {_short(sorted(left))}")
    unnamed = [name for name in left if held[name] and _parse(name).split is None]
    if "test" not in splits and unnamed:
        remedy = "rename it to test, or take it away: then a fifth of train becomes test"
        stop(f"{folder} has no test file, but {_short(unnamed)}: {remedy}")
    return splits


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files that may hold reviews, and the folders; hidden and foreign ones are ignored."""
    try:
        paths = [path for path in sorted(folder.iterdir()) if path.name[0] not in "._~"]
    except OSError as problem:
        stop(f"{folder} cannot be read: {problem.strerror}")
    files = [path for path in paths if path.is_file() and _format(path.name)]
    ours = [path for path in files if path.name.split(".")[0].lower() not in NOT_REVIEWS.split()]
    return ours, [path for path in paths if path.is_dir()]


class _Name(NamedTuple):
    """What the name of a file, folder or hub split says."""

    split: str | None
    exact: bool  # the split's name and nothing else, as in train.csv or train-00000-of-00002.parquet
    table: tuple  # the same for all parts of one table
    part: int | None
    parts: int | None


def _parse(name: str) -> _Name:
    suffix = re.search(rf"({'|'.join(map(re.escape, FORMATS + PACKED))})*/?$", name, re.IGNORECASE)[0]
    # The hub and Spark put an identifier behind the number of a part.
    stem = re.sub(r"(?<=\d)-[0-9a-f]{8,}(-.*)?$", "", name.removesuffix(suffix))
    numbered = re.fullmatch(r"(.*?)[-_ .]?(\d+)(?:[-_]of[-_](\d+))?", stem)
    base, part, parts = numbered.groups() if numbered else (stem, None, None)
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", base)]
    words = {re.sub(r"(?<=.)(set|data)$", "", word) for word in words}  # trainset, testdata
    splits = [split for split, names in SPLITS.items() if words & set(names)]
    # Kaggle has an unlabeledTrainData.tsv.
    split = "transfer" if "transfer" in splits else splits[0] if len(splits) == 1 else None
    exact = split is not None and base.lower() in SPLITS[split] and (part is None or parts is not None)
    table = (base.lower(), parts or part is not None, suffix.lower())
    return _Name(split, exact, table, part and int(part), parts and int(parts))


def _format(name: str) -> str | None:
    """The suffix that says how to read a file, without case and packing; ".zip" where its one file decides."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in Path(name).suffixes)]
    kind = before if last in PACKED else last
    return kind if kind in FORMATS else ".zip" if last == ".zip" else None


def _choose(held: dict[str, list], where: str) -> dict[str, list]:
    """What each split is read from, by the names of what is held; exact names go before longer and numbered ones."""
    chosen = {}
    for split in SPLITS:
        names = [name for name in held if held[name] and _parse(name).split == split]
        if names := _one_table([name for name in names if _parse(name).exact] or names, where, split):
            chosen[split] = [source for name in names for source in held[name]]
    return chosen


def _one_table(names: list[str], where: str, what: str) -> list[str]:
    """The parts of one table in their order; stops if they are of several tables, or if one is missing."""
    parsed = {name: _parse(name) for name in names}
    names = sorted(names, key=lambda name: (parsed[name].part or 0, name))
    numbers, total = [parsed[name].part or 0 for name in names], parsed[names[0]].parts if names else None
    years = len(names) > 1 and min(numbers) > 1 and not total  # reviews_2019 and reviews_2020 are no parts
    if len({name.table for name in parsed.values()}) > 1 or len(set(numbers)) < len(names) or years:
        remedy = "keep one, join them into one, name them train and test, or pass one of them as --dataset"
        stop(f"{where} holds several candidates for {what} ({_short(names)}): {remedy}")
    first, expected = 0 if 0 in numbers else 1, total or len(names)
    missing = [number for number in range(first, first + expected) if number not in numbers]
    if missing and (total or len(names) > 1):
        lacks = f"part {missing[0] - first + 1} of {total or 'several'}"
        stop(f"{where} lacks {lacks} beside {_short(names)}: add it, or pass one file as --dataset")
    return names


def _only_table(folder: Path, taken: Iterable[Path] = ()) -> list[Path]:
    """What a folder holds if no name says a split: one table, its parts, or the folder of texts itself."""
    files, folders = _entries(folder)
    files = [file for file in files if file not in taken]
    texts = list(filter(_is_text, files))
    only_texts = len(texts) == len(files) > 1 and _parse(folder.name).split in ("test", "transfer")
    if only_texts or _is_saved(folder) or _class_folders(folder):
        return [folder]
    read = files if len(files) == 1 and not folders else [file for file in files if file not in texts]
    return [folder / name for name in _one_table([file.name for file in read], str(folder), "one table")]


def _class_folders(folder: Path) -> list[Path]:
    """Folders with one text file per review, named after the label: Stanford's pos and neg, or others."""
    folders = [inner for inner in _entries(folder)[1] if not _parse(inner.name).split]
    folders = [inner for inner in folders if any(map(_is_text, _entries(inner)[0]))]
    known = {label for pair in columns.PAIRS for label in pair}
    return folders if len(folders) > 1 or known & {columns.plain_label(inner.name) for inner in folders} else []


def _is_text(file: Path) -> bool:
    return file.suffix.lower() == ".txt"


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file()  # by Dataset.save_to_disk


def _short(names: Iterable[str]) -> str:
    return textwrap.shorten(", ".join(names), 300, placeholder=" ...")


# Reading


def tables(file: Path, size: int | None = None) -> Iterator[pd.DataFrame]:
    """The rows of a file or folder as one table, or as tables of at most `size` rows; stops if it cannot be read.

    Where a dataset names its classes, the names replace their numbers. Arrow, Excel and JSON files are one table, but
    JSON lines are not.
    """
    if file.is_dir() and not _is_saved(file):
        yield _read_texts(file)
        return
    kind = ".arrow" if file.is_dir() else _format(file.name)
    if kind is None:
        stop(f"{file} is none of {', '.join(FORMATS)}: save it as one of these, best CSV UTF-8, or unpack it first")
    try:
        if kind == ".zip":
            kind = _format(_member(zipfile.ZipFile(file)))
        if kind == ".arrow":
            import datasets

            dataset = (datasets.load_from_disk if file.is_dir() else datasets.Dataset.from_file)(str(file))
            yield _with_class_names(dataset.to_pandas(), dataset.features.arrow_schema)
        elif kind == ".parquet":
            parquet = ParquetFile(_open(file))
            batches = [parquet.read()] if size is None else parquet.iter_batches(size)
            yield from (_with_class_names(batch.to_pandas(), parquet.schema_arrow) for batch in batches)
        elif kind == ".xlsx":
            sheets = pd.read_excel(_open(file), sheet_name=None, dtype=str, keep_default_na=False)
            sheets = {name: sheet for name, sheet in sheets.items() if len(sheet)}
            if not sheets:
                stop(f"{file} holds no rows: write one per review below the line that names the columns")
            if len(sheets) != 1:
                stop(f"{file} has {len(sheets)} sheets with rows ({_short(sheets)}): save each as CSV")
            yield from sheets.values()
        elif kind in SEPARATED:
            # pandas warns of a row with too many cells: its text has an unquoted comma.
            warnings.filterwarnings("error", category=pd.errors.ParserWarning)
            # "NA" and "null" are words of a review, and no column is an index.
            options = {"dtype": str, "keep_default_na": False, "index_col": False, "skipinitialspace": True}
            found = pd.read_csv(_open(file), **options, **_dialect(file), chunksize=size)
            yield from [found] if size is None else found
        else:
            yield from map(pd.DataFrame, _json_tables(file, kind, size))
    except ImportError:
        stop(f"{file} can be read where openpyxl is installed: pip install openpyxl, or save it as CSV UTF-8")
    # ValueErrors: pandas', json's and most of pyarrow's errors; EOFError, zlib and zip: damaged packing; RuntimeError:
    # a zip file with a password or another packing
    except (
        ValueError, OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile, csv.Error,
        pd.errors.ParserWarning,
    ) as problem:  # fmt: skip
        remedy = "; quote texts that hold the separator, and let the first line name each column, as in text,label"
        stop(f"{file} cannot be read as {kind[1:]}: {hub.reason(problem)}{remedy if kind in SEPARATED else ''}")


def _read_texts(folder: Path) -> pd.DataFrame:
    """The table of a folder with one text file per review; folders of classes in it are the labels."""
    rows, foreign = [], 0
    for inner in _class_folders(folder) or [folder]:
        label = {} if inner == folder else {"label": inner.name}
        for content in (file.read_bytes() for file in filter(_is_text, _entries(inner)[0])):
            try:
                rows.append({"text": content.decode("utf-8-sig")} | label)
            except UnicodeDecodeError:
                rows.append({"text": content.decode("cp1252", "replace")} | label)
                foreign += 1
    if foreign:
        print(f"{folder.name}: {foreign:,} files are not UTF-8 and were read as cp1252")
    return pd.DataFrame(rows)


def _open(file: Path) -> BinaryIO:
    """The file's bytes, unpacked."""
    if file.suffix.lower() == ".zip":
        archive = zipfile.ZipFile(file)
        return archive.open(_member(archive))
    return gzip.open(file) if file.suffix.lower() == ".gz" else open(file, "rb")


def _member(archive: zipfile.ZipFile) -> str:
    """The name of the only table in a zip file."""
    names = [name for name in archive.namelist() if _format(name) and not name.startswith("__MACOSX")]
    if len(names) != 1:
        stop(f"{archive.filename} holds {len(names)} files of reviews, not one: unpack it, and pass the folder")
    return names[0]


def _encoding(file: Path) -> str:
    """utf-8-sig, utf-16 by its mark, or cp1252, a Western spreadsheet's; stops if it seems to be another one."""
    with _open(file) as handle:
        start = handle.read(1 << 20)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        with io.TextIOWrapper(_open(file), "utf-8-sig") as lines:
            for _ in lines:
                pass
        return "utf-8-sig"
    except UnicodeDecodeError:
        if len(start.translate(None, bytes(range(128)))) > FOREIGN_SHARE * len(start):
            stop(f"{file} is neither UTF-8 nor Western European text: save it as CSV UTF-8")
    print(f"{file.name} is not UTF-8 and was read as cp1252; if its accents look wrong, save it as CSV UTF-8")
    return "cp1252"


def _dialect(file: Path) -> dict:
    """read_csv's encoding, separator, quotes and escapes."""
    encoding, known = _encoding(file), {*columns.TEXT_NAMES.split(), *columns.LABEL_NAMES.split()}
    with io.TextIOWrapper(_open(file), encoding) as lines:
        header = next((line for line in lines if line.strip()), "")
        names = {mark: next(csv.reader([header], delimiter=mark, skipinitialspace=True), []) for mark in ",;|\t"}
        hits = {mark: len(known & set(map(columns.plain_name, names[mark]))) for mark in names}
        mark = max(names, key=lambda mark: (hits[mark], mark == "\t" and mark in header, len(names[mark])))
        separators = len(names[mark]) - 1
        # Of one column, commas are a text's own, and an empty line is a review without text.
        one_column = {"sep": "\x1f", "skip_blank_lines": False}
        dialect = {"encoding": encoding} | ({"sep": mark} if separators > 0 else one_column)
        opens, closes = (re.compile(side.format(re.escape(dialect["sep"]))) for side in (r'(^|{})\s*"', r'"\s*($|{})'))
        even, paired, inside, escapes = True, True, False, False
        for line in lines:
            even = even and (separators < 1 or line.count(mark) == separators or not line.strip())
            if line.count('"') % 2 == 1:  # a cell of several lines opens here, or closes
                paired = paired and (closes if inside else opens).search(line) is not None
                inside = not inside
            escapes = escapes or re.search(r'\\"[^,;\t|\r\n"]', line) is not None
    if even and (inside or not paired):  # each line is a row, so quotation marks are a text's own
        return dialect | {"quoting": csv.QUOTE_NONE}
    return dialect | {"escapechar": "\\" if escapes else None}


def _json_tables(file: Path, kind: str, size: int | None) -> Iterator[list | dict]:
    """Lists of objects, or a dictionary of columns. Lines come `size` at a time."""
    with io.TextIOWrapper(_open(file), _encoding(file)) as handle:
        if kind == ".json":
            try:
                yield _json_rows(json.load(handle), file)
                return
            except json.JSONDecodeError:  # several lines of JSON, or damaged
                handle.seek(0)
        rows = (json.loads(line) for line in handle if line.strip())
        yield from iter(lambda: list(itertools.islice(rows, size)), [])


def _json_rows(content: object, file: Path) -> list | dict:
    """The rows in a JSON file: a list, a list under one key, a row per key, columns, or a single row."""
    if not isinstance(content, dict):
        return content
    held = list(content.values())
    lists = [key for key, rows in content.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    if len(lists) > 1:
        stop(f"{file} holds several tables ({_short(lists)}): write each to a file of its own")
    if lists:
        return content[lists[0]]
    if all(isinstance(row, dict) and len(row) < len(held) for row in held):  # a table has more rows than columns
        return held
    return content if any(isinstance(value, list | dict) for value in held) else [content]


def _with_class_names(table: pd.DataFrame, schema: pa.Schema) -> pd.DataFrame:
    """The table with each class number replaced by the dataset's own name; -1 is a missing one."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", "{}")).get("info", {}).get("features", {})
    for column, kind in features.items():
        if column in table and isinstance(kind, dict) and kind.get("_type") == "ClassLabel":
            codes = table[column].fillna(columns.UNLABELLED).astype("int64")
            table[column] = pd.Categorical.from_codes(codes, kind["names"])
    return table


def _open_hub(dataset_name: str) -> tuple[dict[str, list[str]], Callable[[str], pd.DataFrame]]:
    """The names of each split of a dataset on the hub or in its cache, and the function that reads one."""
    import datasets

    name, _, configuration = dataset_name.partition(":")
    if name.count("/") != 1 or name.startswith((".", "/")):
        examples = "stanfordnlp/imdb or OWNER/NAME:CONFIGURATION"
        stop(f"{dataset_name} does not exist: pass --dataset a file, a folder or a hub name like {examples}")
    datasets.utils.logging.disable_progress_bar()
    remedy = "pass --dataset a folder of parquet or CSV files"
    try:
        with hub.explained(f"the dataset {name}", remedy):
            dataset = datasets.load_dataset(name, configuration or None)
    # DatasetsError: a file that is not a table; RuntimeError: a dataset that is a script
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as problem:
        if choices := re.search(r"onfig name is missing.*?\[(.*?)\]", str(problem), re.DOTALL):
            names = choices[1].replace("'", "")
            pick = f"--dataset {name}:{names.split(',')[0]}"
            stop(f"the dataset {name} has several configurations ({names}): pass one, such as {pick}")
        stop(f"the dataset {name} cannot be read ({hub.reason(problem)}): {remedy}")
    splits = _choose({key: [key] for key in dataset}, f"the dataset {name}")
    if "train" not in splits:
        stop(f"the dataset {name} has no train split (it has {_short(dataset)}): {remedy}")
    if left := [key for key in dataset if [key] not in splits.values()]:
        print(f"left out: {_short(sorted(left))}")
    return splits, lambda split: _with_class_names(dataset[split].to_pandas(), dataset[split].features.arrow_schema)
