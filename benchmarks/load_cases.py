"""What the load test asks, as HTTP requests, and what the library answers: 20 ways to steer, mixed prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from steerwell.concepts import concept_names, load_concept
from steerwell.core.artifacts import save_direction
from steerwell.core.policy import Policy, save_policy
from steerwell.core.records import Direction, Edit, Message, Prompt, Response, Sampling
from steerwell.engines.hf import HFEngine
from steerwell.steering.interventions import build
from steerwell.studies.defence import attack_prompts, baseline_prompts
from steerwell.studies.fitting import fit

GATE_MARGIN, LOGIT_MARGIN = 1e-3, 1e-3  # as in tests/engines/test_contract.py
SERVED, DEFAULT = "steerwell-pilot", "honest"
UNSTEERED = "unsteered"
LENGTHS = (8, 16, 24, 32, 48, 64, 96)  # max_tokens
EARLIER = (2, 5, 9)  # exchanges before the question of a long prompt
REPLY = "I am glad to help you with that."
TEXTS = ("The capital of Iran is", "The author of War and Peace", "It is fine to feel", "A doctor checks the")

Term = Mapping[str, Any]
POLICIES: dict[str, dict[str, Any]] = {
    "honest": {"direction": "dishonesty", "method": "stmp", "layers": [0], "strength": 2.0},
    "target": {
        "direction": "dishonesty",
        "method": "sttp",
        "layers": [0],
        "strength": 12.0,
        "bounds": {"strength": [2, 20]},
    },
    "shift": {
        "direction": "dishonesty",
        "method": "swfc",
        "layers": [0],
        "strength": 1.0,
        "bounds": {"strength": [0, 2]},
    },
    "frank": {"direction": "sycophancy", "method": "stmp", "layers": [1], "strength": 2.0},
    "kind": {"direction": "hostility", "method": "sttp", "layers": [2, 3], "strength": 6.0, "position": "response"},
    "caring": {"direction": "dismissiveness", "method": "transport", "layers": [1], "strength": 1.0},
}


@dataclass(frozen=True, slots=True)
class Way:
    """A way to ask for steering: in the model's name, in the `steering` field, or not at all (the default policy)."""

    policy: str | None = None
    field: Sequence[Term] | None = None

    @property
    def terms(self) -> Sequence[Term]:
        """What it comes to, as terms of a `steering` field."""
        if self.policy == UNSTEERED:
            return ()
        return self.field if self.field is not None else ({"policy": self.policy or DEFAULT},)

    @property
    def name(self) -> str:
        """What the server calls it."""
        if not self.terms:
            return UNSTEERED
        return self.terms[0].get("policy", "custom") if len(self.terms) == 1 else "custom"

    @property
    def request(self) -> dict[str, Any]:
        """The fields of a request."""
        model = SERVED if self.policy is None else f"{SERVED}:{self.policy}"
        return {"model": model} | ({} if self.field is None else {"steering": self.field})

    def edit(self, directions: Mapping[str, Direction]) -> Edit | None:
        """The library's edit."""
        edits = [_edit(term, directions) for term in self.terms]
        return Edit.compose(edits) if edits else None


def _own(direction: str, method: str, layers: Sequence[int], strength: float, **options: Any) -> dict[str, Any]:
    return {"direction": direction, "method": method, "layers": list(layers), "strength": strength, **options}


WAYS = (
    Way(),
    Way("target"),
    Way("frank"),
    Way("kind"),
    Way("caring"),
    Way(field=[{"policy": "target", "strength": 6.0}]),
    Way(field=[{"policy": "shift", "strength": 0.5}]),
    Way(field=[_own("dishonesty", "clamp", [2], 1.0)]),
    Way(field=[_own("hostility", "directional_ablation", [1, 2, 3], 1.0)]),
    Way(field=[_own("dishonesty", "swfc", [0], 0.5, toward="violating")]),
    Way(field=[_own("sycophancy", "sttp", [2, 4], 4.0, position="response")]),
    Way(field=[_own("hostility", "conditional", [1], 1.0, gate="dishonesty", above=True)]),
    Way(field=[_own("dismissiveness", "stmp", range(6), 1.5, position="response")]),
    Way(field=[_own("sycophancy", "transport", [0, 5], 1.0)]),
    Way(field=[_own("dishonesty", "monitor", [0, 3], 0.0)]),
    Way(field=[_own("hostility", "swfc", [4], 1.0, position="response", toward="violating")]),
    Way(field=[{"policy": "honest"}, {"policy": "kind"}]),
    Way(field=[_own("dishonesty", "stmp", [0], 2.0), _own("sycophancy", "sttp", [0], 4.0)]),
    Way(field=[{"policy": "caring"}, _own("dishonesty", "monitor", [5], 0.0, position="response")]),
    Way(field=[{"policy": "shift"}, {"policy": "frank"}, _own("hostility", "clamp", [3], 1.0)]),
)


