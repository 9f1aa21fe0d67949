"""The edges of the Hugging Face engine: scope, streams, stops, seeds, limits, and every way in which it must refuse."""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from torch import nn

from steerwell.core.errors import ArgumentError, EngineError, ModelMismatchError, UnknownNameError
from steerwell.core.records import Edit, EditTerm, Message, Prompt, Sampling
from steerwell.engines.hf import HFEngine
from steerwell.engines.hf.blocks import decoder_blocks
from steerwell.engines.text import TextCodec, TextStream
from tests.models import GROUPED, VOCABULARY, tokenizer

PROMPT = Prompt.chat("Who are you?", "Be kind.")
TOKENS = [9, 8, 7]
WARM = Sampling(temperature=1.0, max_new_tokens=16)
END = 257  # the end token of the tiny models


def push(engine, layer: int = 1, amount: float = 4.0, **changes) -> Edit:
    """Every token moves by `amount` along the fourth axis."""
    vector = np.eye(engine.info.d_model, dtype=np.float32)[3]
    fields = {"layer": layer, "direction": vector, "gate": math.inf, "offset": amount, "gain": 0.0}
    return Edit((EditTerm(**(fields | changes)),))


def hooks(engine) -> int:
    """Our hooks in the model (transformers leaves some of its own once hidden states were asked for)."""
    hooked = (hook for module in engine._model.network.modules() for hook in module._forward_hooks.values())
    return sum(hook.__module__.startswith("steerwell") for hook in hooked)


def ids_of(engine, prompt: Prompt = PROMPT) -> list[int]:
    return engine._model.codec.encode(prompt)


# --- steering never outlives its scope ----------------------------------------------------------------------


def test_no_hook_is_left_after_a_call(engine) -> None:
    before = engine.score([PROMPT], [TOKENS])[0].logprobs
    for edit in (None, push(engine), Edit((*push(engine, 0).terms, *push(engine, 3).terms))):
        engine.generate([PROMPT], WARM, edit)
        engine.capture([PROMPT], [TOKENS], edit)
        engine.score([PROMPT], [TOKENS], edit)
        list(engine.stream(PROMPT, WARM, edit))
        assert hooks(engine) == 0
    assert_array_equal(engine.score([PROMPT], [TOKENS])[0].logprobs, before)


@pytest.mark.parametrize("call", ["generate", "stream", "capture", "score"])
def test_no_hook_is_left_after_an_exception_inside_the_model(
    engine, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    before = engine.score([PROMPT], [TOKENS])[0].logprobs

    def broken(*_args: object, **_options: object) -> None:
        assert hooks(engine) > 0  # it is steered while it runs
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._model.blocks[2], "forward", broken)
    edit = push(engine, 1)
    calls = {
        "stream": lambda: list(engine.stream(PROMPT, WARM, edit)),
        "generate": lambda: engine.generate([PROMPT], WARM, edit),
        "capture": lambda: engine.capture([PROMPT], [TOKENS], edit),
        "score": lambda: engine.score([PROMPT], [TOKENS], edit),
    }
    with pytest.raises(RuntimeError, match="out of memory"):
        calls[call]()
    assert hooks(engine) == 0
    monkeypatch.undo()
    assert_array_equal(engine.score([PROMPT], [TOKENS])[0].logprobs, before)


def test_no_hook_is_left_when_a_hook_cannot_be_registered(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_args: object, **_options: object) -> None:
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(engine._model.blocks[2], "register_forward_hook", refused)
    with pytest.raises(RuntimeError, match="no hooks here"):
        engine.generate([PROMPT], WARM, Edit((*push(engine, 1).terms, *push(engine, 2).terms)))
    with pytest.raises(RuntimeError, match="no hooks here"):
        engine.capture([PROMPT], [TOKENS])
    assert hooks(engine) == 0


def test_a_resting_or_abandoned_stream_steers_nobody(engine) -> None:
    plain = engine.generate([PROMPT], WARM)[0]
    stream = engine.stream(PROMPT, WARM, push(engine, amount=20.0))
    next(stream)
    assert hooks(engine) == 0
    assert engine.generate([PROMPT], WARM)[0] == plain
    stream.close()
    assert engine.generate([PROMPT], WARM)[0] == plain


