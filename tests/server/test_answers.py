"""Answers over HTTP: the engine's own, whole and streamed, in OpenAI's form."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from steerwell.core.records import Prompt, Sampling
from steerwell.serving.steering import Term
from tests.server.live import MODEL, catalog, chat, complete, events

QUESTION = "What is the capital of France?"
WAYS = [
    {},
    {"steering": []},
    {"steering": {"policy": "bounded", "strength": 2}},
    {"steering": {"direction": "made", "method": "swfc", "layers": [0, 1], "strength": -1.5}},
    {"steering": [{"policy": "honest"}, {"direction": "made", "method": "sttp", "layer": 2, "strength": 1}]},
]


def edit_of(pilot: Any, fields: dict[str, Any]) -> Any:
    given = fields.get("steering")
    listed = [given] if isinstance(given, dict) else given
    terms = None if listed is None else tuple(Term.model_validate(item) for item in listed)
    return catalog(pilot).resolve(MODEL, terms).edit


@pytest.mark.parametrize("fields", WAYS)
def test_greedy_answers_are_the_engines_own(base: str, pilot, fields: dict[str, Any]) -> None:
    edit = edit_of(pilot, fields)
    (expected,) = pilot.generate([Prompt.chat(QUESTION)], Sampling(max_new_tokens=12), edit)
    answer = chat(base, QUESTION, **fields).json()
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["choices"][0]["finish_reason"] == expected.finish_reason
    assert answer["steering"]["edit_id"] == (edit.id if edit else None)
    receipt = answer["steering"]["receipts"][0]
    assert (receipt and receipt["edit_id"]) == (edit.id if edit else None)


@pytest.mark.parametrize("fields", WAYS)
@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.0, "seed": 3}])
def test_streamed_pieces_concatenate_to_the_whole(base: str, fields: dict[str, Any], sampled: dict[str, Any]) -> None:
    whole = chat(base, **fields, **sampled).json()
    *data, done = events(chat(base, stream=True, **fields, **sampled))
    chunks = [json.loads(item) for item in data]
    assert done == "[DONE]"
    assert (
        "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        == (whole["choices"][0]["message"]["content"])
    )
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["steering"] == whole["steering"]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1


def test_the_reply_has_openais_form(base: str) -> None:
    answer = chat(base, logprobs=True, top_logprobs=3, n=2, temperature=1, seed=1).json()
    ChatCompletion.model_validate(answer, strict=True)
    assert set(answer) - {"steering"} == {
        "id", "object", "created", "model", "system_fingerprint", "choices", "usage"
    }  # fmt: skip
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == MODEL
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert set(answer["choices"][0]) == {"index", "message", "logprobs", "finish_reason"}


def test_the_chunks_have_openais_form(base: str) -> None:
    *data, _ = events(chat(base, stream=True, logprobs=True, stream_options={"include_usage": True}))
    chunks = [json.loads(item) for item in data]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert chunks[-1]["steering"]["name"] == "honest"
    assert all("steering" not in chunk for chunk in chunks[:-1])


def test_without_include_usage_every_chunk_has_a_choice(base: str) -> None:
    """Many programs read `chunk.choices[0]` of every chunk."""
    *data, _ = events(chat(base, stream=True, n=3, temperature=1, seed=1))
    assert all(len(json.loads(item)["choices"]) == 1 for item in data)
    assert all("usage" not in json.loads(item) for item in data)
    assert [("steering" in json.loads(item)) for item in data] == [False] * (len(data) - 1) + [True]


def test_usage_counts_tokens(base: str, pilot) -> None:
    prompt = Prompt.chat(QUESTION)
    usage = chat(base, n=3, temperature=1, seed=5, max_tokens=4).json()["usage"]
    assert usage["prompt_tokens"] == len(pilot.loaded.codec.encode(prompt))
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12


def test_the_end_token_counts(base: str, pilot) -> None:
    (expected,) = pilot.generate([Prompt.chat(QUESTION)], Sampling(max_new_tokens=200), None)
    assert expected.finish_reason == "stop"
    answer = chat(base, max_tokens=200, steering=[]).json()
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids) + 1


def test_stop_strings_end_the_answer_and_are_left_out(base: str) -> None:
    text = chat(base, max_tokens=60, steering=[]).json()["choices"][0]["message"]["content"]
    word = text.split()[3]
    for stop in (word, [word], ["never said", word]):
        choice = chat(base, max_tokens=60, steering=[], stop=stop).json()["choices"][0]
        assert choice["message"]["content"] == text[: text.index(word)]
        assert choice["finish_reason"] == "stop"
        *data, _ = events(chat(base, max_tokens=60, steering=[], stop=stop, stream=True))
        deltas = [json.loads(item)["choices"][0]["delta"].get("content", "") for item in data]
        assert "".join(deltas) == text[: text.index(word)]


def test_a_seed_gives_the_same_answers_again_and_one_each(base: str) -> None:
    def texts(**fields: Any) -> list[str]:
        answer = chat(base, temperature=1.5, max_tokens=30, steering=[], **fields).json()
        return [choice["message"]["content"] for choice in answer["choices"]]

    three = texts(n=3, seed=7)
    assert three == texts(n=3, seed=7)
    assert len(set(three)) == 3
    assert texts(seed=8) == three[1:2], "choice i draws with seed + i"
    assert texts(seed=-1) == texts(seed=-1)
    assert texts() != texts(), "without a seed, every answer is drawn anew"


def test_a_prompt_in_a_list_is_answered_as_alone(base: str) -> None:
    fields = {"temperature": 1.0, "seed": 11, "steering": []}
    together = complete(base, ["The capital of", "Who are you"], n=2, **fields).json()["choices"]
    alone = complete(base, "Who are you", n=2, **fields).json()["choices"]
    assert [choice["index"] for choice in together] == [0, 1, 2, 3]
    assert [choice["text"] for choice in together[2:]] == [choice["text"] for choice in alone]


def test_log_probabilities_are_the_engines(base: str, pilot) -> None:
    answer = chat(base, steering=[], logprobs=True, top_logprobs=2).json()["choices"][0]
    said = answer["logprobs"]["content"]
    assert "".join(token["token"] for token in said) == answer["message"]["content"]
    (response,) = pilot.generate([Prompt.chat(QUESTION)], Sampling(max_new_tokens=12))
    (score,) = pilot.score([response.prompt], [response.token_ids])
    assert [token["logprob"] for token in said] == pytest.approx(score.logprobs.tolist(), abs=1e-4)
    for token in said:
        assert len(token["top_logprobs"]) == 2
        assert token["top_logprobs"][0]["logprob"] == token["logprob"], "greedy takes the likeliest"
        assert bytes(token["bytes"]).decode() == token["token"]
    *data, _ = events(chat(base, steering=[], logprobs=True, top_logprobs=2, stream=True))
    streamed = [json.loads(item)["choices"][0]["logprobs"] for item in data]
    assert [token for item in streamed if item for token in item["content"]] == said


def test_a_completion_has_openais_form(base: str) -> None:
    answer = complete(base, logprobs=2).json()
    Completion.model_validate(answer, strict=True)
    choice = answer["choices"][0]
    assert answer["object"] == "text_completion"
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    ends = [len("".join(choice["logprobs"]["tokens"][:index])) for index in range(len(choice["logprobs"]["tokens"]))]
    assert choice["logprobs"]["text_offset"] == ends
    *data, _ = events(complete(base, logprobs=2, stream=True))
    chunks = [json.loads(item) for item in data]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [offset for item in told for offset in item["text_offset"]] == ends


def test_a_completion_has_sixteen_tokens_unless_asked_for_more(base: str) -> None:
    body = {"model": MODEL, "prompt": "The", "temperature": 0, "steering": []}
    answer = httpx.post(f"{base}/v1/completions", json=body, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 16 or answer["choices"][0]["finish_reason"] == "stop"


def test_an_echo_stands_in_front(base: str, pilot) -> None:
    tokens = list(pilot.tokenise("The capital of"))
    plain = complete(base, tokens, steering=[]).json()["choices"][0]["text"]
    for prompt in (tokens, [tokens]):
        assert complete(base, prompt, echo=True, steering=[]).json()["choices"][0]["text"] == "The capital of" + plain
    *data, _ = events(complete(base, tokens, echo=True, stream=True, steering=[]))
    assert "".join(json.loads(item)["choices"][0]["text"] for item in data) == "The capital of" + plain


def test_the_request_of_lm_evals_loglikelihood(base: str, pilot) -> None:
    """What `LocalCompletionsAPI.parse_logprobs` reads: one entry per prompt token, and one for the drawn token."""
    context, continuation = pilot.tokenise("The capital of France"), pilot.tokenise(" is Paris")
    prompt = [*context, *continuation]
    ended = [*pilot.loaded.codec.encode(Prompt.chat("Hello"))]
    body = {"max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234, "steering": []}
    choices = complete(base, [prompt, ended], **body).json()["choices"]
    for choice, tokens in zip(choices, (prompt, ended), strict=True):
        assert len(choice["logprobs"]["token_logprobs"]) == len(tokens) + 1
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["logprobs"]["top_logprobs"][0] is None
    (score,) = pilot.score([Prompt(tokens=context)], [continuation])
    told = choices[0]["logprobs"]["token_logprobs"][len(context) : -1]
    assert math.fsum(told) == pytest.approx(float(score.logprobs.sum()), abs=1e-3)
    greedy = [
        value == max(top.values())
        for value, top in zip(told, choices[0]["logprobs"]["top_logprobs"][len(context) : -1], strict=True)
    ]
    assert greedy == score.greedy.tolist()


def test_a_trace_tells_every_token(base: str, pilot) -> None:
    steering = {"direction": "made", "method": "sttp", "layers": [0, 1], "strength": 2, "position": "response"}
    whole = chat(base, steering=steering, steering_trace=True).json()
    (tokens,) = whole["steering"]["tokens"]
    assert "".join(token["text"] for token in tokens) == whole["choices"][0]["message"]["content"]
    receipt = whole["steering"]["receipts"][0]
    for place, term in enumerate(receipt["terms"]):
        assert sum(token["edited"][place] for token in tokens) == term["tokens_edited"]
        seen = [token["projections"][place] for token in tokens]
        assert sum(seen) / len(seen) == pytest.approx(term["projection_before"], abs=1e-3)
    *data, _ = events(chat(base, steering=steering, steering_trace=True, stream=True))
    streamed = [token for item in data for token in json.loads(item).get("steering", {}).get("tokens", [])]
    assert streamed == tokens


def test_messages_of_parts_and_of_developers(base: str, pilot) -> None:
    parts = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": "of France?"}]
    turns = [{"role": "developer", "content": "You always lie."}, {"role": "user", "content": parts}]
    (expected,) = pilot.generate(
        [Prompt.chat("What is the capital\nof France?", "You always lie.")], Sampling(max_new_tokens=12)
    )
    answer = chat(base, messages=turns, steering=[]).json()
    assert answer["choices"][0]["message"]["content"] == expected.text


def test_a_models_own_reply_can_be_sent_back(base: str) -> None:
    said = chat(base).json()["choices"][0]["message"]
    said |= {"annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    turns = [{"role": "user", "content": "Hi"}, said, {"role": "user", "content": QUESTION}]
    assert chat(base, messages=turns).status_code == 200


def test_max_completion_tokens_is_max_tokens(base: str) -> None:
    answer = chat(base, max_tokens=None, max_completion_tokens=3, steering=[]).json()
    assert answer["usage"]["completion_tokens"] == 3


def test_models_are_listed(base: str) -> None:
    listed = httpx.get(f"{base}/v1/models").json()["data"]
    assert [card["id"] for card in listed] == [
        MODEL, f"{MODEL}:bounded", f"{MODEL}:honest", f"{MODEL}:unsteered"
    ]  # fmt: skip
    for card in listed:
        assert httpx.get(f"{base}/v1/models/{card['id']}").json() == card
    missing = httpx.get(f"{base}/v1/models/gpt-5")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_the_model_name_chooses_the_policy(base: str) -> None:
    names = [chat(base, model=model).json()["steering"]["name"] for model in (f"{MODEL}:bounded", MODEL)]
    assert names == ["bounded", "honest"]
    assert chat(base, model=f"{MODEL}:unsteered").json()["steering"] == {
        "name": "unsteered", "edit_id": None, "monitor": False, "receipts": [None], "flagged": [None]
    }  # fmt: skip
