"""`steerwell serve`: a steered model behind OpenAI's API, with a playground."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from steerwell.apps.cli.common import (
    DEFAULT_MODEL,
    DeviceMap,
    Dtype,
    EngineArgs,
    EngineName,
    GgufFile,
    Model,
    TensorParallel,
    Trust,
    err,
    load_either,
    tasks,
)
from steerwell.core.errors import ArgumentError, EngineError, MissingDependencyError

if TYPE_CHECKING:
    from steerwell.apps.server.service import Service
    from steerwell.serving.catalog import Catalog

STEERING, NETWORK, LIMITS = "Steering", "Network", "Limits"
FITTED, TRACED = 16, 16_384  # vLLM's: requests whose states are read at one time, tokens whose projections are kept
RequestsMode = Literal["locked", "policies", "open"]


def serve(
    model: Model = DEFAULT_MODEL,
    served_model_name: Annotated[str | None, typer.Option(help="The model's name for clients.")] = None,
    direction: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR|NAME=DIR", help="Saved direction; repeatable.", rich_help_panel=STEERING),
    ] = None,
    policy: Annotated[
        list[Path] | None, typer.Option(help="Policy file; repeatable.", rich_help_panel=STEERING)
    ] = None,
    default: Annotated[
        str | None,
        typer.Option(
            help="Policy of requests that choose none, or 'unsteered'; default: the only one.", rich_help_panel=STEERING
        ),
    ] = None,
    requests: Annotated[
        RequestsMode | None,
        typer.Option(
            help="What a request may choose. locked: nothing but a strength within the default policy's bounds; "
            "policies: one of them; open: also its own steering, and none. Default: locked if there is a default "
            "policy, else open.",
            rich_help_panel=STEERING,
        ),
    ] = None,
    monitor_only: Annotated[
        bool, typer.Option("--monitor-only", help="Observe and flag; change nothing.", rich_help_panel=STEERING)
    ] = False,
    host: Annotated[str, typer.Option(help="Address to bind.", rich_help_panel=NETWORK)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.", rich_help_panel=NETWORK)] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(help="Keys file for clients ('steerwell keys new').", rich_help_panel=NETWORK)
    ] = None,
    admin_keys: Annotated[
        Path | None, typer.Option(help="Keys file for the admin API and /metrics.", rich_help_panel=NETWORK)
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Serve other machines without keys.", rich_help_panel=NETWORK)
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name to answer under, behind a proxy; repeatable.", rich_help_panel=NETWORK),
    ] = None,
    root_path: Annotated[str, typer.Option(help="Path that a proxy in front cuts off.", rich_help_panel=NETWORK)] = "",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU threads of the model; default: one per core. Fewer where others need cores. --engine hf only.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Answers that decode together.", rich_help_panel=LIMITS)] = 64,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Answers x longest; bounds memory. --engine hf only.", rich_help_panel=LIMITS)
    ] = 65_536,
    queue: Annotated[int, typer.Option(min=1, help="Answers that wait; more get 429.", rich_help_panel=LIMITS)] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds per request.", rich_help_panel=LIMITS)] = 120.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Per answer.", rich_help_panel=LIMITS)] = 2048,
    max_choices: Annotated[int, typer.Option(min=1, help="Answers per request.", rich_help_panel=LIMITS)] = 16,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.", rich_help_panel=LIMITS)] = 1_000_000,
    report: Annotated[Path | None, typer.Option(help="Study whose report.html to show at /report.")] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts and answers to the log.")] = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    trust_remote_code: Trust = False,
    engine_name: EngineName = "hf",
    tensor_parallel: TensorParallel = 1,
    engine_args: EngineArgs = None,
) -> None:
    """Serve a model, steered per request or by a policy, behind OpenAI's API; a playground is at /.

    Without --model, --direction and --policy: the bundled model with four concepts and an honest default policy.
    """
    try:
        import torch

        from steerwell.apps.server import run, start
        from steerwell.apps.server.service import Service
        from steerwell.serving import keys, logs, monitoring, scheduler
        from steerwell.serving.limits import Limits
        from steerwell.serving.steering import MAX_TERMS
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or "fastapi", "serve") from error

    if engine_name == "vllm" and threads is not None:
        raise ArgumentError("--threads: vLLM's processes have their own; set OMP_NUM_THREADS and leave it out")
    limits = Limits(
        batch=batch,
        batch_tokens=batch_tokens,
        queue=queue,
        timeout=timeout,
        max_tokens=max_tokens,
        choices=max_choices,
        body=max_body,
    )
    clients, admins = keys.load_keys(api_keys, admin_keys)
    start.require_safe(host, clients, no_auth=no_auth)
    name, page = start.served_name(model, served_model_name), start.report_page(report)
    listed = start.registered(direction or [], policy or [], default)
    shows = model == DEFAULT_MODEL and not (direction or policy or default)
    with run.bound(host, port) as listener, ExitStack() as stack:
        if threads is not None:
            torch.set_num_threads(threads)
        options = (engine_name, model, dtype, device_map, gguf_file, batch, trust_remote_code, tensor_parallel)
        traces = max(TRACED, max_tokens)
        engine = load_either(*options, engine_args, max_terms=MAX_TERMS, captures=FITTED * shows, traces=traces)
        stack.callback(engine.close)
        if shows:
            with tasks() as say:
                listed = start.demo(engine, say, lambda text: err.print(text, markup=False, soft_wrap=True))
            requests = requests or "open"
        catalog = start.catalog_of(engine, name, listed, requests, monitor_only=monitor_only)
        log, monitor = logs.configure(log_prompts), monitoring.Monitor()
        service = Service(
            served=name,
            info=engine.info,
            scheduler=scheduler.Scheduler(engine, limits, monitor),
            catalog=catalog,
            monitor=monitor,
            log=log,
            decode=engine.decode,
            limits=limits,
            keys=clients,
            admins=admins,
            report=page,
            hosts=start.hosts_of(host, allow_host or []),
        )
        if not run.run(service, listener, root_path, lambda: _announce(service, run.url_of(listener))):
            raise EngineError("the server could not start; its log says why")


def _announce(service: Service, url: str) -> None:
    """What is served, and what that means, on stderr."""
    told = service.catalog.describe()
    lines = [
        f"Serving {service.served} at {url}/v1; playground: {url}/",
        f"models: {', '.join(service.catalog.models())}",
        f"requests are {told['requests']}: {_meaning(service.catalog)}",
    ]
    if told["monitor_only"]:
        lines.append("monitor only: answers are observed and flagged, nothing is edited")
    if not service.keys:
        lines.append("no API key is asked for: everybody who reaches this address may use it")
    for line in lines:
        err.print(line, markup=False, soft_wrap=True)


def _meaning(catalog: Catalog) -> str:
    told = catalog.describe()
    default = f"policy {told['default']!r}" if told["default"] else "no steering"
    return {
        "locked": f"every answer is under {default}, whatever a request says",
        "policies": f"they may choose a policy; else they get {default}",
        "open": f"they may choose their own steering, or switch it off (--requests locked forbids that); "
        f"else they get {default}",
    }[told["requests"]]
