"""OpenAI's Python client against a live server, as people use it."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from tests.server.live import MODEL, FakeScheduler, chat, key_of, keys, live, service

TURNS = [{"role": "user", "content": "What is the capital of France?"}]


def client(base: str, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0, **options)


def test_a_chat_and_its_steering(base: str) -> None:
    answer = client(base).chat.completions.create(
        model=MODEL,
        messages=TURNS,
        temperature=0,
        max_tokens=12,
        extra_body={"steering": {"policy": "bounded", "strength": 2.5}},
    )
    assert (
        answer.choices[0].message.content
        == chat(base, steering={"policy": "bounded", "strength": 2.5}).json()["choices"][0]["message"]["content"]
    )
    assert answer.steering["name"] == "bounded"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint.startswith("fp_")
    assert answer._request_id.startswith("req_")


def test_a_stream_as_in_everybodys_first_program(base: str) -> None:
    stream = client(base).chat.completions.create(
        model=f"{MODEL}:honest", messages=TURNS, temperature=0, max_tokens=12, stream=True
    )
    text, steering = "", None
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        steering = getattr(chunk, "steering", steering)
    assert text == chat(base).json()["choices"][0]["message"]["content"]
    assert steering["receipts"][0]["edit_id"] == steering["edit_id"]


def test_the_clients_own_reading_of_a_stream(base: str) -> None:
    with client(base).chat.completions.stream(
        model=MODEL, messages=TURNS, temperature=0, max_tokens=200, stream_options={"include_usage": True}
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    whole = chat(base, max_tokens=200).json()
    assert final.choices[0].message.content == whole["choices"][0]["message"]["content"]
    assert final.usage.completion_tokens == whole["usage"]["completion_tokens"]


def test_many_at_once_from_asyncio(base: str) -> None:
    expected = chat(base).json()["choices"][0]["message"]["content"]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="unused") as asking:
            answers = await asyncio.gather(
                *(
                    asking.chat.completions.create(model=MODEL, messages=TURNS, temperature=0, max_tokens=12)
                    for _ in range(12)
                )
            )
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask()) == [expected] * 12


def test_completions_and_models(base: str) -> None:
    with client(base) as asking:
        answer = asking.completions.create(
            model=MODEL, prompt="The capital of", temperature=0, max_tokens=3, logprobs=1
        )
        assert answer.choices[0].text == "".join(answer.choices[0].logprobs.tokens)
        listed = [model.id for model in asking.models.list()]
        assert asking.models.retrieve(f"{MODEL}:honest").id in listed


def test_the_clients_errors(base: str, pilot) -> None:
    asking = client(base)
    with pytest.raises(openai.BadRequestError, match="did you mean 'steering'") as refused:
        asking.chat.completions.create(model=MODEL, messages=TURNS, extra_body={"steerign": []})
    assert (refused.value.param, refused.value.code) == ("steerign", "unknown_field")
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        asking.chat.completions.create(model="gpt-5", messages=TURNS)
    with live(service(pilot, scheduler=FakeScheduler(), keys=keys("ann"))) as closed:
        with pytest.raises(openai.AuthenticationError):
            client(closed).models.list()
        assert openai.OpenAI(base_url=f"{closed}/v1", api_key=key_of("ann")).models.list().data
    with live(service(pilot, scheduler=FakeScheduler(["a"], RuntimeError("x")))) as broken:
        stream = client(broken).chat.completions.create(model=MODEL, messages=TURNS, stream=True)
        with pytest.raises(openai.APIError, match="the server failed"):
            list(stream)


def test_a_client_that_closes_its_stream_leaves_the_batch(pilot) -> None:
    fake = FakeScheduler(["word "], endless=True)
    with live(service(pilot, scheduler=fake)) as address:
        stream = client(address).chat.completions.create(model=MODEL, messages=TURNS, stream=True)
        next(iter(stream))
        stream.close()
        assert fake.tickets[0].cancelled.wait(20)
        assert httpx.get(f"{address}/readyz").status_code == 200
