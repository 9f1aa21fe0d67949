"""What tests on Ray share: a small cluster of their own, and engines that die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from steerwell.engines.fake import FakeEngine


@contextmanager
def cluster() -> Iterator[None]:
    """A Ray cluster of two CPUs on this machine, ended afterwards; tests are skipped where Ray is missing."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    store = 100 * 2**20
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=store, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


class Mortal(FakeEngine):
    """Kills its own process (kill -9) while it generates, as often as `deaths` says; every death leaves a file."""

    def __init__(self, folder: Path, deaths: int) -> None:
        super().__init__()
        self.folder, self.deaths = folder, deaths

    def generate(self, *args, **options):
        died = len(list(self.folder.iterdir()))
        if died < self.deaths:
            (self.folder / str(died)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(*args, **options)
