"""vLLM's tests have their own environment (`make test-vllm`); without vLLM only those of the engine's parts run."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, so that a test can look inside
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")

NEED_VLLM = ("engine", "policy", "processes", "serve", "studies", "traces")
collect_ignore = [] if importlib.util.find_spec("vllm") else [f"test_{name}.py" for name in NEED_VLLM]


def save_model(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a random model whose head size vLLM's CPU attention takes."""
    import torch
    import transformers

    from tests.models import GROUPED, SHAPE, tokenizer

    shape = {"hidden_size": 64, "num_attention_heads": 2}
    others = {key: value for key, value in SHAPE.items() if "hidden" not in key and "heads" not in key}
    configs = {
        "llama": lambda: transformers.LlamaConfig(**GROUPED | shape | {"head_dim": 32}),
        "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=4, n_head=2, n_positions=256, **others),
    }
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(configs[name]()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    """A function: architecture -> folder of a random model of it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_model(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder
