"""Where the bundled model lies."""

from __future__ import annotations

from pathlib import Path

BUNDLED = "pilot"


def bundled_path() -> Path:
    """Folder of the bundled chat model, in Hugging Face format."""
    return Path(__file__).parent / BUNDLED
