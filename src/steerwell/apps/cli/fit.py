"""`steerwell fit`: learn a direction from a model's own contrastive answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerwell.apps.cli.common import (
    DEFAULT_MODEL,
    BatchSize,
    DeviceMap,
    Dtype,
    EngineName,
    GgufFile,
    Json,
    Model,
    TensorParallel,
    Trust,
    in_models_language,
    load_either,
    out,
    print_json,
    progress,
)
from steerwell.core.records import Pool


def fit(
    concept: Annotated[str, typer.Option("--concept", "-c", help="A bundled concept, or your own .yaml file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the direction.")],
    model: Model = DEFAULT_MODEL,
    method: Annotated[str, typer.Option(help="logistic, mean_difference, pca or lda.")] = "logistic",
    pool: Annotated[
        Pool, typer.Option(help="Where to read: the mean over the answer's tokens, or the prompt's last token.")
    ] = "response_mean",
    language: Annotated[str | None, typer.Option(help="The pack's language; default: the model's own.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the model's answers.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Nucleus mass of the answers.")] = 0.9,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the answers and of the split halves.")] = 42,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    batch_size: BatchSize = 32,
    trust_remote_code: Trust = False,
    engine_name: EngineName = "hf",
    tensor_parallel: TensorParallel = 1,
    as_json: Json = False,
) -> None:
    """Learn a concept's direction at every layer of a model, with its calibration."""
    from steerwell.apps.cli.inspect import show, summary
    from steerwell.concepts import ENGLISH, load_concept
    from steerwell.core.artifacts import save_direction
    from steerwell.core.records import Sampling
    from steerwell.core.registry import require_name
    from steerwell.steering.directions import ESTIMATORS
    from steerwell.studies.fitting import contrast

    require_name(ESTIMATORS, method)
    sampling = Sampling(temperature, top_p, max_new_tokens, seed=seed)
    chosen = load_concept(concept, language or ENGLISH)  # before the model, so that a faulty file costs no time
    engine = load_either(
        engine_name, model, dtype, device_map, gguf_file, batch_size, trust_remote_code, tensor_parallel
    )
    chosen = in_models_language(chosen, engine, concept, language)
    with progress(f"answers of {model}", 2 * len(chosen.train)) as advance:
        direction = contrast(engine, chosen, sampling, advance).direction(method, pool, seed)
    save_direction(direction, output)
    if as_json:
        print_json({"path": str(output)} | summary(direction))
        return
    show(direction)
    out.print(f"saved: {output}; 'steerwell sweep' finds where it steers best", markup=False, soft_wrap=True)
