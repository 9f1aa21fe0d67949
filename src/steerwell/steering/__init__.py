"""Directions (from pooled activations) and interventions (a direction and a strength, as data for one kernel)."""