def fitted(engine: HFEngine, folder: Path) -> tuple[dict[str, Direction], list[str]]:
    """A direction of every bundled concept, saved with the policies, and the options of `serve` that name them."""
    directions, options = {}, []
    for name in concept_names(engine.info.language):
        directions[name] = fit(engine, load_concept(name, engine.info.language), pool="prompt_last")
        save_direction(directions[name], folder / name)
        options += ["--direction", f"{name}={folder / name}"]
    for name, fields in POLICIES.items():
        policy = Policy.model_validate(fields | {"name": name, "direction": str(folder / fields["direction"])})
        options += ["--policy", str(save_policy(policy, folder / f"{name}.yaml"))]
    return directions, [*options, "--default", DEFAULT]


def prompts(language: str, each: int = 2) -> list[Prompt]:
    """Questions as they are, under attack, and at the end of long conversations, and texts to go on with."""
    found: list[Prompt] = []
    for number, name in enumerate(concept_names(language)):
        concept = load_concept(name, language)
        asked = baseline_prompts(concept, "test", each)
        attacks = attack_prompts(concept, "test", 3 * each)
        earlier = cycle(message for prompt in attacks for message in prompt.messages if message.role == "user")
        for index, prompt in enumerate(attacks[each : 2 * each]):
            turns = islice(earlier, EARLIER[(number + index) % len(EARLIER)])
            talk = [said for turn in turns for said in (turn, Message("assistant", REPLY))]
            found.append(Prompt((*prompt.messages[:-1], *talk, prompt.messages[-1])))
        found += [*asked, *attacks[2 * each :], Prompt(text=TEXTS[number % len(TEXTS)])]
    return found


@dataclass(frozen=True, slots=True)
class Plan:
    """What the generator sends.

    Attributes:
        cases: requests, each with the answer that must come back.
        traffic: kinds of traffic, each as numbers of cases in the order in which they are sent, over and over.
    """

    cases: list[dict[str, Any]]
    traffic: dict[str, list[int]]


def planned(engine: HFEngine, directions: Mapping[str, Direction], asked: Sequence[Prompt]) -> Plan:
    """Every prompt under every way to steer, in random order; and the same prompts in the same order unsteered."""
    ways = [*WAYS, Way(UNSTEERED)]
    edits = [way.edit(directions) for way in ways]
    samplings = [Sampling(max_new_tokens=LENGTHS[index % len(LENGTHS)]) for index in range(len(asked))]
    rows = [(way, index) for way in range(len(ways)) for index in range(len(asked))]
    columns = [asked[index] for _, index in rows], [samplings[index] for _, index in rows], [edits[w] for w, _ in rows]
    cases = [
        {
            **_request(ways[way], prompt, sampling),
            "way": way,
            "expected": {**expected(answer, edit, ways[way].name), "tie": tie},
        }
        for (way, _), prompt, sampling, edit, (answer, tie) in zip(
            rows, *columns, answers(engine, *columns), strict=True
        )
    ]
    order = np.random.default_rng(0).permutation(len(WAYS) * len(asked)).tolist()
    plain = [len(WAYS) * len(asked) + number % len(asked) for number in order]
    return Plan(cases, {"mixed": order, "unsteered": plain})


def answers(
    engine: HFEngine, asked: Sequence[Prompt], samplings: Sequence[Sampling], edits: Sequence[Edit | None]
) -> Iterator[tuple[Response, bool]]:
    """What the library answers, and whether a gate or a greedy choice of that was within rounding of a tie."""
    said = engine.generate(asked, samplings, edits)
    some = [row for row, answer in enumerate(said) if answer.token_ids]  # others cannot be scored
    tokens = [said[row].token_ids for row in some]
    scores = dict(
        zip(some, engine.score([asked[row] for row in some], tokens, [edits[row] for row in some]), strict=True)
    )
    for row, answer in enumerate(said):
        score = scores.get(row)
        gates = [term.gate_margin for term in score.receipt.terms] if score and score.receipt else []
        sure = score is not None and score.margins.min() >= LOGIT_MARGIN and min(gates, default=np.inf) >= GATE_MARGIN
        yield answer, not sure


def expected(answer: Response, edit: Edit | None, name: str) -> dict[str, Any]:
    """What of a reply is compared."""
    terms = answer.receipt.terms if answer.receipt else ()
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "name": name,
        "edit_id": edit.id if edit else None,
        "counts": [[term.layer, term.tokens_seen, term.tokens_edited] for term in terms],
    }


def _request(way: Way, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
    body = {**way.request, "temperature": 0, "max_tokens": sampling.max_new_tokens}
    if prompt.text is not None:
        return {"path": "/v1/completions", "body": body | {"prompt": prompt.text}}
    messages = [asdict(message) for message in prompt.messages]
    return {"path": "/v1/chat/completions", "body": body | {"messages": messages}}


def _edit(term: Term, directions: Mapping[str, Direction]) -> Edit:
    fields = {**POLICIES[term["policy"]], **term} if "policy" in term else term
    return build(
        directions[fields["direction"]],
        fields["method"],
        fields["layers"],
        fields["strength"],
        position=fields.get("position", "all"),
        toward=fields.get("toward", "aligned"),
        gate=directions[fields["gate"]] if "gate" in fields else None,
        above=fields.get("above", False),
    )
