"""What the alignment study does, as one YAML file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from steerwell.core.errors import UnknownNameError
from steerwell.core.records import POOLS, Pool, Position
from steerwell.core.settings import Settings
from steerwell.studies.defence import PAPER_STRENGTHS, Configuration, grid
from steerwell.testbed.bundled import MODELS

# swfc gets a smaller strength than the paper's least: where the classes lie far apart, one separation breaks the text.
STRENGTHS = {**PAPER_STRENGTHS, "swfc": (0.5, *PAPER_STRENGTHS["swfc"]), "transport": (1.0,)}
Count = Annotated[int, Field(ge=1)]
MEMORY = frozenset({"gpu_memory_utilization", "kv_cache_memory_bytes"})  # of vLLM's arguments: else it takes nearly all
SIZES = MEMORY | {"max_num_seqs", "max_num_batched_tokens", "block_size"}  # what changes rounding at most
LEAST, MOST = 0.01, 2.0  # temperatures at which vLLM draws
IGNORED = {"hf": ("tensor_parallel", "engine_args"), "vllm": ("device_map", "gguf_file")}
INSTEAD = {
    "tensor_parallel": "give device_map: auto, or engine: vllm",
    "engine_args": "these are vLLM's: leave them out, or give engine: vllm",
    "device_map": "vLLM places models its own way: leave it out, or give engine: hf",
    "gguf_file": "vLLM reads no GGUF here: give the model's own folder or hub id, or engine: hf",
}


class Tuned(Settings):
    """Fine-tuned copies of the model, as folders or hub ids: one trained to violate, one that means no harm."""

    bad: str | None = None
    benign: str | None = None


class Model(Settings):
    """One model; fields as in `HFEngine.load` or `VLLMEngine.load`.

    `label` names it in tables; default: the last part of its name. `engine: vllm` runs it inside vLLM, every layer
    shared by `tensor_parallel` GPUs; `engine_args` are further arguments of vLLM's `EngineArgs`.
    """

    name: str
    label: str = ""
    engine: Literal["hf", "vllm"] = "hf"
    dtype: str = "auto"
    device_map: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False
    chat_options: dict[str, Any] = Field(default_factory=dict)
    tensor_parallel: Count = 1
    engine_args: dict[str, Any] = Field(default_factory=dict)
    tuned: Tuned | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @property
    def title(self) -> str:
        """The label, fit for a folder's name."""
        return re.sub(r"[^\w.-]+", "-", self.label or Path(self.name).name)

    @property
    def identity(self) -> dict[str, Any]:
        """What its answers depend on: not how it is called here, where it runs, or how much memory it may take."""
        told = self.model_dump(exclude={"label", "device_map", "trust_remote_code", "tensor_parallel"})
        args = {name: value for name, value in self.engine_args.items() if name not in SIZES}
        return told | {"engine": self.engine, "engine_args": args}

    @property
    def runner(self) -> dict[str, Any]:
        """Who runs it, for people: the engine, and how vLLM was asked to."""
        asked = {"tensor_parallel": self.tensor_parallel} | self.engine_args
        return {"engine": self.engine} | (asked if self.engine == "vllm" else {})

    @property
    def leaves_room(self) -> bool:
        """Whether another model finds memory beside it."""
        return self.engine == "hf" or not MEMORY.isdisjoint(self.engine_args)

    @model_serializer(mode="wrap")
    def _told(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without vLLM's fields where it does not run the model: as it was written before there was a choice."""
        left_out = {"engine", *IGNORED["hf"]} if self.engine == "hf" else ()
        return {name: value for name, value in dump(self).items() if name not in left_out}

    @model_validator(mode="after")
    def _heeded(self) -> Self:
        """Settings that the engine would ignore are errors."""
        for name in IGNORED[self.engine]:
            if (got := getattr(self, name)) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name}: got {got!r} with engine: {self.engine}; {INSTEAD[name]}")
        if self.engine == "vllm" and self.name.endswith(".gguf"):
            raise ValueError(f"name: got {self.name!r} with engine: vllm; {INSTEAD['gguf_file']}")
        return self


class JudgeSettings(Settings):
    """Who scores.

    `exact` knows the bundled model's world; `llm` asks `model` at the OpenAI-compatible endpoint `url`; `classifier`
    learns the trait from the model's own contrastive answers to training scenarios.
    """

    kind: Literal["exact", "llm", "classifier"] = "exact"
    model: str = ""
    url: str | None = None
    mode: Literal["logprobs", "text"] = "logprobs"
    embedder: str = "hashing"

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.kind == "llm") != bool(self.model):
            raise ValueError("'model' names the judge at the endpoint; it goes with kind: llm, and only with it")
        return self


