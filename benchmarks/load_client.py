"""The load generator, in a process of its own: clients that ask without a pause and check every answer.

`python -m benchmarks.load_client PLAN.json` answers requests on standard input, one JSON line each: a turn of traffic
(see `Turn`) gives a line with what came back (see `Tally`). It loads no torch, so that it takes little of the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

PATIENCE = 180.0  # seconds until an answer is lost; the server's own limit is less
SHOWN = 5  # faults of a turn that are told in words
COMPARED = ("text", "finish_reason", "name", "edit_id", "counts")
Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """Some seconds of traffic.

    Attributes:
        base: the server's address.
        traffic: which of the plan's.
        clients: how many ask at the same time; each sends its next request when it has its answer.
        seconds: how long they do; then the answers under way are awaited.
        ramp: seconds at the beginning that do not count for the throughput.
        waits: false: at the end the clients hang up, and what was under way is not counted.
    """

    base: str
    traffic: str
    clients: int
    seconds: float
    ramp: float
    waits: bool = True


@dataclass(slots=True)
class Tally:
    """What came back in a turn.

    Attributes:
        answers: whole ones.
        streams: those of them that were streamed.
        wrong: those that differ from the library's.
        lost: requests without an answer, or with a broken one.
        refused: answered with 429.
        tied: answers within rounding of a tie, where another one is as right ...
        turned: ... and those of them that were another one.
        first: seconds to the first text of every stream.
        latency: seconds to the end of every answer.
        requests: answers that ended in the time that counts ...
        tokens: ... and their generated tokens.
        window: seconds of that time.
        ways: how many ways to steer were asked for.
        faults: some of what was wrong or lost, in words.
    """

    answers: int = 0
    streams: int = 0
    wrong: int = 0
    lost: int = 0
    refused: int = 0
    tied: int = 0
    turned: int = 0
    first: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    requests: int = 0
    tokens: int = 0
    window: float = 0.0
    ways: set[int] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    def judge(self, expected: Fields, got: Fields, stream: bool) -> None:
        """Count an answer as right or wrong."""
        differing = [name for name in COMPARED if got[name] != expected[name]]
        self.answers += 1
        self.streams += stream
        self.tied += expected["tie"]
        if differing and expected["tie"]:
            self.turned += 1
        elif differing:
            self.wrong += 1
            self.note(f"{differing[0]}: got {got[differing[0]]!r}, expected {expected[differing[0]]!r}")

    def note(self, fault: str) -> None:
        """Keep the first few faults."""
        if len(self.faults) < SHOWN:
            self.faults.append(fault[:400])

    def row(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"ways": sorted(self.ways)}


class BrokenAnswerError(Exception):
    """An answer that is not whole."""


def whole(body: bytes) -> dict[str, Any]:
    """What is compared of a reply that came in one piece."""
    reply = json.loads(body)
    choice = reply["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return _compared(text, choice["finish_reason"], reply["steering"], reply["usage"]["completion_tokens"])


def streamed(body: bytes) -> dict[str, Any]:
    """What is compared of a stream: its texts put together, and what its last events say.

    Raises:
        BrokenAnswerError: it has no end, or an error in it.
    """
    *events, last = list(events_of(body))
    if last != "[DONE]":
        raise BrokenAnswerError(f"the stream ends with {last[:200]!r}")
    chunks = [json.loads(event) for event in events]
    if any("error" in chunk for chunk in chunks):
        raise BrokenAnswerError(f"an error in the stream: {chunks[-1]}")
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    text = "".join(text_of(choice) for choice in choices)
    if len(reasons) != 1 or "steering" not in chunks[-1]:
        raise BrokenAnswerError(f"{len(reasons)} finish reasons, last event {events[-1][:200]!r}")
    return _compared(text, reasons[0], chunks[-1]["steering"], chunks[-1]["usage"]["completion_tokens"])


def text_of(choice: Fields) -> str:
    """What a chunk's choice adds."""
    text: str = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    return text


