"""Engines on a Ray cluster: actors that hold the loaded models, and engines that send every call to a free actor.

A call is a pure function of its arguments, so one that is lost with its actor, or with the actor's whole machine, is
made again elsewhere.
"""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from queue import Queue
from threading import Condition
from typing import Any, Self, TypeVar
from weakref import WeakSet

from steerwell.core.errors import ArgumentError, EngineError, MissingDependencyError, SteerwellError
from steerwell.core.records import Edit, ModelInfo, Pool, Prompt, Response, Sampling, Score, Vectors
from steerwell.engines.base import Chunk, Edits, Engine, Samplings, kind_of

T = TypeVar("T")
Load = Callable[[], Engine]
GREEDY = Sampling()
DEATHS = 3  # actors that a call may take with it before it is given up
WAIT = 30  # seconds that calls under way have to end in, once their actors are gone
ENDED = "the actors are no more: ask engines inside the `with` block of their Actors"


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where actors run, and what each of them takes.

    Attributes:
        address: of a running cluster, as `ray.init` takes it (`auto`, `host:port`); None: one of its own on this
            machine, which ends with it.
        actors: how many; None: as many as the whole cluster holds when they are started.
        cpus: cores of each, which are its threads too.
        gpus: GPUs of each; a fraction lets several actors share one.
    """

    address: str | None = None
    actors: int | None = None
    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if self.actors is not None and self.actors < 1:
            raise ArgumentError(f"actors: got {self.actors}; expected 1 or more")
        if not (self.cpus >= 0 and self.gpus >= 0 and self.cpus + self.gpus > 0):
            raise ArgumentError(f"cpus, gpus: got {self.cpus}, {self.gpus}; an actor takes a share of one of them")
        if self.gpus > 1 and self.gpus % 1:
            raise ArgumentError(f"gpus: got {self.gpus}; expected a share below 1, or a whole number")

    def require_gpus(self, count: int, what: str) -> None:
        """Raise `ArgumentError` where an actor has GPUs, but not as many as share what it is to load."""
        if 0 < math.ceil(self.gpus) < count:
            raise ArgumentError(
                f"gpus: an actor has {self.gpus:g}, and {what} is shared by {count} (tensor parallel); give it as many "
                "(--gpus-per-actor)"
            )


class Actors:
    """The actors of one cluster, in a `with` block: it starts and ends them, and the cluster where it is its own.

    One that dies is replaced. While there is no room for a new one, the others do its work.

    Attributes:
        count: how many there are to be.

    Raises:
        MissingDependencyError: Ray is not installed.
        EngineError: there is no cluster at the address.
        ArgumentError: the cluster has no room for a single actor, and no number of actors is given.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._ray, self._cluster, self.count = _ray(), cluster, cluster.actors or 0
        self._options = {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus}
        self._turn, self._asks, self._closed, self._owned = Condition(), 0, False, False
        self._free: Queue[Any] = Queue()
        self._all: set[Any] = set()
        self._engines: WeakSet[RayEngine] = WeakSet()

    def __enter__(self) -> Self:
        if not self._ray.is_initialized():
            _connect(self._ray, self._cluster.address)
            self._owned = True
        try:
            self.count = self.count or self._room()
            for _ in range(self.count):
                self._hire()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._closed = True
            for actor in self._all:
                self._ray.kill(actor)
            self._free.put(None)  # for whoever waits for an actor
            self._turn.wait_for(lambda: not self._asks, WAIT)  # a call after the end would have Ray start again
        if self._owned:
            self._ray.shutdown()

    def engine(self, key: str, load: Load) -> RayEngine:
        """An engine that the actors load on use, once each, and keep for as long as somebody here holds it.

        Args:
            key: what tells it from others; equal keys mean the same model.
            load: loads it in an actor.
        """
        made = RayEngine(self, key, load)
        self._engines.add(made)
        return made

    def forget(self, engine: RayEngine) -> None:
        """Nobody here holds an engine any more: actors close theirs before they load another one."""
        self._engines.discard(engine)

    def ask(self, engine: RayEngine, work: str | Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Have a free actor do something with its copy of an engine: call a method, or a function of the engine.

        Raises:
            SteerwellError: what the work raised in the actor, as it was.
            EngineError: every actor that tried it died, or the actors were ended.
        """
        call = [other.key for other in list(self._engines)], engine.key, engine.load, work, args, options
        died: Exception | None = None
        with self._asking():
            for _ in range(self.count + DEATHS):  # all those at rest may have died with their machine
                actor = self._take()
                try:
                    found = self._ray.get(actor.ask.remote(*call))
                except self._losses() as error:
                    died = error
                    self._replace(actor)
                    continue
                except BaseException:
                    self._free.put(actor)
                    raise
                self._free.put(actor)
                if isinstance(found, _Raised):
                    raise found.error
                return found
        raise EngineError(f"every actor that was asked died, the last one so: {died}") from died

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with self._turn:
            self._asks += 1
        try:
            yield
        finally:
            with self._turn:
                self._asks -= 1
                self._turn.notify_all()

    def _take(self) -> Any:
        """A free actor, as soon as there is one."""
        actor = self._free.get()
        if self._closed:
            self._free.put(actor)  # the next one who waits is to see it, too
            raise EngineError(ENDED)
        return actor

    def _losses(self) -> tuple[type[Exception], ...]:
        known = self._ray.exceptions
        return known.RayActorError, known.ObjectLostError, known.OutOfMemoryError

    def _hire(self) -> None:
        """Start an actor; it is free once it runs. One that cannot be placed now waits until it can."""
        actor = self._ray.remote(_Host).options(**self._options).remote(str(Path.cwd()))
        self._all.add(actor)
        actor.ready.remote().future().add_done_callback(lambda _: self._free.put(actor))  # a dead one is found out

    def _replace(self, actor: Any) -> None:
        with self._turn:
            if self._closed:
                raise EngineError(ENDED)
            self._all.discard(actor)
            self._ray.kill(actor)  # it may only be out of reach
            self._hire()

    def _room(self) -> int:
        """How many actors the whole cluster holds."""
        there = self._ray.cluster_resources()
        asked = {"CPU": self._options["num_cpus"], "GPU": self._options["num_gpus"]}
        count = int(min(there.get(name, 0) / share for name, share in asked.items() if share))
        if count < 1:
            has = ", ".join(f"{there.get(name, 0):g} {name}s" for name in asked)
            raise ArgumentError(
                f"cpus, gpus: an actor takes {asked['CPU']:g} CPUs and {asked['GPU']:g} GPUs, and the cluster has "
                f"{has}; ask for less, or give the number of actors, and they wait until it has grown"
            )
        return count


class RayEngine:
    """An engine whose calls free actors answer; see `steerwell.engines.base.Engine`. Made by `Actors.engine`."""

    def __init__(self, actors: Actors, key: str, load: Load) -> None:
        self._actors, self.key, self.load = actors, key, load
        self._info: ModelInfo | None = None

    @property
    def info(self) -> ModelInfo:
        """What the model is."""
        if self._info is None:
            self._info = self.run(_info)
        return self._info

    @property
    def kind(self) -> str:
        """Which engine the actors have; see `steerwell.engines.base.kind_of`."""
        return self.run(kind_of)

    @property
    def at_once(self) -> int:
        """Units of work to have in flight: one more per actor waits, so that none rests while answers are judged."""
        return 2 * self._actors.count

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function of an engine, and of what else it takes, in an actor; its module must be there too."""
        found: T = self._actors.ask(self, function, *args)
        return found

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Samplings = GREEDY,
        edits: Edits = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Response]:
        """Answer every prompt in one actor, each row under its own edit or none; progress is told at the end."""
        answers: list[Response] = self._actors.ask(self, "generate", prompts, sampling, edits)
        if progress is not None:
            progress(len(answers))
        return answers

    def stream(self, prompt: Prompt, sampling: Sampling = GREEDY, edit: Edit | None = None) -> Iterator[Chunk]:
        """Answer one prompt; the pieces arrive together."""
        return iter(self._actors.ask(self, "stream", prompt, sampling, edit))

    def capture(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[int]],
        edits: Edits = None,
        *,
        pool: Pool = "response_mean",
    ) -> Vectors:
        """One state per row after every block, float32 [n, n_layers, d_model]."""
        states: Vectors = self._actors.ask(self, "capture", prompts, responses, edits, pool=pool)
        return states.copy()  # what Ray hands over is read-only

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], edits: Edits = None) -> list[Score]:
        """Log-probabilities of given responses, with or without edits."""
        scores: list[Score] = self._actors.ask(self, "score", prompts, responses, edits)
        return deepcopy(scores)

    def tokenise(self, text: str) -> tuple[int, ...]:
        """Token ids of an answer's text, without special tokens."""
        tokens: tuple[int, ...] = self._actors.ask(self, "tokenise", text)
        return tokens

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text that each token of an answer adds."""
        texts: list[str] = self._actors.ask(self, "pieces", tokens)
        return texts

    def close(self) -> None:
        """Let the actors end theirs; see `Actors.forget`."""
        self._actors.forget(self)


class _Host:
    """What runs in an actor: engines by key, those that somebody holds."""

    def __init__(self, folder: str) -> None:
        with suppress(OSError):  # relative paths mean the same there, where folders are shared
            os.chdir(folder)
        self._engines: dict[str, Engine] = {}

    def ready(self) -> None:
        """Answers as soon as the actor runs."""

    def ask(
        self,
        held: Sequence[str],
        key: str,
        load: Load,
        work: str | Callable[..., Any],
        args: Sequence[Any],
        options: Mapping[str, Any],
    ) -> Any:
        """What the work gives, or the error that it raised: as a value, since Ray would hand on another one."""
        try:
            for other in set(self._engines) - {*held, key}:
                self._engines.pop(other).close()
            if key not in self._engines:
                self._engines[key] = load()
            engine = self._engines[key]
            found = getattr(engine, work)(*args, **options) if isinstance(work, str) else work(engine, *args, **options)
            return list(found) if isinstance(found, Iterator) else found
        except SteerwellError as error:
            error.add_note(f"In the actor:\n{traceback.format_exc()}")
            return _Raised(error)


@dataclass(frozen=True, slots=True)
class _Raised:
    """An error on its way, as a value."""

    error: SteerwellError


def _info(engine: Engine) -> ModelInfo:
    return engine.info


def _connect(ray: Any, address: str | None) -> None:
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", include_dashboard=False, logging_level="WARNING")
        return
    try:
        ray.init(address=address, logging_level="WARNING")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"address: no Ray cluster answers at {address!r} ({error}); start one with 'ray start --head', or leave it "
            "out for one on this machine"
        ) from error


def _ray() -> Any:
    try:
        return import_module("ray")
    except ModuleNotFoundError as error:
        raise MissingDependencyError("ray", "ray") from error
