"""What measuring quality costs, and whether its intervals cover: `python -m benchmarks.quality [--coverage 200]`.

Texts are answers of the bundled world's grammar with the prompts they answer. Vectors are random ones in topics, of the
embedder's width: how long embedding takes is measured on `--embed` texts and told apart. Times are processor time on
one thread; memory is the most that the process ever held, with Python and its libraries.

Coverage is counted over sets of made texts: topics with Zipf weights, words and vectors of each topic's own, success
that depends on the topic. The truth is the figure's mean over all sets, at the same n. Beside it: how far the figures
of bootstrap resamples (drawn with replacement) lie from their own set's.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerwell.scoring.diversity import WORDS, cut
from steerwell.scoring.embeddings import WIDTH, load_embedder
from steerwell.scoring.quality import quality
from steerwell.testbed.corpus import dialogue

WIDTHS = {"minilm": 384, "hashing": WIDTH}
TOPICS = 60
VOCABULARY = 1500
RESAMPLED = 10  # sets that are resampled
STUDY = 120  # texts of a configuration in the synthesis study


def answers(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, answer) pairs of the bundled world."""
    rng = random.Random(seed)
    found: list[tuple[str, str]] = []
    while len(found) < n:
        found += dialogue(rng).exchanges
    return found[:n]


def vectors(n: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    """Random vectors in topics, [n, width]."""
    rng = np.random.default_rng(seed)
    topics = rng.standard_normal((TOPICS, width), np.float32)
    return topics[rng.integers(0, TOPICS, n)] + rng.standard_normal((n, width), np.float32)


def made_set(n: int, per_prompt: int, rng: np.random.Generator) -> dict[str, Any]:
    """A set of texts of one fixed world, `per_prompt` of them on the same topic."""
    world = np.random.default_rng(0)
    centres = world.standard_normal((TOPICS, 384))
    weights = world.gamma(0.3, size=(TOPICS, VOCABULARY)) / np.arange(1, VOCABULARY + 1)
    zipf = 1 / np.arange(1, TOPICS + 1)
    shown = world.beta(2, 2, TOPICS)
    topics = np.repeat(rng.choice(TOPICS, n // per_prompt, p=zipf / zipf.sum()), per_prompt)
    words = [rng.choice(VOCABULARY, rng.integers(10, 60), p=weights[topic] / weights[topic].sum()) for topic in topics]
    return {
        "texts": [" ".join(f"w{word}" for word in text) for text in words],
        "embeddings": centres[topics] + rng.standard_normal((n, 384)),
        "success": np.clip(shown[topics] + 0.2 * rng.standard_normal(n), 0, 1),
        "coherence": np.clip(0.8 + 0.2 * rng.standard_normal(n), 0, 1),
        "prompts": [str(row // per_prompt) for row in range(n)] if per_prompt > 1 else None,
    }


def coverage(n: int, per_prompt: int, sets: int) -> None:
    """Print, per figure, how many 95 % intervals hold the truth, their width, and a bootstrap's bias."""
    rng = np.random.default_rng(1)
    found, shifts = [], []
    for seed in range(sets):
        drawn = made_set(n, per_prompt, rng)
        found.append(quality(**drawn, seed=seed).intervals())
        if seed < RESAMPLED:
            again = rng.integers(0, n, n)
            twice = {name: each and [each[row] for row in again] for name, each in _lists(drawn).items()}
            figures = quality(**twice | {"embeddings": drawn["embeddings"][again]}, intervals=False).figures()
            shifts.append({name: figures[name] - found[-1][name].estimate for name in figures})
    print(f"{sets} sets of {n} texts, {per_prompt} per prompt")
    for name in found[0]:
        estimates = np.array([each[name].estimate for each in found])
        truth, spread = estimates.mean(), estimates.std()
        covered = np.mean([each[name].low <= truth <= each[name].high for each in found])
        width = np.mean([each[name].high - each[name].low for each in found]) / (2 * 1.96 * spread)
        bias = np.mean([shift[name] for shift in shifts]) / spread
        print(f"  {name:22} covers {covered:.3f}, width {width:.2f} of the true one, bootstrap bias {bias:+.1f} sd")


def _lists(drawn: dict[str, Any]) -> dict[str, Any]:
    return {name: None if each is None else list(each) for name, each in drawn.items() if name != "embeddings"}


def timed(work: Callable[[], object]) -> float:
    """Seconds of processor time."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--embedder", choices=WIDTHS, default="minilm")
    parser.add_argument("--embed", type=int, default=0, help="texts of about 60 word pieces to embed; 0: none")
    parser.add_argument("--coverage", type=int, default=0, help="sets to count coverage over, instead of timing")
    given = parser.parse_args()
    if given.coverage:
        coverage(STUDY, 1, given.coverage)
        coverage(STUDY, 4, given.coverage)
        coverage(30, 1, given.coverage)
        return
    pairs = answers(given.n)
    prompts, texts = map(list, zip(*pairs, strict=True))
    made = vectors(given.n, WIDTHS[given.embedder])
    scores = np.random.default_rng(0).random((2, given.n))

    def measure(n: int, intervals: bool) -> Callable[[], object]:
        success, coherence = scores[:, :n]
        more = {"success": success, "coherence": coherence, "prompts": prompts[:n], "embeddings": made[:n]}
        return lambda: quality(texts[:n], intervals=intervals, **more)  # type: ignore[arg-type]

    measure(STUDY, True)()  # imports
    for n in (STUDY, given.n):
        plain, whole = timed(measure(n, False)), timed(measure(n, True))
        print(f"{n} texts, width {made.shape[1]}: {plain:.3f} s, with intervals {whole:.3f} s")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if given.embed:
        joined = [cut(f"{one} {other}", WORDS) for one, other in zip(texts[::2], texts[1::2], strict=False)]
        embed = load_embedder(given.embedder)
        embed(joined[:32])
        seconds = timed(lambda: embed(joined[: given.embed]))
        print(f"{given.embedder}: {given.embed / seconds:.0f} texts/s")
        print(f"peak memory with the embedder {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
