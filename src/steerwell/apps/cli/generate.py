"""`steerwell generate`: answer one prompt or a file of prompts, steered or not, with a receipt."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    load_either,
    out,
    print_json,
    progress,
)
from steerwell.core.errors import ArgumentError
from steerwell.core.records import Edit, Message, Position, Prompt, Receipt, Response, Sampling, Toward, receipt_row

if TYPE_CHECKING:
    from steerwell.engines.base import Engine

STEERING = "Steering"
SAMPLING = "Sampling"


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The user's message; leave out with --input.")] = None,
    model: Model = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    prefill: Annotated[str, typer.Option(help="First words of the answer, put into the model's mouth.")] = "",
    plain: Annotated[
        bool, typer.Option("--plain", help="The prompt is plain text to continue, no conversation.")
    ] = False,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", help="JSONL: per line 'prompt' (and 'system', 'prefill'), or 'messages', or 'text'."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSONL here instead of stdout.")] = None,
    policy: Annotated[
        list[Path] | None, typer.Option(help="Policy file; several apply in order.", rich_help_panel=STEERING)
    ] = None,
    direction: Annotated[
        Path | None, typer.Option(help="Folder of a saved direction.", rich_help_panel=STEERING)
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="swfc, sttp, stmp, transport, directional_ablation, clamp, conditional, monitor.",
            rich_help_panel=STEERING,
        ),
    ] = "sttp",
    layer: Annotated[
        list[int] | None, typer.Option("--layer", "-l", help="0-based block; repeatable.", rich_help_panel=STEERING)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="Required with --direction. swfc, conditional: class separations; sttp: spreads beyond the aligned "
            "mean; stmp: mirror steps; transport, directional_ablation: share; clamp: 0 violating to 1 aligned mean; "
            "monitor: 0, it changes nothing.",
            rich_help_panel=STEERING,
        ),
    ] = None,
    position: Annotated[
        Position, typer.Option(help="Tokens to correct: the prompt's too, or the answer's.", rich_help_panel=STEERING)
    ] = "all",
    toward: Annotated[Toward, typer.Option(help="The class to steer to.", rich_help_panel=STEERING)] = "aligned",
    gate: Annotated[
        Path | None, typer.Option(help="Second direction, for 'conditional'.", rich_help_panel=STEERING)
    ] = None,
    receipt: Annotated[
        bool, typer.Option("--receipt", help="Show what steering did to each answer.", rich_help_panel=STEERING)
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", rich_help_panel=SAMPLING)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus mass.", rich_help_panel=SAMPLING)] = 1.0,
    seed: Annotated[int, typer.Option(help="Row i draws with seed + i.", rich_help_panel=SAMPLING)] = 42,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer; repeatable.", rich_help_panel=SAMPLING)
    ] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    batch_size: BatchSize = 32,
    trust_remote_code: Trust = False,
    engine_name: EngineName = "hf",
    tensor_parallel: TensorParallel = 1,
    as_json: Json = False,
) -> None:
    """Answer one prompt (streamed) or a JSONL file of prompts (batched), steered or not."""
    prompts = _prompts(prompt, system, prefill, plain, input_file)
    sampling = Sampling(temperature, top_p, max_new_tokens, tuple(stop or ()), seed)
    edit = _edit(policy or [], direction, method, layer or [], strength, position, toward, gate)
    engine = load_either(
        engine_name, model, dtype, device_map, gguf_file, batch_size, trust_remote_code, tensor_parallel
    )
    if input_file is None and not as_json and output is None:
        _stream(engine, prompts[0], sampling, edit, receipt)
        return
    with progress(f"answers of {model}", len(prompts)) as advance:
        responses = engine.generate(prompts, sampling, edit, progress=advance)
    rows = [_row(response) for response in responses]
    if output is not None:
        output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif input_file is not None and not as_json:
        for row in rows:
            typer.echo(json.dumps(row, ensure_ascii=False))
    else:
        print_json(rows)


def _prompts(
    prompt: str | None, system: str | None, prefill: str, plain: bool, input_file: Path | None
) -> list[Prompt]:
    if (prompt is None) == (input_file is None):
        raise ArgumentError("prompt: give a PROMPT or --input FILE, one of them")
    if prompt is not None:
        if plain and system:
            raise ArgumentError("--plain: plain text has no system prompt; leave out --system")
        return [Prompt(text=prompt, prefill=prefill) if plain else Prompt.chat(prompt, system, prefill)]
    assert input_file is not None  # noqa: S101 - the check above
    try:
        lines = input_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--input: {input_file} cannot be read: {error}") from error
    found = [_line(line, number, system, prefill) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ArgumentError(f"--input: {input_file} holds no line")
    return found


def _line(line: str, number: int, system: str | None, prefill: str) -> Prompt:
    """A prompt from one JSON line; the command's --system and --prefill serve lines without their own."""
    try:
        row = json.loads(line)
        prefill = row.get("prefill", prefill)
        if "messages" in row:
            return Prompt(tuple(Message(turn["role"], turn["content"]) for turn in row["messages"]), prefill=prefill)
        if "text" in row:
            return Prompt(text=row["text"], prefill=prefill)
        return Prompt.chat(row["prompt"], row.get("system", system), prefill)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = '{"prompt": "...", "system": "..."}, {"messages": [...]} or {"text": "..."}'
        raise ArgumentError(f"--input: line {number} is no prompt ({error}); write {form}") from error


