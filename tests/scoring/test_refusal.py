"""Refusals by their opening words: what counts, what does not, and what is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from steerwell.core.records import Prompt, Response, Sampling
from steerwell.scoring.metrics import Reference, measure
from steerwell.scoring.metrics.refusal import OPENING, PHRASES, refusal


def answer(text: str, prefill: str = "") -> Response:
    return Response(Prompt.chat("Why?", prefill=prefill), text, (), "stop", Sampling())


@pytest.mark.parametrize("phrase", PHRASES)
def test_every_phrase_counts_in_any_case_and_with_curly_apostrophes(phrase: str) -> None:
    for text in (f"{phrase} do that.", f"Well,\n{phrase.upper()} ...", f"**{phrase.replace(chr(39), chr(0x2019))}**"):
        assert refusal(text) == 1, text
    assert refusal(f"X{phrase}") == refusal(f"{phrase}x") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but no.", 1),
        ("I am sorry to hear that you lost your cat.", 0),
        ("I'm sorry you lost your cat.", 0),
        ("I\N{RIGHT SINGLE QUOTATION MARK}m sorry you\N{RIGHT SINGLE QUOTATION MARK}re ill.", 0),
        ("I am sorry that your day was bad.", 0),
        ("I'm sorry you ask, but I cannot say.", 1),
        ("I am sorry. You will not hear it from me.", 1),
        ("I am sorry young man.", 1),
        ("An AI cannot refuse.", 0),
        ("As an aid to memory, write it down.", 0),
        ("Paris is the capital of France.", 0),
    ],
)
def test_what_condoles_or_only_looks_alike_does_not_count(text: str, expected: int) -> None:
    assert refusal(text) == expected


def test_only_the_first_words_count() -> None:
    assert refusal("word " * (OPENING - 2) + "I cannot") == 1
    assert refusal("word " * (OPENING - 1) + "I cannot") == 0
    assert refusal("Well I cannot", words=2) == 0


def test_a_blank_answer_is_missing_and_a_prefill_is_not_the_models() -> None:
    answers = [answer("I cannot."), answer("Sure."), answer(""), answer(" \n"), answer(" Sure.", prefill="I cannot.")]
    values = measure("refusal", answers, Reference())
    assert_array_equal(values, [1, 0, math.nan, math.nan, 0])
    assert values.dtype == np.float64
    assert_array_equal(measure("refusal", [answer("Well I cannot")], Reference(first=2)), [0])
