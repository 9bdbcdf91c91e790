"""A bag-of-n-grams classifier as 01 saves it and 05 loads it: vocabulary, weights, bias; no pickle."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

from common.artifacts import read_json, whole, write_json
from common.settings import stop

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

TOKEN_PATTERN = r"\w+|[!?]"  # "!" and "?" add half a point on IMDB; "I" and "7" are words too


@dataclass(frozen=True)
class Baseline:
    """logits = vectorizer(texts) · weights + bias, with weights (features, 2) and bias (2,)."""

    vectorizer: CountVectorizer
    weights: np.ndarray
    bias: np.ndarray

    def count_ngrams(self, texts: list[str]) -> "csr_matrix":
        """The (n, features) weighted counts of the texts' n-grams."""
        return self.vectorizer.transform(texts)

    def score(self, counts: "csr_matrix") -> np.ndarray:
        """(n, 2) scores whose softmax is the model's probability of each label."""
        return np.asarray(counts @ self.weights + self.bias, dtype=np.float32)

    def logits(self, texts: list[str]) -> np.ndarray:
        """The scores of texts."""
        return self.score(self.count_ngrams(texts))

    def _arrays(self) -> dict[str, np.ndarray]:
        idf = {"idf": self.vectorizer.idf_} if isinstance(self.vectorizer, TfidfVectorizer) else {}
        return {"weights": self.weights, "bias": self.bias} | idf

    def count(self) -> tuple[int, int]:
        """The number of parameters, and the bytes of parameters (float32, as saved) and vocabulary."""
        parameters = sum(array.size for array in self._arrays().values())
        return parameters, 4 * parameters + sum(len(term.encode()) for term in self.vectorizer.vocabulary_)

    def save(self, folder: Path) -> None:
        """Write config.json, vocabulary.json (the terms in column order) and .npy arrays into `folder`, whole."""
        with whole(folder) as temporary:
            temporary.mkdir()
            tfidf = isinstance(self.vectorizer, TfidfVectorizer)
            config = {"weighting": "tfidf" if tfidf else "binary", "ngram_range": list(self.vectorizer.ngram_range)}
            config["sublinear_tf"] = bool(tfidf and self.vectorizer.sublinear_tf)
            write_json(temporary / "config.json", config)
            write_json(temporary / "vocabulary.json", list(self.vectorizer.get_feature_names_out()))
            for name, array in self._arrays().items():
                np.save(temporary / f"{name}.npy", array.astype(np.float32), allow_pickle=False)


def load_baseline(folder: Path) -> Baseline:
    """The classifier that `save` wrote."""
    config, terms = read_json(folder / "config.json"), read_json(folder / "vocabulary.json")
    arrays = {file.stem: np.load(file, allow_pickle=False) for file in folder.glob("*.npy")}
    if "weights" not in arrays or len(arrays["weights"]) != len(terms):
        stop(f"{folder} is damaged: run 01_baseline.py --force")
    ngrams = tuple(config["ngram_range"])
    if config["weighting"] == "tfidf":
        vectorizer = make_tfidf(ngrams, config["sublinear_tf"], vocabulary=terms)
        vectorizer.idf_ = arrays["idf"]
    else:
        vectorizer = make_binary(ngrams, vocabulary=terms).fit([])
    return Baseline(vectorizer, arrays["weights"], arrays["bias"])


def make_tfidf(ngram_range: tuple[int, int], sublinear_tf: bool, **options: object) -> TfidfVectorizer:
    """The naive Bayes model's features."""
    options |= {"token_pattern": TOKEN_PATTERN, "dtype": np.float32}
    return TfidfVectorizer(ngram_range=ngram_range, sublinear_tf=sublinear_tf, **options)


def make_binary(ngram_range: tuple[int, int], **options: object) -> CountVectorizer:
    """NB-SVM's features: whether the review contains an n-gram."""
    options |= {"token_pattern": TOKEN_PATTERN, "dtype": np.float32}
    return CountVectorizer(ngram_range=ngram_range, binary=True, **options)
