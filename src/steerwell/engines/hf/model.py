"""A loaded model: where it comes from, and its forward passes with and without steering."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from steerwell.core.errors import ArgumentError, EngineError
from steerwell.core.records import Prompt, Vectors
from steerwell.engines.hf.blocks import decoder_blocks, hidden_of, model_info
from steerwell.engines.hf.cache import joinable, slides
from steerwell.engines.hf.plan import Plan, Scope
from steerwell.engines.text import TextCodec
from steerwell.testbed.bundled import MODELS, bundled_path

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class LoadedModel:
    """A causal language model, its tokenizer and its decoder blocks.

    Forward passes take a lock, because a steered pass has its hooks in the shared modules while it runs.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, blocks: str | None, options: Mapping[str, Any]) -> None:
        self.network: nn.Module = model.eval()
        self.blocks = tuple(_named_blocks(model, blocks) if blocks else decoder_blocks(model))
        self.info = model_info(model, self.blocks, name)
        self.codec = TextCodec(tokenizer, options)
        self.end_ids = _end_ids(model, tokenizer)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.pad_id = int(tokenizer.pad_token_id or 0)
        config = model.config.get_text_config(decoder=True)
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self.joinable, self.slides = joinable(model), slides(model)
        self._accepts = set(inspect.signature(model.forward).parameters)
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.network.get_input_embeddings().weight.device  # type: ignore[operator,no-any-return]

    def room(self, prompt: Sequence[int], wanted: int) -> int:
        """How many tokens may follow a prompt: `wanted`, or what the context length leaves.

        Raises:
            ArgumentError: the prompt alone fills the context.
        """
        if self.max_length is None:
            return wanted
        if len(prompt) >= self.max_length:
            raise ArgumentError(
                f"prompt: {len(prompt)} tokens do not fit {self.info.name!r} (context {self.max_length}); shorten it"
            )
        return min(wanted, self.max_length - len(prompt))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, up to where the answer begins.

        Raises:
            ArgumentError: it holds no token, or one that the model does not have.
        """
        return self.codec.encode_known(prompt, self.vocabulary)

    def step(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: Any,
        plan: Plan,
        scope: Scope,
        *,
        prompt: bool,
        keep: int = 1,
    ) -> tuple[Tensor, Any]:
        """One forward pass of generation, and the grown cache: logits [B, keep, vocabulary] of the last positions.

        `keep` 0 means all of them.
        """  # fmt: skip
        with self._lock, plan.applied(self.blocks, scope, prompt=prompt):
            output = self._forward(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        return output.logits, output.past_key_values

    def read(self, ids: Tensor, plan: Plan, scope: Scope, keep: int) -> Tensor:
        """One teacher-forced pass over right-padded rows: logits [B, keep, vocabulary] of the last positions."""
        with self._lock, plan.applied(self.blocks, scope, prompt=True):
            output = self._forward(ids, use_cache=False, logits_to_keep=keep)
        return output.logits[:, -keep:]  # type: ignore[no-any-return]

    def pooled(self, ids: Tensor, weights: Tensor, plan: Plan, scope: Scope) -> Vectors:
        """Weighted sums of every block's states over the tokens, [B, n_layers, D]; pooled inside the hooks.

        Only `n_layers x d_model` numbers per row are ever kept, and the vocabulary projection is skipped.
        """
        found: dict[int, Tensor] = {}
        body = getattr(self.network, getattr(self.network, "base_model_prefix", "") or "_", self.network)
        with self._lock, plan.applied(self.blocks, scope, prompt=True), self._watched(found, weights):
            body(input_ids=ids, use_cache=False)
        if len(found) != len(self.blocks):
            missing = sorted(set(range(len(self.blocks))) - set(found))
            raise EngineError(f"layers {missing} were not run, so their states cannot be read")
        return torch.stack([found[layer].cpu() for layer in range(len(self.blocks))], 1).numpy()

    @contextmanager
    def _watched(self, found: dict[int, Tensor], weights: Tensor) -> Iterator[None]:
        """Hooks that pool each block's output; registered after the plan's, so they see what steering left."""
        handles: list[Any] = []

        def watch(layer: int) -> Any:
            def pool(_module: nn.Module, _inputs: Any, output: Any) -> None:
                hidden = hidden_of(output).float()
                found[layer] = torch.bmm(weights.to(hidden.device)[:, None], hidden)[:, 0]

            return pool

        try:
            for layer, block in enumerate(self.blocks):
                handles.append(block.register_forward_hook(watch(layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, ids: Tensor, **arguments: Any) -> Any:
        """The model's own forward, with those optional arguments that it knows."""
        optional = {"position_ids", "logits_to_keep"} - self._accepts
        return self.network(input_ids=ids, **{key: arguments[key] for key in arguments if key not in optional})


def load(
    name: str,
    *,
    dtype: str = "auto",
    device_map: Any = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    blocks: str | None = None,
    chat_options: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load a causal model: the bundled one, a hub id, a folder or a GGUF file; arguments as in `HFEngine.load`."""
    shown, name = name, str(bundled_path(name)) if name in MODELS else name
    if dtype != "auto" and dtype not in DTYPES:
        raise ArgumentError(f"dtype: got {dtype!r}; expected auto, {', '.join(DTYPES)}")
    place, gguf = (str(Path(name).parent), Path(name).name) if name.endswith(".gguf") else (name, gguf_file)
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if gguf:
        shared["gguf_file"] = gguf
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **shared)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=DTYPES.get(dtype, "auto"), device_map=device_map, output_loading_info=True, **shared
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EngineError(
            f"cannot load model {name!r}: {first} - give the bundled 'pilot', a hub id, a folder that holds "
            "config.json, or a .gguf file"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        raise EngineError(
            f"cannot load model {name!r}: its files lack {len(lacking)} of its weights ({lacking[0]} for one), which "
            "would be random numbers - get the whole checkpoint"
        )
    return LoadedModel(model, tokenizer, shown, blocks, chat_options or {})


def _named_blocks(model: nn.Module, path: str) -> nn.ModuleList:
    found = dict(model.named_modules()).get(path)
    if not isinstance(found, nn.ModuleList):
        raise ArgumentError(f"blocks: {path!r} is no ModuleList of {type(model).__name__}")
    return found


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the generation config's and the tokenizer's."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    several = listed if isinstance(listed, (list, tuple)) else [listed]
    return frozenset(int(token) for token in (*several, tokenizer.eos_token_id) if token is not None)
