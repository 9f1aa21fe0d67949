"""Policy files: round trip, paths, bounds, and every mistake told."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerwell.core.errors import ArgumentError, ArtifactError
from steerwell.core.policy import Policy, load_policy, save_policy

GOOD = "direction: d\nmethod: sttp\nlayers: [3]\nstrength: 12\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "p.yaml"
    file.write_text(text)
    return file


def test_round_trip_with_paths_relative_to_the_file(tmp_path: Path) -> None:
    policy = Policy(
        name="honest", direction="d", method="swfc", layers=(1, 2), strength=1.5, toward="violating",
        position="response", bounds={"strength": (0, 2)}, found={"trait": 88.0},
    )  # fmt: skip
    loaded = load_policy(save_policy(policy, tmp_path / "sub" / "p.yaml"))
    assert loaded == policy.model_copy(update={"direction": str(tmp_path / "sub" / "d")})


def test_an_absolute_path_stays(tmp_path: Path) -> None:
    assert load_policy(write(tmp_path, GOOD.replace("direction: d", "direction: /x/d"))).direction == "/x/d"


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    policy = load_policy(write(tmp_path, GOOD))
    assert (policy.position, policy.toward, policy.bounds) == ("all", "aligned", None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "layer: 3\n", "layer"),
        (GOOD.replace("[3]", "[]"), "layers"),
        (GOOD.replace("[3]", "[-1]"), "layers"),
        (GOOD.replace("12", ".nan"), "strength"),
        (GOOD.replace("12", "much"), "strength"),
        (GOOD + "position: prompt\n", "position"),
        (GOOD + "toward: good\n", "toward"),
        (GOOD + "bounds: {strength: [0, 6]}\n", "outside the bounds 0 to 6"),
        (GOOD + "bounds: {strength: [6, 0]}\n", "exceeds"),
        (GOOD + "schema: 2\n", "schema"),
        ("- a\n- b\n", "p.yaml"),
        ("", "p.yaml"),
        ("direction: [", "YAML"),
        (GOOD.replace("12", "!!int ''"), "YAML"),
        (GOOD + "method: swfc\n", "given twice"),
    ],
)
def test_mistakes_name_the_field(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        load_policy(write(tmp_path, text))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_policy(tmp_path / "none.yaml")


def test_strength_within_bounds_only() -> None:
    policy = Policy(direction="d", method="sttp", layers=(3,), strength=12, bounds={"strength": (0, 24)})
    assert policy.with_strength(24).strength == 24
    with pytest.raises(ArgumentError, match="outside the bounds"):
        policy.with_strength(25)


def test_a_policy_makes_the_edit_that_its_words_say(tmp_path: Path, engine) -> None:
    import numpy as np

    from steerwell.core.artifacts import save_direction
    from steerwell.steering.directions import estimate
    from steerwell.steering.interventions import build
    from steerwell.steering.policies import policy_edit

    rng = np.random.default_rng(0)
    states = rng.normal(size=(2, 8, engine.info.n_layers, engine.info.d_model))
    direction = estimate(states[0] + 1, states[1], engine.info, method="mean_difference")
    save_direction(direction, tmp_path / "d")
    policy = load_policy(write(tmp_path, GOOD + "position: response\ntoward: violating\n"))
    expected = build(direction, "sttp", 3, 12, position="response", toward="violating")
    assert policy_edit(policy).id == expected.id
