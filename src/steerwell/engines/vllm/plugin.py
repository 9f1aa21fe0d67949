"""What changes in vLLM: the entry point `vllm.general_plugins`, which every process of a server runs.

Nothing changes unless steering is asked for, with `additional_config={"steerwell": {}}` (`wire.Settings`); then

- the front end checks every request's steering, and refuses what it cannot do (`front`);
- the engine core puts every request under the server's policy, if it has one (`policy`);
- the scheduler keys cached blocks of keys and values by the steering under which they came to be;
- each worker puts the ops behind its decoder blocks when the model is loaded, before anything is compiled, salts the
  key of the compile cache, fills the buffers at every step, and proves at start-up that the ops are live.

Without it a request that asks for steering is refused: it is never answered unsteered. Two things that vLLM's own
server does differ from `VLLMEngine`: steered tokens from its prefix cache are not in the receipt again, and with
asynchronous scheduling a token may run, and count, after the one that ended the answer.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steerwell.core.errors import EngineError
from steerwell.engines.vllm import front, policy
from steerwell.engines.vllm.front import replace
from steerwell.engines.vllm.wire import KEY, Settings, parse


def register() -> None:
    """Change this process's vLLM; calling it again does nothing.

    Raises:
        EngineError: a vLLM in which what has to change is not there.
    """
    try:
        _register()
    except (ImportError, AttributeError) as error:
        raise EngineError(
            f"this vLLM cannot be steered ({error}); Steerwell was tested with vLLM 0.32. To run it without steering, "
            "list the plugins that you want in VLLM_PLUGINS"
        ) from error


def _register() -> None:
    from vllm.v1.core import kv_cache_utils  # type: ignore[import-not-found,unused-ignore]
    from vllm.v1.engine.core import EngineCore, EngineCoreProc  # type: ignore[import-not-found,unused-ignore]
    from vllm.v1.engine.input_processor import InputProcessor  # type: ignore[import-not-found,unused-ignore]
    from vllm.v1.worker.worker_base import WorkerBase  # type: ignore[import-not-found,unused-ignore]

    name = "generate_block_hash_extra_keys"
    original = getattr(kv_cache_utils, name)
    replace(kv_cache_utils, name, _keyed)
    for module in [module for path, module in sys.modules.items() if path.startswith("vllm.v1.")]:
        if getattr(module, name, None) is original:  # imported by name
            setattr(module, name, getattr(kv_cache_utils, name))
    replace(InputProcessor, "__init__", front.started)
    replace(InputProcessor, "process_inputs", front.checked)
    replace(InputProcessor, "resolve_watermarking", front.no_wrong_beams)
    replace(EngineCore, "__init__", _made)
    replace(EngineCoreProc, "run_busy_loop", _looping)
    replace(EngineCore, "preprocess_add_request", _under_policy)
    replace(WorkerBase, "__init__", _steered_worker)


# --- engine core -------------------------------------------------------------------------------------------------


def _made(original: Callable[..., Any]) -> Callable[..., Any]:
    """An engine core in the caller's own process."""

    def __init__(self: Any, config: Any, *arguments: Any, **named: Any) -> None:  # noqa: N807 - it takes that one's place
        original(self, config, *arguments, **named)
        _require_steered_workers(self)

    return __init__


def _looping(original: Callable[..., Any]) -> Callable[..., Any]:
    """An engine core in a process of its own, which finds the plugin only while it is being made."""

    def run_busy_loop(self: Any) -> Any:
        _require_steered_workers(self)
        _end_with_parent(self)
        return original(self)

    return run_busy_loop


def _require_steered_workers(core: Any) -> None:
    """Workers without the plugin, on another machine say, would leave out what requests ask for: nothing starts."""
    if Settings.of(core.vllm_config.additional_config) is None:
        return
    try:
        core.collective_rpc("steerwell_register", args=({},))
    except Exception as error:
        raise EngineError(
            "a worker does not steer; install steerwell in the environment of every worker, and see that "
            f"VLLM_PLUGINS does not shut it out ({error})"
        ) from error


def _end_with_parent(core: Any) -> None:
    """vLLM's engine core goes on when the process that started it is killed, and holds the device's memory: end it.

    Its workers end with it.
    """
    parent = multiprocessing.parent_process()
    if parent is None or Settings.of(core.vllm_config.additional_config) is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="steerwell-parent", daemon=True).start()


