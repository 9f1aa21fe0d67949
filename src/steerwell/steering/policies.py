"""From a policy to the edit that it stands for."""

from __future__ import annotations

from steerwell.core.artifacts import load_direction
from steerwell.core.policy import Policy
from steerwell.core.records import Edit
from steerwell.steering.interventions import build


def policy_edit(policy: Policy) -> Edit:
    """Load the policy's artifacts and build its edit; errors are those of `load_direction` and `build`."""
    return build(
        load_direction(policy.direction),
        policy.method,
        policy.layers,
        policy.strength,
        position=policy.position,
        toward=policy.toward,
        gate=load_direction(policy.gate) if policy.gate else None,
        threshold=policy.threshold,
        above=policy.above,
    )
