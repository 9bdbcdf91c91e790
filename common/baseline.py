"""A bag-of-n-grams classifier as 01 saves it and 05 loads it: vocabulary, weights, bias; no pickle."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer

from common.settings import stop
from common.storage import read_json, whole, write_json

TOKEN_PATTERN = r"\w+|[^\w\s]"  # "I" and "7" are words too; each mark of punctuation is worth half a point on IMDB
OPTIONS = ("analyzer", "token_pattern", "ngram_range", "binary", "use_idf", "norm")  # in config.json


@dataclass(frozen=True)
class Baseline:
    """logits = vectorizer(texts) · weights + bias, with weights (features, 2) and bias (2,)."""

    vectorizer: TfidfVectorizer
    weights: np.ndarray
    bias: np.ndarray

    def score(self, counts: csr_matrix) -> np.ndarray:
        """(n, 2) scores of the vectorizer's (n, features) counts: their softmax is the probability of each label."""
        return np.asarray(counts @ self.weights + self.bias, dtype=np.float32)

    def logits(self, texts: list[str]) -> np.ndarray:
        """The scores of texts."""
        return self.score(self.vectorizer.transform(texts))

    def _arrays(self) -> dict[str, np.ndarray]:
        idf = {"idf": self.vectorizer.idf_} if self.vectorizer.use_idf else {}
        return {"weights": self.weights, "bias": self.bias} | idf

    def count(self) -> tuple[int, int]:
        """The number of parameters, and the bytes of parameters (float32, as saved) and vocabulary."""
        parameters = sum(array.size for array in self._arrays().values())
        return parameters, 4 * parameters + sum(len(term.encode()) for term in self.vectorizer.vocabulary_)

    def save(self, folder: Path) -> None:
        """Write config.json, vocabulary.json (the terms in column order) and .npy arrays into `folder`, whole."""
        with whole(folder) as temporary:
            temporary.mkdir()
            write_json(temporary / "config.json", {name: getattr(self.vectorizer, name) for name in OPTIONS})
            write_json(temporary / "vocabulary.json", list(self.vectorizer.get_feature_names_out()))
            for name, array in self._arrays().items():
                # In C order: of a transposed array scipy's product copies 7 MB for each review, which takes 7 ms.
                np.save(temporary / f"{name}.npy", np.ascontiguousarray(array, np.float32), allow_pickle=False)


def load_baseline(folder: Path) -> Baseline:
    """The classifier that `save` wrote."""
    config, terms = read_json(folder / "config.json"), read_json(folder / "vocabulary.json")
    arrays = {file.stem: np.load(file, allow_pickle=False) for file in folder.glob("*.npy")}
    if "weights" not in arrays or len(arrays["weights"]) != len(terms):
        stop(f"{folder} is damaged: run 01_baseline.py --force")
    options = config | {"ngram_range": tuple(config["ngram_range"]), "dtype": np.float32}
    return Baseline(make_vectorizer(terms, arrays.get("idf"), **options), arrays["weights"], arrays["bias"])


def units(analyzer: str) -> dict[str, object]:
    """CountVectorizer's options for n-grams of words ("word") or of characters ("char"), once a review."""
    pattern = TOKEN_PATTERN if analyzer == "word" else None
    return {"analyzer": analyzer, "token_pattern": pattern, "binary": True, "dtype": np.float32}


def make_vectorizer(terms: list[str], idf: np.ndarray | None, **options: object) -> TfidfVectorizer:
    """The weighted counts of known n-grams. `idf` has a weight for each, or is None where `use_idf` is False."""
    vectorizer = TfidfVectorizer(vocabulary=terms, **options)
    if idf is None:
        return vectorizer.fit([""])  # nothing is learned from it
    vectorizer.idf_ = idf
    return vectorizer
