"""From what a server is started with to what it serves."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from steerwell import __version__
from steerwell.concepts import Concept, concept_names, load_concept
from steerwell.core.artifacts import load_direction, save_direction
from steerwell.core.errors import ArgumentError, ArtifactError, UnknownNameError
from steerwell.core.policy import load_policy
from steerwell.core.records import Direction
from steerwell.engines.rows import ServingEngine
from steerwell.serving.catalog import Catalog, Requests
from steerwell.serving.keys import Keys
from steerwell.serving.steering import PolicySpec
from steerwell.studies.fitting import fit
from steerwell.testbed.bundled import MODELS

UNSTEERED = "unsteered"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
DEMO_POLICY = PolicySpec(direction="dishonesty", method="stmp", layers=(0,), strength=2.0)  # as in the README
DEMO_NAME = "honest"
Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True, slots=True)
class Registered:
    """Directions and policies by name, and the name of the default policy (None: unsteered)."""

    directions: Mapping[str, Direction] = field(default_factory=dict)
    policies: Mapping[str, PolicySpec] = field(default_factory=dict)
    default: str | None = None


def registered(directions: Sequence[str], policies: Sequence[Path], default: str | None) -> Registered:
    """What the command line names.

    Args:
        directions: folders, or `NAME=FOLDER`; a folder's own name is the direction's otherwise.
        policies: policy files; each brings its directions, under their concepts' names.
        default: the default policy's name, or "unsteered"; None: the only policy, if there is one.

    Raises:
        ArtifactError: a file is missing or damaged.
        ArgumentError: a name is given twice; there are several policies and none is the default.
        UnknownNameError: the default is none of them.
    """
    folders: dict[Path, str] = {}
    found: dict[str, Direction] = {}
    for word in directions:
        name, folder = _named(word)
        if name in found:
            raise ArgumentError(f"--direction: {name!r} is given twice; name one of them: --direction NAME={folder}")
        found[name], folders[folder.resolve()] = load_direction(folder), name

    def name_of(path: str) -> str:
        folder = Path(path).resolve()
        if folder not in folders:
            direction = load_direction(folder)
            name, number = direction.concept, 2
            while name in found:
                name, number = f"{direction.concept}-{number}", number + 1
            found[name], folders[folder] = direction, name
        return folders[folder]

    specs: dict[str, PolicySpec] = {}
    for file in policies:
        policy = load_policy(file)
        name = policy.name or file.stem
        if name in specs:
            raise ArgumentError(f"--policy: {name!r} is there twice; change 'name' in {file}")
        specs[name] = PolicySpec.of(policy, name_of(policy.direction), name_of(policy.gate) if policy.gate else None)
    return Registered(found, specs, _default(specs, default))


def demo(engine: ServingEngine, say: Progress, tell: Callable[[str], None]) -> Registered:
    """The bundled concepts, fitted on the bundled model (kept in the user's cache folder), and an honest policy.

    Args:
        engine: the bundled model.
        say: called with what is being done and how many answers it takes; returns where progress goes.
        tell: called with lines for people.
    """
    language = engine.info.language
    made = hashlib.sha256(json.dumps([engine.info.config_hash, engine.info.signature]).encode()).hexdigest()[:12]
    folder = cache_folder() / f"demo-{__version__}-{made}"
    concepts = [load_concept(name, language) for name in concept_names(language)]
    directions = {item.concept: _fitted(engine, item, folder, say, tell) for item in concepts}
    return Registered(directions, {DEMO_NAME: DEMO_POLICY}, DEMO_NAME)


def cache_folder() -> Path:
    """Where this user's programs keep what they can make anew."""
    home = Path.home()
    usual = {"darwin": home / "Library" / "Caches", "win32": home / "AppData" / "Local"}
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else usual.get(sys.platform, home / ".cache")) / "steerwell"