def events_of(body: bytes) -> Iterator[str]:
    """The data of a stream's whole events."""
    for part in body.decode().split("\n\n")[:-1]:
        yield part.removeprefix("data: ")


def has_text(body: bytes) -> bool:
    """Whether a stream has brought some text so far."""
    events = [json.loads(event) for event in events_of(body) if event != "[DONE]"]
    return any(text_of(choice) for event in events for choice in event.get("choices", ()))


def _compared(text: str, reason: str, steering: Fields, tokens: int) -> dict[str, Any]:
    receipt = steering["receipts"][0]
    counts = (
        [[term["layer"], term["tokens_seen"], term["tokens_edited"]] for term in receipt["terms"]] if receipt else []
    )
    if receipt and receipt["edit_id"] != steering["edit_id"]:
        raise BrokenAnswerError(f"the receipt is of edit {receipt['edit_id']}, the answer of {steering['edit_id']}")
    return {
        "text": text,
        "finish_reason": reason,
        "name": steering["name"],
        "edit_id": steering["edit_id"],
        "counts": counts,
        "tokens": tokens,
    }


async def ask(session: aiohttp.ClientSession, turn: Turn, case: Fields, stream: bool, tally: Tally) -> None:
    """Send one request, check what comes back."""
    body = case["body"] | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})
    began = time.perf_counter()
    try:
        async with session.post(turn.base + case["path"], json=body) as response:
            if response.status == 429:
                tally.refused += 1
                await asyncio.sleep(float(response.headers["retry-after"]))
                return
            data, first = b"", None
            async for part in response.content.iter_any():
                data += part
                if stream and first is None and has_text(data):
                    first = time.perf_counter() - began
            if response.status != 200:
                raise BrokenAnswerError(f"status {response.status}: {data[:200]!r}")
        got = streamed(data) if stream else whole(data)
    except (aiohttp.ClientError, TimeoutError, BrokenAnswerError, ValueError, LookupError) as error:
        tally.lost += 1
        tally.note(f"lost: {type(error).__name__}: {error}")
        return
    seconds = time.perf_counter() - began
    tally.judge(case["expected"], got, stream)
    tally.ways.add(case["way"])
    tally.latency.append(seconds)
    if first is not None:
        tally.first.append(first)
    tally.requests += 1
    tally.tokens += got["tokens"]


async def take(turn: Turn, cases: Sequence[Fields], order: Iterator[tuple[int, bool]]) -> Tally:
    """One turn of traffic."""
    tally, end = Tally(), time.perf_counter() + turn.seconds
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def client() -> None:
            for number, stream in order:
                await ask(session, turn, cases[number], stream, tally)
                if time.perf_counter() >= end:
                    return

        clients = [asyncio.create_task(client()) for _ in range(turn.clients)]
        await asyncio.sleep(turn.ramp)
        tokens, requests, began = tally.tokens, tally.requests, time.perf_counter()
        await asyncio.sleep(max(end - time.perf_counter(), 0))
        tally.window = time.perf_counter() - began
        counted = tally.tokens - tokens, tally.requests - requests
        if not turn.waits:
            for task in clients:
                task.cancel()
        done, _ = await asyncio.wait(clients)
        for task in done:
            if not task.cancelled():
                task.result()  # what the generator itself got wrong is told
    tally.tokens, tally.requests = counted
    return tally


def endless(order: Sequence[int]) -> Iterator[tuple[int, bool]]:
    """Cases over and over, each streamed in every other round."""
    for round_ in itertools.count():
        yield from ((number, (place + round_) % 2 == 0) for place, number in enumerate(order))


def main(plan: str) -> int:
    """Take turns until nobody asks for more."""
    known = json.loads(Path(plan).read_text())
    orders = {name: endless(order) for name, order in known["traffic"].items()}
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            turn = Turn(**json.loads(line))
            tally = asyncio.run(take(turn, known["cases"], orders[turn.traffic]))
            print(json.dumps(tally.row()), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
