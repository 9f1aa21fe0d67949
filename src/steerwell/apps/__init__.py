"""Apps: parse and call, no logic."""