def catalog_of(
    engine: ServingEngine, served: str, listed: Registered, requests: Requests | None, *, monitor_only: bool
) -> Catalog:
    """The catalog of a server.

    Args:
        engine: the served model.
        served: its name for clients.
        listed: what to register.
        requests: what requests may choose; None: `locked` where there is a default policy, else `open`.
        monitor_only: observe, and change nothing.

    Raises:
        ArgumentError: locked without a policy; nothing to monitor; a policy that cannot be built.
        ModelMismatchError: a direction of another model.
    """
    chosen: Requests = requests or ("locked" if listed.default else "open")
    if chosen == "locked" and listed.default is None:
        raise ArgumentError("--requests locked: there is no default policy to lock; give --policy FILE")
    if monitor_only and not listed.policies:
        raise ArgumentError("--monitor-only: there is nothing to watch; give --policy FILE")
    names = {direction.concept for direction in listed.directions.values()}
    catalog = Catalog(engine.info, served, chosen, listed.default, monitor_only, _poles(names, engine.info.language))
    for name, direction in listed.directions.items():
        catalog.put_direction(name, direction)
    if listed.default is not None:  # first, so that the others are held against it
        catalog.put_policy(listed.default, listed.policies[listed.default])
    for name, policy in listed.policies.items():
        catalog.put_policy(name, policy)
    return catalog


def served_name(model: str, given: str | None) -> str:
    """A model's name for clients: the given one, the bundled one's, a hub id, or the last part of a local path.

    Raises:
        ArgumentError: a name with a colon, which stands before a policy's name.
    """
    local = Path(model).exists() or model.endswith(".gguf")
    name = given or (f"steerwell-{model}" if model in MODELS else Path(model).resolve().stem if local else model)
    if ":" in name or not re.fullmatch(r"[!-~]{1,120}", name):
        raise ArgumentError(
            f"--served-model-name: got {name!r}; expected up to 120 letters, digits and marks, no space and no ':'"
        )
    return name


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_safe(host: str, keys: Keys, *, no_auth: bool) -> None:
    """Raise `ArgumentError` where anybody on the network could use the server without a key, unless that is wanted."""
    if not is_loopback(host) and not keys and not no_auth:
        raise ArgumentError(
            f"--host: {host} can be reached from other machines, and there is no API key; make one with "
            "'steerwell keys new NAME --file keys.txt' and give --api-keys keys.txt, or say --no-auth"
        )


def hosts_of(host: str, allowed: Sequence[str]) -> frozenset[str] | None:
    """Names under which a server answers: on loopback its own, and those that are allowed; None: any.

    A page of the web can have its own name point to this machine (DNS rebinding); the browser then tells that name.
    """
    if not is_loopback(host) and not allowed:
        return None
    return LOOPBACK | {host.lower()} | {name.lower() for name in allowed}


def report_page(folder: Path | None) -> Path | None:
    """A study's page; raises `ArgumentError` where there is none."""
    if folder is None:
        return None
    page = folder / "report.html"
    if not page.is_file():
        raise ArgumentError(f"--report: {folder} holds no report.html; run: steerwell report {folder}")
    return page.resolve()


def _named(word: str) -> tuple[str, Path]:
    """`NAME=FOLDER` or `FOLDER` as a name and a folder."""
    name, equals, rest = word.partition("=")
    if equals and not Path(word).exists():
        return name, Path(rest)
    folder = Path(word)
    return folder.resolve().name, folder


def _default(policies: Mapping[str, PolicySpec], default: str | None) -> str | None:
    if default is None:
        if len(policies) > 1:
            raise ArgumentError(
                f"--default: there are several policies ({', '.join(policies)}); say which one answers requests that "
                f"choose none, or '{UNSTEERED}'"
            )
        return next(iter(policies), None)
    if default == UNSTEERED:
        return None
    if default not in policies:
        raise UnknownNameError("policy", default, [*policies, UNSTEERED], "It is what --default names.")
    return default


def _fitted(
    engine: ServingEngine, concept: Concept, folder: Path, say: Progress, tell: Callable[[str], None]
) -> Direction:
    """A direction from the cache, or fitted now and kept there."""
    place = folder / f"{concept.concept}-{concept.hash[:12]}"
    try:
        return load_direction(place)
    except ArtifactError:
        tell(f"learning {concept.concept!r} from the model's own answers, once: kept in {place}")
    advance = say(f"answers about {concept.concept!r}", 2 * len(concept.train))
    direction = fit(engine, concept, progress=advance, pool="prompt_last")
    try:
        save_direction(direction, place)
    except ArtifactError as error:
        tell(f"it is not kept for the next start: {error}")
    return direction


def _poles(names: set[str], language: str) -> dict[str, dict[str, str]]:
    """What the bundled concepts among these names call their classes."""
    bundled = names & set(concept_names(language))
    poles = {name: load_concept(name, language).poles for name in bundled}
    return {name: {"aligned": item.aligned, "violating": item.violating} for name, item in poles.items()}
