"""Other people's programs against a live server, unchanged: their answers are the library's for the same edit."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_DATASETS_OFFLINE"] = "1"

import httpx
import openai
import pytest
import yaml

from steerwell.serving.limits import Limits
from steerwell.testbed.bundled import bundled_path
from tests.server.live import MODEL, catalog, key_of, keys, live, service
from tests.server.node import install
from tests.server.ways import QUESTION, TURNS, WAYS, WEAK, answers, edit

FACTS = Path(__file__).parents[2] / "docs" / "examples" / "facts.jsonl"
POLICIES = ["unsteered", "bounded"]  # of the comparisons with our own lm_eval model


@pytest.fixture(scope="module")
def base(pilot) -> Iterator[str]:
    """A server of policies that show."""
    with live(service(pilot, catalog=catalog(pilot))) as address:
        yield address


@pytest.fixture(scope="module")
def expected(pilot) -> dict[str, str]:
    """The library's answers to the question."""
    return answers(pilot)


# OpenAI for Python ---------------------------------------------------------------------------------------------------


def test_asynchronous_streams_with_their_own_steering(base: str, expected: dict[str, str]) -> None:
    async def ask(client: openai.AsyncOpenAI, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        stream = await client.chat.completions.create(
            model=MODEL, messages=TURNS, temperature=0, max_tokens=12, stream=True, extra_body=fields
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return text, chunks[-1].model_extra["steering"]

    async def all_at_once() -> list[tuple[str, dict[str, Any]]]:
        async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, fields) for fields in list(WAYS.values()) * 3))

    answers = asyncio.run(all_at_once())
    assert [text for text, _ in answers] == list(expected.values()) * 3
    assert [told["name"] for _, told in answers] == ["honest", "unsteered", "bounded", "bounded"] * 3
    assert [told["edit_id"] for _, told in answers[:4]] == [told["edit_id"] for _, told in answers[4:8]]
    assert len({told["edit_id"] for _, told in answers}) == 4


def test_the_raw_response(base: str, expected: dict[str, str]) -> None:
    with openai.OpenAI(base_url=f"{base}/v1", api_key="unused") as client:
        raw = client.chat.completions.with_raw_response.create(
            model=f"{MODEL}:bounded", messages=TURNS, temperature=0, max_tokens=12
        )
        answer = raw.parse()
        assert answer.choices[0].message.content == expected["bounded"]
        assert raw.headers["x-request-id"] == raw.request_id == answer._request_id
        assert answer.model_extra["steering"]["receipts"][0]["edit_id"] == answer.model_extra["steering"]["edit_id"]
        with client.chat.completions.with_streaming_response.create(
            model=MODEL, messages=TURNS, temperature=0, max_tokens=12
        ) as streamed:
            assert streamed.parse().choices[0].message.content == expected["honest"]


def test_what_a_locked_server_forbids(pilot) -> None:
    closed = service(pilot, catalog=catalog(pilot, "locked"), keys=keys("ann"), limits=Limits(choices=2))
    with live(closed) as address, openai.OpenAI(base_url=f"{address}/v1", api_key=key_of("ann")) as client:
        for fields in ({"steering": []}, {"steering": {"policy": "bounded"}}):
            with pytest.raises(openai.PermissionDeniedError, match="answers every request with policy 'honest'") as no:
                client.chat.completions.create(model=MODEL, messages=TURNS, extra_body=fields)
            assert (no.value.code, no.value.param, no.value.type) == ("not_allowed", "steering", "permission_error")
        with pytest.raises(openai.PermissionDeniedError):
            client.chat.completions.create(model=f"{MODEL}:bounded", messages=TURNS)
        with pytest.raises(openai.BadRequestError, match="2 at most"):
            client.chat.completions.create(model=MODEL, messages=TURNS, n=3)


