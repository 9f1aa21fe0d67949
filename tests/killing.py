"""Work that is killed (kill -9) at some moment, wherever it then is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

PROCESSES = multiprocessing.get_context("forkserver")  # what the work needs is imported once, not by every process
PROCESSES.set_forkserver_preload(["tests.study_run", "matplotlib.pyplot", "pyarrow.parquet", "pytest"])


def killed(after: float, work: Callable[..., object], *arguments: object) -> bool:
    """Do the work in a process that kills itself that many seconds later; whether it was killed before it was done."""
    process = PROCESSES.Process(target=_doomed, args=(after, work, *arguments))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def seconds(work: Callable[..., object], *arguments: object) -> float:
    """How long the work takes when nothing kills it."""
    began = time.monotonic()
    work(*arguments)
    return time.monotonic() - began


def _doomed(after: float, work: Callable[..., object], *arguments: object) -> None:
    threading.Thread(target=kill_after, args=(after,), daemon=True).start()
    work(*arguments)


def kill_after(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)
