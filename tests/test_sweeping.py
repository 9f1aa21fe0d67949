"""The arithmetic of the sweep's benchmark: who does what in which round, and which seconds count for which part."""

from __future__ import annotations

from collections import defaultdict

import torch
from benchmarks.sweeping import turns, watched


def test_every_contestant_does_the_same_part_in_every_round_and_the_small_part_does_not_count():
    done: dict[str, list[list[int]]] = {"ours": [], "theirs": []}

    def contestant(name: str, factor: float):
        def run(ways):
            done[name].append(list(ways))
            return factor * len(ways)

        return run

    parts = [[1, 2], [3, 4, 5], [6]]
    times = turns({"ours": contestant("ours", 1), "theirs": contestant("theirs", 10)}, [0], parts)
    assert done == {"ours": [[0], *parts], "theirs": [[0], *parts]}
    assert times == {"ours": [2, 3, 1], "theirs": [20, 30, 10]}


def test_watched_parts_are_counted_by_name_and_everything_is_as_before_afterwards():
    linear, seconds = torch.nn.functional.linear, defaultdict[str, float](float)
    with watched(seconds):
        assert torch.nn.functional.linear is not linear
        product = torch.nn.functional.linear(torch.ones(1, 2), torch.ones(3, 2))
    assert product.tolist() == [[2, 2, 2]]
    assert list(seconds) == ["of it matrix products"]
    assert torch.nn.functional.linear is linear