def test_threads_do_not_steer_each_other(engine) -> None:
    edits = [None, push(engine, amount=20.0), push(engine, 2, -20.0), None, push(engine, 0, 5.0)]
    alone = [engine.generate([PROMPT], WARM, edit)[0] for edit in edits]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda edit: engine.generate([PROMPT], WARM, edit)[0], edits * 2))
    assert [row.token_ids for row in together] == [row.token_ids for row in alone * 2]
    assert len({row.token_ids for row in alone}) == 4


# --- streams and stop strings -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_streamed_chunks_join_to_the_generated_text(engine, seed: int) -> None:
    """Random bytes: half characters, invalid ones and stop strings that begin and do not end."""
    free = Sampling(temperature=1.5, max_new_tokens=40, seed=seed)
    stop = (engine.generate([PROMPT], free)[0].text[12:15], "never", "\N{PILE OF POO}" * 3)
    stopped = Sampling(temperature=1.5, max_new_tokens=40, seed=seed, stop=stop)
    for sampling, edit in ((free, None), (stopped, None), (stopped, push(engine))):
        expected = engine.generate([PROMPT], sampling, edit)[0]
        chunks = list(engine.stream(PROMPT, sampling, edit))
        assert "".join(chunk.text for chunk in chunks) == expected.text
        assert [chunk.response is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        got = chunks[-1].response
        assert (got.text, got.token_ids, got.finish_reason) == (
            expected.text,
            expected.token_ids,
            expected.finish_reason,
        )
        assert got.receipt == expected.receipt


TEXT = "Añb \N{GRINNING FACE}! 日本語 ###! \N{FAMILY} end"


def streamed(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], str, int]:
    """(pieces, final text, tokens used) of a text that comes byte by byte."""
    codec = TextCodec(tokenizer(), {})
    tokens, stream, pieces = codec.encode(Prompt(text=text)), TextStream(codec, stop), []
    for end in range(1, len(tokens) + 1):
        done = stream.stopped(tokens[:end]) or end == len(tokens)
        pieces.append(stream.fresh(tokens[:end], done=done))
        if done:
            return pieces, stream.final(tokens[:end]), end
    raise AssertionError


def test_a_character_is_shown_when_it_is_whole() -> None:
    pieces, final, used = streamed(TEXT)
    assert used == len(TEXT.encode())
    assert "".join(pieces) == final == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "\N{GRINNING FACE}" in pieces


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("###",), "Añb \N{GRINNING FACE}! 日本語 "),
        (("本",), "Añb \N{GRINNING FACE}! 日"),
        (("!",), "Añb \N{GRINNING FACE}"),
        (("### and more", "##!", "zzz"), TEXT[: TEXT.index("##!")]),
        (("####", "never"), TEXT),
        (("end", "e"), TEXT[: TEXT.index("end")]),
        (("A",), ""),
    ],
)
def test_a_stop_string_cuts_the_text_and_is_never_shown(stop: tuple[str, ...], expected: str) -> None:
    pieces, final, _ = streamed(TEXT, stop)
    assert "".join(pieces) == final == expected


def test_a_long_stop_string_of_many_bytes_is_noticed() -> None:
    """Twenty characters in sixty tokens."""
    stop = "日本語終端" * 4
    _, final, used = streamed(f"Hi {stop} and on and on", (stop,))
    assert final == "Hi "
    assert used == len(f"Hi {stop}".encode())


def test_a_stop_string_ends_the_answer_inside_the_engine(engine) -> None:
    free = engine.generate([PROMPT], WARM)[0]
    stop = free.text[6:9]
    assert len(stop) == 3
    got = engine.generate([PROMPT], Sampling(temperature=1.0, max_new_tokens=16, stop=("never", stop)))[0]
    assert got.text == free.text[: free.text.index(stop)]
    assert got.finish_reason == "stop"
    assert len(got.token_ids) < len(free.token_ids)
    assert got.token_ids == free.token_ids[: len(got.token_ids)]


def test_the_end_token_ends_the_answer(engine) -> None:
    rows = engine.generate([PROMPT] * 60, Sampling(temperature=2.0, max_new_tokens=60))
    ended = [row for row in rows if row.finish_reason == "stop"]
    assert ended
    assert all(END not in row.token_ids and "<|end|>" not in row.text for row in rows)
    assert all(len(row.token_ids) < 60 for row in ended)
    assert all(len(row.token_ids) == 60 for row in rows if row.finish_reason == "length")


# --- sampling -----------------------------------------------------------------------------------------------


