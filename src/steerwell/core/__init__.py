"""Records, errors, registry and artifacts: what every room shares. No torch here."""
