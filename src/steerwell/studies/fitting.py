"""Learn a direction from a model's own contrastive answers (A, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from steerwell.concepts import Concept
from steerwell.core.artifacts import MANIFEST, library_versions, load_direction, save_direction
from steerwell.core.errors import EngineError, UnknownNameError
from steerwell.core.records import POOLS, Direction, ModelInfo, Pool, Response, Sampling, Vectors
from steerwell.engines.base import Engine
from steerwell.steering.directions import estimate

PAPER_SAMPLING = Sampling(temperature=0.6, top_p=0.9, max_new_tokens=1024, seed=42)
Progress = Callable[[int], None]
Say = Callable[[str, int], Progress]
Reading = tuple[str, Pool]  # estimator and pool: which of a contrast's directions


@dataclass(frozen=True, eq=False)
class Contrast:
    """A model's answers to a concept's training scenarios under both kinds of system prompt, and their states.

    Attributes:
        concept: what was asked.
        model: who answered.
        states: for every pool the states of the aligned and of the violating answers, each [n, n_layers, d_model];
            row i of both is one scenario.
        responses: the answers, (aligned, violating) by scenario.
        dropped: scenarios left out because one of their answers was empty.
        sampling: how the answers were drawn.
    """

    concept: Concept
    model: ModelInfo
    states: Mapping[Pool, tuple[Vectors, Vectors]]
    responses: tuple[tuple[Response, Response], ...]
    dropped: int
    sampling: Sampling

    def direction(self, method: str = "logistic", pool: Pool = "response_mean", seed: int = 42) -> Direction:
        """Fit a direction on these states; errors are those of `steerwell.steering.directions.estimate`.

        Raises:
            UnknownNameError: no such pool.
        """
        if pool not in self.states:
            raise UnknownNameError("pool", pool, self.states)
        provenance = {
            "pool": pool,
            "sampling": asdict(self.sampling),
            "concept_language": self.concept.language,
            "pairs_dropped": self.dropped,
            "mean_answer_tokens": {
                "aligned": sum(len(pair[0].token_ids) for pair in self.responses) / len(self.responses),
                "violating": sum(len(pair[1].token_ids) for pair in self.responses) / len(self.responses),
            },
            "versions": library_versions(),
        }
        return estimate(
            *self.states[pool],
            self.model,
            method=method,
            concept=self.concept.concept,
            concept_hash=self.concept.hash,
            seed=seed,
            provenance=provenance,
        )


def contrast(
    engine: Engine, concept: Concept, sampling: Sampling = PAPER_SAMPLING, progress: Progress | None = None
) -> Contrast:
    """Have the model answer every training scenario under both system prompts, and read its states in every pool.

    Args:
        engine: the model.
        concept: whose training scenarios to use.
        sampling: the paper's by default: temperature 0.6, top-p 0.9, at most 1024 tokens, seed 42.
        progress: called with the number of answers finished since the last call.

    Raises:
        EngineError: fewer than two scenarios got an answer under both prompts.
    """
    pairs = concept.contrastive("train")
    prompts = [prompt for pair in pairs for prompt in pair]
    answers = engine.generate(prompts, sampling, progress=progress)
    answered = [
        (answers[index], answers[index + 1])
        for index in range(0, len(answers), 2)
        if answers[index].token_ids and answers[index + 1].token_ids
    ]
    if len(answered) < 2:
        raise EngineError(
            f"{engine.info.name!r} left {len(pairs) - len(answered)} of {len(pairs)} scenarios of "
            f"{concept.concept!r} without an answer; does its chat template fit?"
        )
    flat = [answer for pair in answered for answer in pair]
    asked, said = [answer.prompt for answer in flat], [answer.token_ids for answer in flat]
    read = {pool: engine.capture(asked, said, pool=pool) for pool in POOLS}
    states = {pool: (rows[0::2], rows[1::2]) for pool, rows in read.items()}
    return Contrast(concept, engine.info, states, tuple(answered), len(pairs) - len(answered), sampling)


def fit(
    engine: Engine,
    concept: Concept,
    method: str = "logistic",
    sampling: Sampling = PAPER_SAMPLING,
    progress: Progress | None = None,
    pool: Pool = "response_mean",
) -> Direction:
    """Learn a concept's direction at every layer of a model: `contrast`, then `Contrast.direction`."""
    return contrast(engine, concept, sampling, progress).direction(method, pool)


def fitted(
    engine: Engine, concept: Concept, readings: Iterable[Reading], folder: Path, sampling: Sampling, say: Say
) -> dict[Reading, Direction]:
    """The directions of a concept, from a folder or fitted now on one set of answers and saved there.

    Args:
        engine: the model.
        concept: whose training scenarios to use.
        readings: which directions.
        folder: where they are, and go, one folder each.
        sampling: as in `contrast`.
        say: called with what is being done and how many answers it takes; returns where progress goes.
    """
    places = {reading: folder / reading_name(reading) for reading in dict.fromkeys(readings)}
    if not all((place / MANIFEST).is_file() for place in places.values()):  # saving puts it there last
        advance = say(f"answers that {concept.concept!r} is learned from", 2 * len(concept.train))
        answers = contrast(engine, concept, sampling, advance)
        for key, place in places.items():
            save_direction(answers.direction(*key), place)
    return {key: load_direction(place) for key, place in places.items()}


def reading_name(reading: Reading) -> str:
    """A reading as a folder's name."""
    return "-".join(reading)