def seeded(seed: int, **changes) -> Sampling:
    return Sampling(**({"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 12, "seed": seed} | changes))


QUESTIONS = [Prompt.chat(text) for text in ("Why?", "What is the capital of France?", "Hm", "Who?", "Tell me a story.")]


def test_a_sampled_row_does_not_depend_on_its_batch(engine) -> None:
    samplings = [seeded(row, temperature=0.7 + 0.2 * row, max_new_tokens=6 + 3 * row) for row in range(5)]
    edits = [None, push(engine), None, push(engine, 2, -3.0), push(engine, 0)]
    alone = [
        engine.generate([prompt], [sampling], [edit])[0].token_ids
        for prompt, sampling, edit in zip(QUESTIONS, samplings, edits, strict=True)
    ]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [2, 2, 2]):
        for size in (2, 32):
            batch = HFEngine(engine._model, batch_size=size)
            arguments = ([values[row] for row in order] for values in (QUESTIONS, samplings, edits))
            assert [row.token_ids for row in batch.generate(*arguments)] == [alone[row] for row in order]


def test_greedy_rows_stay_greedy_beside_sampled_ones(engine) -> None:
    greedy = engine.generate([PROMPT], Sampling(max_new_tokens=12))[0]
    mixed = engine.generate([PROMPT] * 3, [seeded(0), Sampling(max_new_tokens=12, seed=5), seeded(1)])
    assert mixed[1].token_ids == greedy.token_ids
    assert mixed[0].token_ids != greedy.token_ids


def test_one_seed_one_answer(engine) -> None:
    first, again = (engine.generate([PROMPT] * 4, seeded(11)) for _ in range(2))
    assert [row.token_ids for row in first] == [row.token_ids for row in again]
    assert len({row.token_ids for row in first}) == 4
    assert [row.sampling.seed for row in first] == [11, 12, 13, 14]
    assert engine.generate([PROMPT], seeded(13))[0].token_ids == first[2].token_ids


@pytest.mark.parametrize(
    ("temperature", "top_p", "edit"), [(1.0, 1.0, False), (0.6, 1.0, True), (1.3, 0.8, False), (1.0, 0.5, True)]
)
def test_frequencies_follow_the_distribution(engine, temperature: float, top_p: float, edit: bool) -> None:
    n, change = 2000, push(engine, 3, 1.0) if edit else None
    scores = engine.score([PROMPT] * VOCABULARY, [[token] for token in range(VOCABULARY)], change)
    logits = np.array([score.logprobs[0] for score in scores], np.float64) / temperature
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    order = np.argsort(-expected, kind="stable")
    before = np.cumsum(expected[order]) - expected[order]
    expected[order[before >= top_p]] = 0
    expected /= expected.sum()
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=1, seed=1000)
    rows = HFEngine(engine._model, batch_size=500).generate([PROMPT] * n, sampling, change)
    counts = np.bincount([row.token_ids[0] if row.token_ids else END for row in rows], minlength=VOCABULARY)
    assert (counts[expected == 0] == 0).all()
    common = expected * n >= 5
    observed = [*counts[common], counts[~common].sum()]
    wanted = [*(expected[common] * n), expected[~common].sum() * n]
    keep = np.array(wanted) > 0
    assert chisquare(np.array(observed)[keep], np.array(wanted)[keep]).pvalue > 1e-3


@pytest.mark.parametrize("changes", [{"temperature": 1e-38}, {"temperature": 1e-3}, {"top_p": 1e-9}])
def test_the_cold_limit_is_greedy(engine, changes: dict) -> None:
    greedy = engine.generate([PROMPT], Sampling(max_new_tokens=12))[0]
    assert engine.generate([PROMPT], seeded(3, **changes))[0].token_ids == greedy.token_ids


def test_the_largest_draw_stays_inside_the_nucleus(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A uniform number just below 1 belongs to the last token of the nucleus, not to the least likely of all."""
    largest = SimpleNamespace(random=lambda steps, dtype=np.float64: np.full(steps, np.nextafter(dtype(1), dtype(0))))
    monkeypatch.setattr(np.random, "default_rng", lambda seed: largest)
    score = engine.score([PROMPT] * VOCABULARY, [[token] for token in range(VOCABULARY)])
    likely = np.argsort([-row.logprobs[0] for row in score], kind="stable")
    row = engine.generate([PROMPT], seeded(0, top_p=1e-6, max_new_tokens=1))[0]
    assert row.token_ids == (likely[0],)
    got = engine.generate([PROMPT], seeded(0, top_p=0.5, max_new_tokens=1))[0].token_ids[0]
    mass = np.exp([score[token].logprobs[0] for token in likely]).cumsum()
    assert list(likely).index(got) == int((mass < 0.5).sum())


# --- rows that finish early ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_finished_rows_leave_the_batch_without_changing_the_others(
    tiny_engine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine = tiny_engine(name)
    prompts = (QUESTIONS * 2)[:8]
    edits = [push(engine, row % 4, position=("all", "response")[row % 2]) if row % 3 else None for row in range(8)]
    lengths = [2, 30, 3, 18, 2, 4, 9, 30]
    samplings = [seeded(row, max_new_tokens=length) for row, length in enumerate(lengths)]
    free = engine.generate(prompts, samplings, edits)
    stops = [(row.text[len(row.text) // 2 :] or "never")[:2] for row in free]
    samplings = [seeded(row, max_new_tokens=30, stop=(stop,)) for row, stop in enumerate(stops)]
    alone = [engine.generate([p], [s], [e])[0] for p, s, e in zip(prompts, samplings, edits, strict=True)]
    sizes: list[int] = []
    step = engine._model.step
    monkeypatch.setattr(
        engine._model, "step", lambda ids, *rest, **options: (sizes.append(len(ids)), step(ids, *rest, **options))[1]
    )
    together = engine.generate(prompts, samplings, edits)
    assert sizes[0] == 8
    assert sizes[-1] < 4
    for got, expected in zip(together, alone, strict=True):
        assert (got.token_ids, got.text, got.finish_reason) == (
            expected.token_ids,
            expected.text,
            expected.finish_reason,
        )
        assert (got.receipt is None) == (expected.receipt is None)
        if got.receipt is not None:
            ours, theirs = got.receipt.terms[0], expected.receipt.terms[0]
            assert (ours.tokens_seen, ours.tokens_edited) == (theirs.tokens_seen, theirs.tokens_edited)
            assert ours.projection_before == pytest.approx(theirs.projection_before, abs=1e-4)
            assert ours.perturbation == pytest.approx(4.0, abs=1e-4)


# --- prompts ------------------------------------------------------------------------------------------------


def test_a_prompt_that_fills_the_context_is_refused(engine) -> None:
    for call in (
        lambda p: engine.generate([p]),
        lambda p: engine.score([p], [[1]]),
        lambda p: engine.capture([p], [[1]]),
    ):
        with pytest.raises(ArgumentError, match=r"prompt: 300 tokens do not fit .* \(context 256\); shorten it"):
            call(Prompt(text="x" * 300))


def test_an_answer_ends_where_the_context_ends(engine) -> None:
    rows = engine.generate([Prompt(text="x" * 250), Prompt(text="y")], seeded(7, max_new_tokens=20))
    assert [(len(row.token_ids), row.finish_reason) for row in rows] == [(6, "length"), (20, "length")]
    assert len(engine.score([rows[0].prompt], [rows[0].token_ids])[0].logprobs) == 6
    with pytest.raises(ArgumentError, match="do not fit"):
        engine.score([rows[0].prompt], [[*rows[0].token_ids, 1, 1]])


def test_an_empty_prompt_needs_a_begin_token(engine) -> None:
    with pytest.raises(ArgumentError, match=r"holds no token.*write some text"):
        engine.generate([Prompt(text="")])


def test_no_prompts_no_answers(engine) -> None:
    assert engine.generate([]) == []
    assert engine.score([], []) == []
    assert engine.capture([], []).shape == (0, 4, 32)


def test_prefill_counts_as_prompt(engine) -> None:
    prompt = Prompt.chat("Who are you?", prefill="I am")
    whole = Prompt(text="<|user|>Who are you?<|end|><|assistant|>I am")
    assert ids_of(engine, prompt) == ids_of(engine, whole)
    ours, theirs = engine.generate([prompt, whole], [seeded(1)] * 2, push(engine, position="response"))
    assert ours.token_ids == theirs.token_ids
    assert not ours.text.startswith("I am")
    assert ours.receipt.terms[0].tokens_seen == len(ours.token_ids)


def test_a_conversation_is_rendered_by_the_template(engine) -> None:
    turns = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Why"))
    text = "<|user|>Hi<|end|><|assistant|>Yes?<|end|><|user|>Why<|end|><|assistant|>"
    assert ids_of(engine, Prompt(messages=turns)) == ids_of(engine, Prompt(text=text))


def with_template(template: str | None, **options) -> TextCodec:
    made = tokenizer()
    made.chat_template = template
    return TextCodec(made, options)


def rendered(codec: TextCodec, *turns: tuple[str, str]) -> str:
    return codec.decode(codec.encode(Prompt(messages=tuple(Message(*turn) for turn in turns))))


GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}({{ m['role'] }}: {{ m['content'] | trim }})"
    "{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}(user: {{ m['content'] }})"
    "{% elif m['role'] == 'assistant' %}(assistant: {{ m['content'] }}){% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [GEMMA, PHI3], ids=["refuses", "drops silently"])
def test_a_template_without_system_turn_gets_its_text_in_the_first_user_turn(template: str) -> None:
    codec = with_template(template)
    assert rendered(codec, ("system", "Lie. "), ("user", "Hi")) == "(user: Lie. \n\nHi)"
    assert rendered(codec, ("user", "Hi")) == "(user: Hi)"
    turns = (("system", "Lie."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why"))
    assert rendered(codec, *turns) == "(user: Lie.\n\nHi)(assistant: Yes?)(user: Why)"


@pytest.mark.parametrize("turns", [["user", "user"], ["system", "user", "user"], ["assistant"], ["system"]])
def test_what_a_template_refuses_is_told(turns: list[str]) -> None:
    with pytest.raises(ArgumentError, match=r"chat template refuses these turns: .*(alternate|not supported)"):
        rendered(with_template(GEMMA), *((role, "x") for role in turns))


def test_a_broken_template_is_told() -> None:
    for template in ("{{ messages[0].nothing.at_all }}", "{% for m in messages %}"):
        with pytest.raises(ArgumentError, match="chat template refuses these turns"):
            rendered(with_template(template), ("user", "Hi"))


def test_template_options_are_passed_on() -> None:
    codec = with_template("{% if thinking %}<t>{% endif %}{{ messages[0]['content'] }}", thinking=True)
    assert rendered(codec, ("user", "Hi")) == "<t>Hi"


def test_without_template_the_turns_are_plain_text() -> None:
    assert rendered(with_template(None), ("system", "Be kind."), ("user", "Hi")) == "Be kind.\nHi"


def test_a_base_model_without_template_takes_plain_text(stories: Path) -> None:
    engine = HFEngine.load(str(stories), dtype="float32")
    assert engine._model.codec._tokenizer.chat_template is None
    ids = ids_of(engine, Prompt.chat("Once upon a time"))
    assert ids == ids_of(engine, Prompt(text="Once upon a time"))
    assert engine.generate([Prompt.chat("Once upon a time")], Sampling(max_new_tokens=4))[0].text.startswith(
        ", there was"
    )
    assert len(ids_of(engine, Prompt(text=""))) == 1
    assert engine.generate([Prompt(text="")], Sampling(max_new_tokens=3), push(engine))[0].receipt.tokens_edited == 3


# --- arguments ----------------------------------------------------------------------------------------------


def foreign(engine, **changes) -> Edit:
    from dataclasses import replace

    return Edit(push(engine).terms, replace(engine.info, **changes))


@pytest.mark.parametrize(
    ("edits", "error", "told"),
    [
        (lambda e: "swfc", ArgumentError, "edits: got str; expected Edit or None"),
        (lambda e: push(e).terms[0], ArgumentError, "edits: got EditTerm; expected Edit or None"),
        (lambda e: [push(e), 3], ArgumentError, "edits: got int"),
        (lambda e: [push(e)], ArgumentError, "edits: got 1 for 2 rows; give one for all, or one per row"),
        (lambda e: [None] * 3, ArgumentError, "edits: got 3 for 2 rows"),
        (lambda e: push(e, 4), UnknownNameError, "unknown layer 4; known: 0, 1, 2, 3"),
        (lambda e: push(e, -1), UnknownNameError, "unknown layer -1"),
        (
            lambda e: push(e, direction=np.eye(16, dtype=np.float32)[0]),
            ModelMismatchError,
            "direction has d_model 16; .* has 32",
        ),
        (lambda e: foreign(e, d_model=64), ModelMismatchError, "the edit was made for .*d_model 64"),
        (lambda e: foreign(e, n_layers=2), ModelMismatchError, "n_layers 2"),
        (lambda e: foreign(e, config_hash="x"), ModelMismatchError, "config_hash x"),
        (lambda e: [None, foreign(e, signature=(1.0,) * 256)], ModelMismatchError, "same shape but other weights"),
    ],
)
def test_an_edit_that_does_not_fit_is_refused_before_anything_runs(engine, edits, error: type, told: str) -> None:
    for call in (
        lambda: engine.generate([PROMPT] * 2, WARM, edits(engine)),
        lambda: engine.score([PROMPT] * 2, [TOKENS] * 2, edits(engine)),
        lambda: engine.capture([PROMPT] * 2, [TOKENS] * 2, edits(engine)),
    ):
        with pytest.raises(error, match=told):
            call()


def test_a_stream_checks_its_arguments_before_the_first_chunk(engine) -> None:
    with pytest.raises(UnknownNameError, match="unknown layer 9"):
        engine.stream(PROMPT, WARM, push(engine, 9))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda e: e.generate("Hi"), "prompts: got a single str; give a list of prompts"),
        (lambda e: e.generate(PROMPT), "prompts: got a single Prompt"),
        (lambda e: e.capture(PROMPT, [TOKENS]), "prompts: got a single Prompt"),
        (lambda e: e.score(["Hi"], [TOKENS]), r"prompts: got str; expected Prompt \(see Prompt.chat\)"),
        (lambda e: e.stream("Hi"), "prompts: got str"),
        (lambda e: e.generate([PROMPT], None), "sampling: got NoneType; expected Sampling"),
        (lambda e: e.generate([PROMPT], [WARM, WARM]), "sampling: got 2 for 1 rows"),
        (lambda e: e.score([PROMPT], [TOKENS] * 2), "responses: got 2 for 1 prompts"),
        (lambda e: e.capture([PROMPT] * 2, [TOKENS, []]), r"responses: row\(s\) \[1\] hold no token"),
    ],
)
def test_arguments_of_the_wrong_form_are_refused(engine, call, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        call(engine)


def test_a_retrained_model_of_the_same_shape_is_told_apart(engine, tmp_path: Path) -> None:
    from tests.models import save_tiny

    other = HFEngine.load(str(save_tiny("llama", tmp_path / "other", seed=1)), dtype="float32")
    with pytest.raises(ModelMismatchError, match="same shape but other weights"):
        other.generate([PROMPT], WARM, Edit(push(engine).terms, engine.info))


# --- never silently unsteered -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_run_and_are_steered(tiny_folder, dtype: str) -> None:
    half = HFEngine.load(str(tiny_folder("llama")), dtype=dtype)
    assert next(half._model.network.parameters()).dtype == getattr(torch, dtype)
    edit = push(half, amount=2.0)
    plain, steered = half.capture([PROMPT], [TOKENS]), half.capture([PROMPT], [TOKENS], edit)
    moved = steered[0, 1] - plain[0, 1]
    assert_allclose(moved, 2.0 * np.eye(32)[3], atol=0.05)
    assert_array_equal(steered[0, 0], plain[0, 0])
    response = half.generate([PROMPT], WARM, edit)[0]
    assert response.receipt.perturbation == pytest.approx(2.0, rel=1e-3)
    exact = HFEngine.load(str(tiny_folder("llama")), dtype="float32")
    exact.info.require_same(half.info, "a direction of the float32 copy")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_an_error(engine, value: float) -> None:
    def overflow(_module: nn.Module, _inputs: object, output: object) -> object:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[..., 5] = value
        return output

    handle = engine._model.blocks[0].register_forward_hook(overflow)
    try:
        for call in (
            lambda: engine.generate([PROMPT], WARM, push(engine, 1)),
            lambda: list(engine.stream(PROMPT, WARM, push(engine, 1))),
            lambda: engine.score([PROMPT], [TOKENS], push(engine, 1)),
            lambda: engine.capture([PROMPT], [TOKENS], push(engine, 1)),
        ):
            with pytest.raises(EngineError, match=r"layer 1, row 0: the activations are not finite.*bfloat16"):
                call()
    finally:
        handle.remove()


@pytest.mark.parametrize("call", ["generate", "score", "capture"])
def test_a_model_that_does_not_run_its_hooks_is_an_error(tiny_folder, call: str) -> None:
    """As a compiled or wrapped model would: what runs are not the modules that were hooked."""
    import copy

    engine = HFEngine.load(str(tiny_folder("llama")), dtype="float32")
    engine._model.blocks = copy.deepcopy(engine._model.blocks)
    arguments = ([PROMPT], WARM) if call == "generate" else ([PROMPT], [TOKENS])
    with pytest.raises(EngineError, match="layer 1 ran its steering 0 times in one pass, expected once"):
        getattr(engine, call)(*arguments, push(engine))
    with pytest.raises(EngineError, match=r"layers \[0, 1, 2, 3\] were not run"):
        engine.capture([PROMPT], [TOKENS])


def test_a_block_that_runs_twice_is_an_error(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    block = engine._model.blocks[1]
    once = block.forward

    def twice(hidden: torch.Tensor, *rest: object, **options: object) -> object:
        monkeypatch.setattr(block, "forward", once)
        block(hidden, *rest, **options)
        return once(hidden, *rest, **options)

    monkeypatch.setattr(block, "forward", twice)
    with pytest.raises(EngineError, match="layer 1 ran its steering 2 times in one pass"):
        engine.score([PROMPT], [TOKENS], push(engine))


def test_a_block_that_returns_no_state_is_an_error(engine) -> None:
    handle = engine._model.blocks[1].register_forward_hook(lambda _module, _inputs, output: {"hidden": output})
    try:
        with pytest.raises(
            EngineError, match=r"a decoder block returned dict; expected a state \[batch, tokens, d_model\]"
        ):
            engine.score([PROMPT], [TOKENS], push(engine))
    finally:
        handle.remove()


# --- loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/nowhere/at/all", "nobody/has-this-model", "/nowhere/model.gguf"])
def test_a_model_that_is_not_there(name: str) -> None:
    with pytest.raises(EngineError, match=f"cannot load model '{name}': .*a hub id, a folder that holds config.json"):
        HFEngine.load(name)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "made-up"}'),
        ("tokenizer.json", b"{"),
        ("model.safetensors", None),
        ("model.safetensors", b"\x10\x00"),
        ("model.safetensors", b"\xff" * 64),
    ],
)
def test_a_damaged_folder(tiny_folder, tmp_path: Path, file: str, content: bytes | None) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(EngineError, match="cannot load model") as told:
        HFEngine.load(str(folder))
    assert "\n" not in str(told.value)


def test_a_checkpoint_that_lacks_weights(tiny_folder, tmp_path: Path) -> None:
    """Transformers would fill in random numbers and go on."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"lack 1 of its weights \(model\.layers\.2\.mlp\.up_proj\.weight for one\)"):
        HFEngine.load(str(folder))


def test_an_unknown_dtype(tiny_folder) -> None:
    with pytest.raises(ArgumentError, match="dtype: got 'fp16'; expected auto, float32, float16, bfloat16"):
        HFEngine.load(str(tiny_folder("llama")), dtype="fp16")


def test_blocks_may_be_named(tiny_folder, engine) -> None:
    named = HFEngine.load(str(tiny_folder("llama")), dtype="float32", blocks="model.layers")
    assert named.info.config_hash == engine.info.config_hash
    assert (
        named.generate([PROMPT], WARM, push(named))[0].token_ids
        == engine.generate([PROMPT], WARM, push(engine))[0].token_ids
    )
    for wrong in ("model.layer", "model", "model.layers.0"):
        with pytest.raises(ArgumentError, match=f"blocks: '{wrong}' is no ModuleList of LlamaForCausalLM"):
            HFEngine.load(str(tiny_folder("llama")), blocks=wrong)


def test_what_a_model_is(engine, tiny_folder) -> None:
    info = engine.info
    assert (info.architecture, info.d_model, info.n_layers) == ("LlamaForCausalLM", 32, 4)
    assert info.name == str(tiny_folder("llama"))
    assert info.language == "english"
    assert len(info.signature) == 256
    assert_allclose([np.mean(info.signature), np.std(info.signature, ddof=1)], [0, 1], atol=1e-3)


def test_a_gguf_file(engine, tmp_path: Path) -> None:
    """The same weights in llama.cpp's format: same text, same model."""
    path = write_gguf(engine, tmp_path / "tiny.gguf")
    for arguments in ({"name": str(path)}, {"name": str(tmp_path), "gguf_file": "tiny.gguf"}):
        loaded = HFEngine.load(dtype="float32", **arguments)
        loaded.info.require_same(engine.info, "a direction of the GGUF copy")
        ours, theirs = (e.generate([PROMPT], Sampling(max_new_tokens=8), push(e))[0] for e in (engine, loaded))
        assert ids_of(loaded) == ids_of(engine)
        assert theirs.token_ids == ours.token_ids
        assert theirs.receipt.terms[0].tokens_edited == ours.receipt.terms[0].tokens_edited


def write_gguf(engine, path: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    config, weights = engine._model.network.config, engine._model.network.state_dict()
    codec = engine._model.codec._tokenizer
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = [codec.convert_ids_to_tokens(index) or f"<|unused{index}|>" for index in range(config.vocab_size)]
    names[262] = "!!"  # the format wants one merge at least
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([1] * 256 + [3] * (config.vocab_size - 256))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(258)
    writer.add_chat_template(codec.chat_template)
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {
        f"model.layers.{layer}.{theirs}": f"blk.{layer}.{ours}"
        for layer in range(config.num_hidden_layers)
        for theirs, ours in parts.items()
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for theirs, ours in (outer | inner).items():
        weight = weights[f"{theirs}.weight"].float().numpy()
        count = heads.get(ours.rpartition(".")[2])
        if count:  # llama.cpp keeps rotary pairs side by side
            weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{ours}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- decoder blocks by structure ----------------------------------------------------------------------------


class Odd(nn.Module):
    """A module tree with named lists of blocks and an embedding somewhere."""

    def __init__(self, lists: dict[str, int], embedding: str, blocks: int = 4) -> None:
        super().__init__()
        self.config = transformers.LlamaConfig(num_hidden_layers=blocks, hidden_size=4, num_attention_heads=1)
        self._embedding = nn.Embedding(5, 4)
        for path, count in lists.items():
            self._put(path, nn.ModuleList(nn.Linear(4, 4) for _ in range(count)))
        embedding_module, self._embedding = self._embedding, None
        self._put(embedding, embedding_module)
        object.__setattr__(self, "found", embedding_module)

    def _put(self, path: str, module: nn.Module) -> None:
        place: nn.Module = self
        *way, last = path.split(".")
        for name in way:
            if not hasattr(place, name):
                place.add_module(name, nn.Module())
            place = getattr(place, name)
        place.add_module(last, module)

    def get_input_embeddings(self) -> nn.Module:
        return self.found


@pytest.mark.parametrize(
    ("lists", "embedding", "expected"),
    [
        ({"model.layers": 4}, "model.embed", "model.layers"),
        ({"vision.layers": 4, "language.layers": 4}, "language.embed", "language.layers"),
        ({"model.vision.blocks": 4, "model.text.layers": 4}, "model.text.embed", "model.text.layers"),
        ({"model.layers": 4, "model.norms": 3}, "model.embed", "model.layers"),
        ({"model.encoder.layer": 4}, "model.embeddings.words", "model.encoder.layer"),
        ({"blocks": 4, "heads.extra": 4}, "inner.embed", "blocks"),
    ],
)
def test_blocks_are_found_by_structure(lists: dict[str, int], embedding: str, expected: str) -> None:
    model = Odd(lists, embedding)
    assert decoder_blocks(model) is model.get_submodule(expected)


@pytest.mark.parametrize(
    ("lists", "embedding", "found"),
    [
        ({"model.layers": 3}, "model.embed", 0),
        ({"left.layers": 4, "right.layers": 4}, "shared.embed", 2),
        ({"model.layers": 4, "model.experts": 4}, "model.embed", 2),
    ],
)
def test_blocks_that_cannot_be_told_apart_are_asked_for(lists: dict[str, int], embedding: str, found: int) -> None:
    with pytest.raises(EngineError, match=f"found {found} candidate lists of 4 decoder blocks, .*pass blocks='path"):
        decoder_blocks(Odd(lists, embedding))


def test_the_language_stack_of_a_vision_model() -> None:
    """Both towers have four blocks."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(**GROUPED)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))
    blocks = decoder_blocks(model)
    assert len(blocks) == 4
    assert {type(block).__name__ for block in blocks} == {"LlamaDecoderLayer"}


def test_the_config_of_the_tiny_models_is_what_these_tests_assume(tiny_folder) -> None:
    config = json.loads((tiny_folder("llama") / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (4, 32, VOCABULARY)
