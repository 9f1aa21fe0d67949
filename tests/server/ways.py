"""What the library says to each way of steering that the live server offers; the answers all differ."""

from __future__ import annotations

from typing import Any

from steerwell.core.records import Edit, Prompt, Sampling
from steerwell.engines.hf import HFEngine
from steerwell.serving.steering import Term
from tests.server.live import MODEL, catalog

QUESTION = "What is the capital of France?"
TURNS = [{"role": "user", "content": QUESTION}]
WEAK = {"policy": "bounded", "strength": 2}
WAYS: dict[str, dict[str, Any]] = {  # fields of a request by what its answer is called in `answers`
    "honest": {},
    "unsteered": {"steering": []},
    "bounded": {"steering": {"policy": "bounded"}},
    "weak": {"steering": WEAK},
}


def edit(engine: HFEngine, way: str) -> Edit | None:
    """What a request of `WAYS` is answered under."""
    given = WAYS[way].get("steering")
    terms = None if given is None else tuple(Term.model_validate(item) for item in ([given] if given else []))
    return catalog(engine).resolve(MODEL, terms).edit


def answers(engine: HFEngine, tokens: int = 12) -> dict[str, str]:
    """The library's greedy answers to the question, which all differ."""
    sampling = Sampling(max_new_tokens=tokens)
    said = {way: engine.generate([Prompt.chat(QUESTION)], sampling, edit(engine, way))[0].text for way in WAYS}
    assert len(set(said.values())) == len(WAYS)
    return said
