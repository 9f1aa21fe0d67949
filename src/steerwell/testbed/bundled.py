"""Where the bundled models lie."""

from __future__ import annotations

from pathlib import Path

BUNDLED = "pilot"
MODELS = (BUNDLED, "small")  # the second one is smaller and was trained from another seed


def bundled_path(name: str = BUNDLED) -> Path:
    """Folder of a bundled chat model, in Hugging Face format; `name` is one of `MODELS`."""
    return Path(__file__).parent / name
