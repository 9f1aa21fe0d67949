"""What a server tells Prometheus: its load, and what steering met and did, so that an attack shows as a jump.

A projection is told in units of its layer's class separation, seen from the decision boundary: 0 is the boundary,
negative is the violating side, and the calibrated class means lie near 0.5 (aligned) and -0.5 (violating).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from steerwell.engines.base import Answer
from steerwell.serving.steering import Steering

REFUSED = ("invalid", "unauthenticated", "forbidden", "not_found", "too_large", "overloaded", "other")
FAILED = ("timed_out", "cancelled", "engine", "internal", "other")
NAMES = 200  # names of steering that get series of their own; later ones share OTHER
OTHER = "other"
RECENT = 100  # readings that a moving mean remembers
WHENS = ("before", "after")  # an edit

_LATENCY = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SHARE = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
_PROJECTION = (-4, -3, -2, -1.5, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12)
_UNIT = (
    "in class separations from the decision boundary: about 0.5 is the aligned class's mean, about -0.5 the violating "
    "one's; one reading per answer and watched layer"
)
_ONLY_MONITORED = "(steering that only monitors has its gate open on the violating side and edits nothing)"


class Monitor:
    """The metrics of one server, in a registry of its own. Every method may be called from any thread.

    No request can create series: the label `steering` is a name that the catalog gave (at most `NAMES` of them, then
    `other`), `reason` is one of `REFUSED` or `FAILED`.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._lock = Lock()
        self._names: set[str] = set()
        self._means: dict[tuple[str, str], tuple[int, float]] = {}
        self._load()
        self._steering()

    def _load(self) -> None:
        self._seconds = self._histogram("answer_seconds", "Time from a request to its finished answer.", _LATENCY)
        self._first = self._histogram("first_token_seconds", "Time from a streamed request to its first token.", _FIRST)
        self._step = self._histogram(
            "step_seconds", "Time of one step: new prompts read, and a token for every answer that decodes.", _STEP
        )
        self._rows = self._histogram("batch_rows", "Answers that decoded together in one step.", _ROWS)
        self._waiting = self._gauge("queue_length", "Answers that waited for a place in the batch at the latest step.")
        self._generated = self._counter("generated_tokens", "Tokens generated, also for answers that nobody awaited.")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of finished answers.")
        self._refused = self._counter("refused_requests", "Requests refused before anything was generated.", "reason")
        self._failed = self._counter("failed_requests", "Requests that were taken and not finished.", "reason")
        for counter, reasons in ((self._refused, REFUSED), (self._failed, FAILED)):
            for reason in reasons:
                counter.labels(reason)

    def _steering(self) -> None:
        self._answers = self._counter(
            "answers", "Finished answers (a request may ask for several).", "steering", "finish"
        )
        self._flagged = self._counter(
            "flagged_answers", "Answers on the violating side of a boundary after the edit.", "steering"
        )
        self._seen = self._counter(
            "seen_tokens", "Tokens that the steering's terms saw, summed over terms.", "steering"
        )
        self._edited = self._counter(
            "edited_tokens", f"Those whose gate was open, summed over terms {_ONLY_MONITORED}.", "steering"
        )
        self._moved = self._counter(
            "perturbation",
            "Sum of |h' - h| over edited tokens, activation units; per steerwell_edited_tokens_total it is the mean.",
            "steering",
        )
        self._share = self._histogram(
            "edited_share", f"Edited share of the tokens an answer's terms saw {_ONLY_MONITORED}.", _SHARE, "steering"
        )
        self._projection = {
            when: self._histogram(
                f"projection_{when}", f"Mean projection {when} the edit, {_UNIT}.", _PROJECTION, "steering"
            )
            for when in WHENS
        }
        self._recent = {
            when: self._gauge(
                f"projection_{when}_recent", f"Mean of about the latest {RECENT} projections {when}.", "steering"
            )
            for when in WHENS
        }

    def stepped(self, rows: int, waiting: int, seconds: float, tokens: int) -> None:
        """One decoding step ended: rows in it, answers still waiting, its seconds, tokens it added."""
        self._rows.observe(rows)
        self._waiting.set(waiting)
        self._step.observe(seconds)
        self._generated.inc(tokens)

    def first_token(self, seconds: float) -> None:
        """A request's first token came, seconds after the request."""
        self._first.observe(seconds)

    def answered(self, steering: Steering, answer: Answer, seconds: float, flagged: bool | None) -> None:
        """An answer is finished, seconds after its request; `flagged` is None where nothing judged it."""
        name, receipt = self._label(steering.name), answer.response.receipt
        self._answers.labels(name, answer.response.finish_reason).inc()
        self._seconds.observe(seconds)
        self._prompt.inc(answer.prompt_tokens)
        self._flagged.labels(name).inc(bool(flagged))
        if receipt is None:
            return
        self._seen.labels(name).inc(sum(term.tokens_seen for term in receipt.terms))
        self._edited.labels(name).inc(receipt.tokens_edited)
        self._moved.labels(name).inc(receipt.perturbation * receipt.tokens_edited)
        _observe(self._share.labels(name), (receipt.gate_rate,))
        for when in WHENS:
            means = [getattr(receipt.terms[watch.term], f"projection_{when}") for watch in steering.watches]
            read = [watch.reading(mean) for watch, mean in zip(steering.watches, means, strict=True)]
            self._project(name, when, read)

    def refused(self, reason: str) -> None:
        """A request was refused; a reason that is not in `REFUSED` counts as other."""
        self._refused.labels(reason if reason in REFUSED else OTHER).inc()

    def failed(self, reason: str) -> None:
        """A request that was taken did not end well; a reason that is not in `FAILED` counts as other."""
        self._failed.labels(reason if reason in FAILED else OTHER).inc()

    def exposition(self) -> tuple[bytes, str]:
        """All metrics in Prometheus' text format, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _project(self, name: str, when: str, values: list[float]) -> None:
        _observe(self._projection[when].labels(name), values)
        with self._lock:
            for value in filter(math.isfinite, values):
                count, mean = self._means.get((name, when), (0, 0.0))
                count = min(count + 1, RECENT)
                self._means[name, when] = count, mean + (value - mean) / count
                self._recent[when].labels(name).set(self._means[name, when][1])

    def _label(self, name: str) -> str:
        with self._lock:
            if name not in self._names and len(self._names) >= NAMES:
                return OTHER
            self._names.add(name)
        return name

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"steerwell_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"steerwell_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"steerwell_{name}", text, labels, registry=self._registry, buckets=buckets)


def _observe(histogram: Histogram, values: Iterable[float]) -> None:
    for value in filter(math.isfinite, values):  # a NaN would stay in the sum for good
        histogram.observe(value)
