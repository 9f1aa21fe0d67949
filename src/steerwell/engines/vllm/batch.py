"""A running batch in vLLM: requests are sent as they come, and vLLM decides what runs together."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from steerwell.core.errors import EngineError, EngineGoneError, SteerwellError
from steerwell.core.records import Sampling, TokenTrace
from steerwell.engines.base import Token
from steerwell.engines.rows import Row
from steerwell.engines.text import TextCodec
from steerwell.engines.vllm.client import Client, Job

Met = tuple[tuple[float, ...], tuple[bool, ...]]  # projections and whether the gates were open, one per term


class Batch:
    """Rows that vLLM answers; `steerwell.engines.rows.Running` says what it offers.

    A row that ends at a stop string may have begun a token or two more before vLLM heard of it; its receipt counts
    them.

    Args:
        client: to vLLM.
        codec: tokens to text.
        end_ids: tokens that end an answer.
        draws: options of vLLM's `SamplingParams` that draw as a `Sampling` says.
    """

    joins, padded = True, False

    def __init__(
        self,
        client: Client,
        codec: TextCodec,
        end_ids: frozenset[int],
        draws: Callable[[Sampling], Mapping[str, Any]],
    ) -> None:
        self._client, self._codec, self._end_ids, self._draws = client, codec, end_ids, draws
        self._jobs: dict[Row, Job] = {}  # of every row that has not been settled
        self._waiting: deque[Row] = deque()  # the device's tables are full
        self._flying: dict[str, Row] = {}
        self._drawn: Counter[Row] = Counter()  # tokens of each row that flies

    @property
    def gone(self) -> bool:
        """Whether vLLM's processes have ended."""
        return self._client.gone

    def admit(self, rows: Sequence[Row]) -> int:
        """Send rows; vLLM reads their prompts in its next steps."""
        made = {row: Job(row.prompt_ids, self._wants(row), row.edit, kept(row)) for row in rows}
        self._client.register(list(made.values()))
        self._jobs |= made
        self._waiting += rows
        return 0

    def step(self) -> int:
        """Take what vLLM has drawn; how many tokens these are."""
        while self._waiting and (self._waiting[0].finish or self._client.fits(self._jobs[self._waiting[0]])):
            row = self._waiting.popleft()
            if row.finish is None:
                self._send(row)
        outputs = self._client.wait({name: self._jobs[row] for name, row in self._flying.items()})
        met = self._met(outputs)
        for output in outputs:
            row = self._flying[output.request_id]
            self._grow(row, output, met.get(row, iter(())))
            if output.finished:
                self._client.landed(self._jobs[self._flying.pop(output.request_id)])
            elif row.finish is not None:  # at a stop string
                self._abort([output.request_id])
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def settle(self) -> None:
        """Bring home the receipts of finished rows."""
        done = {row: job for row, job in self._jobs.items() if row.finish is not None}
        steered = [job for row, job in done.items() if row.edit is not None and job.ticket and row.fault is None]
        if steered:
            self._client.receipts(steered)
        for row, job in done.items():
            row.settled = True
            row.receipt, row.fault = job.receipt, row.fault or job.fault
            del self._jobs[row], self._drawn[row]

    def rest(self) -> None:
        """Nothing is held here."""

    def drop(self, rows: Sequence[Row]) -> None:
        """End rows that nobody waits for any more; nothing is known of them afterwards."""
        gone = set(rows)
        self._abort([name for name, row in self._flying.items() if row in gone])
        for row in gone:
            row.finish = row.finish or "length"
            self._jobs.pop(row, None)
            del self._drawn[row]
        self._waiting = deque(row for row in self._waiting if row not in gone)

    def _send(self, row: Row) -> None:
        """Hand a row to vLLM; what it refuses fails alone."""
        try:
            self._flying[self._client.send(self._jobs[row])] = row
        except EngineGoneError:
            raise
        except SteerwellError as error:
            row.fault = EngineError(str(error))
            row.finish = "stop"

    def _abort(self, names: Sequence[str]) -> None:
        self._client.abort({name: self._jobs[self._flying.pop(name)] for name in names})

    def _wants(self, row: Row) -> dict[str, Any]:
        """Options of vLLM's `SamplingParams`; stop strings are looked for here, by the rules of every engine."""
        return {
            **self._draws(row.sampling),
            "max_tokens": row.limit,
            "stop_token_ids": sorted(self._end_ids),
            "detokenize": False,
            "output_kind": "DELTA",
            "logprobs": row.logprobs,
            "prompt_logprobs": row.logprobs if row.echo else None,
        }

    def _met(self, outputs: Sequence[Any]) -> dict[Row, Iterator[Met]]:
        """What the terms met where the new tokens were drawn, of rows that are traced: per token, in their order."""
        new: Counter[Row] = Counter()
        for output in outputs:
            new[self._flying[output.request_id]] += len(output.outputs[0].token_ids)
        rows = [row for row in new if self._jobs[row].traced]
        spans = [(self._drawn[row], self._drawn[row] + new[row]) for row in rows]
        self._drawn.update(new)
        traces = self._client.traces([self._jobs[row] for row in rows], spans)
        return {row: _by_token(found) for row, found in zip(rows, traces, strict=True)}

    def _grow(self, row: Row, output: Any, met: Iterator[Met]) -> None:
        """Add what an output brings to its row."""
        got = output.outputs[0]
        if row.echo and not row.echoed and output.prompt_logprobs:
            pairs = zip(row.prompt_ids, output.prompt_logprobs, strict=True)
            row.echoed = tuple(self._token(token, found, row.logprobs) for token, found in pairs)
        told = got.logprobs if row.logprobs is not None else [None] * len(got.token_ids)
        for token, found in zip(got.token_ids, told, strict=True):
            if row.finish is not None:
                return
            if (row.logprobs is not None or row.trace) and token not in self._end_ids:
                projections, edited = next(met, ((), ()))
                told_of = self._token(token, found, row.logprobs)
                row.told.append(replace(told_of, projections=projections, edited=edited))
            row.append(token, self._end_ids)
        if output.finished and row.finish is None:
            row.finish = "stop"
            row.fault = EngineError(f"vLLM ended this answer early ({got.finish_reason}); ask again")

    def _token(self, token: int, found: Mapping[int, Any] | None, count: int | None) -> Token:
        """A token with what vLLM tells of its place; nothing where nothing came before."""
        text = self._codec.decode([token])
        if found is None:
            return Token(token, text)
        best = sorted((item.rank, other, item.logprob) for other, item in found.items() if item.rank <= (count or 0))
        top = tuple((other, self._codec.decode([other]), logprob) for _, other, logprob in best)
        return Token(token, text, found[token].logprob, top)


def kept(row: Row) -> dict[str, tuple[int, int]]:
    """What the workers keep of a row's tokens: as arguments of `wire.encode`."""
    if not row.trace or row.edit is None:
        return {}
    start = len(row.prompt_ids) - 1  # it yields the first token
    return {"trace": (start, start + row.limit)}


def _by_token(traces: Sequence[TokenTrace]) -> Iterator[Met]:
    """What terms met, token by token."""
    return zip(
        zip(*(trace.projection.tolist() for trace in traces), strict=True),
        zip(*(trace.edited.tolist() for trace in traces), strict=True),
        strict=True,
    )