def _under_policy(original: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        settings = Settings.of(self.vllm_config.additional_config)
        if settings is not None and settings.policy is not None:
            policy.impose(settings, request)
        return original(self, request)

    return preprocess_add_request


# --- scheduler ---------------------------------------------------------------------------------------------------


def _keyed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keys of cached blocks name the steering, from the first block on that holds a token that may be edited."""

    def generate_block_hash_extra_keys(request: Any, start: int, end: int, start_mm: int) -> Any:
        keys, following = original(request, start, end, start_mm)
        key = steering_key(request)
        if key is None or end <= key[0]:
            return keys, following
        return (*(keys or ()), (KEY, key[1])), following

    return generate_block_hash_extra_keys


def steering_key(request: Any) -> tuple[int, str] | None:
    """A scheduler's request: its first token that may be edited, and the hash of its steering; None: unsteered."""
    found: tuple[int, str] | None = getattr(request, "_steerwell_key", None)
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    if found is None and KEY in extra:
        steering = parse(extra[KEY])
        found = (steering.first_steered(request.num_prompt_tokens), steering.key) if steering.terms else None
        request._steerwell_key = found
    return found


# --- workers -----------------------------------------------------------------------------------------------------


def check_config(config: Any) -> None:
    """Refuse what the ops cannot be right under.

    Raises:
        EngineError: what has to be turned off.
    """
    parallel, compilation = config.parallel_config, config.compilation_config
    wrong = {
        "speculative decoding": config.speculative_config is not None,
        "a KV connector": config.kv_transfer_config is not None,
        "data parallelism (run several servers instead)": parallel.data_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "dual batch overlap": bool(getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False)),
        "sequence parallelism": bool(getattr(compilation.pass_config, "enable_sp", False)),
        "kv_sharing_fast_prefill": bool(getattr(config.cache_config, "kv_sharing_fast_prefill", False)),
        "an encoder-decoder model": bool(config.model_config.is_encoder_decoder),
        "a pooling model": config.model_config.runner_type != "generate",
    }
    found = [name for name, is_on in wrong.items() if is_on]
    if found:
        raise EngineError(f"steering does not work together with {', '.join(found)}; turn it off")


def _steered_worker(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *arguments: Any, **named: Any) -> None:  # noqa: N807 - it takes that one's place
        original(self, *arguments, **named)
        settings = Settings.of(self.vllm_config.additional_config)
        if settings is not None:
            prepare_worker(self, settings)

    return __init__


def prepare_worker(worker: Any, settings: Settings) -> None:
    """Have a worker steer: nothing is loaded yet."""
    check_config(worker.vllm_config)
    # Part of the hash of the configuration, hence of the key under which compiled graphs are cached.
    worker.vllm_config.additional_config[KEY]["code"] = code_hash()
    load = worker.load_model

    def load_model(*arguments: Any, **named: Any) -> Any:
        result = load(*arguments, **named)
        install(worker, settings)
        return result

    worker.load_model = load_model
    for method in (
        steerwell_about,
        steerwell_register,
        steerwell_forget,
        steerwell_receipts,
        steerwell_states,
        steerwell_traces,
    ):
        setattr(worker, method.__name__, functools.partial(method, worker))


def code_hash() -> str:
    """Hash of this package's own source: a compiled graph of another version is never taken from the cache."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def install(worker: Any, settings: Settings) -> None:
    """Put the ops behind the blocks of a worker's model, and follow its steps."""
    from steerwell.engines.vllm.about import info_of
    from steerwell.engines.vllm.blocks import attach, decoder_blocks, own_layers
    from steerwell.engines.vllm.state import Steering

    runner, config = worker.model_runner, worker.vllm_config
    text = config.model_config.hf_text_config
    model = runner.get_model()
    blocks = decoder_blocks(model, int(text.num_hidden_layers))
    largest = config.compilation_config.max_cudagraph_capture_size or 0
    steering = Steering(
        settings,
        own_layers(blocks),
        n_layers=len(blocks),
        width=int(text.hidden_size),
        requests=config.scheduler_config.max_num_seqs,
        tokens=max(config.scheduler_config.max_num_batched_tokens, largest),
        device=worker.device,
    )
    if settings.policy is not None:
        steering.register(policy.vectors_for(settings, info_of(config, _embeddings(worker))))
    attach(blocks, steering.layers, steering.buffers, reads=settings.captures > 0, traces=settings.traces > 0)
    worker.steerwell, steering.cleanse = steering, functools.partial(_cleanse, runner)
    _follow(runner, steering)
    warm_up = worker.compile_or_warm_up_model

    def compile_or_warm_up_model(*arguments: Any, **named: Any) -> Any:
        from steerwell.engines.vllm.proof import prove

        result = warm_up(*arguments, **named)
        prove(runner, steering)
        return result

    worker.compile_or_warm_up_model = compile_or_warm_up_model


