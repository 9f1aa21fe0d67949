"""`steerwell detect`: train a detector of violations, test it, and have it read a file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from steerwell.apps.cli.common import DeviceMap, Dtype, Json, err, load_engine, out, print_json, progress
from steerwell.core.errors import ArgumentError

if TYPE_CHECKING:
    from steerwell.scoring.intervals import Interval
    from steerwell.synthesis.detection import Comparison, Detection
    from steerwell.synthesis.detectors import Detector
    from steerwell.synthesis.examples import Example

app = typer.Typer(no_args_is_help=True, help="Train a detector of violations, test it, and have it read a file.")

TextCol = Annotated[str, typer.Option(help="Column of the responses.")]
LabelCol = Annotated[str, typer.Option(help="Column of the labels.")]
PromptCol = Annotated[str | None, typer.Option(help="Column of the prompts; default: 'prompt' if there is one.")]
Positive = Annotated[
    list[str] | None, typer.Option(help="Label that means violating; repeatable; default: 1, true or yes.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Read this many rows of a file only, from its start.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Of a probe: the model its direction was made for.")]
Folder = Annotated[Path, typer.Argument(metavar="DETECTOR", help="Folder of a saved detector.")]

TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1 at the threshold",
    "fpr95": "FPR at 95 % TPR",
    "ece": "calibration error (ECE)",
}
OWN = {  # options that belong to one kind
    "linear": ("embedder",),
    "encoder": ("base", "epochs", "learning_rate", "max_length"),
    "probe": ("direction", "layer", "model"),
}
ENDINGS = (".jsonl", ".csv", ".parquet")
FIFTH = 0.2
CHANCE, FLAG = "p_violating", "flagged"


@app.command("train")
def train(
    training: Annotated[
        str, typer.Option("--train", help="Labelled file, a folder written by an export, or a data set's hub name.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the detector.")],
    validation: Annotated[
        str | None, typer.Option(help="Chooses settings and threshold; default: a fifth of --train.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="What the figures are measured on; default: a fifth of --train.")
    ] = None,
    text_col: TextCol = "response",
    label_col: LabelCol = "label",
    prompt_col: PromptCol = None,
    positive: Positive = None,
    kind: Annotated[str, typer.Option(help="linear (fast), encoder (fine-tuned) or probe (a direction).")] = "linear",
    embedder: Annotated[
        str | None, typer.Option(help="linear: minilm (default), hashing, a sentence-transformers hub id or folder.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="encoder: minilm (default), a hub id or folder.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="encoder: at most; default: 8.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="encoder: default: 5e-5.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="encoder: tokens it reads; default: 256.")] = None,
    direction: Annotated[Path | None, typer.Option(help="probe: folder of a direction ('steerwell fit').")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="probe: 0-based block; default: chosen.")] = None,
    model: Model = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings, with seeds 0, 1 ...; the first one is saved.")] = 3,
    split_seed: Annotated[int, typer.Option(help="Of the parts taken from --train.")] = 0,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Train a detector on labelled exchanges with several seeds, and test it on others.

    Parts that are taken from --train share no prompt, template or near-duplicate. Writes OUTPUT (the detector) and
    OUTPUT/figures.json. Figures are means over the seeds; intervals are 95 % bootstrap ones over test prompts.
    """
    from steerwell.core.artifacts import finite, write_atomic
    from steerwell.core.registry import require_name
    from steerwell.synthesis.detectors import DETECTORS, trial

    require_name(DETECTORS, kind)
    given: dict[str, Any] = {"embedder": embedder, "base": base, "epochs": epochs, "learning_rate": learning_rate}
    given |= {"max_length": max_length, "direction": direction, "layer": layer, "model": model}
    options = _own(kind, given)
    columns = {"text_col": text_col, "label_col": label_col, "prompt_col": prompt_col, "positive": positive}
    parts = _parts(training, validation, test, columns, limit, split_seed)
    if kind == "probe":
        options = _probe(options, dtype, device_map)
    with progress(f"training {kind}", seeds) as advance:
        tried = trial(kind, parts["train"], parts["validation"], parts["test"], range(seeds), advance, **options)
    tried.detector.save(output)
    counts = {name: {"n": len(part), "violating": sum(item.label for item in part)} for name, part in parts.items()}
    made = {"detector": str(output), "kind": kind, "examples": counts, "provenance": tried.detector.provenance}
    made |= {"test": _summary(tried.figures)}
    write_atomic(output / "figures.json", json.dumps(finite(made), indent=2, ensure_ascii=False))
    if as_json:
        print_json(made)
        return
    for name, count in counts.items():
        out.print(f"{name}: {count['n']} examples, {count['violating']} violating", markup=False)
    out.print(_table(tried.figures, f"{kind}: test figures, mean of {seeds} seeds"))
    out.print(f"saved: {output} (seed 0, threshold {tried.detector.threshold:.3f})", markup=False, soft_wrap=True)


@app.command("eval")
def evaluate(
    detector: Folder,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Labelled file, folder or data set, as for training.")],
    against: Annotated[Path | None, typer.Option(help="Another detector: a paired test on the same examples.")] = None,
    text_col: TextCol = "response",
    label_col: LabelCol = "label",
    prompt_col: PromptCol = None,
    positive: Positive = None,
    model: Model = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Figures of a saved detector on labelled examples that it has not seen."""
    from steerwell.synthesis.detection import by_prompt, compare, detection
    from steerwell.synthesis.examples import labels

    columns = {"text_col": text_col, "label_col": label_col, "prompt_col": prompt_col, "positive": positive}
    examples = _read(file, "test", columns, limit)
    truth, groups = labels(examples), by_prompt(examples)
    made: dict[str, Any] = {"file": file}
    scores, compared = [], None
    for role, folder in (("detector", detector), ("against", against)):
        if folder is not None:
            loaded = _load(folder, model, dtype, device_map)
            scores.append(loaded.scores(examples))
            figures = detection(truth, scores[-1], threshold=loaded.threshold, groups=groups)
            made[role] = {"folder": str(folder), "kind": loaded.name} | _summary(figures)
            if not as_json:
                out.print(_table(figures, f"{folder} ({loaded.name})"))
    if against is not None:
        compared = compare(truth, *scores, groups=groups)
        made["comparison"] = asdict(compared)
    if as_json:
        print_json(made)
    elif compared is not None:
        _tell(compared)


@app.command("predict")
def predict(
    detector: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL, JSON, CSV or Parquet; no labels needed.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A .jsonl, .csv or .parquet file.")] = None,
    text_col: TextCol = "response",
    prompt_col: PromptCol = None,
    model: Model = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Read exchanges: the file's rows with `p_violating` and `flagged`, both empty where the response is blank."""
    from steerwell.synthesis.examples import BENIGN, Example
    from steerwell.synthesis.files import column, read_table

    if output is not None and output.suffix.lower() not in ENDINGS:
        raise ArgumentError(f"--output: {output} ends in {output.suffix!r}; expected one of {', '.join(ENDINGS)}")
    rows = read_table(file)[:limit]
    responses = [_text(value) for value in column(rows, text_col, str(file))]
    name = prompt_col or ("prompt" if any("prompt" in row for row in rows) else None)
    prompts = [_text(value) for value in column(rows, name, str(file))] if name else [""] * len(rows)
    asked = [Example(*texts, label=BENIGN) for texts in zip(prompts, responses, strict=True)]  # labels are not read
    loaded = _load(detector, model, dtype, device_map)
    found = loaded.scores(asked).tolist()
    read = [
        row | {CHANCE: None if math.isnan(chance) else chance, FLAG: None if math.isnan(chance) else chance >= cut}
        for row, chance, cut in zip(rows, found, [loaded.threshold] * len(rows), strict=True)
    ]
    if output is not None:
        _write(read, output)
    if as_json:
        print_json(read)
        return
    flagged, blank = (sum(row[FLAG] is value for row in read) for value in (True, None))
    out.print(
        f"{len(read)} exchanges: {flagged} flagged (threshold {loaded.threshold:.3f}), {blank} without a response"
    )
    if output is not None:
        out.print(f"saved: {output}", markup=False, soft_wrap=True)


def _own(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options given, all of which must be this kind's."""
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in chosen:
        if name not in OWN.get(kind, ()):
            owner = next(other for other, names in OWN.items() if name in names)
            raise ArgumentError(f"--{name.replace('_', '-')}: belongs to --kind {owner}; --kind is {kind!r}")
    return chosen


def _probe(options: dict[str, Any], dtype: str, device_map: str | None) -> dict[str, Any]:
    """A probe's options with what the paths and names in them stand for."""
    from steerwell.core.artifacts import load_direction

    if "direction" not in options:
        raise ArgumentError("--direction: a probe needs one; make it with 'steerwell fit -o FOLDER'")
    direction = load_direction(options.pop("direction"))
    engine = load_engine(options.pop("model", direction.model.name), dtype, device_map, None, 32, False)
    return options | {"direction": direction, "engine": engine}


def _load(folder: Path, model: str | None, dtype: str, device_map: str | None) -> Detector:
    from steerwell.synthesis.detectors import load_detector, read_kind

    if read_kind(folder) != "probe" or (model, dtype, device_map) == (None, "auto", None):
        return load_detector(folder)
    if model is None:
        raise ArgumentError("--dtype, --device-map: say of which model with --model")
    return load_detector(folder, engine=load_engine(model, dtype, device_map, None, 32, False))


def _parts(
    training: str, validation: str | None, test: str | None, columns: dict[str, Any], limit: int | None, seed: int
) -> dict[str, list[Example]]:
    """Training, validation and test examples; a fifth of the training ones for each that was not given."""
    from steerwell.synthesis.data import split
    from steerwell.synthesis.leaks import leaks_between

    sources = {"validation": validation, "test": test}
    for name in sources:
        if sources[name] is None and (Path(training) / "data" / f"{name}.parquet").is_file():
            sources[name] = training  # an export brings its own parts
    learned = _read(training, "train", columns, limit)
    given = {name: _read(source, name, columns, limit) for name, source in sources.items() if source is not None}
    first, second = (0.0 if name in given else FIFTH for name in sources)
    if first + second:
        learned, *taken = split(learned, (1 - first - second, first, second), seed=seed).values()
        given = dict(zip(sources, taken, strict=True)) | given
    parts = {"train": learned} | given
    for leak in leaks_between(parts):
        err.print(f"warning: {leak}", markup=False, soft_wrap=True)
    return parts


def _read(source: str, part: str, columns: dict[str, Any], limit: int | None) -> list[Example]:
    """Labelled examples; of a folder or a data set the part that is called so."""
    from steerwell.synthesis.files import read_examples, read_table

    is_file = Path(source).is_file()
    if columns["prompt_col"] is None and is_file and any("prompt" in row for row in read_table(Path(source))):
        columns = columns | {"prompt_col": "prompt"}
    whole = is_file or Path(source).suffix  # a missing file is told as one
    return read_examples(source, split=None if whole else part, **columns)[:limit]


def _summary(figures: Detection) -> dict[str, Any]:
    area = figures.auroc
    counts = {"n": area.n, "violating": figures.violating, "missing": area.missing, "prompts": figures.groups}
    listed = {}
    for name in TITLES:
        interval: Interval = getattr(figures, name)
        bounds = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
        listed[name] = bounds | {"seeds": figures.seeds[name]}
    return counts | {"thresholds": figures.thresholds, "figures": listed}


def _table(figures: Detection, title: str) -> Table:
    area, rows = figures.auroc, len(figures.thresholds)
    caption = f"{area.n} examples, {figures.violating} violating, {figures.groups} prompts; {area.missing} not scored"
    table = Table(title=title, caption=caption)
    for name in ("", "figure", "95 % interval", *(["over seeds"] if rows > 1 else [])):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, words in TITLES.items():
        interval, spread = getattr(figures, name), figures.seeds[name]
        cells = [f"{interval.estimate:.3f}", f"{interval.low:.3f} to {interval.high:.3f}"]
        cells += [f"{min(spread):.3f} to {max(spread):.3f}"] if rows > 1 else []
        table.add_row(words, *cells)
    return table


def _tell(compared: Comparison) -> None:
    apart = compared.difference
    bounds = f"{apart.low:+.3f} to {apart.high:+.3f}, p = {compared.p:.3g}"
    out.print(
        f"AUROC {compared.first.estimate:.3f} - {compared.second.estimate:.3f} = {apart.estimate:+.3f} ({bounds})"
    )
    out.print(f"paired bootstrap, {apart.n} examples that both score", soft_wrap=True)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    """Rows as JSONL, CSV or Parquet."""
    import csv
    import io

    from steerwell.core.artifacts import finite, write_atomic

    plain = [finite(row) for row in rows]
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(plain), path)
        return
    if path.suffix.lower() == ".jsonl":
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in plain))
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in plain for name in row)))
    writer.writeheader()
    writer.writerows(plain)
    write_atomic(path, text.getvalue())
