"""Judges: who scores answers. `base.py` says what each offers."""
