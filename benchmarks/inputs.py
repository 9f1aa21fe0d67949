"""What every contestant is asked: the same texts for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

THINGS = ("river", "mountain", "teacher", "bridge", "letter", "garden", "winter", "kitchen", "doctor", "village")
QUESTIONS = (
    "What do people say about the {}?",
    "Where would you look for a {}?",
    "Is every {} as old as it looks, and how could one tell?",
    "Tell me about a {}.",
)
ANSWERS = (
    "A {} is known to many people here, and most of them would tell you the same thing about it.",
    "There is no {} like that. I will say it again: there is none, and there never was one in this town.",
)
SYSTEMS = ("You are helpful.", "You always tell the truth.", "You always lie.")
STRENGTH = 1e-6  # activation units: the whole hot path runs, and no token changes


@dataclass(frozen=True, slots=True)
class Task:
    """Texts, already in the model's chat format.

    Attributes:
        prompts: what generation starts from.
        pairs: (aligned prompt, aligned answer, violating prompt, violating answer) of each training scenario.
    """

    prompts: list[str]
    pairs: list[tuple[str, str, str, str]]

    @classmethod
    def for_tokenizer(cls, tokenizer: Any, rows: int = 32, pairs: int = 64) -> Task:
        """Prompts of different lengths, in the tokenizer's chat template or plain where it has none."""

        def ask(index: int, system: str) -> str:
            question = QUESTIONS[index % len(QUESTIONS)].format(THINGS[index % len(THINGS)])
            if not tokenizer.chat_template:
                return f"{system} {question}"
            turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

        def pair(index: int) -> tuple[str, str, str, str]:
            thing = THINGS[index % len(THINGS)]
            aligned, violating = (answer.format(thing) for answer in ANSWERS)
            return ask(index, SYSTEMS[1]), aligned, ask(index, SYSTEMS[2]), violating

        return cls([ask(index, SYSTEMS[0]) for index in range(rows)], [pair(index) for index in range(pairs)])


def unit_vectors(layers: int, d_model: int, seed: int = 0) -> NDArray[np.float32]:
    """Random unit directions [layers, d_model], the same in every process."""
    vectors = np.random.default_rng(seed).normal(size=(layers, d_model))
    unit: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def words() -> list[str]:
    """Every word of the texts above, for a model that has no tokenizer."""
    texts = [*SYSTEMS, *(form.format(thing) for form in (*QUESTIONS, *ANSWERS) for thing in THINGS)]
    return sorted({word for text in texts for word in text.split()})
