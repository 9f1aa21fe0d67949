"""What the harnesses share: a steered model from their flat arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from steerwell.core.errors import ArgumentError, MissingDependencyError, UnknownNameError
from steerwell.core.policy import Policy, load_policy
from steerwell.core.records import Edit
from steerwell.steering.policies import policy_edit

if TYPE_CHECKING:
    from steerwell.engines.hf import HFEngine
    from steerwell.engines.hf.model import LoadedModel

ALONG = ("direction", "method", "layer", "strength", "position", "toward", "gate", "threshold", "above")
STEERING = ("policy", *ALONG)
LOADING = ("dtype", "device_map", "gguf_file", "revision", "trust_remote_code", "blocks", "chat_options")
BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Steered:
    """A loaded model, the engine that runs it, and the edit that all its answers are under (None: unsteered)."""

    model: LoadedModel
    engine: HFEngine
    edit: Edit | None


def load_steered(name: str, args: Mapping[str, Any]) -> Steered:
    """A model and its edit from a harness's arguments; the edit is made, and checked, before anything is evaluated.

    Args:
        name: `pilot` (the bundled model), a hub id, a local folder, or a `.gguf` file.
        args: for steering (see `steering_from_args`), for loading (see `HFEngine.load`), and `batch_size`, rows per
            forward pass.

    Raises:
        UnknownNameError: an argument that nothing reads, or a layer that the model does not have.
        ArgumentError: a value that cannot be used, or steering that is said in part only.
        ArtifactError: a direction or a policy that cannot be read.
        EngineError: the model cannot be loaded.
        ModelMismatchError: the direction was made for another model.
        MissingDependencyError: torch or transformers is not installed.
    """
    known = (*STEERING, *LOADING, "batch_size")
    for key in args:
        if key not in known:
            raise UnknownNameError("model argument", key, known)
    edit = steering_from_args({key: value for key, value in args.items() if key in STEERING})
    batch_size = _batch_size(args.get("batch_size", BATCH_SIZE))
    try:
        from steerwell.engines.base import row_edits
        from steerwell.engines.hf import HFEngine
        from steerwell.engines.hf.model import load
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or "torch", "hf") from error
    model = load(name, **{key: value for key, value in args.items() if key in LOADING})
    row_edits(edit, 1, model.info)
    return Steered(model, HFEngine(model, batch_size), edit)


def steering_from_args(args: Mapping[str, Any]) -> Edit | None:
    """The edit that a harness's arguments ask for; None when there are none, never when they are incomplete.

    Args:
        args: either `policy`, the path of a policy file (a list composes several in order), or `direction`, `method`,
            `layer` (one, or a list) and `strength`, with `position`, `toward`, `gate`, `threshold` and `above` as in
            `steerwell.build`. Values may be text, as they come from a command line.

    Raises:
        UnknownNameError: no such argument, method or layer.
        ArgumentError: an empty or wrong value, a missing one, or a policy beside arguments that it already holds.
        ArtifactError: a direction or a policy that cannot be read.
    """
    for key, value in args.items():
        if key not in STEERING:
            raise UnknownNameError("steering argument", key, STEERING)
        if value is None or value == "":
            raise ArgumentError(f"{key}: got {value!r}; give a value, or leave it out to change nothing")
    if not args:
        return None
    if "policy" not in args:
        return policy_edit(_policy(args))
    beside = [key for key in args if key != "policy"]
    if beside:
        raise ArgumentError(f"{beside[0]}: the policy says how to steer; give either a policy or a direction")
    paths = args["policy"] if isinstance(args["policy"], (list, tuple)) else [args["policy"]]
    return Edit.compose(policy_edit(load_policy(str(path))) for path in paths)


def _policy(args: Mapping[str, Any]) -> Policy:
    """The arguments as an unsaved policy, which checks them."""
    for key in ("direction", "method", "layer", "strength"):
        if key not in args:
            raise ArgumentError(
                f"{key}: missing; steering along a direction needs direction, method, layer and strength "
                "('steerwell inspect DIRECTION' shows the layers)"
            )
    fields = {key: value for key, value in args.items() if key != "layer"}
    layers = args["layer"] if isinstance(args["layer"], (list, tuple)) else [args["layer"]]
    try:
        return Policy.model_validate(fields | {"layers": layers})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]).replace("layers", "layer")
        raise ArgumentError(f"{key}: got {args[key]!r}; {first['msg']}") from error


def _batch_size(value: Any) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ArgumentError(f"batch_size: got {value!r}; expected a whole number, 1 or more (it is not searched for)")
    return int(value)
