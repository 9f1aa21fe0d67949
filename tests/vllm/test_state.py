"""Requests as they travel, what is made of them step by step, and what vLLM is told. None of this needs vLLM."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from steerwell.core.errors import ArgumentError, EngineError
from steerwell.core.records import Edit, EditTerm
from steerwell.engines.vllm import front, plugin
from steerwell.engines.vllm.blocks import attach, decoder_blocks, own_layers
from steerwell.engines.vllm.ops import BEFORE, CAPTURE, MARGIN, ROW, SEEN, TALLY, TRACE
from steerwell.engines.vllm.state import Steering
from steerwell.engines.vllm.wire import KEY, Settings, decode, encode, packed, parse, vector_name

WIDTH, LAYERS = 8, 3
STEERED = ("tokens", "live", "ids", "numbers", "table", "sums", "traced")


def unit(place: int) -> np.ndarray:
    return np.eye(WIDTH, dtype=np.float32)[place % WIDTH]


def edit_of(*terms, position="all", gate=math.inf) -> Edit:
    return Edit(tuple(EditTerm(layer, unit(place), gate, 1.0, 0.0, position) for layer, place in terms))


def steering(**settings) -> Steering:
    return Steering(
        Settings(**{"max_terms": 2, "directions": 4} | settings),
        range(LAYERS),
        n_layers=LAYERS,
        width=WIDTH,
        requests=2,
        tokens=32,
        device=torch.device("cpu"),
    )


def step(on: Steering, counts: dict[str, int], *, new=(), cached=(), finished=()) -> torch.Tensor:
    """One step: `new` are (name, request data, prompt length), `cached` (name, tokens computed)."""
    arrived = [
        SimpleNamespace(
            req_id=name,
            prompt_len=length,
            num_computed_tokens=0,
            sampling_params=SimpleNamespace(extra_args=value and {KEY: value}),
        )
        for name, value, length in new
    ]
    names, computed = [name for name, _ in cached], [number for _, number in cached]
    on.update(
        SimpleNamespace(
            finished_req_ids=set(finished),
            scheduled_new_reqs=arrived,
            scheduled_cached_reqs=SimpleNamespace(req_ids=names, num_computed_tokens=computed),
        )
    )
    on.fill(list(counts), counts)
    tokens = on.buffers.tokens[:, : sum(counts.values())].clone()
    for layer in range(LAYERS):
        run = torch.zeros(tokens.shape[1], WIDTH)
        parts = [getattr(on.buffers, name) for name in STEERED]
        torch.ops.steerwell.steer(run, None, torch.tensor(layer), *parts)
        torch.ops.steerwell.read(
            torch.ones_like(run), None, torch.tensor(layer), on.buffers.tokens, on.buffers.captured
        )
    return tokens


def test_an_edit_survives_the_journey() -> None:
    gate = unit(5)
    edit = Edit((*edit_of((0, 1)).terms, EditTerm(2, unit(3), 0.25, -1.5, 0.5, "response", gate)))
    sent = encode(edit, ticket="t", start=4, end=9)
    for value in (sent, json.dumps(sent)):
        request = decode(value, WIDTH, LAYERS, Settings(), ())
        assert [(term.layer, term.gate, term.offset, term.gain, term.position) for term in request.terms] == [
            (0, math.inf, 1.0, 0.0, "all"),
            (2, 0.25, -1.5, 0.5, "response"),
        ]
        assert (request.ticket, request.start, request.end, request.read) == ("t", 4, 9, None)
        np.testing.assert_array_equal(request.vectors[request.terms[1].direction], unit(3))
        np.testing.assert_array_equal(request.vectors[request.terms[1].gate_direction], gate)
    known = {vector_name(unit(1)), vector_name(unit(3)), vector_name(gate)}
    named = encode(edit, known=known)
    assert named["vectors"] == {}
    assert decode(named, WIDTH, LAYERS, Settings(), known).key == parse(encode(edit)).key
    assert all(len(text) < 4 * WIDTH * 2 for text in sent["vectors"].values())


def test_traces_are_asked_for_where_there_is_room() -> None:
    def sent(room: int, **asked):
        value = encode(asked.pop("edit", edit_of((0, 1))), **{"ticket": "t"} | asked)
        return decode(value, WIDTH, LAYERS, Settings(traces=room, captures=1), ())

    assert sent(4, trace=(3, 7)).trace == (3, 7)
    assert sent(4).trace is None
    assert sent(4, trace=(3, 7)).key == sent(4).key  # a trace changes no state
    for room, words in ((3, "a trace of 4 tokens; this server keeps 3"), (0, "keeps 0 \\(setting 'traces'\\)")):
        with pytest.raises(ArgumentError, match=words):
            sent(room, trace=(3, 7))
    for odd in ({"trace": (3, 3)}, {"trace": (-1, 2)}, {"trace": (0, 2), "ticket": ""}):
        with pytest.raises(ArgumentError, match="expected first < end, terms to trace, and a ticket"):
            sent(4, **odd)
    with pytest.raises(ArgumentError, match="terms to trace"):
        sent(4, edit=None, read=(0, 2), trace=(0, 2))


def test_keys_tell_steerings_apart() -> None:
    edits = [edit_of((0, 1)), edit_of((0, 2)), edit_of((1, 1)), edit_of((0, 1), gate=2.0)]
    edits += [edit_of((0, 1), position="response"), edit_of((0, 1), (0, 1))]
    assert len({parse(encode(edit)).key for edit in edits}) == len(edits)
    assert parse(encode(edits[0], ticket="a")).key == parse(encode(edits[0], ticket="b")).key
    assert parse(encode(edits[0])).first_steered(10) == 0
    assert parse(encode(edits[4])).first_steered(10) == 9
    assert parse(encode(edits[4], start=3)).first_steered(10) == 3


@pytest.mark.parametrize("bad", [{"max_terms": 0}, {"captures": -1}, {"directions": 1.5}, {"traces": -1}])
def test_settings_are_checked(bad) -> None:
    with pytest.raises(ArgumentError, match=next(iter(bad))):
        Settings(**bad)
    with pytest.raises(ArgumentError, match="unknown"):
        Settings.of({KEY: {"slots": 3}})
    assert Settings.of({}) is None
    assert Settings.of({KEY: {}}) == Settings()


def test_every_token_gets_its_rows() -> None:
    on = steering(captures=1)
    tokens = step(
        on,
        {"a": 2, "plain": 3, "b": 4},
        new=[
            ("a", encode(edit_of((0, 1))), 2),
            ("plain", None, 3),
            ("b", encode(edit_of((1, 2), position="response"), ticket="b", read=(1, 3)), 6),
        ],
    )

    first, second = int(tokens[TALLY, 0]), int(tokens[TALLY, 5])
    assert {first, second} == {1, 2}
    assert tokens[ROW].tolist() == [2 * first - 1, 2 * first, 0, 0, 0, *[2 * second - 1] * 4]
    assert tokens[TALLY].tolist() == [first, first, 0, 0, 0, *[second] * 4]
    assert tokens[CAPTURE].tolist() == [0] * 6 + [1, 1, 0]
    tokens = step(on, {"b": 2}, cached=[("b", 4)])  # its last two prompt tokens: the last one yields an answer's first
    assert tokens[ROW].tolist() == [2 * second - 1, 2 * second]
    tokens = step(on, {"b": 1}, cached=[("b", 6)], finished=["a"])
    assert tokens[ROW].tolist() == [2 * second]
    assert on.collect(["b"])["b"][0][1:3] == [2.0, 2.0]
    step(on, {"plain": 1}, finished=["b"])
    assert on.buffers.tokens.sum() == 0
    assert on.buffers.live.sum() == 0


def test_counts_go_on_after_a_preemption_and_slots_take_turns() -> None:
    """Three requests on two slots: who is not in the batch makes room, and no token is counted twice."""
    on, data = steering(), [encode(edit_of((0, place)), ticket=str(place)) for place in range(3)]
    step(on, {"0": 4, "1": 4}, new=[("0", data[0], 4), ("1", data[1], 4)])
    step(on, {"0": 1, "2": 4}, cached=[("0", 4)], new=[("2", data[2], 4)])
    step(on, {"1": 5}, cached=[("1", 0)])  # preempted: its four tokens run again, and one more
    step(on, {"1": 1, "2": 1}, cached=[("1", 5), ("2", 4)])
    step(on, {"x": 1}, finished=["0", "1", "2"])
    found = on.collect(["0", "1", "2"])
    assert [found[name][0][1] for name in "012"] == [5, 6, 5]
    assert [found[name][0][4] for name in "012"] == [5, 6, 5]  # each was moved by 1
    with pytest.raises(EngineError, match="no receipt under ticket '0'"):
        on.collect(["0"])


def told(on: Steering, ticket: str, first: int, end: int) -> np.ndarray:
    """A trace [terms, tokens, 2]."""
    found = on.traces({ticket: (first, end)})[ticket]
    assert [index for index, _ in found] == list(range(len(found)))
    return np.array([np.frombuffer(sent, np.float32).reshape(-1, 2) for _, sent in found])


def test_traces_are_kept_token_by_token_until_the_receipt_is_collected() -> None:
    """In chunks, beside others, through a preemption; at layer 1 the second term reads what the first one left."""
    edit = Edit((*edit_of((1, 1), (1, 1)).terms, *edit_of((0, 2), position="response", gate=-1.0).terms))
    on, data = steering(traces=6), encode(edit, ticket="a", start=2, trace=(1, 5))
    expected = np.array([[[1, 0]] * 4, [[1, 1]] * 4, [[np.nan] * 2, *[[0, 0]] * 3]], np.float32)
    beside = encode(edit_of((0, 1)), ticket="b")
    tokens = step(on, {"b": 1, "a": 3}, new=[("b", beside, 1), ("a", data, 4)])
    places = on._live["a"].trace.places.tolist()
    assert sorted(places) == [1, 2, 3, 4]
    assert tokens[TRACE].tolist() == [0, 0, *places[:2]]
    np.testing.assert_array_equal(told(on, "a", 0, 2), expected[:, :2])
    with pytest.raises(EngineError, match="traced tokens 0 to 2 were asked for, and 2 of them have run"):
        told(on, "a", 0, 3)
    step(on, {"a": 1}, cached=[("a", 3)])
    tokens = step(on, {"a": 4}, cached=[("a", 0)])  # preempted: it runs again
    assert tokens[TRACE].tolist() == [0, *places[:3]]
    np.testing.assert_array_equal(told(on, "a", 0, 3), expected[:, :3])
    assert step(on, {"a": 1}, cached=[("a", 4)])[TRACE].tolist() == places[3:]
    assert step(on, {"a": 1}, cached=[("a", 5)])[TRACE].tolist() == [0]
    np.testing.assert_array_equal(told(on, "a", 2, 4), expected[:, 2:])
    step(on, {"b": 1}, cached=[("b", 1)], finished=["a"])
    np.testing.assert_array_equal(told(on, "a", 0, 4), expected)
    with pytest.raises(EngineError, match="no trace: none was asked for"):
        told(on, "b", 0, 1)
    assert [row[1] for row in on.collect(["a"])["a"]] == [6, 6, 4]
    with pytest.raises(EngineError, match="no receipt under ticket 'a'"):
        told(on, "a", 0, 4)


def test_places_of_traces_take_turns_and_hold_nothing_old() -> None:
    on = steering(traces=3)
    data = {name: encode(edit_of((0, 1)), ticket=name, trace=(0, 2)) for name in "abc"}
    step(on, {"a": 2, "b": 1}, new=[("a", data["a"], 2), ("b", data["b"], 2)])
    assert told(on, "a", 0, 2)[0, :, 0].tolist() == [1, 1]
    with pytest.raises(EngineError, match="more at one time than the setting 'traces' has room for"):
        told(on, "b", 0, 1)  # it is steered all the same
    step(on, {"c": 1}, new=[("c", data["c"], 2)], finished=["a", "b"])
    assert told(on, "c", 0, 1).tolist() == [[[1, 0]]]
    assert on.buffers.traced[:, 1:].isfinite().sum() == 2  # nothing of "a" has stayed
    assert [on.collect([name])[name][0][1] for name in "ab"] == [2, 1]
    assert on.traces({}) == {}


def test_rows_that_are_there_are_not_written_again() -> None:
    on = steering()
    data = encode(edit_of((0, 1)), ticket="a")
    step(on, {"a": 1}, new=[("a", data, 1)])
    version = on.buffers.tokens._version
    step(on, {"a": 1}, cached=[("a", 1)])
    assert on.buffers.tokens._version == version
    on.clear()
    assert not on.buffers.tokens.any()
    step(on, {"a": 1}, cached=[("a", 2)])
    assert on.buffers.tokens[ROW, 0] > 0
    assert on.collect(["a"])["a"][0][1] == 3


def test_vectors_are_loaded_and_evicted() -> None:
    on = steering(directions=2)
    on.register({vector_name(unit(place)): packed(unit(place)) for place in range(6)})
    known = set(on.known)
    for place in range(6):
        name = str(place)
        step(on, {name: 1}, new=[(name, encode(edit_of((0, place)), known=known), 1)])
        row = int(on.buffers.ids[0, 2 * on._live[name].slot, 0, 0])
        np.testing.assert_array_equal(on.buffers.table[row].numpy(), unit(place))
        step(on, {}, finished=[name])
    step(on, {"a": 1, "b": 1}, new=[(name, encode(edit_of((0, at))), 1) for name, at in (("a", 0), ("b", 1))])
    on.forget(known)
    assert not on.known
    with pytest.raises(ArgumentError, match="neither registered nor sent"):
        step(on, {"c": 1}, new=[("c", encode(edit_of((0, 3)), known=known), 1)])
    third = ("d", encode(edit_of((1, 4), (2, 5))), 1)
    with pytest.raises(EngineError, match="more than 2 vectors"):
        step(on, {"d": 1}, new=[third], finished=["a"])


def test_a_token_that_the_op_missed_voids_the_answer() -> None:
    on = steering()
    step(on, {"a": 3}, new=[("a", encode(edit_of((0, 1)), ticket="a"), 3)])
    on.buffers.sums[0, on._live["a"].slot, 0, SEEN] -= 1
    with pytest.raises(EngineError, match="saw 2 tokens of a request, expected 3"):
        on.collect(["a"])


def test_terms_of_one_layer_apply_in_order_and_unseated_slots_are_clean() -> None:
    on = steering()
    step(on, {"a": 1}, new=[("a", encode(edit_of((1, 1), (1, 1)), ticket="a"), 1)])
    assert [row[3] for row in on.collect(["a"])["a"]] == [0.0, 1.0]  # the second one reads what the first one left
    step(on, {}, finished=["a"])
    step(on, {"b": 1}, new=[("b", encode(edit_of((0, 1)), ticket="b"), 1)])
    slot = on._live["b"].slot
    assert on.buffers.ids[1, 2 * slot - 1 : 2 * slot + 1].amax() == -1
    assert on.buffers.sums[1, slot, :, :MARGIN].abs().sum() == 0


def test_the_cache_is_keyed_by_the_steering_from_the_first_steered_block_on() -> None:
    keyed = plugin._keyed(lambda request, start, end, mm: (("mm",) if request.images else None, mm))

    def request(value, images=False):
        extra = {KEY: value} if value else None
        return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra), num_prompt_tokens=40, images=images)

    assert keyed(request(None), 0, 16, 0) == (None, 0)
    assert keyed(request(None, True), 0, 16, 3) == (("mm",), 3)
    every, answer = (request(encode(edit_of((0, 1), position=position)), True) for position in ("all", "response"))
    key = parse(encode(edit_of((0, 1)))).key
    assert keyed(every, 0, 16, 0) == (("mm", (KEY, key)), 0)
    assert keyed(answer, 16, 32, 0) == (("mm",), 0)
    assert keyed(answer, 32, 48, 0)[0][1][0] == KEY  # holds token 39, which yields the first of the answer
    assert keyed(answer, 32, 39, 0) == (("mm",), 0)
    assert keyed(request(encode(None, read=(0, 2))), 0, 16, 0) == (None, 0)


def fine_config() -> SimpleNamespace:
    return SimpleNamespace(
        speculative_config=None,
        kv_transfer_config=None,
        parallel_config=SimpleNamespace(data_parallel_size=1),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=False)),
        cache_config=SimpleNamespace(),
        model_config=SimpleNamespace(is_encoder_decoder=False, runner_type="generate"),
    )


def test_what_the_ops_cannot_be_right_under_is_refused() -> None:
    plugin.check_config(fine_config())
    for change, word in [
        (lambda config: setattr(config, "speculative_config", object()), "speculative decoding"),
        (lambda config: setattr(config, "kv_transfer_config", object()), "KV connector"),
        (lambda config: setattr(config.parallel_config, "data_parallel_size", 2), "data parallelism"),
        (lambda config: setattr(config.parallel_config, "enable_dbo", True), "dual batch overlap"),
        (lambda config: setattr(config.compilation_config.pass_config, "enable_sp", True), "sequence parallelism"),
        (lambda config: setattr(config.model_config, "runner_type", "pooling"), "pooling"),
    ]:
        config = fine_config()
        change(config)
        with pytest.raises(EngineError, match=word):
            plugin.check_config(config)


def test_a_server_without_steering_refuses_steered_requests() -> None:
    config = SimpleNamespace(additional_config={})
    params = SimpleNamespace(extra_args={KEY: encode(edit_of((0, 1)))}, n=1)
    with pytest.raises(ArgumentError, match="started without steering"):
        front.check_request(config, params)


def test_what_is_drawn_from_outputs_that_are_not_finite_has_no_receipt() -> None:
    """Only that of its own request; and the keys and values are cleansed, before its blocks go to others."""
    on, cleansed = steering(), []
    on.cleanse = lambda: cleansed.append(True)
    sent = {name: encode(edit_of((0, 1)), ticket=name) for name in ("a", "b")}
    new = [("a", sent["a"], 2), ("plain", None, 1), ("b", sent["b"], 1)]
    step(on, {"a": 2, "plain": 1, "b": 1}, new=new)
    for at, value in ((0, math.nan), (1, math.inf)):
        outputs = torch.zeros(3, 5)
        outputs[at, 3] = value
        on.judge(outputs)
    step(on, {"plain": 1, "b": 1}, cached=[("plain", 1), ("b", 1)], finished=["a"])
    assert cleansed == [True]
    on.judge(torch.zeros(2, 5))
    found = on.collect(["a", "b"])
    assert math.isnan(found["a"][0][1 + BEFORE])
    assert found["b"][0][1 + BEFORE] == 0


def test_both_model_runners_are_followed() -> None:
    """Runner V1 says the batch's order before it prepares its inputs, V2 afterwards; dummy steps steer nothing."""
    calls = []
    watcher = SimpleNamespace(
        update=lambda output: calls.append("update"),
        fill=lambda names, counts: calls.append(("fill", list(names), counts)),
        clear=lambda: calls.append("clear"),
        judge=lambda outputs: calls.append(("judge", outputs)),
    )
    output = SimpleNamespace(num_scheduled_tokens={"b": 1, "a": 2})

    class First:
        input_batch = SimpleNamespace(req_ids=["a", "b"])

        def execute_model(self, output, tensors=None):
            return self._prepare_inputs(output, None)

        def _prepare_inputs(self, output, counts):
            calls.append("prepare")
            return 1

        def _dummy_run(self, tokens):
            calls.append("dummy")

        def _sample(self, logits, metadata):
            calls.append(("drawn", logits))

    class Second:
        def execute_model(self, output, dummy_run=False):
            return None if dummy_run else self.prepare_inputs(output, None)

        def prepare_inputs(self, output, state):
            calls.append("prepare")
            return SimpleNamespace(req_ids=["b", "a"])

        def _dummy_run(self, tokens):
            return self.execute_model(None, dummy_run=True)

        def sample(self, states, batch, grammar):
            calls.append(("drawn", states))

    for runner, order in ((First(), ["a", "b"]), (Second(), ["b", "a"])):
        calls.clear()
        plugin._follow(runner, watcher)
        runner.execute_model(output)
        filled = ("fill", order, {"b": 1, "a": 2})
        assert calls == ["update", filled, "prepare"] if order[0] == "a" else ["update", "prepare", filled]
        calls.clear()
        runner._dummy_run(4)
        assert calls[0] == "clear"
        assert "update" not in calls
        calls.clear()
        states = np.arange(6).reshape(3, 2)
        if order[0] == "a":
            runner._sample(None, None)  # a rank that does not draw
            assert calls == [("drawn", None)]
            runner._sample(states, None)
        else:
            runner.sample(states, SimpleNamespace(logits_indices=[2, 0]), None)
        judged = states if order[0] == "a" else states[[2, 0]]
        assert [call[0] for call in calls[-2:]] == ["judge", "drawn"]
        np.testing.assert_array_equal(calls[-2][1], judged)


