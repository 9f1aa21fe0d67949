"""Studies: whole measurements, from a concept and a model to figures."""
