from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from steerwell.core import registry as registry_module
from steerwell.core.errors import UnknownNameError
from steerwell.core.registry import Registry

PACKAGE = "steerwell.steering.interventions"


@pytest.fixture
def interventions() -> Registry:
    return Registry("intervention", PACKAGE, "coefficients")


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch):
    """A function: publish a module under a name, as an installed package would."""
    points: list[EntryPoint] = []

    def publish(name: str, **attributes: object) -> None:
        module = ModuleType(f"someone_elses_{name}")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        points.append(EntryPoint(name, module.__name__, "steerwell.interventions"))

    def entry_points(group: str) -> list[EntryPoint]:
        return [point for point in points if point.group == group]

    monkeypatch.setattr(registry_module, "entry_points", entry_points)
    return publish


def test_the_file_name_is_the_name(interventions: Registry) -> None:
    assert set(interventions.names()) >= {"swfc", "sttp", "stmp", "directional_ablation", "clamp", "conditional"}
    assert interventions.names() == tuple(sorted(interventions.names()))
    assert interventions.get("swfc").__module__ == f"{PACKAGE}.swfc"


def test_private_modules_have_no_name() -> None:
    directions = Registry("direction", "steerwell.steering.directions", "fit")
    assert set(directions.names()) >= {"logistic", "mean_difference", "pca", "lda"}
    with pytest.raises(UnknownNameError):
        directions.get("_calibrate")


def test_a_third_partys_method_is_found(interventions: Registry, third_party) -> None:
    def coefficients(calibration: object, strength: float) -> tuple[float, float, float]:
        return 1.0, 2.0, strength

    third_party("nudge", coefficients=coefficients)
    assert "nudge" in interventions.names()
    assert interventions.get("nudge") is coefficients


def test_a_third_partys_method_builds_an_edit(interventions: Registry, third_party, monkeypatch) -> None:
    from steerwell.steering import interventions as package
    from tests import made

    third_party("nudge", coefficients=lambda calibration, strength: (1.0, 2.0, strength))
    monkeypatch.setattr(package, "METHODS", interventions)  # the package's own has looked already
    term = package.build(made.direction(), "nudge", 1, 3.0).terms[0]
    assert (term.gate, term.offset, term.gain) == (1.0, 2.0, 3.0)


def test_another_groups_entry_point_is_not_found(third_party) -> None:
    third_party("nudge", fit=lambda aligned, violating: None)
    assert "nudge" not in Registry("direction", "steerwell.steering.directions", "fit").names()


def test_a_bundled_name_cannot_be_overridden(interventions: Registry, third_party) -> None:
    third_party("swfc", coefficients=lambda calibration, strength: (0.0, 0.0, 0.0))
    assert interventions.get("swfc").__module__ == f"{PACKAGE}.swfc"
    assert interventions.names().count("swfc") == 1


def test_a_module_that_offers_nothing(interventions: Registry, third_party) -> None:
    third_party("empty")
    with pytest.raises(UnknownNameError, match=r"intervention implementation 'empty'.*must define 'coefficients'"):
        interventions.get("empty")


def test_an_unknown_name_gives_the_nearest(interventions: Registry) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown intervention 'conditionl'; known: .*swfc.*'conditional'"):
        interventions.get("conditionl")


@pytest.mark.parametrize("name", ["", "swfc.py", "..kernel", "__init__", "SWFC"])
def test_odd_names_are_unknown(interventions: Registry, name: str) -> None:
    with pytest.raises(UnknownNameError):
        interventions.get(name)
