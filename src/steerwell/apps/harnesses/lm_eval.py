"""A steered model as an `lm_eval` model (EleutherAI's lm-evaluation-harness; written against 0.4.13).

lm_eval looks for no models in other packages. Importing this module registers `steerwell`; run as a module, it is
lm_eval's own command line with that model in it: `python -m steerwell.apps.harnesses.lm_eval --model steerwell ...`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs  # its package registers lm_eval's own models before ours
from lm_eval.utils import get_rolling_token_windows
from tqdm import tqdm

from steerwell.apps.harnesses.common import load_steered
from steerwell.core.errors import ArgumentError, SteerwellError
from steerwell.core.records import Edit, Message, Prompt, Receipt, Sampling, Score
from steerwell.engines.base import length_sorted, proven
from steerwell.engines.hf import HFEngine
from steerwell.testbed.bundled import BUNDLED

MAX_GEN_TOKS = 256  # as in lm_eval's own models
NEUTRAL = {"num_beams": 1, "top_k": 0, "repetition_penalty": 1.0}  # values that ask for nothing


class ChatContext(str):
    """A conversation on its way through lm_eval, which hands contexts on as text: JSON of a prompt's fields.

    The type tells it from plain text, so that the model's own chat template is applied by the engine, by its rules.
    """

    __slots__ = ()


@register_model("steerwell")
class SteeredLM(LM):  # type: ignore[misc]  # lm_eval has no types
    """A Hugging Face model under one edit, for all of lm_eval's request types.

    Every result's `config.steering` tells what was done: the edit, its terms, and how many tokens they saw and edited.

    Args:
        pretrained: `pilot` (the bundled model), a hub id, a local folder, or a `.gguf` file.
        device: lm_eval's `--device`, read as `device_map` where that is not given. lm_eval's command line always gives
            one, `cuda:0` by default, so CUDA where there is none means the CPU, as in lm_eval's own models.
        seed: the i-th request of a run that samples draws with `seed + i`.
        args: steering, loading and `batch_size`; see `load_steered`, also for the errors.
    """

    def __init__(self, pretrained: str = BUNDLED, device: str | None = None, seed: int = 42, **args: Any) -> None:
        if device is not None and (torch.cuda.is_available() or not device.startswith("cuda")):
            args.setdefault("device_map", device)
        steered = load_steered(str(pretrained), args)
        self._take(steered.engine, steered.edit, seed)

    @classmethod
    def of(cls, engine: HFEngine, edit: Edit | None, seed: int = 42) -> Self:
        """The same around an engine that is loaded already."""
        made = cls.__new__(cls)
        made._take(engine, edit, seed)
        return made

    def _take(self, engine: HFEngine, edit: Edit | None, seed: int) -> None:
        super().__init__()
        self._model, self._engine, self._edit = engine.loaded, engine, edit
        self._seed, self._begin = seed, self._begin_prompt()
        self._receipts = _Totals()

    @property
    def tokenizer_name(self) -> str:
        """Part of the key of lm_eval's cache of built requests."""
        return self._engine.info.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Nothing to show: the engine applies the model's own template.

        Raises:
            ArgumentError: a template is asked for by name.
        """
        if isinstance(chat_template, str):
            raise ArgumentError(
                f"apply_chat_template: got {chat_template!r}; the model's own template is used, so give no name "
                "(variables for it go into the model argument chat_options)"
            )
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as a context; without `add_generation_prompt` its last turn is the answer's beginning."""
        turns = chat_history if add_generation_prompt else chat_history[:-1]
        prefill = "" if add_generation_prompt else chat_history[-1]["content"]
        return ChatContext(json.dumps({"messages": turns, "prefill": prefill}, ensure_ascii=False))

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Called when lm_eval puts its cache of answers in front of this model.

        Raises:
            ArgumentError: the model is steered; that cache knows requests only, so it would mix up edits.
        """
        if self._edit is not None:
            raise ArgumentError(
                "use_cache: lm_eval's cache of answers does not know the edit, so a steered model could get unsteered "
                "answers from it; leave --use_cache out (--cache_requests is fine)"
            )
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes into the results' `config`; `steering` is None for an unsteered model."""
        steering = None if self._edit is None else {"edit_id": self._edit.id, **self._receipts.row()}
        return {"model_name": self._engine.info.name, "steering": steering}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability (nats) of every continuation, and whether greedy decoding would write it.

        An edit with position `all` works on the context's tokens too. A continuation that holds an end token counts as
        not greedy, because no answer does.
        """
        pairs = [self._pair(*request.args) for request in requests]
        scores = self._scores([prompt for prompt, _ in pairs], [tokens for _, tokens in pairs], disable_tqdm)
        ends = self._model.end_ids
        return [
            (float(score.logprobs.sum()), bool(score.greedy.all()) and ends.isdisjoint(tokens))
            for score, (_, tokens) in zip(scores, pairs, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability (nats) of every whole text after the begin token.

        A text longer than the model's context is cut into windows, each token scored once; every window starts with
        the begin token and counts as response, so the edit is the same for each.
        """
        prompts, responses, owners, counts = [], [], [], []
        for owner, request in enumerate(requests):
            for tokens, count in self._windows(self._after(self._begin, request.args[0])):
                prompts.append(self._begin)
                responses.append(tokens)
                owners.append(owner)
                counts.append(count)
        totals = [0.0] * len(requests)
        for owner, count, score in zip(owners, counts, self._scores(prompts, responses, disable_tqdm), strict=True):
            totals[owner] += float(score.logprobs[-count:].sum())
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to every context, cut before the first stop string."""
        prompts = [self._prompt(request.args[0]) for request in requests]
        samplings = [_sampling(request.args[1], self._seed + index) for index, request in enumerate(requests)]
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            responses = self._engine.generate(prompts, samplings, self._edit, progress=bar.update)
        for response in responses:
            self._receipts.add(proven(response.receipt, self._edit))
        return [response.text for response in responses]

    def _begin_prompt(self) -> Prompt:
        """The begin token alone, or the end token where a tokenizer has no begin token: the context of a whole text."""
        try:
            self._model.codec.encode(Prompt(text=""))
            return Prompt(text="")
        except ArgumentError:
            return Prompt(text=self._model.codec.begin)

    def _prompt(self, context: str) -> Prompt:
        if isinstance(context, ChatContext):
            fields = json.loads(context)
            turns = tuple(Message(turn["role"], turn["content"]) for turn in fields["messages"])
            return Prompt(turns, prefill=fields["prefill"])
        return Prompt(text=context) if context else self._begin

    def _pair(self, context: str, continuation: str) -> tuple[Prompt, list[int]]:
        """Prompt and response tokens; spaces at the context's end go to the continuation, as in lm_eval's models."""
        prompt, encode = self._prompt(context), self._model.codec.encode
        head = prompt.prefill if prompt.messages else context
        kept = head.rstrip()
        rest = head[len(kept) :] + continuation
        if kept and not prompt.messages:
            start = Prompt(text=kept)
            return start, encode(Prompt(text=kept + rest))[len(encode(start)) :]
        start = replace(prompt, prefill=kept) if prompt.messages else self._begin
        return start, self._after(start, rest)

    def _after(self, prompt: Prompt, text: str) -> list[int]:
        """Tokens of a text that follows a prompt."""
        encode = self._model.codec.encode
        return encode(replace(prompt, prefill=prompt.prefill + text))[len(encode(prompt)) :]

    def _windows(self, tokens: list[int]) -> list[tuple[list[int], int]]:
        """Stretches of a text that fit behind the begin token, and how many tokens at each one's end are new."""
        room = self._model.max_length or len(tokens) + 3
        size = room - len(self._model.codec.encode(self._begin)) - 1  # one less: later windows show one token more
        windows = get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=size, context_len=1)
        return [
            ([*(shown if index else shown[1:]), new[-1]], len(new))  # the first window begins with the prefix token
            for index, (shown, new) in enumerate(windows)
        ]

    def _scores(self, prompts: Sequence[Prompt], responses: Sequence[list[int]], disable_tqdm: bool) -> list[Score]:
        lengths = [len(self._model.codec.encode(p)) + len(r) for p, r in zip(prompts, responses, strict=True)]
        found: dict[int, Score] = {}
        with tqdm(total=len(prompts), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for batch in length_sorted(lengths, self._engine.batch_size):
                rows = self._engine.score([prompts[i] for i in batch], [responses[i] for i in batch], self._edit)
                found.update(zip(batch, rows, strict=True))
                bar.update(len(batch))
        for score in found.values():
            self._receipts.add(proven(score.receipt, self._edit))
        return [found[index] for index in range(len(prompts))]


def accuracies(engine: HFEngine, edit: Edit | None, tasks: Sequence[str]) -> dict[str, float]:
    """Each task's or group's accuracy in per cent, under an edit or none, by lm_eval's own defaults.

    Args:
        engine: the model; its chat template is applied.
        edit: what it is steered with.
        tasks: names that lm_eval knows, or its task files (`.yaml`).

    Raises:
        ArgumentError: a task has no metric that is a share.
    """
    named = [str(Path(task).absolute()) if task.endswith(".yaml") else task for task in tasks]
    found = lm_eval.simple_evaluate(
        model=SteeredLM.of(engine, edit), tasks=named, apply_chat_template=True, bootstrap_iters=0, log_samples=False
    )
    rows = found["results"] | found.get("groups", {})
    asked = [name for name in rows if name in tasks] or list(rows)  # a task file's own name is inside it
    return {name: 100 * _share(name, rows[name]) for name in asked}


def _share(task: str, row: Mapping[str, Any]) -> float:
    """The metric that stands for a task: accuracy, exact match, or the first that its author named."""
    values = {name: value for name, value in row.items() if isinstance(value, float) and "stderr" not in name}
    for metric in (*(f"{name},none" for name in ("acc", "exact_match")), *values):
        if 0 <= values.get(metric, -1.0) <= 1:
            return values[metric]
    raise ArgumentError(f"capabilities: task {task!r} has no metric between 0 and 1 (it has {sorted(values)})")


class _Totals:
    """Tokens that each term of the edit saw and edited, over all receipts."""

    def __init__(self) -> None:
        self._answers = 0
        self._terms: list[dict[str, Any]] = []

    def add(self, receipt: Receipt | None) -> None:
        if receipt is None:
            return
        self._answers += 1
        if not self._terms:
            self._terms = [
                {"label": t.label, "layer": t.layer, "position": t.position, "tokens_seen": 0, "tokens_edited": 0}
                for t in receipt.terms
            ]
        for total, term in zip(self._terms, receipt.terms, strict=True):
            total["tokens_seen"] += term.tokens_seen
            total["tokens_edited"] += term.tokens_edited

    def row(self) -> dict[str, Any]:
        return {"answers": self._answers, "terms": self._terms}


def _sampling(arguments: Mapping[str, Any], seed: int) -> Sampling:
    """lm_eval's generation arguments as a `Sampling`; one that would be ignored is an error."""
    fields: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), MAX_GEN_TOKS))
    stop = tuple(text for text in fields.pop("until") if text)
    temperature, top_p = float(fields.pop("temperature", 0.0)), float(fields.pop("top_p", 1.0))
    if fields.pop("do_sample") and not temperature:
        raise ArgumentError("temperature: missing, but do_sample asks to sample; add temperature=1 to --gen_kwargs")
    limit = int(fields.pop("max_gen_toks"))
    for name, value in fields.items():
        if name not in NEUTRAL or value != NEUTRAL[name]:
            fix = f"set {name}={NEUTRAL[name]} in --gen_kwargs" if name in NEUTRAL else "take it out of the task"
            raise ArgumentError(f"generation_kwargs: got {name}={value!r}, which this model cannot do; {fix}")
    return Sampling(temperature, top_p, limit, stop, seed)


def main() -> None:
    """lm_eval's command line, with this model registered; our errors end it with one line and exit code 1."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except SteerwellError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