def _cleanse(runner: Any) -> None:
    """Take what is not finite out of the keys and values.

    vLLM's attention on the CPU multiplies what another request has left in a block by nought: NaN stays NaN, and
    whoever gets the block next would be answered with nonsense. Attention on CUDA should skip it; there it is a
    precaution.
    """
    import torch

    for cache in runner.kv_caches:
        if isinstance(cache, torch.Tensor) and cache.dtype in (torch.float32, torch.bfloat16, torch.float16):
            torch.nan_to_num_(cache, 0.0, 0.0, 0.0)


def _follow(runner: Any, steering: Any) -> None:
    """Wrap a model runner's steps: V1 (`_prepare_inputs`) or V2 (`prepare_inputs`)."""
    second = not hasattr(runner, "_prepare_inputs")
    prepare_name = "prepare_inputs" if second else "_prepare_inputs"
    sample_name = "sample" if second else "_sample"
    execute, prepare, dummy = runner.execute_model, getattr(runner, prepare_name), runner._dummy_run
    draw = getattr(runner, sample_name)

    def execute_model(output: Any, *arguments: Any, **named: Any) -> Any:
        if not named.get("dummy_run"):
            steering.update(output)
        return execute(output, *arguments, **named)

    def prepare_inputs(output: Any, *arguments: Any, **named: Any) -> Any:
        if second:
            batch = prepare(output, *arguments, **named)
            steering.fill(batch.req_ids, output.num_scheduled_tokens)
            return batch
        steering.fill(runner.input_batch.req_ids, output.num_scheduled_tokens)
        return prepare(output, *arguments, **named)

    def sample(outputs: Any, batch: Any, *arguments: Any, **named: Any) -> Any:
        """From logits (V1; none on a rank that does not draw), or from the states of all tokens (V2)."""
        if outputs is not None:
            steering.judge(outputs[batch.logits_indices] if second else outputs)
        return draw(outputs, batch, *arguments, **named)

    def dummy_run(*arguments: Any, **named: Any) -> Any:
        steering.clear()
        return dummy(*arguments, **named)

    runner.execute_model, runner._dummy_run, runner.steerwell_dummy_run = execute_model, dummy_run, dummy
    setattr(runner, prepare_name, prepare_inputs)
    setattr(runner, sample_name, sample)


def _embeddings(worker: Any) -> list[dict[int, list[float]]]:
    """The sample of the input embeddings, from all workers that share it out; they all ask at the same time."""
    from torch import distributed
    from vllm.distributed.parallel_state import get_tp_group  # type: ignore[import-not-found,unused-ignore]

    group, own = get_tp_group(), steerwell_sample(worker)
    found = [own] * int(group.world_size)
    if len(found) > 1:
        distributed.all_gather_object(found, own, group=group.cpu_group)
    return found


def steerwell_sample(worker: Any) -> dict[int, list[float]]:
    """Those rows of the input embeddings that a model is known by which a worker holds."""
    from steerwell.engines.vllm.about import embedding_sample

    text = worker.vllm_config.model_config.hf_text_config
    return embedding_sample(worker.model_runner.get_model(), int(text.vocab_size))


def steerwell_about(worker: Any) -> dict[str, Any]:
    """A worker's layers, and its rows of the input embeddings that a model is known by; for `collective_rpc`."""
    steering = worker.steerwell
    return {"layers": steering.layers, "bytes": steering.buffers.size, "embedding": steerwell_sample(worker)}


def steerwell_register(worker: Any, vectors: dict[str, str]) -> None:
    """Keep vectors on a worker, by name."""
    worker.steerwell.register(vectors)


def steerwell_forget(worker: Any, names: list[str]) -> None:
    """Drop registered vectors."""
    worker.steerwell.forget(names)


def steerwell_receipts(worker: Any, tickets: list[str]) -> dict[str, list[list[float]]]:
    """What the terms at a worker's layers did; see `state.Steering.collect`."""
    found: dict[str, list[list[float]]] = worker.steerwell.collect(tickets)
    return found


def steerwell_states(worker: Any, tickets: list[str]) -> dict[str, bytes]:
    """Mean states that were asked for; see `state.Steering.states`."""
    found: dict[str, bytes] = worker.steerwell.states(tickets)
    return found


def steerwell_traces(worker: Any, asked: dict[str, list[int]]) -> dict[str, list[list[Any]]]:
    """What terms met, token by token; see `state.Steering.traces`."""
    found: dict[str, list[list[Any]]] = worker.steerwell.traces(asked)
    return found
