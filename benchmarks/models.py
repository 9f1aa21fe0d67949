"""The models that are timed, as plain Hugging Face folders that every contestant can read.

They are copies without end token: whatever is asked, an answer has exactly `max_new_tokens` tokens, in every library.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.inputs import words
from steerwell.testbed.bundled import BUNDLED, bundled_path

TEMPLATE = (
    "{% for m in messages %}{{ '<|' ~ m['role'] ~ '|>' ~ m['content'] ~ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
END, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<|unknown|>"
MARKS = (END, PAD, UNKNOWN, "<|system|>", "<|user|>", "<|assistant|>")
# d_model, layers, intermediate size, heads, vocabulary: the bundled model's shape, and that of a real small model.
SHAPES = {"random-pilot": (128, 6, 352, 4, 2048), "random-100M": (640, 16, 1728, 10, 32000)}


def prepare(model: str, folder: Path) -> Path:
    """Write a float32 copy of a model without end token.

    Args:
        model: `pilot`, a name in `SHAPES` (random weights), a hub id, a local folder or a `.gguf` file.
        folder: where to; each model gets a folder of its own in it.
    """
    target = folder / Path(model).stem
    if model in SHAPES:
        network, tokenizer = _random(*SHAPES[model])
    else:
        place = bundled_path() if model == BUNDLED else Path(model)
        options = {"gguf_file": place.name} if place.suffix == ".gguf" else {}
        source = str(place.parent) if options else str(place)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        network = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pad = tokenizer.pad_token_id
    tokenizer.eos_token = None
    for config in (network.config, network.generation_config):
        config.eos_token_id, config.pad_token_id = None, pad
    network.generation_config.do_sample = False
    network.generation_config.temperature = network.generation_config.top_p = network.generation_config.top_k = None
    network.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def default_models() -> list[str]:
    """The bundled model (or random weights of its shape, where it is missing), and a model of realistic size."""
    return [BUNDLED if (bundled_path() / "model.safetensors").exists() else "random-pilot", "random-100M"]


def _random(
    d_model: int, layers: int, inner: int, heads: int, vocabulary: int
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A Llama with random weights, and a tokenizer whose tokens are the words of the prompts."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=d_model,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    known = {word: index for index, word in enumerate([*MARKS, *words()])}
    by_word = Tokenizer(models.WordLevel(known, unk_token=UNKNOWN))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    by_word.add_special_tokens(list(MARKS))
    tokenizer = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=by_word, eos_token=END, pad_token=PAD, unk_token=UNKNOWN, chat_template=TEMPLATE
    )
    return transformers.LlamaForCausalLM(config), tokenizer
