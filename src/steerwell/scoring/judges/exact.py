"""The exact judge, for answers of the bundled model; it lives with the world that it knows."""

from steerwell.testbed.judge import ExactJudge

__all__ = ["ExactJudge"]
