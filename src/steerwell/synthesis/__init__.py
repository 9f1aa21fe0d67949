"""Steered text as data: labelled examples, their generation, quality control, and the detectors trained on them."""