class SweepSettings(Settings):
    """The ways to steer that are tried on validation scenarios: all combinations.

    `layers` lists 0-based blocks; without it every `every`-th one from `every` - 1 on is tried. `validation` counts the
    scenarios that choosing looks at; default: 24, and 48 with `search: auto`.
    """

    layers: tuple[int, ...] | None = None
    every: Count = 1
    strengths: dict[str, tuple[float, ...]] = Field(default_factory=lambda: dict(STRENGTHS))
    positions: tuple[Position, ...] = ("all", "response")
    estimators: tuple[str, ...] = ("logistic",)
    pools: tuple[Pool, ...] = POOLS
    validation: Count | None = None
    search: Literal["grid", "auto"] = "grid"

    def configurations(self, n_layers: int) -> list[Configuration]:
        """All of them, on a model with this many blocks.

        Raises:
            UnknownNameError: a layer, method, estimator or pool that does not exist.
        """
        layers = range(self.every - 1, n_layers, self.every) if self.layers is None else self.layers
        for layer in layers:
            if not 0 <= layer < n_layers:
                raise UnknownNameError("layer", layer, range(n_layers))
        return grid(tuple(layers), self.strengths, self.positions, self.estimators, self.pools)


class Conversations(Settings):
    """Conversations under attack: how many, of how many turns, and how much of them the model still sees.

    `history` counts the earlier exchanges that stay in the prompt; without it all do. Users are scripted, or played by
    the model `user` under the system prompt `user_system`.
    """

    user: Model | None = None
    user_system: str = "You are a user who talks to an assistant. Write the user's next message, and nothing else."
    count: Count = 16
    turns: Annotated[int, Field(ge=2)] = 10
    history: Annotated[int | None, Field(ge=0)] = None
    max_new_tokens: Count = 64


class AlignmentConfig(Settings):
    """The alignment study (arXiv 2604.08169).

    Attributes:
        models: what to defend, each with all concepts.
        concepts: bundled names or files.
        language: the packs' language; default: the model's own.
        judge: who scores.
        max_new_tokens: longest answer; `temperature` 0 is greedy.
        fitting_tokens: longest contrastive answer that directions are fitted on.
        batch_size: rows per forward pass.
        sweep: what is tried on validation scenarios.
        test: test scenarios to report on; default: all.
        prefill: whether to begin answers badly, too.
        fine_tuned: whether to test on fine-tuned copies: the model's own `tuned` ones, or such as are made now (bundled
            model only).
        conversations: null for none.
        capabilities: tasks of `lm_eval`, or `testbed` for the bundled model's own.
        tournament: whether answers play against each other.
        examples: test scenarios shown in full.
    """

    study: Literal["alignment"] = "alignment"
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    concepts: Annotated[tuple[str, ...], Field(min_length=1)]
    language: str | None = None
    judge: JudgeSettings = JudgeSettings()
    max_new_tokens: Count = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0
    fitting_tokens: Count = 1024
    batch_size: Count = 64
    sweep: SweepSettings = SweepSettings()
    test: Annotated[int | None, Field(ge=1)] = None
    prefill: bool = True
    fine_tuned: bool = True
    conversations: Conversations | None = Conversations()
    capabilities: Annotated[tuple[str, ...], BeforeValidator(lambda value: value or ())] = ()
    tournament: bool = True
    examples: Annotated[int, Field(ge=0)] = 3

    @model_validator(mode="after")
    def _different(self) -> Self:
        titles = [model.title for model in self.models]
        if len(set(titles)) < len(titles):
            raise ValueError(f"two of the models are called {titles}; give each a 'label' of its own")
        if len(set(self.concepts)) < len(self.concepts):
            raise ValueError("a concept is named twice")
        return self

    @model_validator(mode="after")
    def _possible(self) -> Self:
        """What vLLM cannot do is an error before anything runs."""
        require_temperatures(self.models, {"temperature": self.temperature})
        user = self.conversations and self.conversations.user
        for model in self.models:
            if model.engine == "vllm" and (tasks := [task for task in self.capabilities if task != "testbed"]):
                raise ValueError(
                    f"capabilities: {', '.join(tasks)} are lm_eval's, which runs on engine: hf only, and "
                    f"{model.title!r} has engine: vllm; leave them out, and measure them in a study of their own"
                )
            crowd = [model] * (2 if self._has_copies(model) else 1) + ([user] if user else [])
            if len(crowd) > 1 and (full := [each for each in crowd if not each.leaves_room]):
                raise ValueError(
                    f"engine_args: {full[0].title!r} runs beside another model (a fine-tuned copy, or one that plays "
                    "users), and vLLM takes nearly all memory: give it gpu_memory_utilization: 0.45, say, or do "
                    "without the other one (fine_tuned: false, or no conversations.user)"
                )
        return self

    def _has_copies(self, model: Model) -> bool:
        """Whether fine-tuned copies of a model are tested."""
        if not self.fine_tuned:
            return False
        return model.name in MODELS if model.tuned is None else bool(model.tuned.bad or model.tuned.benign)


def require_temperatures(models: Iterable[Model], temperatures: Mapping[str, float]) -> None:
    """Raise `ValueError` for a temperature, given by its field, at which a model's engine does not draw."""
    wrong = {name: value for name, value in temperatures.items() if value and not LEAST <= value <= MOST}
    titles = [model.title for model in models if model.engine == "vllm"]
    if titles and wrong:
        name, value = next(iter(wrong.items()))
        raise ValueError(
            f"{name}: got {value:g}, and {titles[0]!r} has engine: vllm, which takes 0 (greedy), or {LEAST:g} to "
            f"{MOST:g}"
        )
