"""One contestant in a process of its own: `python benchmarks/peers.py NAME MODEL_FOLDER TASK_FILE`.

It reads one JSON request per line and answers one JSON line. This file runs in the peers' environment too, so it
imports no more than each contestant needs, and all of them are written down side by side: the same texts in, the same
texts out, and the clock runs around exactly that.

    {"do": "generate", "rows": 32, "layers": [2], "new_tokens": 64}  ->  {"seconds": s, "tokens": [[...], ...]}
    {"do": "capture" | "train", "pairs": 64}                         ->  {"seconds": s, "growth_mib": m}
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.inputs import STRENGTH, Task, unit_vectors

BATCH = 32
Tokens = list[list[int]]


class Contestant(Protocol):
    """What a library must do to take part."""

    def prepare(self, layers: Sequence[int]) -> None:
        """Set up steering at some layers, none for unsteered; not timed."""
        ...

    def generate(self, prompts: Sequence[str], new_tokens: int) -> Tokens:
        """Greedy answers, tokens of each; their texts are decoded too."""
        ...

    def capture(self, task: Task, pairs: int) -> None:
        """Read the states of all layers that a direction is made of."""
        ...

    def train(self, task: Task, pairs: int) -> None:
        """A direction at every layer, from texts."""
        ...


class Steerwell:
    """This library: response-mean states; a direction comes with its calibration and stability at every layer."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer

        from steerwell.engines.hf import HFEngine

        self._engine = HFEngine.load(folder, dtype="float32", batch_size=BATCH)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._edit: Any = None

    def prepare(self, layers: Sequence[int]) -> None:
        from steerwell.core.records import Edit, EditTerm

        vectors = unit_vectors(self._engine.info.n_layers, self._engine.info.d_model)
        terms = tuple(EditTerm(layer, vectors[layer], float("inf"), STRENGTH, 0.0) for layer in layers)
        self._edit = Edit(terms) if terms else None

    def generate(self, prompts: Sequence[str], new_tokens: int) -> Tokens:
        from steerwell.core.records import Prompt, Sampling

        asked = [Prompt(text=text) for text in prompts]
        answers = self._engine.generate(asked, Sampling(max_new_tokens=new_tokens), self._edit)
        return [list(answer.token_ids) for answer in answers]

    def capture(self, task: Task, pairs: int) -> None:
        self._states(task, pairs)

    def train(self, task: Task, pairs: int) -> None:
        from steerwell.steering.directions import estimate

        states = self._states(task, pairs)
        estimate(states[0::2], states[1::2], self._engine.info, method="mean_difference")

    def _states(self, task: Task, pairs: int) -> Any:
        from steerwell.core.records import Prompt

        rows = [row for a, b, c, d in task.pairs[:pairs] for row in ((a, b), (c, d))]
        answers = self._tokenizer([answer for _, answer in rows], add_special_tokens=False)["input_ids"]
        return self._engine.capture([Prompt(text=prompt) for prompt, _ in rows], answers)


