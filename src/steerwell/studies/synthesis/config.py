"""What the synthesis study does, as one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.core.records import Pool, Position
from steerwell.core.settings import Settings
from steerwell.studies.config import Count, JudgeSettings, Model, require_temperatures
from steerwell.studies.defence import Configuration
from steerwell.synthesis.writers import Prompting

Share = Annotated[float, Field(gt=0, lt=1)]


class Way(Settings):
    """A method with its strengths along one direction: how it is estimated, and read at which tokens."""

    method: str
    strengths: Annotated[tuple[float, ...], Field(min_length=1)]
    estimator: str = "logistic"
    pool: Pool = "response_mean"
    position: Position = "all"


FOUR_WAYS = (
    Way(method="swfc", estimator="mean_difference", strengths=(1, 2, 3, 4)),
    Way(method="swfc", strengths=(1, 2, 3, 4)),
    Way(method="sttp", strengths=(0, 12, 24, 36)),
    Way(method="stmp", strengths=(1, 2, 3, 4)),
)


class Steering(Settings):
    """Every way at every layer, toward the violating class.

    `layers` lists 0-based blocks; without it every `every`-th one from `every` - 1 on is taken.
    """

    ways: Annotated[tuple[Way, ...], Field(min_length=1)] = FOUR_WAYS
    layers: tuple[int, ...] | None = None
    every: Count = 2

    def configurations(self, n_layers: int) -> list[Configuration]:
        """All of them, on a model with this many blocks.

        Raises:
            UnknownNameError: a layer, method or estimator that does not exist.
            ArgumentError: no layer at all.
        """
        layers = range(self.every - 1, n_layers, self.every) if self.layers is None else self.layers
        if not layers:
            raise ArgumentError(f"steering.layers: got none of the model's {n_layers}; list some, or lower 'every'")
        for layer in layers:
            if not 0 <= layer < n_layers:
                raise UnknownNameError("layer", layer, range(n_layers))
        return [
            Configuration(way.method, layer, strength, way.position, way.estimator, way.pool)
            for way in self.ways
            for layer in layers
            for strength in way.strengths
        ]


class PromptingGrid(Settings):
    """Every violating system prompt of the concept's pairs (the first `systems`), shots and temperature.

    The same budget as steering has: give as many combinations as there are steering configurations, or all count.
    Shots are drawn from the training originals.
    """

    systems: Count = 8
    shots: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1)
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = (0.7, 1.0)

    def configurations(self, known: int) -> list[Prompting]:
        """All of them, where the concept has `known` violating system prompts."""
        return [
            Prompting(system, shots, temperature)
            for system in range(min(self.systems, known))
            for shots in self.shots
            for temperature in self.temperatures
        ]


class Data(Settings):
    """Labelled files of your own; without them the bundled model's world gives its own (see `testbed.violations`).

    `train`, `validation` and `test` are as in `steerwell.synthesis.files.read_examples`; a missing validation or test
    set is split off `train`, so that the splits share no prompt, template or near-duplicate. `label` names the column
    of labels and `positive` the values that mean a violation.
    """

    train: str
    validation: str | None = None
    test: str | None = None
    text: str = "response"
    prompt: str | None = "prompt"
    label: str = "label"
    positive: Any = None
    template: str | None = None
    shares: tuple[Share, Share, Share] = (0.5, 0.2, 0.3)

    @model_validator(mode="after")
    def _test_with_validation(self) -> Self:
        if (self.validation is None) != (self.test is None):
            raise ValueError("'validation' and 'test' go together: give both files, or neither to have them split off")
        return self


class DetectorSettings(Settings):
    """The `linear` detectors that every configuration trains.

    `c` is fixed, so that detectors differ in their data alone; `seeds` counts trainings.
    """

    embedder: str = "minilm"
    c: Annotated[float, Field(gt=0)] = 10.0
    seeds: Annotated[int, Field(ge=3)] = 3


class EncoderSettings(Settings):
    """Fine-tuned encoders for a stated subset: these concepts, and of each the controls and the selected sources."""

    base: str = "minilm"
    concepts: Annotated[tuple[str, ...], Field(min_length=1)]
    models: tuple[str, ...] = ()
    epochs: Count = 4
    seeds: Annotated[int, Field(ge=3)] = 3


class SynthesisConfig(Settings):
    """The synthesis study, in the design of arXiv 2605.28664; its grid is ours.

    Attributes:
        models: what writes, each about all concepts.
        concepts: bundled names or files.
        language: the packs' language; default: the model's own.
        judge: scores success and coherence; null: both are missing, and with them HM3.
        data: real examples; default: the bundled model's world.
        steering: the steering configurations.
        prompting: the prompting configurations.
        texts: violating texts per configuration, which is also how many a detector is trained on.
        kept: originals that stay in training beside the generated texts: 0 replaces them, more tops them up.
        originals: violating originals that the control `original` is trained on, and shots are drawn from.
        few: smaller numbers of originals, each a control of its own.
        benign: benign originals in every training.
        validation: examples of each class to select on; test: to report on; null: all there are.
        broken: temperature of a control: unsteered texts that break without any steering. A detector that does well
            on these finds what is unlike the benign examples, whatever it is.
        temperature: of steered and unsteered texts; `top_p` and `max_new_tokens` of all.
        fitting_tokens: longest contrastive answer that directions are fitted on.
        batch_size: rows per forward pass.
        embedder: of the diversity measures.
        words: of every text that diversity looks at.
        detector: of every configuration.
        probe: whether the direction itself is tested as a detector; the model then reads every real example.
        encoders: fine-tuned ones on a subset; null: none.
        examples: texts shown of the best configurations.
    """

    study: Literal["synthesis"] = "synthesis"
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    concepts: Annotated[tuple[str, ...], Field(min_length=1)]
    language: str | None = None
    judge: JudgeSettings | None = JudgeSettings()
    data: Data | None = None
    steering: Steering = Steering()
    prompting: PromptingGrid = PromptingGrid()
    texts: Annotated[int, Field(ge=4)] = 100
    kept: Annotated[int, Field(ge=0)] = 0
    originals: Annotated[int, Field(ge=2)] = 100
    few: tuple[Annotated[int, Field(ge=2)], ...] = (10, 50)
    benign: Annotated[int, Field(ge=2)] = 100
    validation: Annotated[int | None, Field(ge=2)] = 100
    test: Annotated[int | None, Field(ge=2)] = 200
    broken: Annotated[float, Field(gt=0)] = 3.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Count = 96
    fitting_tokens: Count = 1024
    batch_size: Count = 64
    embedder: str = "minilm"
    words: Count = 50
    detector: DetectorSettings = DetectorSettings()
    probe: bool = True
    encoders: EncoderSettings | None = None
    examples: Annotated[int, Field(ge=0)] = 4

    @field_validator("few")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("give rising numbers, each once")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        titles = [model.title for model in self.models]
        if len(set(titles)) < len(titles):
            raise ValueError(f"two of the models are called {titles}; give each a 'label' of its own")
        if self.broken == self.temperature:
            raise ValueError(f"broken: {self.broken} is the temperature of all texts; give a higher one, such as 3")
        prompting = max(self.prompting.temperatures, default=0.0)
        asked = {"temperature": self.temperature, "broken": self.broken, "prompting.temperatures": prompting}
        require_temperatures(self.models, asked)
        stems = {Path(concept).stem for concept in self.concepts}
        if len(stems) < len(self.concepts):
            raise ValueError("a concept is named twice")
        for name, most in (("kept", self.kept), ("few", max(self.few, default=0))):
            if most > self.originals:
                raise ValueError(f"{name}: {most} is more than the {self.originals} 'originals'")
        if max(self.prompting.shots, default=0) > self.originals:
            raise ValueError(f"prompting.shots: more than the {self.originals} 'originals'")
        if self.encoders:
            for name, own, known in (
                ("concepts", self.encoders.concepts, stems),
                ("models", self.encoders.models, set(titles)),
            ):
                if unknown := set(own) - known:
                    raise ValueError(f"encoders.{name}: {', '.join(sorted(unknown))} is none of this study's {name}")
        return self