class PPMissingLayer(torch.nn.Module):
    """As vLLM calls the placeholder of a layer that another process runs."""


class PairBlock(torch.nn.Module):
    def forward(self, hidden_states, residual):
        return hidden_states * 2, residual


class OwnSumBlock(torch.nn.Module):
    def forward(self, hidden_states, residual):
        hidden_states = residual + hidden_states * 2
        return hidden_states, residual


class Model(torch.nn.Module):
    def __init__(self, block, towers: int = 0) -> None:
        super().__init__()
        self.body = torch.nn.Module()
        self.body.start_layer = 0
        self.body.layers = torch.nn.ModuleList([PPMissingLayer(), block(), block()])
        self.tower = torch.nn.ModuleList(torch.nn.Identity() for _ in range(towers))


def test_blocks_are_found_by_structure_and_call_the_op() -> None:
    model = Model(PairBlock, towers=3)
    blocks = decoder_blocks(model, 3)
    assert blocks is model.body.layers
    assert own_layers(blocks) == [1, 2]
    on = steering()
    attach(blocks, [1, 2], on.buffers, reads=False)
    step(on, {"a": 2}, new=[("a", encode(edit_of((1, 3))), 2)])
    hidden, residual = blocks[2](torch.ones(2, WIDTH), torch.zeros(2, WIDTH))
    assert on.buffers.traced.isnan().all()
    assert hidden[:, 3].tolist() == [3, 3]  # twice 1, and moved by 1; block 2 is the second that this process runs
    assert hidden[:, 2].tolist() == [2, 2]
    assert not residual.any()


def test_blocks_that_are_not_understood_are_refused() -> None:
    with pytest.raises(EngineError, match="found 0 lists of 5"):
        decoder_blocks(Model(PairBlock), 5)
    blocks = decoder_blocks(Model(OwnSumBlock), 3)
    with pytest.raises(EngineError, match="in its hidden state already"):
        attach(blocks, [1], steering().buffers, reads=False)
