"""Requests on their way to vLLM and back: sent as fast as its tables have room, and receipts fetched when they land."""

from __future__ import annotations

import itertools
import math
import threading
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steerwell.core.errors import ArgumentError, EngineError, NotFiniteError
from steerwell.core.records import Edit, EditTerm, Receipt, TermReceipt
from steerwell.engines.vllm.plugin import REGISTERED
from steerwell.engines.vllm.wire import KEY, Settings, encode, packed, vector_name

COLLECT = 1024  # receipts that are fetched at one time


@dataclass(slots=True)
class Job:
    """One request on its way. `wants` are options of vLLM's `SamplingParams`; the steering is added when it is sent."""

    ids: list[int]
    wants: dict[str, Any]
    edit: Edit | None = None
    steering: dict[str, Any] = field(default_factory=dict)  # further arguments of `wire.encode`
    ticket: str = ""
    names: frozenset[str] = frozenset()
    output: Any = None
    receipt: Receipt | None = None

    @property
    def steered(self) -> bool:
        return self.edit is not None or "read" in self.steering


class Client:
    """What runs requests on a vLLM engine; several threads may.

    Args:
        core: vLLM's `LLMEngine`, started with steering on.
        settings: what was reserved for steering.
        reuse: whether steered tokens may come from the prefix cache.
    """

    def __init__(self, core: Any, settings: Settings, reuse: bool) -> None:
        self.core, self._settings, self.reuse = core, settings, reuse
        self._lock = threading.Lock()
        self._inbox: dict[str, list[Any]] = {}
        self._uses: Counter[str] = Counter()  # vectors of the requests on their way
        self._reading = 0  # requests on their way whose states are read
        self._registered: set[str] = set()

    def run(
        self,
        jobs: Sequence[Job],
        progress: Callable[[int], None] | None = None,
        fetch: Callable[[Sequence[Job]], None] | None = None,
        at_once: int = COLLECT,
    ) -> None:
        """Run requests to their ends, as many at one time as the device's tables hold.

        `fetch` brings home what was kept for at most `at_once` steered requests; by default their receipts.
        """
        self.register(jobs)
        waiting, flying, kept = deque(jobs), dict[str, Job](), list[Job]()
        try:
            while waiting or flying:
                while waiting and self.fits(waiting[0]):
                    job = waiting.popleft()
                    flying[self.send(job)] = job
                for output in self.wait(flying):
                    job = flying.pop(output.request_id)
                    self.landed(job)
                    job.output = output
                    kept += [job] if job.steered else []
                    if progress is not None:
                        progress(1)
                if len(kept) >= at_once:
                    (fetch or self.receipts)(kept)
                    kept = []
        finally:
            self.abort(flying)
        if kept:
            (fetch or self.receipts)(kept)

    def register(self, jobs: Sequence[Job]) -> None:
        """Send vectors that the workers have not got; afterwards requests name them."""
        fresh: dict[str, str] = {}
        for edit in {id(job.edit): job.edit for job in jobs if job.edit is not None}.values():
            names = set()
            for term in edit.terms:
                for vector in (term.direction, term.gate_direction):
                    if vector is not None:
                        name = vector_name(vector)
                        names.add(name)
                        if name not in self._registered and name not in fresh:
                            fresh[name] = packed(vector)
            if len(names) > self._settings.directions:
                raise ArgumentError(
                    f"edits: one needs {len(names)} vectors; this engine holds {self._settings.directions}, see "
                    "Settings.directions"
                )
            for job in jobs:
                if job.edit is edit:
                    job.names = frozenset(names)
        if fresh:
            self.call("steerwell_register", fresh)
            self._registered |= set(fresh)
            REGISTERED.update(fresh)

    def fits(self, job: Job) -> bool:
        more = sum(not self._uses[name] for name in job.names)
        busy = sum(count > 0 for count in self._uses.values()) if more else 0
        return busy + more <= self._settings.directions and not (
            "read" in job.steering and self._reading >= self._settings.captures
        )

    def send(self, job: Job) -> str:
        from vllm.inputs.engine import tokens_input  # type: ignore[import-not-found,unused-ignore]
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found,unused-ignore]

        from vllm import SamplingParams  # type: ignore[import-not-found,unused-ignore]

        wants = {"output_kind": "FINAL_ONLY"} | job.wants
        wants["output_kind"] = RequestOutputKind[wants["output_kind"]]
        if job.steered:
            job.ticket = uuid.uuid4().hex
            wants["extra_args"] = {KEY: encode(job.edit, known=self._registered, ticket=job.ticket, **job.steering)}
        if job.edit is not None and not self.reuse and any(term.position == "all" for term in job.edit.terms):
            wants["skip_reading_prefix_cache"] = True
        name = uuid.uuid4().hex
        with self._lock:
            self.core.add_request(name, tokens_input(job.ids), SamplingParams(**wants))
            self._inbox[name] = []
            self._uses.update(job.names)
            self._reading += "read" in job.steering
        return name

    def landed(self, job: Job) -> None:
        with self._lock:
            self._uses.subtract(job.names)
            self._reading -= "read" in job.steering

    def wait(self, flying: Mapping[str, Job]) -> list[Any]:
        """Outputs of these requests; runs a step where none has come yet. Steps bring other callers' outputs, too."""
        with self._lock:
            if not any(self._inbox[name] for name in flying) and self.core.has_unfinished_requests():
                for output in self.core.step():
                    if output.request_id in self._inbox:
                        self._inbox[output.request_id].append(output)
            found = list(itertools.chain.from_iterable(self._inbox[name] for name in flying))
            for name in flying:
                self._inbox[name] = []
            for output in found:
                if output.finished:
                    del self._inbox[output.request_id]
        return found

    def abort(self, flying: Mapping[str, Job]) -> None:
        if flying:
            with self._lock:
                self.core.abort_request(list(flying))
            for name, job in flying.items():
                self._inbox.pop(name, None)
                self.landed(job)

    def receipts(self, jobs: Sequence[Job]) -> None:
        """Bring receipts home. A pipeline's workers each tell of their own layers."""
        found = self.call("steerwell_receipts", [job.ticket for job in jobs])
        for job in jobs:
            assert job.edit is not None  # noqa: S101 - only steered jobs come here
            rows = {int(index): row for worker in found for index, *row in worker[job.ticket]}
            terms = [_term_receipt(term, *rows[index]) for index, term in enumerate(job.edit.terms)]
            job.receipt = Receipt(job.edit.id, tuple(terms))

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call every worker."""
        try:
            with self._lock:
                found: list[Any] = self.core.collective_rpc(method, args=arguments)
            return found
        except Exception as error:  # a worker's error comes as whatever vLLM makes of it
            raise EngineError(
                f"vLLM's workers refused {method!r}: {error} - is the plugin 'steerwell' installed in vLLM's "
                "environment and not shut out by VLLM_PLUGINS?"
            ) from error


def _term_receipt(
    term: EditTerm, seen: float, edited: float, before: float, moved: float, distance: float, margin: float
) -> TermReceipt:
    if not math.isfinite(before):
        raise NotFiniteError(
            f"layer {term.layer}: the activations are not finite, so they cannot be steered; load the model with "
            "dtype='bfloat16' or 'float32'"
        )
    return TermReceipt.of(term, seen, edited, before, moved, distance, margin)
