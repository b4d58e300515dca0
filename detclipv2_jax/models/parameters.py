"""Paths of parameters, and regex rules that assign a value to each of them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from detclipv2_jax.common.errors import UserError


def path_name(path: Sequence) -> str:
    """Return a JAX key path as a string such as 'backbone/layers/0/blocks/1/attn/qkv/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_paths(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return all parameters of nested dicts by their path (the keys joined by '/')."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def match_rules(rules: Sequence[tuple[str, object]], params: PyTree, what: str) -> PyTree:
    """Return, for every parameter, the value of the first rule that matches its path.

    Args:
        rules: (regex, value) pairs. A regex must match the whole path.
        params: tree of parameters.
        what: what the rules assign, for the error message, such as "sharding".

    Returns:
        A tree like `params` with the rules' values as leaves.

    Raises:
        UserError: no rule matches a parameter; the message names it.
    """

    def first_match(path, _):
        name = path_name(path)
        for pattern, value in rules:
            if re.fullmatch(pattern, name):
                return value
        raise UserError(
            f"No {what} rule matches the parameter {name}. Add a rule for it, or end the rules "
            "with a rule for '.*'."
        )

    return jax.tree_util.tree_map_with_path(first_match, params)
