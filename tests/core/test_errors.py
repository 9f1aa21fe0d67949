from __future__ import annotations

import inspect
import pickle

import pytest

from steerwell.core import errors
from steerwell.core.errors import MissingDependencyError, SteerwellError, UnknownNameError


def test_one_tree() -> None:
    """Whoever catches `SteerwellError` catches everything that is raised on purpose."""
    raised = [found for _, found in inspect.getmembers(errors, inspect.isclass) if issubclass(found, Exception)]
    assert len(raised) >= 8
    assert all(issubclass(found, SteerwellError) for found in raised)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        ("ArgumentError", ValueError),
        ("UnknownNameError", LookupError),
        ("ConceptError", ValueError),
        ("ModelMismatchError", ValueError),
        ("EngineError", RuntimeError),
        ("MissingDependencyError", ImportError),
    ],
)
def test_errors_are_also_what_a_python_programmer_expects(error: str, builtin: type) -> None:
    assert issubclass(getattr(errors, error), builtin)


def test_an_unknown_name_shows_what_is_known_and_the_nearest() -> None:
    error = UnknownNameError("method", "stpt", ["sttp", "swfc"], "See the docs.")
    assert str(error) == "unknown method 'stpt'; known: sttp, swfc. Did you mean 'sttp'? See the docs."
    assert (error.kind, error.name, error.known) == ("method", "stpt", ("sttp", "swfc"))


def test_an_unknown_name_far_from_all() -> None:
    assert str(UnknownNameError("layer", 12, range(2))) == "unknown layer 12; known: 0, 1."
    assert str(UnknownNameError("method", "x", [])) == "unknown method 'x'; known: none."


def test_a_missing_dependency_says_what_to_install() -> None:
    assert str(MissingDependencyError("torch", "hf")) == "'torch' is not installed; run: pip install 'steerwell[hf]'"


@pytest.mark.parametrize(
    "error",
    [
        errors.ArgumentError("n: got 0"),
        UnknownNameError("layer", 9, range(3), "Count again."),
        MissingDependencyError("torch", "hf"),
        errors.OverloadedError("full", 7),
        errors.NotFiniteError("layer 2"),
    ],
)
def test_errors_cross_processes_as_they_are(error: SteerwellError) -> None:
    error.add_note("elsewhere")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