# OpenAI for Node -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node(base: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the Node program tells of a server."""
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("openai-node") if cache else tmp_path_factory.mktemp("openai-node")
    install(folder)
    done = subprocess.run(
        [shutil.which("node"), "client.js", base], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_the_node_client_gets_the_same_answers(node: dict[str, Any], expected: dict[str, str]) -> None:
    assert node["chat"]["choices"][0]["message"]["content"] == expected["weak"]
    assert node["named"]["choices"][0]["message"]["content"] == expected["bounded"]
    assert node["streamed"]["text"] == expected["weak"]
    told = [node[kind]["steering"]["receipts"][0] for kind in ("streamed", "chat")]
    assert told[0]["edit_id"] == told[1]["edit_id"]
    assert told[0]["tokens_edited"] == told[1]["tokens_edited"] > 0
    assert node["usage"]["completion_tokens"] == 12
    assert node["completion"]["object"] == "text_completion"
    assert node["models"] == [MODEL, f"{MODEL}:bounded", f"{MODEL}:honest", f"{MODEL}:unsteered"]
    assert node["retrieved"] == f"{MODEL}:honest"


def test_the_node_client_knows_the_errors(node: dict[str, Any]) -> None:
    kinds = {name: node[name]["name"] for name in ("misspelt", "unknown", "direction")}
    assert kinds == {"misspelt": "BadRequestError", "unknown": "NotFoundError", "direction": "BadRequestError"}
    assert (node["misspelt"]["code"], node["misspelt"]["param"]) == ("unknown_field", "steerign")
    assert node["direction"]["code"] == "unknown_direction"
    assert "known: made" in node["direction"]["message"]


def test_the_node_client_can_leave_a_stream(node: dict[str, Any], base: str) -> None:
    assert node["stopped"] is True
    assert httpx.get(f"{base}/readyz").json() == {"status": "ready"}


# LangChain -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def langchain(base: str, monkeypatch: pytest.MonkeyPatch):
    """A function: fields -> LangChain's chat model."""
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    openai_models = pytest.importorskip("langchain_openai")

    def make(**fields: Any) -> Any:
        given = {"model": MODEL, "temperature": 0, "max_tokens": 12, "max_retries": 0} | fields
        return openai_models.ChatOpenAI(base_url=f"{base}/v1", api_key="unused", **given)

    return make


def test_langchain(langchain, expected: dict[str, str]) -> None:
    assert langchain().invoke(QUESTION).content == expected["honest"]
    assert langchain(model=f"{MODEL}:bounded").invoke([("user", QUESTION)]).content == expected["bounded"]
    steered = langchain(extra_body={"steering": WEAK})
    answer = steered.invoke(QUESTION)
    assert answer.content == expected["weak"]
    assert answer.usage_metadata["output_tokens"] == 12
    assert "".join(chunk.content for chunk in steered.stream(QUESTION)) == expected["weak"]
    assert [item.content for item in steered.batch([QUESTION] * 3)] == [expected["weak"]] * 3
    with pytest.raises(openai.BadRequestError, match="unknown direction 'nothing'"):
        langchain(
            extra_body={"steering": {"direction": "nothing", "method": "swfc", "layer": 0, "strength": 1}}
        ).invoke(QUESTION)


# lm_eval -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """lm_eval's manager of two tasks of ours: one scores answers, one has them written."""
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
    for package in ("aiohttp", "tenacity"):  # of lm_eval[api]
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("tasks")
    files = {"data_files": {"test": str(FACTS)}, "cache_dir": str(folder / "cache")}
    shared = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "doc_to_text": "{{question}}"}
    scored = {
        "task": "facts_scored",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    written = {
        "task": "facts_written",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for fields in (scored, written):
        (folder / f"{fields['task']}.yaml").write_text(yaml.safe_dump(shared | fields))
    return lm_eval_tasks.TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(model: Any, tasks: Any, *names: str, **options: Any) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """(Metric by task, what the model gave per document by task)."""
    import lm_eval

    found = lm_eval.simple_evaluate(
        model, tasks=list(names), task_manager=tasks, apply_chat_template=True, bootstrap_iters=0, **options
    )
    metrics = {name: next(found["results"][name][m] for m in ("acc,none", "exact_match,none")
                          if m in found["results"][name]) for name in names}  # fmt: skip
    given = {}
    for name in names:
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        given[name] = [answer[0] for sample in samples for answer in sample["resps"]]
    return metrics, given


@pytest.fixture(scope="module", params=POLICIES)
def ours(request: pytest.FixtureRequest, pilot, tasks: Any) -> tuple[str, dict[str, float], dict[str, list[Any]]]:
    """A policy, and what our own lm_eval model finds under it."""
    harness = pytest.importorskip("steerwell.apps.harnesses.lm_eval")
    model = harness.SteeredLM.of(pilot, edit(pilot, request.param))
    return request.param, *evaluated(model, tasks, "facts_scored", "facts_written")


def arguments(base: str, path: str, policy: str, **more: Any) -> dict[str, Any]:
    return {"base_url": f"{base}/v1/{path}", "model": f"{MODEL}:{policy}", "max_length": 1024, "max_retries": 1} | more


def test_lm_evals_completions_find_what_our_own_model_finds(base: str, tasks: Any, ours) -> None:
    policy, metrics, given = ours
    tokenizer = {"tokenizer_backend": "huggingface", "tokenizer": str(bundled_path())}
    args = arguments(base, "completions", policy, num_concurrent=4, **tokenizer)
    found, got = evaluated("local-completions", tasks, "facts_scored", "facts_written", model_args=args)
    assert found == metrics
    assert got["facts_written"] == given["facts_written"]
    likelihoods = [[float(value) for value, _ in rows["facts_scored"]] for rows in (got, given)]
    assert likelihoods[0] == pytest.approx(likelihoods[1], abs=1e-3)
    assert [greedy for _, greedy in got["facts_scored"]] == [greedy for _, greedy in given["facts_scored"]]


def test_lm_evals_chat_completions_write_what_our_own_model_writes(base: str, tasks: Any, ours) -> None:
    policy, metrics, given = ours
    args = arguments(base, "chat/completions", policy, num_concurrent=4)
    found, got = evaluated("local-chat-completions", tasks, "facts_written", model_args=args)
    assert got["facts_written"] == given["facts_written"]
    assert found["facts_written"] == metrics["facts_written"]


def test_the_policies_of_these_comparisons_differ(pilot, tasks: Any) -> None:
    """Or the two tests above would not see a server that forgot to steer."""
    harness = pytest.importorskip("steerwell.apps.harnesses.lm_eval")
    both = [evaluated(harness.SteeredLM.of(pilot, edit(pilot, name)), tasks, "facts_written")[1] for name in POLICIES]
    assert both[0] != both[1]


# Inspect -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "way"), [(f"{MODEL}:bounded", "bounded"), (MODEL, "weak")])
def test_inspect(base: str, name: str, way: str, expected: dict[str, str], tmp_path: Path) -> None:
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import exact

    fields = WAYS["weak"] if way == "weak" else None
    config = GenerateConfig(temperature=0, max_tokens=12, max_retries=0, extra_body=fields)
    model = get_model(
        f"openai-api/steerwell/{name}", base_url=f"{base}/v1", api_key="unused", config=config, memoize=False
    )
    samples = [Sample(input=QUESTION, target=text) for text in expected.values()]
    task = inspect_ai.Task(dataset=samples, scorer=exact())
    (log,) = inspect_ai.eval(task, model=model, display="none", log_dir=str(tmp_path))
    assert log.status == "success", log.error
    assert [sample.output.completion for sample in log.samples] == [expected[way]] * len(samples)
    assert log.results.scores[0].metrics["mean"].value == 1 / len(samples)
