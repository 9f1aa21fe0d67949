"""OpenAI's routes, and the one that tells what steering there is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from steerwell.apps.server.errors import Refusal
from steerwell.apps.server.exchange import Wish, begin
from steerwell.apps.server.replies import (
    ChatCompletion,
    ChatForm,
    ModelCard,
    ModelList,
    TextCompletion,
    TextForm,
)
from steerwell.apps.server.routing import BEARER, ClientRoute, errors, service_of, visit_of
from steerwell.apps.server.schemas import ChatMessage, ChatRequest, CompletionRequest
from steerwell.apps.server.service import Service
from steerwell.core.errors import ArgumentError, UnknownNameError
from steerwell.core.records import Message, Prompt

DEFAULT_COMPLETION = 16  # tokens, OpenAI's
STREAM = {"text/event-stream": {"schema": {"description": "Server-sent events: chunks as JSON, and `[DONE]`."}}}
ANSWERING = errors(400, 401, 403, 404, 408, 413, 415, 421, 429, 500, 503)

router = APIRouter(prefix="/v1", route_class=ClientRoute, dependencies=BEARER, tags=["OpenAI"])


@router.get("/models", responses=errors(401, 421), response_model=ModelList)
async def models(request: Request) -> Any:
    """The model, alone and under every policy that a request may choose."""
    service = service_of(request)
    return ModelList(object="list", data=[_card(service, name) for name in service.catalog.models()])


@router.get("/models/{model:path}", responses=errors(401, 404, 421), response_model=ModelCard)
async def model(request: Request, model: str) -> Any:
    """One of them."""
    service = service_of(request)
    names = service.catalog.models()
    if model not in names:
        raise UnknownNameError("model", model[:160], names)
    return _card(service, model)


@router.get("/steering", responses=errors(401, 421), tags=["Steering"])
async def steering(request: Request) -> dict[str, Any]:
    """Directions with their calibration, policies and methods, what requests may choose, and whether /report exists."""
    service = service_of(request)
    return {**service.catalog.describe(), "report": service.report is not None}


@router.post(
    "/chat/completions",
    responses=ANSWERING | {200: {"model": ChatCompletion, "content": STREAM}},
    response_model=None,
)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ArgumentError("top_logprobs: needs 'logprobs': true; set it, or leave this out")
    longest = body.max_completion_tokens
    if None not in (longest, body.max_tokens) and longest != body.max_tokens:
        raise ArgumentError("max_tokens: differs from 'max_completion_tokens', which means the same; give one of them")
    prompt = Prompt(tuple(_message(turn) for turn in body.messages))
    wish = Wish(
        form=ChatForm(bool(body.logprobs)),
        prompts=[prompt],
        leads=[""],
        max_tokens=body.max_tokens if longest is None else longest,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    exchange = await begin(service_of(request), visit_of(request), body, wish)
    return await exchange.reply(request.receive)


@router.post(
    "/completions",
    responses=ANSWERING | {200: {"model": TextCompletion, "content": STREAM}},
    response_model=None,
)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue a text; no chat template is used."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise Refusal(
            400,
            "best_of: the server returns every answer that it draws; make it equal to 'n', or leave it out",
            param="best_of",
            code="unsupported_field",
        )
    if body.echo and body.stream and body.logprobs is not None:
        raise ArgumentError("echo: with 'logprobs' it cannot be streamed; leave out one of the three")
    service, prompts = service_of(request), _prompts(body)
    wish = Wish(
        form=TextForm(body.logprobs is not None),
        prompts=prompts,
        leads=[_lead(service, prompt) if body.echo else "" for prompt in prompts],
        max_tokens=DEFAULT_COMPLETION if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        echo=bool(body.echo),
    )
    exchange = await begin(service, visit_of(request), body, wish)
    return await exchange.reply(request.receive)


def _card(service: Service, name: str) -> ModelCard:
    return ModelCard(id=name, object="model", created=service.started, owned_by="steerwell")


def _message(turn: ChatMessage) -> Message:
    return Message("system" if turn.role == "developer" else turn.role, turn.text)


def _prompts(body: CompletionRequest) -> list[Prompt]:
    """A text, texts, token ids or lists of them, as prompts."""
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(given[0], int):
        given = [given]
    return [Prompt(text=item) if isinstance(item, str) else Prompt(tokens=tuple(item)) for item in given]


def _lead(service: Service, prompt: Prompt) -> str:
    return service.decode(prompt.tokens) if prompt.tokens is not None else prompt.text or ""
