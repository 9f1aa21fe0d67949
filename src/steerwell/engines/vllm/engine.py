"""The engine that users hold: the promises of `steerwell.engines.base.Engine`, kept by vLLM.

Greedy answers, log-probabilities, captured states and receipts are those of the Hugging Face engine up to rounding.
Sampled answers are drawn by vLLM: a row's own seed fixes them, but they are other draws than the Hugging Face engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Self

import numpy as np
import transformers

from steerwell.core.errors import ArgumentError, EngineError, MissingDependencyError
from steerwell.core.records import (
    Edit,
    FinishReason,
    ModelInfo,
    Pool,
    Prompt,
    Response,
    Sampling,
    Score,
    Vectors,
)
from steerwell.engines.base import (
    Asked,
    Chunk,
    Edits,
    Samplings,
    check_responses,
    pooled_span,
    row_edits,
    row_prompts,
    row_samplings,
)
from steerwell.engines.rows import Row
from steerwell.engines.text import TextCodec, TextStream
from steerwell.engines.vllm.about import model_info
from steerwell.engines.vllm.batch import Batch, kept
from steerwell.engines.vllm.client import Client, Job
from steerwell.engines.vllm.options import checked_options, end_ids, saved_dtype
from steerwell.engines.vllm.wire import AMPLE, KEY, Settings
from steerwell.testbed.bundled import BUNDLED, MODELS, bundled_path

GREEDY = Sampling()
CPU_MEMORY = 0.5  # share of a CPU machine's memory that vLLM may take, unless `options` say otherwise


class VLLMEngine:
    """A model served by vLLM in this process's children. Make one with `load`; `close` ends it.

    Args:
        core: vLLM's `LLMEngine`, started with steering on.
        codec: prompts to tokens and back, by the rules of the Hugging Face engine.
        end_ids: tokens that end an answer.
        name: what the model is called.
        settings: what was reserved for steering.
        reuse_steered: see `load`.
    """

    def __init__(
        self, core: Any, codec: TextCodec, end_ids: frozenset[int], name: str, settings: Settings, reuse_steered: bool
    ) -> None:
        self._codec, self._end_ids, self._settings = codec, end_ids, settings
        self._client = Client(core, settings, reuse_steered)
        config = core.vllm_config.model_config
        self.max_length = int(config.max_model_len)
        self.vocabulary = int(config.hf_text_config.vocab_size)
        about = self._client.call("steerwell_about")
        self._layers = [item["layers"] for item in about]
        self._info = model_info(config.hf_config, name, [item["embedding"] for item in about])

    @classmethod
    def load(
        cls,
        name: str = BUNDLED,
        *,
        dtype: str = "auto",
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        revision: str | None = None,
        trust_remote_code: bool = False,
        chat_options: Mapping[str, Any] | None = None,
        max_length: int | None = None,
        batch_size: int = 256,
        compiled: bool = True,
        prefix_caching: bool = True,
        reuse_steered: bool = False,
        settings: Settings = AMPLE,
        options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Start vLLM on a model, with steering on.

        Args:
            name: `pilot` (the bundled model), a hub id or a local folder.
            dtype: `auto` (as saved), `float32`, `float16` or `bfloat16`.
            tensor_parallel: devices that share every layer.
            pipeline_parallel: groups of devices that share the layers out.
            revision: branch, tag or commit of a hub id.
            trust_remote_code: run code that comes with the model.
            chat_options: variables for the chat template.
            max_length: longest prompt and answer together; default: the model's.
            batch_size: most requests in one step.
            compiled: compile the model, and on CUDA record graphs; False, or `enforce_eager` in options: run it line by
                line.
            prefix_caching: keep keys and values of prompts; those of steered tokens are kept by their steering.
            reuse_steered: take keys and values of steered prompts from there. Tokens that come from the cache do not
                run again, so a receipt leaves them out; by default they run again and receipts are whole.
            settings: what is reserved for steering.
            options: further arguments of vLLM's `EngineArgs`; not those that are arguments here, or that would void
                receipts.

        Raises:
            MissingDependencyError: vLLM is not installed.
            ArgumentError: an option that vLLM does not have or that cannot be given here.
            EngineError: vLLM does not start, or it cannot be steered.
        """
        try:
            from vllm.platforms import current_platform  # type: ignore[import-not-found,unused-ignore]
            from vllm.v1.engine.llm_engine import LLMEngine  # type: ignore[import-not-found,unused-ignore]

            from vllm import EngineArgs  # type: ignore[import-not-found,unused-ignore]
        except ModuleNotFoundError as error:
            raise MissingDependencyError(error.name or "vllm", "vllm") from error
        more = checked_options(options or {}, {item.name for item in fields(EngineArgs)})
        if settings.policy is not None:
            raise ArgumentError("settings: a policy is for vLLM's own server; here every request brings its own edit")
        more["enforce_eager"] = bool(more.get("enforce_eager")) or not compiled
        place = str(bundled_path(name)) if name in MODELS else name
        shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        arguments = {
            "model": place,
            "tensor_parallel_size": tensor_parallel,
            "pipeline_parallel_size": pipeline_parallel,
            "max_model_len": max_length,
            "max_num_seqs": batch_size,
            "enable_prefix_caching": prefix_caching,
            "generation_config": "vllm",  # sampling is what the caller says, not what the model's folder says
            "async_scheduling": False,  # else a token may run, and count, after the one that ended the answer
            "enable_chunked_prefill": False if current_platform.is_cpu() else None,  # see `_draws`
            "max_logprobs": -1,  # as many as a caller asks for
            "disable_log_stats": True,
            "seed": 0,
            "additional_config": {KEY: asdict(settings)},
        }
        if current_platform.is_cpu():  # else it wants nearly all memory to be free, which it rarely is on a CPU
            arguments["gpu_memory_utilization"] = CPU_MEMORY
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **shared)
            config = transformers.AutoConfig.from_pretrained(place, **shared)
            arguments["dtype"] = saved_dtype(config) if dtype == "auto" else dtype
            ends = end_ids(place, config, tokenizer, revision)
            core = LLMEngine.from_engine_args(EngineArgs(**arguments | shared | more))
        except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise EngineError(f"vLLM cannot start {name!r}: {lines[0] if lines else type(error).__name__}") from error
        return cls(core, TextCodec(tokenizer, chat_options or {}), ends, name, settings, reuse_steered)

    @property
    def info(self) -> ModelInfo:
        """What the loaded model is."""
        return self._info

    def close(self) -> None:
        """End vLLM's processes."""
        self._client.core.engine_core.shutdown()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Samplings = GREEDY,
        edits: Edits = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Response]:
        """Answer every prompt, each row under its own edit or none; see `HFEngine.generate`.

        With stop strings vLLM may have begun a token or two beyond the stop: a receipt counts them.
        """
        rows, drawn, jobs = self._jobs(prompts, sampling, edits)
        self._client.run(jobs, progress)
        return [self._response(*row) for row in zip(rows, drawn, jobs, strict=True)]

    def stream(self, prompt: Prompt, sampling: Sampling = GREEDY, edit: Edit | None = None) -> Iterator[Chunk]:
        """Answer one prompt piece by piece; the last chunk carries the response. Arguments are checked at once."""
        (how,) = row_samplings(sampling, 1)
        return self._chunks(self.row(Asked(prompt, how, edit)))

    def batch(self) -> Batch:
        """An empty batch for rows of `row`."""
        return Batch(self._client, self._codec, self._end_ids, self._draws)

    def row(self, asked: Asked) -> Row:
        """What a batch needs to answer one request; see `HFEngine.row`.

        Raises:
            ArgumentError: what `HFEngine.row` refuses, and an edit or a trace that there is no room for (`Settings`).
        """
        (prompt,), (edit,) = row_prompts([asked.prompt]), row_edits([asked.edit], 1, self.info)
        ids = self._encode(prompt)
        self._draws(asked.sampling)
        limit = min(asked.sampling.max_new_tokens, self._room(ids))
        text = TextStream(self._codec, asked.sampling.stop)
        row = Row(prompt, ids, asked.sampling, edit, text, limit, asked.logprobs, asked.echo, asked.trace)
        self._client.check(edit, **kept(row))
        return row

    def capture(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[int]],
        edits: Edits = None,
        *,
        pool: Pool = "response_mean",
    ) -> Vectors:
        """One state per row after every block, float32 [n, n_layers, d_model]; see `HFEngine.capture`.

        Raises:
            EngineError: `settings.captures` is 0.
        """
        if not self._settings.captures:
            raise EngineError("states cannot be read: load with settings=Settings(captures=16), say")
        jobs = self._forced(prompts, responses, edits)
        for job, tokens in zip(jobs, responses, strict=True):
            job.steering["read"] = pooled_span(pool, len(job.ids) - len(tokens), len(job.ids))
        states = np.full((len(jobs), self.info.n_layers, self.info.d_model), np.nan, np.float32)
        row_of = {id(job): row for row, job in enumerate(jobs)}

        def fetch(finished: Sequence[Job]) -> None:
            found = self._client.call("steerwell_states", [job.ticket for job in finished])
            for layers, worker in zip(self._layers, found, strict=True):
                for job in finished:
                    state = np.frombuffer(worker[job.ticket], np.float32).reshape(len(layers), -1)
                    states[row_of[id(job)], layers] = state

        self._client.run(jobs, None, fetch, at_once=self._settings.captures)
        return states

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], edits: Edits = None) -> list[Score]:
        """Log-probabilities (nats), top-two margins and greediness of given tokens; see `HFEngine.score`.

        Scores carry no traces where `settings.traces` is 0. Prompt and response must leave one token of the context
        free.

        Raises:
            ArgumentError: what `HFEngine.score` refuses, and a steered response of more tokens than `settings.traces`.
        """
        jobs = self._forced(prompts, responses, edits)
        for job in jobs:
            job.wants["prompt_logprobs"] = 2
            if job.edit is not None:
                job.steering["end"] = len(job.ids) - 1  # the last token yields none of the response's
                if self._settings.traces:
                    job.steering["trace"] = (job.steering["start"], job.steering["end"])

        def fetch(finished: Sequence[Job]) -> None:
            traced = [job for job in finished if job.traced]
            for job, traces in zip(traced, self._client.traces(traced), strict=True):
                job.traces = traces
            self._client.receipts(finished)

        self._client.run(jobs, None, fetch)
        return [_score(job, len(tokens)) for job, tokens in zip(jobs, responses, strict=True)]

    def tokenise(self, text: str) -> tuple[int, ...]:
        """Token ids of an answer's text, without special tokens."""
        return self._codec.tokens(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self._codec.decode(tokens)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text that each token of an answer adds; a character of several tokens comes with its last one."""
        stream, listed = TextStream(self._codec, ()), list(tokens)
        ends = range(1, len(listed) + 1)
        return [stream.fresh(listed[:end], done=end == len(listed)) for end in ends]

    def _jobs(
        self, prompts: Sequence[Prompt], sampling: Samplings, edits: Edits
    ) -> tuple[list[Prompt], list[Sampling], list[Job]]:
        rows = row_prompts(prompts)
        drawn, steered = row_samplings(sampling, len(rows)), row_edits(edits, len(rows), self.info)
        jobs = []
        for prompt, how, edit in zip(rows, drawn, steered, strict=True):
            ids = self._encode(prompt)
            wants = self._draws(how) | {
                "max_tokens": min(how.max_new_tokens, self._room(ids)),
                "stop": list(how.stop),
                "stop_token_ids": sorted(self._end_ids),
                "detokenize": bool(how.stop),
            }
            jobs.append(Job(ids, wants, edit))
        return rows, drawn, jobs

    def _draws(self, how: Sampling) -> dict[str, Any]:
        """How vLLM draws a row's tokens.

        Raises:
            ArgumentError: a temperature that vLLM does not take; seeds under chunked prefill on the CPU, under which
                vLLM 0.32 ends with an error of its own.
        """
        if how.temperature == 0:
            return {"temperature": 0.0}
        if not 0.01 <= how.temperature <= 2:
            raise ArgumentError(f"temperature: got {how.temperature:g}; vLLM takes 0 (greedy), or 0.01 to 2")
        config = self._client.core.vllm_config
        if config.device_config.device_type == "cpu" and config.scheduler_config.enable_chunked_prefill:
            raise ArgumentError(
                "temperature: vLLM's CPU build cannot draw with seeds under chunked prefill; load without "
                "'enable_chunked_prefill' in options, or sample greedily"
            )
        return {"temperature": how.temperature, "top_p": how.top_p, "seed": how.seed % 2**63}

    def _forced(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], edits: Edits) -> list[Job]:
        """One request per row whose prompt is prompt and response together."""
        rows = row_prompts(prompts)
        check_responses(responses, len(rows), self.vocabulary)
        jobs = []
        for prompt, tokens, edit in zip(rows, responses, row_edits(edits, len(rows), self.info), strict=True):
            start = self._encode(prompt)
            job = Job([*start, *tokens], {"max_tokens": 1, "temperature": 0.0, "detokenize": False}, edit)
            if edit is not None:
                job.steering["start"] = len(start) - 1
            self._room(job.ids)
            jobs.append(job)
        return jobs

    def _encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; vLLM's processes would end at one that the model does not have."""
        return self._codec.encode_known(prompt, self.vocabulary)

    def _room(self, ids: Sequence[int]) -> int:
        """How many tokens may follow.

        Raises:
            ArgumentError: none.
        """
        if len(ids) >= self.max_length:
            raise ArgumentError(
                f"prompt: {len(ids)} tokens do not fit {self.info.name!r} (context {self.max_length}); shorten it"
            )
        return self.max_length - len(ids)

    def _chunks(self, row: Row) -> Iterator[Chunk]:
        batch = self.batch()
        batch.admit([row])
        try:
            while row.finish is None:
                batch.step()
                if row.finish is None and (text := row.text.fresh(row.tokens, done=False)):
                    yield Chunk(text)
        finally:
            if row.finish is None:  # nobody listens any more
                batch.drop([row])
        batch.settle()
        if row.fault is not None:
            raise row.fault
        if text := row.text.fresh(row.tokens, done=True):
            yield Chunk(text)
        yield Chunk("", row.response())

    def _answer(self, output: Any) -> tuple[list[int], FinishReason]:
        """Generated tokens without the end token, and why there are no more.

        Raises:
            EngineError: vLLM ended the answer before its end.
        """
        got = output.outputs[0]
        if got.finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended this answer early ({got.finish_reason}); ask again")
        tokens = list(got.token_ids)
        if tokens and tokens[-1] in self._end_ids:
            tokens.pop()
        return tokens, "length" if got.finish_reason == "length" else "stop"

    def _response(self, prompt: Prompt, how: Sampling, job: Job) -> Response:
        tokens, reason = self._answer(job.output)
        text = TextStream(self._codec, how.stop).final(tokens)
        return Response(prompt, text, tuple(tokens), reason, how, job.receipt)


def _score(job: Job, length: int) -> Score:
    """Log-probabilities of the last `length` tokens of a prompt."""
    tokens, rows = job.ids[-length:], job.output.prompt_logprobs[-length:]
    top = np.array([sorted((item.logprob for item in row.values()), reverse=True)[:2] for row in rows], np.float32)
    return Score(
        np.array([row[token].logprob for token, row in zip(tokens, rows, strict=True)], np.float32),
        top[:, 0] - top[:, 1],
        np.array([row[token].rank == 1 for token, row in zip(tokens, rows, strict=True)], bool),
        job.receipt,
        job.traces,
    )
