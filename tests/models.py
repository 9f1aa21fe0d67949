"""Random tiny models of the architectures that people deploy, with a byte tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 264
TEMPLATE = (
    "{% for m in messages %}{{ '<|' ~ m['role'] ~ '|>' ~ m['content'] ~ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "tie_word_embeddings": False,
    "initializer_range": 0.35,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
ARCHITECTURES = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=16),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=None),
    "phi": lambda: transformers.PhiConfig(**SHAPE),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=4, n_head=4, n_positions=256, **{k: v for k, v in SHAPE.items() if "hidden" not in k}
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SHAPE),
    "olmo": lambda: transformers.OlmoConfig(**GROUPED),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Every byte is a token; the chat marks are tokens too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    marks = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    bytes_only.add_special_tokens(marks)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        bos_token=marks[0],
        eos_token=marks[1],
        pad_token=marks[2],
        additional_special_tokens=marks[3:],
        chat_template=TEMPLATE,
    )


def save_tiny(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a random model of an architecture in Hugging Face format."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]())
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
