"""The activation of a published CLIP text tower, where its file or a file next to it states it.

Towers with the exact GELU and with QuickGELU have the same tensors. The wrong activation gives
wrong features without any error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_file import read_json
from detclipv2_jax.ops.kernels.mlp import Activation
from detclipv2_jax.weights import torchscript

ASSUMED: Activation = "quick_gelu"  # OpenAI's


class Stated(NamedTuple):
    """What is known about the activation of a text tower."""

    activation: Activation | None  # None: neither the file nor a config next to it states it
    where: str  # what states it

    def __str__(self) -> str:
        """Return a text for a log."""
        if self.activation is None:
            return f"activation {ASSUMED} is assumed: {self.where}"
        return f"activation {self.activation}, as {self.where} states"


def stated(path: str | Path) -> Stated:
    """Return the activation of the text tower in a file of CLIP weights, as far as it is stated.

    OpenAI's TorchScript archives contain the code of the model. Hugging Face's `config.json`
    (`hidden_act`) and open_clip's `open_clip_config.json` (`quick_gelu`) lie next to the weights.

    Raises:
        UserError: the config names an activation that the text tower does not have.
    """
    path = Path(path)
    if torchscript.is_archive(path):
        code = torchscript.code(path)
        quick, exact = "class QuickGELU(" in code, "class GELU(" in code
        if quick != exact:
            return Stated("quick_gelu" if quick else "gelu", f"the code in {path}")
    for name, read in (("open_clip_config.json", _of_open_clip), ("config.json", _of_transformers)):
        config = path.with_name(name)
        if config.is_file() and (found := read(_json(config))) is not None:
            if found not in ("gelu", "quick_gelu"):
                raise UserError(
                    f"{config}: the text tower has the activation {found!r}. Use a tower with "
                    "'gelu' or 'quick_gelu'."
                )
            return Stated(found, str(config))
    return Stated(None, f"neither {path} nor a config next to it states it")


def check(configured: Activation, path: str | Path) -> Stated:
    """Return what `stated` returns; `UserError` if it is not the config's activation."""
    found = stated(path)
    if found.activation not in (None, configured):
        raise UserError(
            f"config.model.text.activation is {configured!r}, but {found.where} states "
            f"{found.activation!r}. Set it to {found.activation!r}."
        )
    if found.activation is None and configured != ASSUMED:
        return Stated(configured, "config.model.text.activation")
    return found


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = read_json(path)
    except UserError:
        content = None
    return content if isinstance(content, Mapping) else {}


def _of_open_clip(config: Mapping[str, Any]) -> str | None:
    model = config.get("model_cfg")
    if not isinstance(model, Mapping) or "text_cfg" not in model:
        return None
    return "quick_gelu" if model.get("quick_gelu") else "gelu"  # absent means False


def _of_transformers(config: Mapping[str, Any]) -> str | None:
    section = config.get("text_config")
    section = section if isinstance(section, Mapping) else config
    if not str(section.get("model_type", config.get("model_type", ""))).startswith("clip"):
        return None
    return section.get("hidden_act", "quick_gelu")  # absent means transformers' default
