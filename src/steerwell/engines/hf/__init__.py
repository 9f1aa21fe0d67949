"""The Hugging Face engine: any causal language model, batches whose rows are steered differently."""

from steerwell.engines.hf.engine import HFEngine

__all__ = ["HFEngine"]
