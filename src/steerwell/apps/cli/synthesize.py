"""`steerwell synthesize`: a labelled data set of violations, written by a steered or prompted model."""

from __future__ import annotations

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
    in_models_language,
    load_either,
    out,
    print_json,
    tasks,
)
from steerwell.core.errors import ArgumentError

if TYPE_CHECKING:
    from steerwell.concepts import Concept
    from steerwell.core.records import Sampling
    from steerwell.synthesis.dataset import Made
    from steerwell.synthesis.examples import Example
    from steerwell.synthesis.writers import Writer

FILTERS = "Filters"
SAMPLING = "Sampling"


def synthesize(
    concept: Annotated[str, typer.Option("--concept", "-c", help="A bundled concept, or your own .yaml file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; run again on it to resume.")],
    policy: Annotated[
        list[Path] | None,
        typer.Option(help="Policy file toward the violating class, as 'select' writes them; repeatable."),
    ] = None,
    prompted: Annotated[
        bool, typer.Option("--prompted", help="Have the model write under violating system prompts, too.")
    ] = False,
    shots: Annotated[
        int, typer.Option(min=0, help="With --prompted: violations of --examples shown before each prompt.")
    ] = 0,
    examples: Annotated[
        Path | None,
        typer.Option(help="File of real exchanges (columns prompt, response, label) that --shots are drawn from."),
    ] = None,
    benign: Annotated[
        bool, typer.Option(help="Benign answers to the same prompts: unsteered, or under aligned system prompts.")
    ] = True,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Texts per policy, and of each other kind.")] = 200,
    prompts: Annotated[
        Path | None, typer.Option(help="File of user turns (column 'prompt'); default: the concept's training ones.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    judge: Annotated[
        Literal["exact", "llm", "classifier", "none"], typer.Option(help="Who scores success and coherence.")
    ] = "exact",
    judge_model: Annotated[str, typer.Option(help="With --judge llm: model at an OpenAI-compatible endpoint.")] = "",
    judge_url: Annotated[str | None, typer.Option(help="Where that endpoint lies; default: OPENAI_BASE_URL.")] = None,
    min_success: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Least success of violations; 0.5 with a judge.", rich_help_panel=FILTERS),
    ] = None,
    min_coherence: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least coherence; 0.5 with a judge.", rich_help_panel=FILTERS)
    ] = None,
    words: Annotated[
        tuple[int, int], typer.Option(help="Fewest and most words of a response.", rich_help_panel=FILTERS)
    ] = (3, 400),
    near: Annotated[
        float,
        typer.Option(min=0, max=1, help="Likeness that makes a near-duplicate; 1: none.", rich_help_panel=FILTERS),
    ] = 0.8,
    shares: Annotated[
        tuple[float, float, float], typer.Option(help="Train, validation and test.", rich_help_panel=FILTERS)
    ] = (0.8, 0.1, 0.1),
    temperature: Annotated[float, typer.Option(rich_help_panel=SAMPLING)] = 1.0,
    top_p: Annotated[float, typer.Option(rich_help_panel=SAMPLING)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(rich_help_panel=SAMPLING)] = 256,
    seed: Annotated[int, typer.Option(rich_help_panel=SAMPLING)] = 42,
    embedder: Annotated[str, typer.Option(help="Of the diversity measures.")] = "minilm",
    licence: Annotated[str, typer.Option(help="Licence of the data set, for its card.")] = "",
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
    """Have a model write violations of a concept, and benign answers beside them, as a labelled data set.

    Writes OUTPUT/dataset, a folder that Hugging Face's `load_dataset` reads: its splits share no prompt, template or
    near-duplicate, and a card says how it was made. An interrupted run continues when the same command is run again.
    """
    from dataclasses import replace
    from functools import partial

    from steerwell.concepts import ENGLISH, load_concept
    from steerwell.core.records import Sampling
    from steerwell.core.settings import read_settings
    from steerwell.studies.config import JudgeSettings
    from steerwell.studies.fitting import PAPER_SAMPLING
    from steerwell.studies.judging import judge_for
    from steerwell.synthesis.dataset import Filters, Synthesis
    from steerwell.synthesis.near import NEAR

    if not policy and not prompted:
        raise ArgumentError("--policy, --prompted: got neither; give a policy file (see 'steerwell select'), or both")
    shown = _shown(shots, examples, prompted)
    cluster = cluster_of(executor, address, actors, cpus_per_actor, gpus_per_actor)
    chosen = load_concept(concept, language or ENGLISH)  # before the model, so that a faulty file costs no time
    scoring = None
    if judge != "none":
        asked = {"kind": judge, "model": judge_model, "url": judge_url}
        scoring = read_settings(JudgeSettings, asked, "--judge, --judge-model")
        min_success = 0.5 if min_success is None else min_success
        min_coherence = 0.5 if min_coherence is None else min_coherence
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
        drawn = Sampling(temperature, top_p, max_new_tokens, seed=seed)
        asked_of = _asked(chosen, prompts)
        writers = _writers(chosen, asked_of, policy or [], benign, drawn)
        if prompted:
            writers += _prompted(chosen, asked_of, benign, drawn, shots, shown)
        likeness = None if near == 1 else replace(NEAR, threshold=near)
        filters = Filters(min_success, min_coherence, words, likeness, shares)
        work = Synthesis(chosen, tuple(writers), count, filters, embedder, licence)
        learned = replace(PAPER_SAMPLING, max_new_tokens=max_new_tokens)
        judging = judge_for(scoring, chosen, engine, learned, output, say) if scoring else None
        made = work.run(engine, judging, output, size=batch_size, say=say)
    if as_json:
        counts = {name: len(part) for name, part in made.splits.items()}
        figures = {source: found.figures() | {"n": found.n} for source, found in made.quality.items()}
        told = {"folder": str(made.folder), "written": made.written, "dropped": dict(made.dropped)}
        print_json(told | {"splits": counts, "quality": figures})
    else:
        _show(made)


