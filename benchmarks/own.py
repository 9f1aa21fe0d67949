"""The engine beside itself: steered and unsteered, equal and different edits, mixed batch and one after another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.inputs import STRENGTH, Task, unit_vectors
from benchmarks.report import Row, Section, differences, per_second
from benchmarks.timing import Pace, Summary, Times, clocked, ratio, take_turns
from steerwell.core.records import Direction, Edit, EditTerm, Position, Prompt, Sampling
from steerwell.engines.base import Edits
from steerwell.engines.hf import HFEngine
from steerwell.steering.directions import estimate
from steerwell.steering.interventions import build

METHODS = (("swfc", 0.5), ("sttp", 1.0), ("stmp", 1.5), ("directional_ablation", 1.0), ("clamp", 1.0))
ROWS = 32


class Bench:
    """One model and its prompts.

    Args:
        name: the model's name, for people.
        engine: the model, without end token.
        tokenizer: its tokenizer.
        task: at least `ROWS` prompts, and pairs for directions.
        new_tokens: length of every answer.
    """

    def __init__(self, name: str, engine: HFEngine, tokenizer: Any, task: Task, new_tokens: int) -> None:
        self.name, self.engine, self._tokenizer = name, engine, tokenizer
        self.prompts = [Prompt(text=text) for text in task.prompts[:ROWS]]
        self.sampling = Sampling(max_new_tokens=new_tokens)
        self.new_tokens, self._task = new_tokens, task

    def steered_beside_unsteered(self, pace: Pace, *, thorough: bool = True) -> Section:
        """One layer and all layers, and (thorough) position response and a gate; nothing but the steering differs."""
        layers = self.engine.info.n_layers
        cases: dict[str, Edits] = {
            "unsteered": None,
            "one layer": self._tiny([layers // 2]),
            "one layer, position response": self._tiny([layers // 2], "response"),
            "one layer, gated": self._tiny([layers // 2], gate=0.0),
            f"all {layers} layers": self._tiny(range(layers)),
        }
        if not thorough:
            cases = {name: cases[name] for name in ("unsteered", "one layer", f"all {layers} layers")}
        plain = self._tokens(None)
        remarks = [text for name, edits in cases.items() for text in differences(name, plain, self._tokens(edits))]
        times = self._race(cases, pace)
        rows = [
            Row(name, ratio(times, name, "unsteered"), self._speed(times, name), at_most=1.03)
            for name in cases
            if name != "unsteered"
        ]
        note = (
            f"Time of steered over time of unsteered generation, batch {ROWS}, {self.new_tokens} new tokens, "
            f"strength 1e-6, position all unless named. Unsteered: {self._speed(times, 'unsteered')}."
        )
        return Section(f"Steered beside unsteered: {self.name}", note, rows, remarks)

    def different_beside_equal(self, pace: Pace) -> Section:
        """32 rows with 32 different edits beside 32 rows with one."""
        directions, layers = self._directions(8), self.engine.info.n_layers
        middle, every = layers // 2, range(layers)
        same = build(directions[0], "sttp", middle, 1.0)
        here = [self._varied(directions, row, middle) for row in range(ROWS)]
        gated = [
            build(directions[row % 8], "conditional", middle, 0.5 + row / 64, gate=directions[-1])
            if row % 6 == 5
            else edit
            for row, edit in enumerate(here)
        ]
        cases: dict[str, Edits] = {
            "equal": same,
            "equal, all layers": build(directions[0], "sttp", every, 1.0),
            "different": here,
            "different, some gated by a second direction": gated,
            "different layers": [self._varied(directions, row, row % layers) for row in range(ROWS)],
            "different, all layers": [self._varied(directions, row, every) for row in range(ROWS)],
        }
        times = self._race(cases, pace)
        pairs = [
            ("different", "equal", "32 different (method, strength, direction, position), one layer / 32 equal there"),
            (
                "different, some gated by a second direction",
                "equal",
                "the same, every sixth row gated by a second direction / 32 equal, one layer",
            ),
            ("different, all layers", "equal, all layers", f"32 different / 32 equal, all {layers} layers"),
            (
                "different layers",
                "equal, all layers",
                f"32 different, row i at layer i mod {layers} / 32 equal, all layers",
            ),
            ("different layers", "equal", f"32 different, row i at layer i mod {layers} / 32 equal, one layer"),
        ]
        rows = [
            Row(what, ratio(times, name, base), self._speed(times, name), at_most=1.05) for name, base, what in pairs
        ]
        note = (
            f"Time of a batch whose {ROWS} rows differ over one whose rows are equal, {self.new_tokens} new tokens. "
            "Methods: " + ", ".join(name for name, _ in METHODS) + "; 8 directions, 32 strengths, both positions. "
            "When every row has a layer of its own, every layer has work to do, so the last line compares "
            f"{layers} edited layers with one."
        )
        return Section(f"Different beside equal edits: {self.name}", note, rows)

    def mixed_beside_one_by_one(self, pace: Pace) -> Section:
        """32 configurations, one prompt each: one mixed batch, or one call after another."""
        directions, layers = self._directions(8), self.engine.info.n_layers
        edits = [self._varied(directions, row, row % layers) for row in range(ROWS)]

        def one_by_one() -> None:
            for prompt, edit in zip(self.prompts, edits, strict=True):
                self.engine.generate([prompt], self.sampling, edit)

        def together() -> None:
            self.engine.generate(self.prompts, self.sampling, edits)

        times = take_turns({"together": clocked(together), "one by one": clocked(one_by_one)}, pace)
        figures = f"{self._speed(times, 'together')} mixed, {self._speed(times, 'one by one')} one by one"
        row = Row("one mixed batch / 32 calls", ratio(times, "one by one", "together"), figures, at_least=4)
        note = f"Throughput of {ROWS} configurations with one prompt each, {self.new_tokens} new tokens."
        return Section(f"Mixed batch beside one by one: {self.name}", note, [row])

    def _race(self, cases: dict[str, Edits], pace: Pace) -> Times:
        def run(edits: Edits) -> None:
            self.engine.generate(self.prompts, self.sampling, edits)

        return take_turns({name: clocked(lambda edits=edits: run(edits)) for name, edits in cases.items()}, pace)  # type: ignore[misc]

    def _speed(self, times: Times, name: str) -> str:
        return per_second(ROWS * self.new_tokens, Summary.of(times[name]))

    def _tokens(self, edits: Edits) -> list[tuple[int, ...]]:
        return [row.token_ids for row in self.engine.generate(self.prompts, self.sampling, edits)]

    def _tiny(self, layers: Iterable[int], position: Position = "all", gate: float = float("inf")) -> Edit:
        """An edit that does everything and changes nothing."""
        vectors = unit_vectors(self.engine.info.n_layers, self.engine.info.d_model)
        return Edit(tuple(EditTerm(layer, vectors[layer], gate, STRENGTH, 0.0, position) for layer in layers))

    def _directions(self, count: int) -> list[Direction]:
        """Directions that differ: each is fitted on other pairs."""
        pairs = self._task.pairs[: 4 * count]
        rows = [row for a, b, c, d in pairs for row in ((a, b), (c, d))]
        answers = self._tokenizer([answer for _, answer in rows], add_special_tokens=False)["input_ids"]
        states = self.engine.capture([Prompt(text=prompt) for prompt, _ in rows], answers)
        good, bad = states[0::2], states[1::2]
        return [
            estimate(good[index::count], bad[index::count], self.engine.info, method="mean_difference")
            for index in range(count)
        ]

    def _varied(self, directions: Sequence[Direction], row: int, layers: int | Iterable[int]) -> Edit:
        """The edit of a row: no two rows agree in direction, method, strength and position."""
        method, strength = METHODS[row % len(METHODS)]
        position: Position = "response" if row // len(METHODS) % 2 else "all"
        return build(directions[row % len(directions)], method, layers, strength * (1 + row / ROWS), position=position)
