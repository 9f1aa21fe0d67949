"""The public names, pinned: adding or removing one is a decision, not an accident."""

from __future__ import annotations

import subprocess
import sys

import pytest

import steerwell

PUBLIC = [
    "Calibration",
    "Concept",
    "Direction",
    "Edit",
    "EditTerm",
    "HFEngine",
    "Message",
    "Policy",
    "Prompt",
    "Receipt",
    "Response",
    "Sampling",
    "Score",
    "SteerwellError",
    "Verdict",
    "build",
    "check_concept",
    "concept_names",
    "contrast",
    "fit",
    "load_concept",
    "load_direction",
    "load_policy",
    "policy_edit",
    "save_direction",
    "save_policy",
]


def test_public_names() -> None:
    assert sorted(steerwell.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(steerwell, name).__doc__, name


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'steer'"):
        _ = steerwell.steer


def test_a_missing_extra_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import steerwell\n"
        "try:\n    steerwell.HFEngine\n"
        "except steerwell.SteerwellError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'steerwell[hf]'" in done.stdout
