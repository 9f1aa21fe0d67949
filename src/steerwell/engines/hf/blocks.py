"""Find a model's decoder blocks by structure, and tell what model it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerwell.core.errors import EngineError
from steerwell.core.records import ModelInfo

SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
SIGNATURE_ROWS = 1024  # signature rows come from the first tokens, which resizing a vocabulary leaves alone


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks: the `ModuleList` of `num_hidden_layers` modules next to the input embedding.

    Only where no such list stands beside the embedding, the one nearest to the root is taken, if it is the only one.

    Raises:
        EngineError: no list of that length, or several at the same depth.
    """
    config = _text_config(model)
    count = getattr(config, "num_hidden_layers", None)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    owner = next((name for name, module in model.named_modules() if embedding in module.children()), None)
    beside = [module for name, module in stacks if name.rpartition(".")[0] == owner]
    if len(beside) == 1:
        return beside[0]
    depths = [name.count(".") for name, _ in stacks]
    nearest = [module for (_, module), depth in zip(stacks, depths, strict=True) if depth == min(depths)]
    if len(nearest) != 1:
        raise EngineError(
            f"{type(model).__name__}: found {len(nearest)} candidate lists of {count} decoder blocks, expected one; "
            "pass blocks='path.to.the.ModuleList'"
        )
    return nearest[0]


def hidden_of(output: Any) -> Tensor:
    """The residual state [B, T, D] in what a block returned.

    Raises:
        EngineError: the block returns something else.
    """
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise EngineError(f"a decoder block returned {shape}; expected a state [batch, tokens, d_model]")
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """What the block returned, with its state replaced."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def model_info(model: nn.Module, blocks: Sequence[nn.Module], name: str) -> ModelInfo:
    """What a direction must know of this model."""
    config = _text_config(model)
    fields = {field: getattr(config, field, None) for field in SHAPE_FIELDS}
    return ModelInfo(
        name=name,
        architecture=type(model).__name__,
        config_hash=hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16],
        d_model=int(config.hidden_size),
        n_layers=len(blocks),
        signature=_signature(model),
        language=str(getattr(model.config, "steerwell_language", "english")),
    )


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]


def _signature(model: nn.Module) -> tuple[float, ...]:
    """A 16 x 16 sample of the input embeddings, centred and scaled; empty where the weights are not in memory."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    if weight.is_meta or not weight.is_floating_point():
        return ()
    rows = torch.linspace(0, min(weight.shape[0], SIGNATURE_ROWS) - 1, 16, device=weight.device).long()
    columns = torch.linspace(0, weight.shape[1] - 1, 16, device=weight.device).long()
    sample = weight.detach()[rows][:, columns].float().cpu()
    sample = sample - sample.mean()
    scale = sample.std()
    return tuple(round(value, 4) for value in (sample / scale if scale > 0 else sample).flatten().tolist())
