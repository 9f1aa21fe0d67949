"""What model vLLM runs: the same `ModelInfo` that the Hugging Face engine gives, so that directions fit both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from steerwell.core.records import ModelInfo
from steerwell.engines.hf.blocks import SHAPE_FIELDS, SIGNATURE_ROWS

SAMPLE = 16  # rows and columns of the embedding's sample, as in `hf.blocks`


def embedding_sample(model: nn.Module, vocabulary: int) -> dict[int, list[float]]:
    """Those rows of the sample of the input embeddings that this worker holds; none where they are quantised."""
    named = next((module for module in model.modules() if type(module).__name__ == "VocabParallelEmbedding"), None)
    weight = getattr(named, "weight", None)
    if weight is None or not weight.is_floating_point():
        return {}
    shard: Any = getattr(named, "shard_indices", None)
    first, end = (shard.org_vocab_start_index, shard.org_vocab_end_index) if shard else (0, vocabulary)
    rows = _sampled(vocabulary)
    columns = torch.linspace(0, weight.shape[1] - 1, SAMPLE).long().to(weight.device)
    return {row: weight.detach()[row - first, columns].float().tolist() for row in rows if first <= row < end}


def _sampled(vocabulary: int) -> list[int]:
    """Rows of the sample."""
    rows: list[int] = torch.linspace(0, min(vocabulary, SIGNATURE_ROWS) - 1, SAMPLE).long().tolist()
    return rows


def signature(samples: Iterable[Mapping[int, list[float]]], vocabulary: int) -> tuple[float, ...]:
    """The sample centred and scaled, as `ModelInfo.signature` wants it; empty unless every row is there."""
    rows = {int(row): values for sample in samples for row, values in sample.items()}
    if set(rows) != set(_sampled(vocabulary)):
        return ()
    values = np.array([rows[row] for row in sorted(rows)], np.float32)
    values = values - values.mean()
    scale = float(values.std(ddof=1))
    return tuple(round(value, 4) for value in (values / scale if scale > 0 else values).flatten().tolist())


def model_info(config: Any, name: str, samples: Iterable[Mapping[int, list[float]]]) -> ModelInfo:
    """What a direction must know of the model; `config` is the Hugging Face configuration."""
    text = config.get_text_config(decoder=True)
    shape = {field: getattr(text, field, None) for field in SHAPE_FIELDS}
    return ModelInfo(
        name=name,
        architecture=str((config.architectures or ["?"])[0]),
        config_hash=hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16],
        d_model=int(text.hidden_size),
        n_layers=int(text.num_hidden_layers),
        signature=signature(samples, int(text.vocab_size)),
        language=str(getattr(config, "steerwell_language", "english")),
    )


def info_of(config: Any, samples: Iterable[Mapping[int, list[float]]] = ()) -> ModelInfo:
    """The same from a vLLM configuration."""
    return model_info(config.model_config.hf_config, str(config.model_config.model), samples)
