"""A public model that we did not train: its known text, and a happy/sad direction that moves its words."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import steerwell as sw

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "happiness.yaml"
HAPPY = {
    "happy",
    "smile",
    "smiled",
    "laugh",
    "laughed",
    "fun",
    "love",
    "loved",
    "joy",
    "excited",
    "glad",
    "best",
    "nice",
    "good",
}
SAD = {
    "sad",
    "cry",
    "cried",
    "scared",
    "angry",
    "upset",
    "hurt",
    "lost",
    "bad",
    "afraid",
    "alone",
    "worried",
    "mad",
    "sorry",
}
STRENGTHS = (-0.5, -0.25, 0.0, 0.25, 0.5)  # class separations
LAYER = 3


@pytest.fixture(scope="module")
def model(stories: Path) -> sw.HFEngine:
    return sw.HFEngine.load(str(stories), batch_size=64)


@pytest.fixture(scope="module")
def direction(model: sw.HFEngine) -> sw.Direction:
    return sw.fit(model, sw.load_concept(EXAMPLE), sampling=sw.Sampling(0.6, 0.9, 4))


@pytest.fixture(scope="module")
def prompts() -> list[sw.Prompt]:
    return [sw.Prompt.chat(scenario.prompt) for scenario in sw.load_concept(EXAMPLE).test]


def test_known_greedy_text(model: sw.HFEngine, stories: Path) -> None:
    response = model.generate([sw.Prompt(text="")], sw.Sampling(max_new_tokens=256))[0]
    assert response.text.strip() == (stories / "golden.txt").read_text().strip()


def test_direction_moves_the_odds_of_happy_words(model, direction, prompts) -> None:
    """Log-odds of ' happy' against ' sad' as the next word rise with every step of the strength."""
    happy, sad = (model._model.codec.encode(sw.Prompt(text=word))[1:] for word in ("happy", "sad"))
    odds = []
    for strength in STRENGTHS:
        edit = sw.build(direction, "swfc", LAYER, strength)
        score = [
            sum(item.logprobs.sum() for item in model.score(prompts, [word] * len(prompts), edit))
            for word in (happy, sad)
        ]
        odds.append((score[0] - score[1]) / len(prompts))
    assert (np.diff(odds) > 0).all(), odds


def test_direction_moves_the_words_that_it_writes(model, direction, prompts) -> None:
    """The surplus of happy over sad words, per hundred words, is larger at the happy end than at the sad one."""
    surplus = []
    for strength in (-0.5, 0.5):
        edit = sw.build(direction, "swfc", LAYER, strength)
        answers = model.generate(prompts * 4, sw.Sampling(0.8, 0.95, 40, seed=1), edit)
        words = [word for answer in answers for word in re.findall(r"[a-z]+", answer.text.lower())]
        surplus.append(100 * sum((word in HAPPY) - (word in SAD) for word in words) / len(words))
    assert surplus[0] < surplus[1], surplus
