"""Names of parameters, and rules that match them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from detclipv2_jax.common.errors import UserError


def path_name(path: Sequence) -> str:
    """A tree path as 'backbone/stages/0/…'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def match_rules(rules: Sequence[tuple[str, object]], params: PyTree, what: str) -> PyTree:
    """For every parameter the value of the first rule whose pattern matches its whole path.

    Raises:
      UserError: naming a parameter that no rule matches (contract 4 of the design).
    """

    def pick(path, _):
        name = path_name(path)
        for pattern, value in rules:
            if re.fullmatch(pattern, name):
                return value
        raise UserError(f"No {what} rule matches the parameter {name}: add one, or end with '.*'.")

    return jax.tree_util.tree_map_with_path(pick, params)


def parameter_paths(params: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters by path, for example 'backbone/layers/0/blocks/1/attn/qkv/kernel'."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}
