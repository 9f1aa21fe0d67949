"""Safe YAML that tells what is wrong, always as a `yaml.YAMLError` with its line."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


def parse_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """One document: its node tree (for line numbers) and its data; (None, None) where there is none.

    Raises:
        yaml.YAMLError: wrong syntax, a key given twice, or a value that its tag or form forbids; the attribute `note`,
            where there is one, says how to mend it.
        RecursionError: nested too deeply.
    """
    loader = _UniqueKeys(text)
    try:
        node = loader.get_single_node()
        return node, loader.construct_document(node) if node is not None else None
    finally:
        loader.dispose()


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice (plain YAML keeps the last one silently)."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As in YAML, but a value that its tag or form forbids (a 13th month) is an error with its line."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            raise _error("this value cannot be read as what it looks like", "put it in quotes", node) from error
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise _error("this text holds half a character", "write the whole one instead of its escape code", node)
        return value


def _error(problem: str, fix: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark, note=fix)


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Hashable] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise _error("this field name is not a word", "write 'field: value'", key_node)
        if key in seen:
            raise _error(f"the field {key!r} is given twice", "keep one of the two", key_node)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
