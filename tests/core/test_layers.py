"""The house rules: who may import whom, what stays light, and what is never used."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import steerwell

SOURCE = Path(steerwell.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
ROOMS = (
    "core",
    "concepts",
    "steering",
    "engines",
    "testbed",
    "runs",
    "scoring",
    "synthesis",
    "studies",
    "serving",
    "apps",
)
HEAVY = ("torch", "transformers", "sklearn", "accelerate", "matplotlib", "fastapi", "ray", "vllm", "datasets")
ALLOWED = {
    ("engines", "steerwell.testbed.bundled"),  # where the bundled model lies: a path, nothing else
    ("apps", "steerwell.__version__"),
}


def module_of(path: Path) -> str:
    return ".".join(("steerwell", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def imported(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports from this package, also inside functions and relatively."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def breaks_of_the_order(path: Path) -> list[str]:
    room = module_of(path).split(".")[1]
    found = []
    for line, name in imported(path, ast.parse(path.read_text())):
        if not inside(name, "steerwell") or any(room == who and inside(name, what) for who, what in ALLOWED):
            continue
        target = [*name.split("."), ""][1]
        if target not in ROOMS or ROOMS.index(target) > ROOMS.index(room):
            found.append(f"{path.relative_to(SOURCE)}:{line} imports {name}")
    return found


def test_every_file_lives_in_a_room_of_the_architecture() -> None:
    assert {module_of(path).split(".")[1] for path in FILES if module_of(path) != "steerwell"} <= set(ROOMS)


def test_a_module_imports_only_from_rooms_above_it() -> None:
    broken = [line for path in FILES if module_of(path) != "steerwell" for line in breaks_of_the_order(path)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("line", "fine"),
    [
        ("from steerwell.core.errors import ArgumentError", True),
        ("import numpy", True),
        ("from steerwell.testbed.bundled import BUNDLED", True),
        ("from steerwell.testbed import world", False),
        ("from steerwell import apps", False),
        ("import steerwell.scoring.judges", False),
        ("from ..studies import sweep", False),
        ("def late():\n    from steerwell.apps.cli import app", False),
        ("import steerwell", False),
    ],
)
def test_the_rule_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, fine: bool) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    (tmp_path / "engines").mkdir()
    path = tmp_path / "engines" / "made.py"
    path.write_text(line)
    assert (breaks_of_the_order(path) == []) == fine


def loaded_by(code: str) -> set[str]:
    """Heavy packages that a fresh interpreter has loaded after running some code."""
    tail = "\nimport sys\nprint('loaded:', *sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split()) & set(HEAVY)


def test_the_probe_sees_a_heavy_package() -> None:
    assert "torch" in loaded_by("import steerwell.steering.kernel")


@pytest.mark.parametrize(
    "code",
    [
        "import steerwell",
        "from steerwell import load_concept, load_direction, Prompt\nload_concept('dishonesty')",
        "import steerwell.concepts, steerwell.core.artifacts, steerwell.core.registry, steerwell.engines",
        "from steerwell.steering.interventions import METHODS\nMETHODS.names()",
    ],
)
def test_importing_is_light(code: str) -> None:
    assert loaded_by(code) == set()


CLI = """
from typer.testing import CliRunner
from steerwell.apps.cli import app
for arguments in (["--help"], *([name, "--help"] for name in {commands})):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (arguments, result.output, result.exception)
"""


@pytest.mark.skipif(not (SOURCE / "apps" / "cli" / "__init__.py").is_file(), reason="there is no CLI yet")
def test_the_clis_help_is_light() -> None:
    commands = ["demo", "concepts", "fit", "inspect", "generate", "serve", "keys"]
    assert loaded_by(CLI.format(commands=commands)) == set()


def test_nothing_is_unpickled() -> None:
    """Artifacts of strangers are read: no format that runs code."""
    runs_code = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
    found = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        found += [f"{path}:{line} {name}" for line, name in imported(path, tree) if name.split(".")[0] in runs_code]
        for node in ast.walk(tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            pickled = any(item.arg == "allow_pickle" for item in getattr(node, "keywords", []))
            if called in ("torch.load", "torch.save", "pickle.load", "yaml.load", "yaml.unsafe_load") or pickled:
                found.append(f"{path}:{node.lineno} {called}")
    assert not found, "\n".join(found)
