"""What the subcommands share: options, the model, progress, output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from steerwell.core.artifacts import finite
from steerwell.core.errors import ArgumentError, MissingDependencyError
from steerwell.testbed.bundled import BUNDLED

if TYPE_CHECKING:
    from steerwell.concepts import Concept
    from steerwell.engines.base import Engine
    from steerwell.engines.hf import HFEngine
    from steerwell.engines.rows import ServingEngine

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Model = Annotated[
    str, typer.Option("--model", "-m", help="'pilot' (bundled), a hub id, a local folder, or a .gguf file.")
]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, float16 or bfloat16.")]
DeviceMap = Annotated[str | None, typer.Option(help="As in transformers: auto, cuda, cpu ...")]
GgufFile = Annotated[str | None, typer.Option(help="A GGUF file inside the hub repository or folder of --model.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per forward pass.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
EngineName = Annotated[
    Literal["hf", "vllm"],
    typer.Option("--engine", help="hf: Hugging Face, any model. vllm: the same edits inside vLLM's compiled graph."),
]
TensorParallel = Annotated[int, typer.Option(min=1, help="GPUs that share each layer; --engine vllm only.")]
EngineArgs = Annotated[
    str | None, typer.Option(metavar="JSON", help="Further arguments of vLLM's engine; --engine vllm only.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
DEFAULT_MODEL = BUNDLED


def load_either(
    engine: str,
    model: str,
    dtype: str,
    device_map: str | None,
    gguf_file: str | None,
    batch_size: int,
    trust: bool,
    tensor_parallel: int,
    engine_args: str | None = None,
    *,
    max_terms: int = 4,
    captures: int = 16,
    traces: int = 0,
) -> ServingEngine:
    """The engine that a command's options ask for; options that it would ignore are an error.

    The last three are what vLLM reserves (`Settings`).
    """
    if engine == "hf":
        if tensor_parallel != 1:
            raise ArgumentError(f"--tensor-parallel: got {tensor_parallel} with --engine hf; use --device-map auto")
        if engine_args is not None:
            raise ArgumentError("--engine-args: these are vLLM's; leave them out, or add --engine vllm")
        return load_engine(model, dtype, device_map, gguf_file, batch_size, trust)
    if device_map is not None or gguf_file is not None:
        option = "--device-map" if device_map is not None else "--gguf-file"
        raise ArgumentError(f"{option}: vLLM places and loads models its own way; leave it out with --engine vllm")
    from steerwell.engines.vllm import VLLMEngine
    from steerwell.engines.vllm.wire import Settings

    return VLLMEngine.load(
        model,
        dtype=dtype,
        tensor_parallel=tensor_parallel,
        trust_remote_code=trust,
        batch_size=batch_size,
        settings=Settings(max_terms=max_terms, captures=captures, traces=traces),
        options=_engine_args(engine_args),
    )


def _engine_args(text: str | None) -> dict[str, Any]:
    """What `--engine-args` holds."""
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise ArgumentError(f"--engine-args: got {text!r}, which is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ArgumentError(f"--engine-args: got {text!r}; expected an object, such as '{{\"max_model_len\": 4096}}'")
    return found


def load_engine(
    model: str, dtype: str, device_map: str | None, gguf_file: str | None, batch_size: int, trust: bool
) -> HFEngine:
    """The Hugging Face engine."""
    try:
        import transformers

        from steerwell.engines.hf import HFEngine
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or "torch", "hf") from error
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return HFEngine.load(
        model,
        dtype=dtype,
        device_map=device_map,
        gguf_file=gguf_file,
        batch_size=batch_size,
        trust_remote_code=trust,
    )


def in_models_language(chosen: Concept, engine: Engine, asked: str, language: str | None) -> Concept:
    """The loaded concept, or the model's own pack of it where a bundled name and no language were asked for."""
    from steerwell.concepts import ENGLISH, load_concept

    if language is None and asked == chosen.concept and engine.info.language != ENGLISH:
        chosen = load_concept(asked, engine.info.language)
        err.print(f"The model speaks {chosen.language!r}, so its own pack of {chosen.concept!r} is used.")
    return chosen


def print_json(value: Any) -> None:
    """One JSON value on stdout; NaN and infinity, which JSON lacks, become null."""
    typer.echo(json.dumps(finite(value), indent=2, ensure_ascii=False))


@contextmanager
def tasks() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Progress bars with remaining time on stderr, shown on a terminal only: `say(text, total)` starts the next one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True, disable=not err.is_terminal) as bar:

        def say(text: str, total: int) -> Callable[[int], None]:
            task = bar.add_task(text, total=total)
            return lambda done: bar.advance(task, done)

        yield say


@contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """One such bar."""
    with tasks() as say:
        yield say(text, total)
