"""Which request has which rows of the buffers: a worker's side of steering, step by step.

At every step the scheduler says what was added, what has finished, and how many tokens of each request run. From that
`fill` writes one row of coefficients per token, in a few vectorised lines; coefficients themselves are uploaded only
when a request joins. Nothing here waits for the device, except when a receipt is collected.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerwell.core.errors import EngineError
from steerwell.core.records import Vectors
from steerwell.engines.vllm.ops import CAPTURE, MARGIN, ROW, TALLY, Buffers
from steerwell.engines.vllm.wire import KEY, Request, Settings, Term, decode, vector_of

KEPT = 8192  # receipts that nobody has collected yet; the oldest go first
FOREVER = np.iinfo(np.int64).max


@dataclass(slots=True)
class Live:
    """A steered request that has not finished."""

    request: Request
    start: int  # first token in the scope of `response`
    places: list[tuple[int, Term, int, int]]  # index in the request, term, layer of the buffers, terms before it there
    vectors: Mapping[str, Vectors]
    slot: int = 0  # 0: it has none now
    computed: int = 0  # tokens that ran in earlier steps
    mark: int = 0  # tokens before this one were counted: those that run again after a preemption are not
    seen: dict[str, int] = field(default_factory=lambda: {"all": 0, "response": 0})
    stash: list[Tensor] = field(default_factory=list)  # sums from before it lost its slot, [terms, 6] each
    capture: int = 0
    read: int = 0  # tokens whose states were added up
    state: Tensor | None = None  # [layers, d_model], set when it has finished


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
        self._counts = np.zeros(len(layers), np.int32)
        self._filled = 0  # tokens of the step before

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
        columns = np.array([_column(live) for live in batch], np.int64).T
        rows, tallied, response, read = _spread(lengths, columns)
        self._write(rows)
        for at, live in enumerate(batch):
            if live is not None:
                live.mark = max(live.mark, live.computed + int(lengths[at]))
                live.seen["all"] += int(tallied[at])
                live.seen["response"] += int(response[at])
                live.read += int(read[at])

    def clear(self) -> None:
        """Steer nothing in the step that comes."""
        if self._filled:
            self.buffers.tokens.zero_()
            self._filled = 0

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

    def _take(self, ticket: str) -> tuple[Live, NDArray[np.float64]]:
        """A request and what its terms did. It may be collected once, when its answer is there."""
        if ticket not in self._by_ticket:
            raise EngineError(
                f"no receipt under ticket {ticket!r}: never asked for, collected before, or dropped as old"
            )
        live = self._by_ticket.pop(ticket)
        self._done.pop(ticket, None)
        sums = self._sums(live)
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
        before: Counter[int] = Counter()
        places = []
        for index, term in enumerate(request.terms):
            if term.layer in self._index:
                places.append((index, term, self._index[term.layer], before[term.layer]))
                before[term.layer] += 1
        vectors = {name: request.vectors.get(name, self._vectors.get(name)) for name in request.names}
        start = request.response_start(new.prompt_len)
        live = Live(request, start, places, vectors, computed=new.num_computed_tokens)  # type: ignore[arg-type]
        live.mark = live.computed
        if request.read:
            if not self._captures:
                raise EngineError("more requests ask for states than the setting 'captures' has places for")
            live.capture = self._captures.pop()
            self.buffers.captured[:, live.capture] = 0
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
        self._unseat(live)
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
        """Copy the step's rows [3, T] to the device, without waiting for it."""
        host = torch.from_numpy(rows)
        if self._device.type != "cpu":
            host = host.pin_memory()
        width = rows.shape[1]
        self.buffers.tokens[:, :width].copy_(host, non_blocking=True)
        if self._filled > width:
            self.buffers.tokens[:, width : self._filled] = 0
        self._filled = width

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


def _column(live: Live | None) -> tuple[int, ...]:
    """What `_spread` has to know of a request."""
    if live is None:
        return (0,) * 8
    first, last = live.request.read or (0, 0)
    end = FOREVER if live.request.end is None else live.request.end
    return live.slot, live.computed, live.start, end, live.mark, live.capture, first, last


def _spread(
    lengths: NDArray[np.int64], columns: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Rows of `Buffers.tokens` [3, T] from what is known of each request [8, n], and tokens counted per request."""
    which = np.repeat(np.arange(len(lengths)), lengths)
    begins = np.cumsum(lengths) - lengths
    slot, computed, start, end, mark, capture, first, last = columns[:, which]
    position = np.arange(len(which)) - begins[which] + computed
    steered = (slot > 0) & (position < end)
    response = steered & (position >= start)
    counted = steered & (position >= mark)
    reading = (capture > 0) & (position >= first) & (position < last) & (position >= mark)
    rows = np.empty((3, len(which)), np.int32)
    rows[ROW] = np.where(steered, 2 * slot - 1 + response, 0)
    rows[TALLY] = np.where(counted, slot, 0)
    rows[CAPTURE] = np.where(reading, capture, 0)
    tallied, answered, read = (
        np.bincount(which[chosen], minlength=len(lengths)) for chosen in (counted, counted & response, reading)
    )
    return rows, tallied, answered, read
