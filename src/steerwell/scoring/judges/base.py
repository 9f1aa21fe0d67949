"""What every judge offers."""

from __future__ import annotations

from typing import Protocol

from steerwell.core.records import Verdict


class Judge(Protocol):
    """Scores answers for a concept's trait and for coherence."""

    def score(self, concept: str, prompt: str, response: str) -> Verdict:
        """Score one answer; `prompt` is the last user turn."""
        ...
