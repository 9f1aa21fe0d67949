"""Prompts to tokens and tokens to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from steerwell.core.errors import ArgumentError
from steerwell.core.records import Message, Prompt


class TextCodec:
    """A tokenizer with this library's rules.

    A conversation goes through the model's chat template; where that refuses or drops the system turn, its text goes in
    front of the first user turn. A model without template (a base model) gets the turns' texts one per line.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any]) -> None:
        self._tokenizer, self._options = tokenizer, dict(options)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, up to where the answer begins."""
        if prompt.tokens is not None:
            ids = list(prompt.tokens)
        elif prompt.text is not None:
            ids = self._tokenizer(prompt.text)["input_ids"]
        elif self._tokenizer.chat_template:
            ids = self._tokenizer(self._render(prompt.messages), add_special_tokens=False)["input_ids"]
        else:
            ids = self._tokenizer("\n".join(turn.content for turn in prompt.messages))["input_ids"]
        if prompt.prefill:
            ids = [*ids, *self.tokens(prompt.prefill)]
        if not ids:
            raise ArgumentError("prompt: it holds no token, and this tokenizer adds no begin token; write some text")
        return list(ids)

    def encode_known(self, prompt: Prompt, vocabulary: int) -> list[int]:
        """`encode`; raises `ArgumentError` for a token that is not among a model's `vocabulary` tokens."""
        ids = self.encode(prompt)
        if prompt.tokens is not None and not (min(ids) >= 0 and max(ids) < vocabulary):
            raise ArgumentError(f"prompt: holds token ids outside 0 to {vocabulary - 1}")
        return ids

    def tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of a part of a text, without special tokens."""
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def begin(self) -> str:
        """The begin token, or the end token where a tokenizer has no begin token."""
        return str(self._tokenizer.bos_token or self._tokenizer.eos_token)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _render(self, messages: Sequence[Message]) -> str:
        first, *others = messages
        try:
            if first.role == "system" and others:
                rendered = self._with_system(messages)
                if first.content.strip() in rendered:
                    return rendered
                merged = Message(others[0].role, f"{first.content}\n\n{others[0].content}")
                return self._apply([merged, *others[1:]])
            return self._apply(messages)
        except TemplateError as error:
            raise ArgumentError(f"prompt: the model's chat template refuses these turns: {error}") from error

    def _with_system(self, messages: Sequence[Message]) -> str:
        """The conversation as it is; empty where the template refuses it."""
        try:
            return self._apply(messages)
        except TemplateError:
            return ""

    def _apply(self, messages: Sequence[Message]) -> str:
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        rendered: str = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **self._options
        )
        return rendered


class TextStream:
    """Text of a growing answer: what can be shown already, up to the first stop string."""

    def __init__(self, codec: TextCodec, stop: tuple[str, ...]) -> None:
        self._codec, self._stop = codec, stop
        self._window = max((len(text.encode()) for text in stop), default=0) + 16  # a token may be a single byte
        self._shown = 0
        self._text, self._read = "", (0, 0)  # of all tokens but an unfinished character; see `_grown`

    def stopped(self, tokens: Sequence[int]) -> bool:
        """Whether a stop string stands in the newest text (a window that any stop string fits into)."""
        if not self._stop:
            return False
        tail = self._codec.decode(tokens[-self._window :])
        return any(stop in tail for stop in self._stop)

    def final(self, tokens: Sequence[int]) -> str:
        """The whole text, cut before the first stop string."""
        return self._cut(self._codec.decode(tokens))

    def fresh(self, tokens: Sequence[int], *, done: bool) -> str:
        """Text not yet shown; an unfinished character or a possible beginning of a stop string is held back."""
        if done:
            text = self.final(tokens)
        else:
            text = self._cut(self._grown(tokens))
            longest = max((_overlap(text, stop) for stop in self._stop), default=0)
            text = text[: len(text) - longest]
        piece, self._shown = text[self._shown :], max(self._shown, len(text))
        return piece

    def _grown(self, tokens: Sequence[int]) -> str:
        """The text of all tokens but an unfinished character; only the newest tokens are decoded.

        A tokenizer may drop the space before what it takes for a beginning, so new tokens are decoded behind those
        that were new the last time, whose text is then left out.
        """
        begin, known = self._read
        behind, text = self._codec.decode(tokens[begin:known]), self._codec.decode(tokens[begin:])
        if len(text) > len(behind) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._text, self._read = self._text + text[len(behind) :], (known, len(tokens))
        return self._text

    def _cut(self, text: str) -> str:
        ends = [text.find(stop) for stop in self._stop]
        return text[: min((end for end in ends if end >= 0), default=len(text))]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:size])), 0)
