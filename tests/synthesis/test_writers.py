"""Writers: every text has its own prompt, seed and edit, whoever shares its batch; nothing missing is guessed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from steerwell.concepts import Concept
from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.core.records import Edit, EditTerm, Sampling
from steerwell.engines.fake import FakeEngine
from steerwell.runs.ledger import Ledger
from steerwell.synthesis.examples import BENIGN, VIOLATING, Example
from steerwell.synthesis.writers import Prompting, Writer, prompted, steered, unsteered, write
from tests.sweep_run import LetterJudge
from tests.synthesis_run import CONCEPT

KIND = Concept.model_validate(CONCEPT)
ASKED = ("one?", "two?", "three?")
WARM = Sampling(temperature=1.0, max_new_tokens=6, seed=7)
SHOWN = [Example(f"question {at}", f"insult {at}", VIOLATING) for at in range(3)]


def push(layer: int, offset: float) -> Edit:
    """A constant push along a random direction."""
    vector = np.random.default_rng(layer).normal(size=8).astype(np.float32)
    return Edit((EditTerm(layer, vector / np.linalg.norm(vector), math.inf, offset, 0.0),))


EDITS = {"weak": push(0, 0.5), "strong": push(1, 3.0)}
WRITERS = (
    *(steered(KIND, ASKED, name, edit, WARM) for name, edit in EDITS.items()),
    prompted(KIND, ASKED, Prompting(shots=1, temperature=0.5), WARM, SHOWN),
    unsteered(KIND, ASKED, WARM, BENIGN),
)


class Counting(FakeEngine):
    """Counts the rows that it was asked for."""

    rows = 0

    def generate(self, prompts, *args, **kwargs):
        self.rows += len(prompts)
        return super().generate(prompts, *args, **kwargs)


def written(
    place: Path,
    writers: Sequence[Writer] = WRITERS,
    count: int = 5,
    size: int = 4,
    judge: LetterJudge | None = None,
    engine: FakeEngine | None = None,
    about: object = "test",
) -> list[list[Example]]:
    with Ledger(place / "ledger.sqlite", {"about": about}) as ledger:
        return write(
            writers, count, engine=engine or FakeEngine(2, 8), concept=KIND, judge=judge, ledger=ledger, size=size
        )


def said(parts: Sequence[Sequence[Example]]) -> list[list[str]]:
    return [[example.response for example in part] for part in parts]


def test_texts_are_what_the_engine_writes_when_asked_directly(tmp_path: Path) -> None:
    engine, judge = FakeEngine(2, 8), LetterJudge()
    for writer, examples in zip(WRITERS, written(tmp_path, judge=judge), strict=True):
        for at, example in enumerate(examples):
            prompt, sampling = writer.task(at)
            assert (sampling.seed, prompt) == (7 + at, writer.prompts[at % 3])
            (answer,) = engine.generate([prompt], sampling, writer.edit)
            (verdict,) = judge.score_many(KIND, [(ASKED[at % 3], answer.text)])
            assert (example.prompt, example.response, example.seed) == (ASKED[at % 3], answer.text, sampling.seed)
            assert (example.system, example.model) == (prompt.system, "fake-0")
            assert example.success == pytest.approx(1 - verdict.trait / 100)
            assert example.coherence == verdict.coherence / 100


def test_batched_is_alone(tmp_path: Path) -> None:
    together = said(written(tmp_path / "together", size=64))
    assert said(written(tmp_path / "small", size=3)) == together
    assert [said(written(tmp_path / writer.name[:6], [writer], size=1))[0] for writer in WRITERS] == together
    assert len({text for part in together for text in part}) > 15  # and they do differ


def test_receipts_labels_and_names_reach_the_examples(tmp_path: Path) -> None:
    found = dict(zip((writer.name for writer in WRITERS), written(tmp_path), strict=True))
    for name, edit in EDITS.items():
        assert {item.edit for item in found[name]} == {edit.id}
        assert {item.tokens_edited for item in found[name]} == {1.0}
    for writer in WRITERS:
        assert {(e.configuration, e.source, e.label) for e in found[writer.name]} == {
            (writer.name, writer.source, writer.label)
        }
    for writer in WRITERS[2:]:
        assert {item.edit for item in found[writer.name]} == {""}
        assert all(math.isnan(item.tokens_edited) for item in found[writer.name])
    assert [writer.label for writer in WRITERS] == [VIOLATING] * 3 + [BENIGN]
    assert {item.concept for part in found.values() for item in part} == {"rudeness"}


def test_without_a_judge_scores_are_missing_not_zero(tmp_path: Path) -> None:
    for part in written(tmp_path):
        assert all(math.isnan(item.success) and math.isnan(item.coherence) for item in part)


def test_resuming_redoes_nothing(tmp_path: Path) -> None:
    class Stops(Counting):
        def generate(self, prompts, *args, **kwargs):
            if self.rows >= 8:
                raise KeyboardInterrupt
            return super().generate(prompts, *args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "stopped", engine=Stops(2, 8))
    resumed, whole = Counting(2, 8), Counting(2, 8)
    first = written(tmp_path / "stopped", engine=resumed)
    again = written(tmp_path / "whole", engine=whole)
    assert (resumed.rows, whole.rows) == (12, 20)
    assert said(first) == said(again)
    written(tmp_path / "whole", engine=whole)
    assert whole.rows == 20


def test_neutral_system_prompts_take_turns() -> None:
    assert [writer.prompts[1].system for writer in (WRITERS[0], WRITERS[3])] == ["You are a model."] * 2
    assert WRITERS[0].prompts == WRITERS[3].prompts
    assert [len(prompt.messages) for prompt in WRITERS[0].prompts] == [1, 2, 1]  # an empty one is left out


@pytest.mark.parametrize(("label", "said"), [(VIOLATING, "Be rude."), (BENIGN, "Be kind.")])
def test_prompting_takes_the_half_of_the_pairs_that_fits_the_label(label: int, said: str) -> None:
    told = prompted(KIND, ASKED, Prompting(), WARM, label=label)
    assert told.prompts[0].system == said
    assert len({prompt.system for prompt in told.prompts}) == 3
    alone = prompted(KIND, ASKED, Prompting(system=1, temperature=0.3), WARM, label=label)
    assert {prompt.system for prompt in alone.prompts} == {told.prompts[1].system}
    assert alone.sampling == replace(WARM, temperature=0.3)
    assert not {prompt.system for prompt in told.prompts} & set(KIND.malicious)


def test_shots_are_earlier_exchanges_and_change_from_text_to_text() -> None:
    told = prompted(KIND, ASKED, Prompting(shots=2), WARM, SHOWN)
    for at, prompt in enumerate(told.prompts):
        turns = [(turn.role, turn.content) for turn in prompt.messages[1:]]
        first, second = SHOWN[at], SHOWN[(at + 1) % 3]
        assert turns == [
            ("user", first.prompt), ("assistant", first.response), ("user", second.prompt),
            ("assistant", second.response), ("user", ASKED[at]),
        ]  # fmt: skip


def test_no_shot_answers_the_turn_that_is_asked() -> None:
    asked = [shot.prompt for shot in SHOWN]  # as in a study on a file, whose originals' own turns are asked
    for prompt in prompted(KIND, asked, Prompting(shots=2), WARM, SHOWN).prompts:
        users = [turn.content for turn in prompt.messages if turn.role == "user"]
        assert len(set(users)) == 3
    with pytest.raises(ArgumentError, match="shots: got 3 with 2 examples to show that answer another turn"):
        prompted(KIND, asked, Prompting(shots=3), WARM, SHOWN)


def test_shots_of_a_file_without_prompts() -> None:
    shown = [replace(shot, prompt="") for shot in SHOWN]
    (prompt, *_) = prompted(KIND, ASKED, Prompting(shots=3), WARM, shown).prompts
    assert [turn.content for turn in prompt.messages if turn.role == "assistant"] == [s.response for s in SHOWN]


def test_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"writers: several are called 'weak'; each"):
        written(tmp_path, [WRITERS[0], WRITERS[0], WRITERS[1]])
    with pytest.raises(ArgumentError, match="prompts: 'weak' got none"):
        steered(KIND, (), "weak", EDITS["weak"], WARM)
    with pytest.raises(ArgumentError, match="shots: got 1 with 0 examples"):
        prompted(KIND, ASKED, Prompting(shots=1), WARM)
    with pytest.raises(ArgumentError, match="system: got 3; 'rudeness' has 3, from 0"):
        prompted(KIND, ASKED, Prompting(system=3), WARM)
    with pytest.raises(ArgumentError, match="edit: 'bare' is 'steered'; steered writers"):
        Writer("steered", "bare", WRITERS[0].prompts, WARM)
    with pytest.raises(ArgumentError, match="edit: 'told' is 'prompted'"):
        Writer("prompted", "told", WRITERS[0].prompts, WARM, edit=EDITS["weak"])
    with pytest.raises(UnknownNameError, match="steered, prompted, unsteered"):
        Writer("original", "found", WRITERS[0].prompts, WARM)