class Transformers:
    """Plain `generate` of the transformers library, without steering; the peers build on it."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, **_old_config(folder)).eval()
        self.tokenizer = _tokenizer(folder)
        self.steered: Callable[[], Any] = nullcontext

    def prepare(self, layers: Sequence[int]) -> None:
        if layers:
            raise ValueError("plain transformers does not steer")

    def generate(self, prompts: Sequence[str], new_tokens: int) -> Tokens:
        batch = self.tokenizer(list(prompts), return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.inference_mode(), self.steered():
            whole = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
            )
        answers = whole[:, ids.shape[1] :]
        self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [[int(token) for token in row] for row in answers.tolist()]

    def capture(self, task: Task, pairs: int) -> None:
        raise NotImplementedError

    def train(self, task: Task, pairs: int) -> None:
        raise NotImplementedError


class Repeng(Transformers):
    """repeng: last-token states, PCA of the differences; adds a vector to every token but padding."""

    def prepare(self, layers: Sequence[int]) -> None:
        from repeng import ControlModel, ControlVector

        if isinstance(self.model, ControlModel):
            self.model = self.model.unwrap()
        if layers:
            config = self.model.config
            vectors = unit_vectors(config.num_hidden_layers, config.hidden_size)
            control = ControlVector(config.model_type, {layer: vectors[layer] for layer in layers})
            self.model = ControlModel(self.model, list(layers))
            self.model.set_control(control, STRENGTH)

    def capture(self, task: Task, pairs: int) -> None:
        from repeng.extract import batched_get_hiddens

        texts = [text for pair in _texts(task, pairs) for text in pair]
        layers = list(range(self.model.config.num_hidden_layers))
        with torch.inference_mode():
            batched_get_hiddens(self.model, self.tokenizer, texts, layers, BATCH)

    def train(self, task: Task, pairs: int) -> None:
        from repeng import ControlVector, DatasetEntry

        layers = list(range(self.model.config.num_hidden_layers))
        entries = [DatasetEntry(*pair) for pair in _texts(task, pairs)]
        ControlVector.train(self.model, self.tokenizer, entries, batch_size=BATCH, hidden_layers=layers)


class SteeringVectors(Transformers):
    """steering-vectors: last-token states, mean difference; adds a vector to every token."""

    def prepare(self, layers: Sequence[int]) -> None:
        from steering_vectors import SteeringVector

        config = self.model.config
        vectors = torch.from_numpy(unit_vectors(config.num_hidden_layers, config.hidden_size))
        vector = SteeringVector({layer: vectors[layer] for layer in layers})
        self.steered = (lambda: vector.apply(self.model, multiplier=STRENGTH)) if layers else nullcontext

    def capture(self, task: Task, pairs: int) -> None:
        from steering_vectors.train_steering_vector import extract_activations

        extract_activations(self.model, self.tokenizer, _texts(task, pairs), batch_size=BATCH)

    def train(self, task: Task, pairs: int) -> None:
        from steering_vectors import train_steering_vector

        train_steering_vector(self.model, self.tokenizer, _texts(task, pairs), batch_size=BATCH)


CONTESTANTS: dict[str, Callable[[str], Contestant]] = {
    "steerwell": Steerwell,
    "transformers": Transformers,
    "repeng": Repeng,
    "steering-vectors": SteeringVectors,
}


def _texts(task: Task, pairs: int) -> list[tuple[str, str]]:
    return [(a + b, c + d) for a, b, c, d in task.pairs[:pairs]]


def _tokenizer(folder: str) -> Any:
    """The folder's tokenizer, also where its configuration is newer than this transformers."""
    from transformers import PreTrainedTokenizerFast

    config = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    marks = {name: config[name] for name in ("bos_token", "pad_token", "unk_token") if config.get(name)}
    file, names = str(Path(folder) / "tokenizer.json"), ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_file=file, padding_side="left", model_input_names=names, **marks)


def _old_config(folder: str) -> dict[str, Any]:
    """What transformers 4 does not read in a transformers 5 configuration: the rotary base."""
    import transformers

    rope = json.loads((Path(folder) / "config.json").read_text()).get("rope_parameters") or {}
    old = int(transformers.__version__.split(".")[0]) < 5
    return {"rope_theta": rope["rope_theta"]} if old and "rope_theta" in rope else {}


def answer(contestant: Contestant, task: Task, request: dict[str, Any]) -> dict[str, Any]:
    """Do what one request asks."""
    if request["do"] == "generate":
        contestant.prepare(request["layers"])
        start = time.perf_counter()
        tokens = contestant.generate(task.prompts[: request["rows"]], request["new_tokens"])
        return {"seconds": time.perf_counter() - start, "tokens": tokens}
    run = {"capture": contestant.capture, "train": contestant.train}[request["do"]]
    contestant.prepare([])
    before = _peak_from_here()
    start = time.perf_counter()
    run(task, request["pairs"])
    return {"seconds": time.perf_counter() - start, "growth_mib": (_peak() - before) / 1024}


def _peak() -> int:
    """Largest resident size of this process so far, KiB."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1])
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size // 1024 if sys.platform == "darwin" else size


def _peak_from_here() -> int:
    """Let the peak begin anew where the system can do that (Linux), so that loading the model does not hide growth."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def main() -> None:
    """Answer requests until standard input ends; libraries' own output goes to standard error."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, folder, task_file = sys.argv[1:]
    task = Task(**json.loads(Path(task_file).read_text()))
    contestant = CONTESTANTS[name](folder)
    for line in sys.stdin:
        try:
            result = answer(contestant, task, json.loads(line))
        except Exception as error:  # noqa: BLE001 - whatever fails in a library is told to the one who asked
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), file=reply, flush=True)


if __name__ == "__main__":
    main()
