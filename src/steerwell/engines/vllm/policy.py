"""A policy inside vLLM's own server: it steers every request, whatever endpoint that comes through.

It is switched on with `additional_config={"steerwell": {"policy": "honest.yaml"}}`. Requests are given the policy in
the engine core, where all of them pass, before the keys of their cached blocks are made. Front ends refuse what cannot
be right under it, so that a client is told. Every process reads the file once, when it starts.
"""

from __future__ import annotations

from copy import copy
from functools import lru_cache
from typing import Any

from steerwell.core.errors import ArgumentError, EngineError
from steerwell.core.policy import load_policy
from steerwell.core.records import Edit, ModelInfo
from steerwell.engines.vllm.wire import KEY, Settings, encode, parse


@lru_cache(maxsize=1)
def policy_edit_of(path: str) -> Edit:
    """The edit of a policy file; errors are those of `load_policy` and `policy_edit`."""
    from steerwell.steering.policies import policy_edit

    return policy_edit(load_policy(path))


@lru_cache(maxsize=1)
def _request_data(path: str) -> dict[str, Any]:
    """A policy as request data whose vectors the workers have."""
    sent = encode(policy_edit_of(path))
    return sent | {"vectors": {}}


def vectors_for(settings: Settings, info: ModelInfo) -> dict[str, str]:
    """The policy's vectors by name, as text, if it was made for this model.

    Raises:
        ArtifactError: the policy or a direction of it is missing or damaged.
        ModelMismatchError: it was made for another model.
    """
    edit = policy_edit_of(str(settings.policy))
    if edit.model is not None:
        edit.model.require_same(info, f"policy {settings.policy}")
    vectors: dict[str, str] = encode(edit)["vectors"]
    return vectors


def meaning(settings: Settings) -> str:
    """What the policy means for requests, for people."""
    freedom = "none may replace it" if settings.locked else "those that bring steering of their own are under that"
    return f"requests are under policy {settings.policy} (edit {policy_edit_of(str(settings.policy)).id}); {freedom}"


def check_free(settings: Settings, params: Any, *, resumable: bool = False) -> None:
    """Refuse a request that a server's policy does not allow, or that it could not be right for.

    Raises:
        ArgumentError: why not.
    """
    if not hasattr(params, "extra_args"):
        raise ArgumentError("this server's answers are under a policy; pooling and embedding requests cannot be")
    if resumable:
        raise ArgumentError("this server's answers are under a policy, and a request sent piece by piece cannot be")
    if settings.locked and KEY in (params.extra_args or {}):
        raise ArgumentError(f"{KEY}: this server's policy steers every request, and none may replace it; leave it out")


def check_beams(settings: Settings) -> None:
    """Refuse beam search where it would move what is steered: its prompts grow by the tokens of the answer.

    Raises:
        ArgumentError: the policy steers at position `response` only.
    """
    if settings.policy is None:
        return
    if any(term.position == "response" for term in policy_edit_of(settings.policy).terms):
        raise ArgumentError(
            "use_beam_search: this server's policy steers the response only, and beam search hands the answer's tokens "
            "in as prompt; leave it out"
        )


def asks_for_none(settings: Settings, value: Any) -> bool:
    """Whether a request asks to be unsteered, which it may where requests are open: `{"terms": []}`."""
    if settings.policy is None or settings.locked:
        return False
    request = parse(value)
    return not request.terms and request.read is None


def impose(settings: Settings, request: Any) -> None:
    """Put a request (an `EngineCoreRequest`) under the policy, unless it may and does bring steering of its own.

    Raises:
        EngineError: a request that front ends should have refused.
    """
    assert settings.policy is not None  # noqa: S101 - asked for under a policy only
    params = request.sampling_params
    if params is None or request.resumable:
        raise EngineError("a request that cannot be put under this server's policy has come to the engine core")
    extra = dict(params.extra_args or {})
    if settings.locked or KEY not in extra:
        extra[KEY] = _request_data(settings.policy)
    elif asks_for_none(settings, extra[KEY]):
        del extra[KEY]
    request.sampling_params = copy(params)  # several requests may share them
    request.sampling_params.extra_args = extra
