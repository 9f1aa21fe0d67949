"""Concepts: a trait with two poles, told in one YAML file."""

from steerwell.concepts.loader import ENGLISH, Fault, check_concept, concept_names, load_concept
from steerwell.concepts.schema import Concept, Pair, Rubric, Scenario

__all__ = [
    "ENGLISH",
    "Concept",
    "Fault",
    "Pair",
    "Rubric",
    "Scenario",
    "check_concept",
    "concept_names",
    "load_concept",
]
