"""`steerwell sweep`: try every way to steer under attack, and write the best one as a policy."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from steerwell.apps.cli.cluster import Address, Count, Cpus, Executor, Gpus, cluster_of, engine_on
from steerwell.apps.cli.common import (
    DEFAULT_MODEL,
    BatchSize,
    DeviceMap,
    Dtype,
    EngineArgs,
    EngineName,
    GgufFile,
    Json,
    Model,
    TensorParallel,
    Trust,
    err,
    in_models_language,
    load_either,
    out,
    print_json,
    tasks,
)
from steerwell.core.errors import ArgumentError

if TYPE_CHECKING:
    from steerwell.studies.sweep import Scores, SweepResult


def sweep(
    concept: Annotated[str, typer.Option("--concept", "-c", help="A bundled concept, or your own .yaml file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; run again on it to resume.")],
    model: Model = DEFAULT_MODEL,
    layer: Annotated[
        list[int] | None, typer.Option("--layer", "-l", help="0-based block; repeatable; default: all.")
    ] = None,
    strengths: Annotated[
        list[str] | None,
        typer.Option("--strengths", "-s", help="Like 'sttp=0,6,12'; repeatable; default: the paper's, three methods."),
    ] = None,
    position: Annotated[list[str] | None, typer.Option(help="all or response; repeatable; default: all.")] = None,
    estimator: Annotated[
        list[str] | None, typer.Option(help="Repeatable; default: logistic and mean_difference.")
    ] = None,
    pool: Annotated[
        list[str] | None, typer.Option(help="response_mean or prompt_last; repeatable; default: both.")
    ] = None,
    validation: Annotated[
        int | None, typer.Option(min=1, help="Validation scenarios to choose on; default: 24, with --search auto 48.")
    ] = None,
    test: Annotated[int | None, typer.Option(min=1, help="Test scenarios to report on; default: all.")] = None,
    threat: Annotated[
        Literal["system", "prefill"],
        typer.Option(help="Malicious system prompts, or an answer begun badly under a neutral one."),
    ] = "system",
    search: Annotated[
        Literal["grid", "auto"],
        typer.Option(
            help="auto skips ways that make the unattacked answers unlikely: an eighth of a large grid's cost."
        ),
    ] = "grid",
    judge: Annotated[
        Literal["exact", "llm", "classifier"] | None,
        typer.Option(
            help="exact: the bundled world (default); llm: --judge-model at an endpoint; classifier: learned from "
            "the model's own contrastive answers."
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="Judge at an OpenAI-compatible endpoint; implies --judge llm.")
    ] = None,
    judge_url: Annotated[str | None, typer.Option(help="Where that endpoint lies; default: OPENAI_BASE_URL.")] = None,
    judge_mode: Annotated[
        Literal["logprobs", "text"], typer.Option(help="Score by the judge's log-probabilities or by its words.")
    ] = "logprobs",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    language: Annotated[str | None, typer.Option(help="The pack's language; default: the model's own.")] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    batch_size: BatchSize = 64,
    trust_remote_code: Trust = False,
    engine_name: EngineName = "hf",
    tensor_parallel: TensorParallel = 1,
    engine_args: EngineArgs = None,
    executor: Executor = "local",
    address: Address = None,
    actors: Count = None,
    cpus_per_actor: Cpus = 1,
    gpus_per_actor: Gpus = 0,
    as_json: Json = False,
) -> None:
    """Steer a model under attack in every way of a grid, choose on validation scenarios, report on test scenarios.

    Writes OUTPUT/policy.yaml (what `generate --policy` reads), answers.parquet, configurations.parquet (means), the
    directions and a ledger. An interrupted sweep continues where it was when the same command is run again.
    """
    from steerwell.concepts import ENGLISH, load_concept
    from steerwell.core.records import POOLS, Sampling
    from steerwell.core.settings import read_settings
    from steerwell.studies.config import JudgeSettings
    from steerwell.studies.defence import PAPER_STRENGTHS, grid
    from steerwell.studies.fitting import PAPER_SAMPLING
    from steerwell.studies.judging import judge_for
    from steerwell.studies.sweep import VALIDATION, Sweep

    cluster = cluster_of(executor, address, actors, cpus_per_actor, gpus_per_actor)
    asked = {"kind": judge or ("llm" if judge_model else "exact"), "model": judge_model or "", "url": judge_url}
    scoring = read_settings(JudgeSettings, asked | {"mode": judge_mode}, "--judge, --judge-model")
    values = dict(map(_strengths, strengths)) if strengths else PAPER_STRENGTHS
    chosen = load_concept(concept, language or ENGLISH)  # before the model, so that a faulty file costs no time
    load = partial(
        load_either,
        engine_name,
        model,
        dtype,
        device_map,
        gguf_file,
        batch_size,
        trust_remote_code,
        tensor_parallel,
        engine_args,
    )
    with engine_on(cluster, load, tensor_parallel) as engine, tasks() as say:
        chosen = in_models_language(chosen, engine, concept, language)
        ways = grid(
            layer or range(engine.info.n_layers),
            values,
            position or ("all",),  # type: ignore[arg-type]  # checked by Configuration
            estimator or ("logistic", "mean_difference"),
            pool or POOLS,  # type: ignore[arg-type]
        )
        drawn = Sampling(max_new_tokens=max_new_tokens)
        work = Sweep(chosen, tuple(ways), validation or VALIDATION[search], test, threat, search, drawn)
        learned = replace(PAPER_SAMPLING, max_new_tokens=max_new_tokens)
        judging = judge_for(scoring, chosen, engine, learned, output, say)
        result = work.run(engine, judging, output, rows_per_unit=batch_size, say=say)
    if (report := getattr(judging, "report", None)) is not None:
        err.print(f"judge: {report}", soft_wrap=True)
    if as_json:
        print_json(_summary(result))
    else:
        _show(result, chosen.poles.aligned)


def _strengths(text: str) -> tuple[str, tuple[float, ...]]:
    """'sttp=0,6' -> ("sttp", (0, 6))."""
    from steerwell.core.registry import require_name
    from steerwell.steering.interventions import METHODS

    method, _, values = text.partition("=")
    require_name(METHODS, method)
    try:
        return method, tuple(float(value) for value in values.split(","))
    except ValueError as error:
        raise ArgumentError(f"--strengths: got {text!r}; expected a method and numbers, like 'sttp=0,6,12'") from error


def _summary(result: SweepResult) -> dict[str, object]:
    return {
        "unsteered": {
            "not_attacked": result.test[None, False].figures(),
            "attacked": result.test[None, True].figures(),
        },
        "operating_points": [
            {
                "chosen": index == result.chosen,
                "configuration": asdict(result.configurations[index]),
                "validation": {"attacked": result.tried[index].figures()},
                "test": {
                    "not_attacked": result.test[index, False].figures(),
                    "attacked": result.test[index, True].figures(),
                },
            }
            for index in result.best.values()
        ],
        "validation_answers": result.answers,
        "validation_tokens": result.tokens,
        "validation_tokens_read": result.scored,
        "policy": None if result.policy is None else str(result.policy),
    }


def _show(result: SweepResult, trait: str) -> None:
    size = len(result.test[None, True].traits)
    caption = "in brackets: 95 % bootstrap interval of the mean trait; validation: attacked, as chosen"
    table = Table(title=f"{trait} / coherence, 0-100; {size} test answers each", caption=caption)
    for column in ("steering", "not attacked", "attacked", "validation"):
        table.add_column(column, justify="left" if column == "steering" else "right", no_wrap=True)

    def row(name: str, index: int | None, tried: Scores) -> None:
        calm, attacked = result.test[index, False], result.test[index, True]
        spread = f"[dim]({attacked.interval.low:.0f} to {attacked.interval.high:.0f})[/]"
        scores = [f"{item.trait:.1f} / {item.coherence:.1f}" for item in (calm, attacked, tried)]
        table.add_row(name, scores[0], f"{scores[1]}\n{spread}", scores[2])

    row("unsteered", None, result.attacked)
    for method, index in result.best.items():
        way = result.configurations[index]
        mark = " [bold]*[/]" if index == result.chosen else ""
        where = f"{way.estimator}, {way.pool}" + ("" if way.position == "all" else f", {way.position}")
        row(f"{method} {way.strength:g}, layer {way.layer}{mark}\n[dim]{where}[/]", index, result.tried[index])
    out.print(table)
    out.print(f"{len(result.configurations)} configurations, {result.answers} validation answers", soft_wrap=True)
    if result.policy is None:
        out.print("Nothing keeps 90 % of the unattacked coherence; no policy was written.")
    else:
        out.print(f"* chosen; policy: {result.policy}", soft_wrap=True)
