"""Requests on their way to vLLM and back: sent as fast as its tables have room, and receipts fetched when they land."""

from __future__ import annotations

import itertools
import math
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from steerwell.core.errors import ArgumentError, EngineError, EngineGoneError, NotFiniteError, SteerwellError
from steerwell.core.records import Edit, EditTerm, Receipt, TermReceipt, TokenTrace
from steerwell.engines.vllm.front import REGISTERED
from steerwell.engines.vllm.wire import KEY, Settings, decode, encode, packed, vector_name

COLLECT = 1024  # receipts that are fetched at one time
LOOK = 0.2  # seconds between looks at whether vLLM's processes live


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
    traces: tuple[TokenTrace, ...] = ()
    fault: NotFiniteError | None = None

    @property
    def steered(self) -> bool:
        return self.edit is not None or "read" in self.steering

    @property
    def traced(self) -> int:
        """Tokens whose trace is asked for."""
        first, end = self.steering.get("trace", (0, 0))
        return int(end - first)


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
        self._tracing = 0  # tokens of the requests on their way whose traces are kept
        self._registered: set[str] = set()
        _wake_when_gone(core.engine_core)

    @property
    def gone(self) -> bool:
        """Whether vLLM's processes have ended."""
        resources = getattr(self.core.engine_core, "resources", None)  # none where vLLM runs in this process
        return resources is not None and bool(resources.engine_dead)

    def check(self, edit: Edit | None, trace: tuple[int, int] | None = None) -> None:
        """Raise `ArgumentError` unless the device's tables can take an edit, and its trace."""
        if edit is not None:
            text = self.core.vllm_config.model_config.hf_text_config
            sent = encode(edit, known=self._registered, ticket="-", trace=trace)
            decode(sent, int(text.hidden_size), int(text.num_hidden_layers), self._settings, self._registered)

    @contextmanager
    def _vllm(self) -> Iterator[Any]:
        """vLLM's engine, for one thread at a time.

        Raises:
            EngineGoneError: its processes have ended.
        """
        with self._lock:
            try:
                if self.gone:
                    raise EngineGoneError
                yield self.core
            except Exception as error:
                if not self.gone:
                    raise
                raise EngineGoneError(
                    "vLLM's processes have ended, and with them every answer under way; vLLM's log says why. Start the "
                    "engine again"
                ) from error

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
        for job in jobs:
            if job.fault is not None:
                raise job.fault

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
        full = "read" in job.steering and self._reading >= self._settings.captures
        if job.traced and self._tracing:  # one that does not fit even alone is refused when it is sent
            full = full or self._tracing + job.traced > self._settings.traces
        return busy + more <= self._settings.directions and not full

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
        try:
            with self._vllm() as core:
                core.add_request(name, tokens_input(job.ids), SamplingParams(**wants))
                self._inbox[name] = []
                self._uses.update(job.names)
                self._reading += "read" in job.steering
                self._tracing += job.traced
        except SteerwellError:
            raise
        except Exception as error:  # of several kinds
            raise EngineError(f"vLLM refuses a request: {error}") from error
        return name

    def landed(self, job: Job) -> None:
        with self._lock:
            self._uses.subtract(job.names)
            self._reading -= "read" in job.steering
            self._tracing -= job.traced

    def wait(self, flying: Mapping[str, Job]) -> list[Any]:
        """Outputs of these requests; runs a step where none has come yet. Steps bring other callers' outputs, too."""
        with self._vllm() as core:
            if not any(self._inbox[name] for name in flying) and core.has_unfinished_requests():
                for output in core.step():
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
            with suppress(EngineGoneError), self._vllm() as core:
                core.abort_request(list(flying))
            for name, job in flying.items():
                self._inbox.pop(name, None)
                self.landed(job)

    def receipts(self, jobs: Sequence[Job]) -> None:
        """Bring receipts, or faults, home. A pipeline's workers each tell of their own layers."""
        found = self.call("steerwell_receipts", [job.ticket for job in jobs])
        for job in jobs:
            assert job.edit is not None  # noqa: S101 - only steered jobs come here
            rows = {int(index): row for worker in found for index, *row in worker[job.ticket]}
            try:
                terms = [_term_receipt(term, *rows[index]) for index, term in enumerate(job.edit.terms)]
            except NotFiniteError as error:
                job.fault = error
            else:
                job.receipt = Receipt(job.edit.id, tuple(terms))

    def traces(
        self, jobs: Sequence[Job], spans: Sequence[tuple[int, int]] | None = None
    ) -> list[tuple[TokenTrace, ...]]:
        """What every term of the jobs' edits met, token by token; to be asked before their receipts are fetched.

        A running answer of at most `limit` tokens to a prompt `ids` is traced with `Job(..., steering={"trace":
        (len(ids) - 1, len(ids) - 1 + limit)})`; `check` refuses what there is no room for. After each `wait` one call
        for all such jobs, from as many tokens as each was asked of to as many as it has, brings an entry for each new
        one, of the token that yields it.

        Args:
            jobs: sent with `steering["trace"]`.
            spans: the part that is wanted of each, counted from its first traced token; None: the whole.

        Raises:
            EngineError: no trace is kept of a job, or tokens are wanted that did not run.
        """
        wanted = spans if spans is not None else [(0, job.traced) for job in jobs]
        asked = {job.ticket: list(span) for job, span in zip(jobs, wanted, strict=True)}
        found = self.call("steerwell_traces", asked) if asked else []
        traces = []
        for job in jobs:
            assert job.edit is not None  # noqa: S101 - only steered jobs come here
            told = {int(at): np.frombuffer(sent, "<f4") for worker in found for at, sent in worker[job.ticket]}
            pairs = [(term.layer, told[index].reshape(-1, 2).T) for index, term in enumerate(job.edit.terms)]
            traces.append(tuple(TokenTrace(layer, before.copy(), edited > 0) for layer, (edited, before) in pairs))
        return traces

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call every worker."""
        try:
            with self._vllm() as core:
                found: list[Any] = core.collective_rpc(method, args=arguments)
            return found
        except EngineGoneError:
            raise
        except Exception as error:  # a worker's error comes as whatever vLLM makes of it
            raise EngineError(
                f"vLLM's workers refused {method!r}: {error} - is the plugin 'steerwell' installed in vLLM's "
                "environment and not shut out by VLLM_PLUGINS?"
            ) from error


def _wake_when_gone(engine_core: Any) -> None:
    """vLLM 0.32 waits for ever for processes that were killed: have it meet an error."""
    if not hasattr(engine_core, "outputs_queue"):  # it runs in this process
        return
    from vllm.v1.engine.exceptions import EngineDeadError  # type: ignore[import-not-found,unused-ignore]

    resources, outputs, calls = engine_core.resources, engine_core.outputs_queue, engine_core.utility_results

    def watch() -> None:
        while not resources.engine_dead:
            time.sleep(LOOK)
        outputs.put(EngineDeadError())
        for call in list(calls.values()):
            if not call.done():
                call.set_exception(EngineDeadError())

    threading.Thread(target=watch, name="steerwell-watch", daemon=True).start()


def _term_receipt(
    term: EditTerm, seen: float, edited: float, before: float, moved: float, distance: float, margin: float
) -> TermReceipt:
    if not math.isfinite(before):
        raise NotFiniteError(
            f"layer {term.layer}: the activations are not finite, so they cannot be steered; load the model with "
            "dtype='bfloat16' or 'float32', or steer with less strength"
        )
    return TermReceipt.of(term, seen, edited, before, moved, distance, margin)