def _asked(concept: Concept, prompts: Path | None) -> list[str]:
    from steerwell.synthesis.files import column, read_table

    if prompts is None:
        return [scenario.prompt for scenario in concept.train]
    values = column(read_table(prompts), "prompt", str(prompts))
    found = dict.fromkeys(text for value in values if (text := str(value or "").strip()))
    if not found:
        raise ArgumentError(f"--prompts: column 'prompt' of {prompts} is empty; give user turns there")
    return list(found)


def _writers(concept: Concept, asked: list[str], policies: list[Path], benign: bool, drawn: Sampling) -> list[Writer]:
    from steerwell.core.policy import load_policy
    from steerwell.steering.policies import policy_edit
    from steerwell.synthesis.examples import BENIGN
    from steerwell.synthesis.writers import steered, unsteered

    writers = []
    for path in policies:
        policy = load_policy(path)
        if policy.toward != "violating":
            raise ArgumentError(f"--policy: {path} steers toward {policy.toward!r}; expected 'toward: violating'")
        layers = ", ".join(map(str, policy.layers))
        name = f"{policy.name or path.stem}: {policy.method}, layer {layers}, strength {policy.strength:g}"
        writers.append(steered(concept, asked, name, policy_edit(policy), drawn))
    if policies and benign:
        writers.append(unsteered(concept, asked, drawn, BENIGN))
    return writers


def _shown(shots: int, examples: Path | None, prompted: bool) -> list[Example]:
    """The violations that shots are drawn from."""
    from steerwell.synthesis.files import read_examples

    if (shots > 0) != (examples is not None) or (shots and not prompted):
        raise ArgumentError("--shots, --examples: go together, and with --prompted; give all three, or neither")
    found = read_examples(examples, prompt_col="prompt") if examples else []
    return [example for example in found if example.label]


def _prompted(
    concept: Concept, asked: list[str], benign: bool, drawn: Sampling, shots: int, shown: list[Example]
) -> list[Writer]:
    from steerwell.synthesis.examples import BENIGN
    from steerwell.synthesis.writers import Prompting, prompted

    writers = [prompted(concept, asked, Prompting(None, shots, drawn.temperature), drawn, shown)]
    if benign:
        writers.append(prompted(concept, asked, Prompting(temperature=drawn.temperature), drawn, label=BENIGN))
    return writers


def _show(made: Made) -> None:
    table = Table("split", "violating", "benign", title=f"{made.folder}")
    for name, part in made.splits.items():
        violating = sum(example.label for example in part)
        table.add_row(name, str(violating), str(len(part) - violating))
    out.print(table)
    kept = sum(map(len, made.splits.values()))
    reasons = "; ".join(f"{count} {reason}" for reason, count in made.dropped.items()) or "none"
    out.print(f"{kept} of {made.written} texts kept; dropped: {reasons}", markup=False, soft_wrap=True)
    for source, found in made.quality.items():
        figures = found.figures()
        told = ", ".join(f"{name} {figures[name]:.2f}" for name in ("success", "coherence", "diversity", "hm3"))
        out.print(f"{source}, violating, {found.n} texts: {told}", markup=False, soft_wrap=True)
    for example in next(iter(made.splits.values()))[:3]:
        kind = "violating" if example.label else "benign"
        out.print(
            f"\n{kind} ({example.source})\n  {example.prompt}\n  {example.response}", markup=False, soft_wrap=True
        )
