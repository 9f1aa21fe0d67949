"""The training code: tokenizer, masking, the fast forward pass and reproducibility."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from steerwell.testbed.corpus import Dialogue
from steerwell.testbed.forward import hidden_states
from steerwell.testbed.train import RECIPES, Recipe, batches, build, encode, fit, fixed_tokenizer, stream

TINY = Recipe(d_model=64, d_ff=96, layers=2, steps=6, batch=4, warmup=2, vocab=512, tokenizer_dialogues=300)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return fixed_tokenizer(TINY)


def test_only_assistant_tokens_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = Dialogue("Be nice.", (("Hi there.", "Hello, friend."), ("Bye.", "So long.")))
    example = encode([talk], tokenizer)[0]
    learned = [token for token in example.labels if token >= 0]
    assert tokenizer.decode(learned) == "Hello, friend.<|end|>So long.<|end|>"
    whole = "<|bos|><|system|>Be nice.<|end|><|user|>Hi there.<|end|><|assistant|>Hello, friend.<|end|>"
    assert tokenizer.decode(example.ids).startswith(whole)


def test_fast_forward_equals_transformers(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = build(TINY, tokenizer).eval()
    ids = torch.randint(6, 512, (3, 21))
    with torch.no_grad():
        torch.testing.assert_close(
            hidden_states(model, ids), model.model(input_ids=ids).last_hidden_state, rtol=1e-4, atol=1e-4
        )


def test_batches_lose_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = list(islice(stream(0, tokenizer), 50))
    seen = list(batches(iter(examples), 8, tokenizer.pad_token_id, random.Random(0)))
    assert sum(len(ids) for ids, _ in seen) == 50
    assert sum(int((labels >= 0).sum()) for _, labels in seen) == sum(
        label >= 0 for example in examples for label in example.labels
    )


def test_training_is_reproducible_and_learns(tokenizer: PreTrainedTokenizerFast) -> None:
    def run(seed: int, steps: int) -> float:
        torch.manual_seed(seed)
        recipe = replace(TINY, steps=steps)
        return fit(build(recipe, tokenizer), stream(seed, tokenizer), recipe, random.Random(seed))

    first = run(0, 4)
    assert first == pytest.approx(run(0, 4), abs=1e-6)
    assert first != run(1, 4)
    assert run(0, 12) < first


def test_the_tokenizer_is_the_same_every_time(tokenizer: PreTrainedTokenizerFast) -> None:
    assert fixed_tokenizer(TINY).get_vocab() == tokenizer.get_vocab()


def test_recipes_are_small_enough() -> None:
    assert set(RECIPES) == {"pilot", "small"}
