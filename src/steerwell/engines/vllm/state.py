"""Which request has which rows of the buffers: a worker's side of steering, step by step.

At every step the scheduler says what was added, what has finished, and how many tokens of each request run. From that
`fill` writes one row of coefficients per token, in a few vectorised lines; coefficients themselves are uploaded only
when a request joins. Nothing here waits for the device, except when a receipt is collected.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerwell.core.errors import EngineError
from steerwell.core.records import Vectors
from steerwell.engines.vllm.live import Live, column, spread
from steerwell.engines.vllm.ops import BEFORE, MARGIN, TRACE, Buffers
from steerwell.engines.vllm.traces import Traces, fetched
from steerwell.engines.vllm.wire import KEY, Settings, decode, vector_of

KEPT = 8192  # receipts that nobody has collected yet; the oldest go first


class Steering:
    """A worker's requests under steering.

    Args:
        settings: what is reserved.
        layers: blocks that this worker runs.
        n_layers: blocks of the whole model.
        width: d_model.
        requests: most requests in one step; `tokens` most tokens.
        device: where the model is.
    """

    def __init__(
        self,
        settings: Settings,
        layers: Sequence[int],
        *,
        n_layers: int,
        width: int,
        requests: int,
        tokens: int,
        device: torch.device,
    ) -> None:
        self.settings, self.layers, self._n_layers, self._width = settings, list(layers), n_layers, width
        self._device, self._index = device, {layer: index for index, layer in enumerate(layers)}
        self.buffers = Buffers.empty(
            layers=len(layers),
            slots=requests,
            terms=settings.max_terms,
            tokens=tokens,
            rows=settings.directions,
            captures=settings.captures,
            traces=settings.traces,
            width=width,
            device=device,
        )
        self._vectors: dict[str, Vectors] = {}  # registered ones, until they are forgotten
        self._rows: OrderedDict[str, int] = OrderedDict()  # rows of the table, the longest unused first
        self._uses: Counter[str] = Counter()
        self._live: dict[str, Live] = {}
        self._by_ticket: dict[str, Live] = {}  # those that have not finished, and those not collected
        self._done: OrderedDict[str, None] = OrderedDict()
        self._slots = list(range(requests, 0, -1))
        self._captures = list(range(settings.captures, 0, -1))
        self._traces = Traces(self.buffers.traced)
        self._counts = np.zeros(len(layers), np.int32)
        self.cleanse: Callable[[], None] = lambda: None  # takes what is not finite out of the keys and values
        self._order, self._slots_of = np.zeros(0, np.int64), torch.zeros(0, dtype=torch.long, device=device)
        self._written: NDArray[np.int32] | None = None  # rows of the step before; None: nothing was steered in it

    @property
    def known(self) -> Collection[str]:
        """Names of the registered vectors."""
        return self._vectors.keys()

    def register(self, vectors: Mapping[str, str]) -> None:
        """Keep vectors, so that requests can name them."""
        self._vectors.update({name: vector_of(name, text, self._width) for name, text in vectors.items()})

    def forget(self, names: Iterable[str]) -> None:
        """Drop registered vectors; requests that run keep theirs."""
        for name in names:
            self._vectors.pop(name, None)

    def update(self, output: Any) -> None:
        """Take over what the scheduler says (a `SchedulerOutput`): what has finished, what is new, how far each is."""
        for name in output.finished_req_ids:
            self._finish(name)
        for new in output.scheduled_new_reqs:
            self._add(new)
        cached = output.scheduled_cached_reqs
        if self._live:
            for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
                if name in self._live:
                    self._live[name].computed = computed

    def fill(self, names: Sequence[str], counts: Mapping[str, int]) -> None:
        """Write every token's rows for the step that comes.

        Args:
            names: requests in the order of their tokens.
            counts: how many tokens of each run.
        """
        if not self._live:
            self.clear()
            return
        batch = [self._live.get(name) for name in names]
        self._seat([live for live in batch if live is not None and not live.slot], {id(live) for live in batch})
        lengths = np.fromiter((counts[name] for name in names), np.int64, len(names))
        columns = np.array([column(live) for live in batch], np.int64).T
        rows, *tallies = spread(lengths, columns)
        end = 0
        for live, length, tallied, response, read in zip(
            batch, lengths.tolist(), *(tally.tolist() for tally in tallies), strict=True
        ):
            begin, end = end, end + length
            if live is not None:
                live.mark = max(live.mark, live.computed + length)
                live.seen["all"] += tallied
                live.seen["response"] += response
                live.read += read
                if live.trace is not None:
                    live.trace.write(rows[TRACE, begin:end], live.computed)
        self._write(rows)
        if not np.array_equal(columns[0], self._order):
            self._order, self._slots_of = columns[0], self._tensor(columns[0])

    def judge(self, outputs: Tensor) -> None:
        """Spoil what was counted of requests whose outputs are not finite: tokens drawn from them mean nothing.

        Args:
            outputs: logits, or the states that they are made from [n, width], in the order of `fill`.
        """
        if self._written is None or len(outputs) != len(self._order):
            return
        spoilt = ~torch.isfinite(outputs.amax(-1)) & (self._slots_of > 0)  # amax hands a NaN on
        if self._device.type == "cpu" and not bool(spoilt.any()):  # elsewhere a look would wait for the device
            return
        self.buffers.sums[:, self._slots_of, :, BEFORE] += torch.where(spoilt, math.nan, 0.0)[None, :, None]

    def clear(self) -> None:
        """Steer nothing in the step that comes."""
        if self._written is not None:
            self.buffers.tokens.zero_()
            self._written = None

    def collect(self, tickets: Iterable[str]) -> dict[str, list[list[float]]]:
        """What the terms at this worker's layers did: per ticket `[index of the term, *columns of sums]`, and drop it.

        Raises:
            EngineError: a ticket that nobody holds, or a term that met other tokens than it should have.
        """
        found = {}
        for ticket in tickets:
            live, sums = self._take(ticket)
            found[ticket] = [[float(place[0]), *row] for place, row in zip(live.places, sums.tolist(), strict=True)]
        return found

    def states(self, tickets: Iterable[str]) -> dict[str, bytes]:
        """Mean states that requests asked for: per ticket float32 [layers of this worker, d_model]; drops them.

        Raises:
            EngineError: a ticket that nobody holds, or one whose tokens did not all run.
        """
        found = {}
        for ticket in tickets:
            live, _ = self._take(ticket)
            first, end = live.request.read or (0, 0)
            if live.read != end - first or live.read == 0:
                raise EngineError(f"{live.read} tokens' states were read, expected {end - first}")
            state = self.buffers.captured[:, live.capture] if live.state is None else live.state
            found[ticket] = (state / live.read).cpu().numpy().tobytes()
        return found

    def traces(self, asked: Mapping[str, Sequence[int]]) -> dict[str, list[list[Any]]]:
        """What terms met at traced tokens, of running requests and of finished ones until their receipt is collected.

        Args:
            asked: per ticket the span that is wanted, counted from the request's first traced token.

        Returns:
            Per ticket and term at this worker's layers: its index, and its part of `Buffers.traced` as bytes of
            float32 [tokens of the span, 2].

        Raises:
            EngineError: a ticket that nobody holds, one without a trace, or tokens that did not run.
        """
        found = {}
        told = fetched([self._traced(ticket, *span) for ticket, span in asked.items()])
        for ticket, values in zip(asked, told, strict=True):
            terms = self._by_ticket[ticket].places
            found[ticket] = [[term[0], value.tobytes()] for term, value in zip(terms, values, strict=True)]
        return found

    def _traced(self, ticket: str, first: int, end: int) -> Tensor:
        """A span of a request's trace, [terms, tokens, 2], on the device."""
        live = self._held(ticket)
        trace = live.trace
        if trace is None or trace.places is None:
            raise EngineError(
                "a request has no trace: none was asked for, or more at one time than the setting 'traces' has room for"
            )
        ran = min(len(trace.places), live.mark - trace.first)
        if not 0 <= first <= end <= ran:
            raise EngineError(f"traced tokens {first} to {end - 1} were asked for, and {max(ran, 0)} of them have run")
        return self._traces.read(trace, first, end)

    def _held(self, ticket: str) -> Live:
        if ticket not in self._by_ticket:
            raise EngineError(
                f"no receipt under ticket {ticket!r}: never asked for, collected before, or dropped as old"
            )
        return self._by_ticket[ticket]

    def _take(self, ticket: str) -> tuple[Live, NDArray[np.float64]]:
        """A request and what its terms did. It may be collected once, when its answer is there."""
        live = self._held(ticket)
        del self._by_ticket[ticket]
        self._done.pop(ticket, None)
        sums = self._sums(live)
        if not np.isfinite(sums[:, BEFORE]).all():
            self.cleanse()
        for (_, term, _, _), row in zip(live.places, sums, strict=True):
            if int(row[0]) != live.seen[term.position]:
                raise EngineError(
                    f"layer {term.layer} saw {int(row[0])} tokens of a request, expected {live.seen[term.position]}: "
                    "vLLM did not run the steering op as it should; the answer is void"
                )
        return live, sums

    def _add(self, new: Any) -> None:
        """A new request; or one that comes back after a preemption, which goes on counting where it was."""
        if new.req_id in self._live:
            self._live[new.req_id].computed = new.num_computed_tokens
            return
        extra = new.sampling_params.extra_args if new.sampling_params is not None else None
        if not extra or KEY not in extra:
            return
        request = decode(extra[KEY], self._width, self._n_layers, self.settings, self.known)
        counts: Counter[int] = Counter()
        places = []
        for index, term in enumerate(request.terms):
            if term.layer in self._index:
                places.append((index, term, self._index[term.layer], counts[term.layer]))
                counts[term.layer] += 1
        vectors = {name: request.vectors.get(name, self._vectors.get(name)) for name in request.names}
        start = request.response_start(new.prompt_len)
        live = Live(request, start, places, vectors, computed=new.num_computed_tokens)  # type: ignore[arg-type]
        live.mark = live.computed
        if request.read:
            if not self._captures:
                raise EngineError("more requests ask for states than the setting 'captures' has places for")
            live.capture = self._captures.pop()
            self.buffers.captured[:, live.capture] = 0
        if request.trace:
            live.trace = self._traces.begin(request.trace, [(layer, before) for _, _, layer, before in places])
        self._live[new.req_id] = live
        if request.ticket:
            self._by_ticket[request.ticket] = live

    def _finish(self, name: str) -> None:
        live = self._live.pop(name, None)
        if live is None:
            return
        if live.capture:
            live.state = self.buffers.captured[:, live.capture].clone()
            self._captures.append(live.capture)
        if live.trace is not None:
            self._traces.end(live.trace, keep=live.request.ticket in self._by_ticket)
        self._unseat(live)
        if self._device.type == "cpu" and not np.isfinite(self._sums(live)[:, BEFORE]).all():  # elsewhere: see `_take`
            self.cleanse()
        if live.request.ticket in self._by_ticket:
            self._done[live.request.ticket] = None
            while len(self._done) > KEPT:
                del self._by_ticket[self._done.popitem(last=False)[0]]

    def _seat(self, newcomers: Sequence[Live], running: set[int]) -> None:
        """Give slots to requests, and upload their coefficients in one go."""
        if not newcomers:
            return
        idle = [live for live in self._live.values() if live.slot and id(live) not in running]
        for live in newcomers:
            if not self._slots:
                self._unseat(idle.pop())  # preempted, or waiting for a turn
            live.slot = self._slots.pop()
        uploads = [upload for live in newcomers for upload in self._rows_for(live)]
        if uploads:
            vectors = torch.from_numpy(np.stack([vector for _, vector in uploads])).to(self._device)
            self.buffers.table[self._tensor([row for row, _ in uploads])] = vectors
        slots = [live.slot for live in newcomers]
        shape = (len(self.layers), 2 * len(slots), self.settings.max_terms)
        ids, numbers = np.full((*shape, 2), -1, np.int32), np.zeros((*shape, 3), np.float32)
        for at, live in enumerate(newcomers):
            for _, term, layer, before in live.places:
                scopes = slice(2 * at, 2 * at + 2) if term.position == "all" else slice(2 * at + 1, 2 * at + 2)
                ids[layer, scopes, before] = self._rows[term.direction], self._rows[term.gate_direction]
                numbers[layer, scopes, before] = term.gate, term.offset, term.gain
                self._counts[layer] += 1
        rows = self._tensor([row for slot in slots for row in (2 * slot - 1, 2 * slot)])
        self.buffers.ids[:, rows] = torch.from_numpy(ids).to(self._device)
        self.buffers.numbers[:, rows] = torch.from_numpy(numbers).to(self._device)
        fresh = self.buffers.sums.new_zeros((1, 1, 1, MARGIN + 1))
        fresh[..., MARGIN] = math.inf
        self.buffers.sums[:, self._tensor(slots)] = fresh
        self.buffers.live.copy_(torch.from_numpy(self._counts))

    def _unseat(self, live: Live) -> None:
        """Take a request's slot away; what its terms did so far is kept."""
        if not live.slot:
            return
        live.stash.append(self._now(live))
        self._slots.append(live.slot)
        live.slot = 0
        self._uses.subtract(live.request.names)
        for _, _, layer, _ in live.places:
            self._counts[layer] -= 1
        self.buffers.live.copy_(torch.from_numpy(self._counts))

    def _rows_for(self, live: Live) -> list[tuple[int, Vectors]]:
        """Rows of the table for a request's vectors; those that have to be uploaded, longest unused rows first."""
        uploads = []
        for name in sorted(live.request.names):
            self._uses[name] += 1
            if name not in self._rows:
                row = len(self._rows)
                if row == self.settings.directions:
                    old = next((other for other in self._rows if not self._uses[other]), None)
                    if old is None:
                        raise EngineError(
                            f"the requests that run need more than {row} vectors; raise the setting 'directions'"
                        )
                    row = self._rows.pop(old)
                self._rows[name] = row
                uploads.append((row, live.vectors[name]))
            self._rows.move_to_end(name)
        return uploads

    def _write(self, rows: NDArray[np.int32]) -> None:
        """Copy the step's rows [4, T] to the device, without waiting for it, unless they are there."""
        width, before = rows.shape[1], self._written
        self._written = rows
        if before is not None and np.array_equal(before, rows):
            return
        host = torch.from_numpy(rows)
        if self._device.type != "cpu":
            host = host.pin_memory()
        self.buffers.tokens[:, :width].copy_(host, non_blocking=True)
        if before is not None and before.shape[1] > width:
            self.buffers.tokens[:, width : before.shape[1]] = 0

    def _now(self, live: Live) -> Tensor:
        """What stands in a request's slot, [terms, 6], on the device."""
        layers, before = [place[2] for place in live.places], [place[3] for place in live.places]
        return self.buffers.sums[self._tensor(layers), live.slot, self._tensor(before)]

    def _sums(self, live: Live) -> NDArray[np.float64]:
        parts = [*live.stash, *([self._now(live)] if live.slot else [])]
        if not parts:
            return np.zeros((len(live.places), MARGIN + 1))
        stacked = torch.stack(parts).cpu().double().numpy()
        total: NDArray[np.float64] = stacked.sum(0)
        total[:, MARGIN] = stacked[:, :, MARGIN].min(0)
        return total

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)