def _edit(
    policies: list[Path],
    direction: Path | None,
    method: str,
    layers: list[int],
    strength: float | None,
    position: Position,
    toward: Toward,
    gate: Path | None,
) -> Edit | None:
    """The edit that the options ask for; options that would be ignored are an error."""
    if direction is None and (layers or strength is not None or gate is not None):
        raise ArgumentError("--direction: missing; --layer, --strength and --gate say how to steer along a direction")
    if direction is None and not policies:
        return None
    from steerwell.core.artifacts import load_direction
    from steerwell.core.policy import load_policy
    from steerwell.steering.interventions import build
    from steerwell.steering.policies import policy_edit

    edits = [policy_edit(load_policy(path)) for path in policies]
    if direction is not None:
        if strength is None or not layers:
            missing = "--strength" if strength is None else "--layer"
            raise ArgumentError(f"{missing}: missing; 'steerwell inspect {direction}' shows the layers")
        edits.append(
            build(
                load_direction(direction),
                method,
                layers,
                strength,
                position=position,
                toward=toward,
                gate=load_direction(gate) if gate else None,
            )
        )
    return Edit.compose(edits)


def _stream(engine: Engine, prompt: Prompt, sampling: Sampling, edit: Edit | None, receipt: bool) -> None:
    response = None
    for chunk in engine.stream(prompt, sampling, edit):
        typer.echo(chunk.text, nl=False)
        response = chunk.response
    typer.echo()
    if receipt:
        out.print()
        _show_receipt(response.receipt if response else None)


def _show_receipt(receipt: Receipt | None) -> None:
    if receipt is None:
        out.print("receipt: none - this answer was not steered")
        return
    out.print(f"receipt {receipt.edit_id}")
    for term in receipt.terms:
        out.print(f"  {term.label or 'hand-made'}, layer {term.layer}, position {term.position}:", soft_wrap=True)
        out.print(
            f"    {term.tokens_edited} of {term.tokens_seen} tokens edited, mean projection "
            f"{term.projection_before:.2f} -> {term.projection_after:.2f}, mean |h' - h| {term.perturbation:.2f}",
            soft_wrap=True,
        )


def _row(response: Response) -> dict[str, Any]:
    """A response as a JSON row."""
    prompt = response.prompt
    asked = (
        {"text": prompt.text} if prompt.text is not None else {"messages": [asdict(turn) for turn in prompt.messages]}
    )
    return asked | {
        "prefill": prompt.prefill,
        "response": response.text,
        "finish_reason": response.finish_reason,
        "n_tokens": len(response.token_ids),
        "sampling": asdict(response.sampling),
        "receipt": receipt_row(response.receipt),
    }
