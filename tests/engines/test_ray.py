"""Engines whose calls Ray actors answer: what comes back, what becomes of errors, and of actors that die."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from steerwell.core.errors import ArgumentError, EngineError, MissingDependencyError, UnknownNameError
from steerwell.core.records import Edit, EditTerm, Prompt, Sampling
from steerwell.engines.base import kind_of
from steerwell.engines.fake import FakeEngine
from steerwell.engines.ray import DEATHS, Actors, Cluster, RayEngine, _Host
from tests.ray_run import Mortal, cluster

PROMPTS = [Prompt.chat("One?"), Prompt.chat("Two and three?")]
SAMPLING = Sampling(1.0, max_new_tokens=6)


def edit(layer: int = 1) -> Edit:
    direction = np.zeros(16, np.float32)
    direction[3] = 1
    return Edit((EditTerm(layer, direction, np.inf, 2.0, 0.0),))


@pytest.fixture(scope="module")
def actors() -> Iterator[Actors]:
    with cluster(), Actors(Cluster(cpus=0.9)) as made:
        assert made.count == 2  # as many as two CPUs hold, and some room is left
        yield made


@pytest.fixture(scope="module")
def engine(actors: Actors) -> RayEngine:
    return actors.engine("fake", FakeEngine)


def test_every_call_gives_what_the_engine_itself_gives(engine: RayEngine) -> None:
    alone, edits, told = FakeEngine(), [None, edit()], []
    assert engine.info == alone.info
    answers = engine.generate(PROMPTS, SAMPLING, edits, progress=told.append)
    assert answers == alone.generate(PROMPTS, SAMPLING, edits)
    assert answers[0].receipt is None
    assert answers[1].receipt.tokens_edited > 0
    assert sum(told) == 2
    assert list(engine.stream(PROMPTS[0], SAMPLING, edit())) == list(alone.stream(PROMPTS[0], SAMPLING, edit()))
    said = [answer.token_ids for answer in answers]
    for pool in ("response_mean", "prompt_last"):
        states = engine.capture(PROMPTS, said, edits, pool=pool)
        np.testing.assert_array_equal(states, alone.capture(PROMPTS, said, edits, pool=pool))
        assert states.flags.writeable  # what an engine gives belongs to whoever asked
    for mine, theirs in zip(engine.score(PROMPTS, said, edits), alone.score(PROMPTS, said, edits), strict=True):
        np.testing.assert_array_equal(mine.logprobs, theirs.logprobs)
        assert mine.receipt == theirs.receipt
        assert mine.logprobs.flags.writeable
    tokens = engine.tokenise("naïve")
    assert tokens == alone.tokenise("naïve")
    assert engine.pieces(tokens) == alone.pieces(tokens)


def test_an_actor_has_as_many_threads_as_cores(engine: RayEngine) -> None:
    assert engine.run(lambda _engine: os.environ["OMP_NUM_THREADS"]) == "1"
    assert engine.run(lambda _engine: Path.cwd()) == Path.cwd()  # relative paths mean the same there


def test_an_error_of_ours_comes_back_as_itself(engine: RayEngine) -> None:
    with pytest.raises(UnknownNameError) as here:
        FakeEngine().generate(PROMPTS, SAMPLING, edit(9))
    with pytest.raises(UnknownNameError) as there:
        engine.generate(PROMPTS, SAMPLING, edit(9))
    assert type(there.value) is UnknownNameError
    assert str(there.value) == str(here.value)
    assert there.value.known == ("0", "1", "2", "3")
    assert "row_edits" in "".join(there.value.__notes__)  # where in the actor it was raised
    with pytest.raises(ZeroDivisionError):
        engine.run(lambda _engine: 1 / 0)
    assert engine.generate(PROMPTS, SAMPLING) == FakeEngine().generate(PROMPTS, SAMPLING)  # nobody was lost


def test_a_model_that_cannot_be_loaded_is_an_error_of_ours_too(actors: Actors) -> None:
    def load() -> FakeEngine:
        raise EngineError("no such model")

    with pytest.raises(EngineError) as raised:
        actors.engine("none", load).generate(PROMPTS)
    assert str(raised.value) == "no such model"


def test_a_call_that_is_lost_with_its_actor_is_made_again(actors: Actors, tmp_path: Path) -> None:
    engine = actors.engine("mortal", partial(Mortal, tmp_path, 2))
    assert engine.generate(PROMPTS, SAMPLING) == FakeEngine().generate(PROMPTS, SAMPLING)
    assert len(list(tmp_path.iterdir())) == 2
    free = [engine.run(lambda _engine: os.getpid()) for _ in range(8)]
    assert os.getpid() not in free


def test_a_call_that_takes_every_actor_with_it_is_given_up(actors: Actors, tmp_path: Path) -> None:
    engine = actors.engine("deadly", partial(Mortal, tmp_path, 99))
    with pytest.raises(EngineError, match="every actor that was asked died"):
        engine.generate(PROMPTS, SAMPLING)
    assert 1 + DEATHS <= len(list(tmp_path.iterdir())) <= actors.count + DEATHS
    assert actors.engine("fake", FakeEngine).info == FakeEngine().info  # others are served again


def test_calls_at_a_time_go_to_different_actors(actors: Actors, engine: RayEngine, tmp_path: Path) -> None:
    """Each call ends only when the other one has begun."""

    def meet(_engine: FakeEngine, me: str, other: str) -> int:
        (tmp_path / me).touch()
        while not (tmp_path / other).exists():
            time.sleep(0.01)
        return os.getpid()

    found: list[int] = []
    threads = [
        Thread(target=lambda pair=pair: found.append(engine.run(meet, *pair)), daemon=True) for pair in ("ab", "ba")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(found)) == 2


def test_a_cluster_too_small_for_one_actor_is_named(actors: Actors) -> None:
    with (
        pytest.raises(ArgumentError, match="takes 1 CPUs and 1 GPUs, and the cluster has 2 CPUs, 0 GPUs"),
        Actors(Cluster(gpus=1)),
    ):
        pass


def test_calls_end_with_the_actors(actors: Actors, tmp_path: Path) -> None:
    """Those under way, those that wait for an actor, and later ones; or the process could not end."""

    def sleeps(_engine: FakeEngine, name: str) -> None:
        (tmp_path / name).touch()
        time.sleep(600)

    raised: list[BaseException] = []

    def ask(name: str) -> None:
        try:
            engine.run(sleeps, name)
        except EngineError as error:
            raised.append(error)

    threads = [Thread(target=ask, args=(name,), daemon=True) for name in "abc"]
    with Actors(Cluster(actors=2, cpus=0.1)) as others:  # beside those of the other tests
        engine = others.engine("fake", FakeEngine)
        for thread in threads:
            thread.start()
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
    threads.append(Thread(target=ask, args=("late",), daemon=True))
    threads[-1].start()
    for thread in threads:
        thread.join(20)
    assert [str(error)[:22] for error in raised] == ["the actors are no more"] * 4


# Without a cluster ----------------------------------------------------------------------------------------------------


def test_an_actor_loads_a_model_once_and_keeps_what_somebody_holds(tmp_path: Path) -> None:
    loaded: list[int] = []

    def load(seed: int) -> FakeEngine:
        loaded.append(seed)
        return FakeEngine(seed=seed)

    host = _Host(".")

    def name(held: str, key: str) -> str:
        return host.ask(held, key, partial(load, int(key)), lambda engine: engine.info.name, (), {})

    assert [name("12", key) for key in "1212"] == ["fake-1", "fake-2", "fake-1", "fake-2"]
    assert loaded == [1, 2]
    assert name("23", "2") == "fake-2"  # nobody holds 1 any more
    assert (list(host._engines), loaded) == (["2"], [1, 2])
    name("13", "1")
    assert (list(host._engines), loaded) == (["1"], [1, 2, 1])


def test_an_actor_closes_a_model_before_it_loads_another() -> None:
    told: list[str] = []

    class Told(FakeEngine):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            told.append(f"{name} loaded")

        def close(self) -> None:
            told.append(f"{self.name} closed")

    host = _Host(".")
    for held, key in (("ab", "a"), ("ab", "b"), ("a", "a"), ("c", "c"), ("", "c")):
        host.ask(held, key, partial(Told, key), lambda engine: engine.name, (), {})
    assert told == ["a loaded", "b loaded", "b closed", "a closed", "c loaded"]


def test_an_engine_that_is_closed_is_not_held_any_more(actors: Actors) -> None:
    first, second = (actors.engine(key, FakeEngine) for key in ("first", "second"))
    kept = len(actors._engines)
    first.close()
    assert len(actors._engines) == kept - 1
    assert kind_of(second) == "fake"
    assert second.info == FakeEngine().info


@pytest.mark.parametrize(("gpus", "count"), [(1, 2), (0.5, 2), (2, 4)])
def test_an_actor_with_fewer_gpus_than_share_a_model(gpus: float, count: int) -> None:
    with pytest.raises(ArgumentError, match=f"gpus: an actor has {gpus}, and 'it' is shared by {count}"):
        Cluster(gpus=gpus).require_gpus(count, "'it'")


def test_an_actor_with_enough_gpus_or_none() -> None:
    for gpus, count in ((0, 4), (0.5, 1), (4, 4), (4, 2)):
        Cluster(gpus=gpus).require_gpus(count, "it")


@pytest.mark.parametrize("wrong", [{"actors": 0}, {"cpus": -1}, {"cpus": 0}, {"gpus": -0.5}, {"gpus": 1.5}])
def test_a_cluster_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="|".join(wrong)):
        Cluster(**wrong)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"'ray' is not installed; run: pip install 'steerwell\[ray\]'"):
        Actors(Cluster())
