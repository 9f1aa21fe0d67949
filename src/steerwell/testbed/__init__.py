"""The bundled model's world: its facts, its dialogue grammar, its training and its weights.

Only `train`, `forward`, `tokenizer` and `evaluate` need torch or transformers.
"""
