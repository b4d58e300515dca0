"""Names in README.md and docs/ that exist: paths, config fields and flags of the commands."""

import importlib
import re

import pytest
import tiny_run

from detclipv2_jax.__main__ import COMMANDS
from detclipv2_jax.common import config_dict
from detclipv2_jax.training.config import RunConfig

PAGES = [
    *tiny_run.ROOT.glob("*.md"),
    *(tiny_run.ROOT / "docs").rglob("*.md"),
    *(tiny_run.ROOT / "configs").glob("*.py"),
    *(tiny_run.ROOT / "scripts").rglob("*.py"),
]
SECTIONS = "model|init|data|loss|optimizer|train|eval|mesh"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(tiny_run.ROOT)))
def test_paths_and_config_fields_exist(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("names what is gone")
    text = page.read_text()
    for path in re.findall(
        r"\b(?:detclipv2_jax|scripts|configs|tests)/[\w/]+\.(?:py|sh|toml)\b", text
    ):
        assert (tiny_run.ROOT / path).is_file(), path
    fields = re.findall(r"--config\.([a-z_0-9.]*[a-z_0-9])", text)
    fields += re.findall(rf"`config\.((?:{SECTIONS})\.[a-z_0-9.]+)`", text)
    if page.name == "paper_vs_ours.md":
        fields += fields_of_table(text)
    for field in fields:
        config_dict.check_path(RunConfig, field, f"{page.name}: config")


def fields_of_table(text):
    """The fields in backticks; `…name` is next to the field before it, `data.*` any kind."""
    found = []
    for token in re.findall(rf"`((?:{SECTIONS})\.[a-z_0-9.*]+|…[a-z_0-9]+)`", text):
        if token.startswith("…"):
            token = f"{found[-1].rpartition('.')[0]}.{token[1:]}"
        found.append(token.replace("data.*", "data.detection").removesuffix(".*"))
    return found


def flags_of(command):
    """The long options that the command's own parser accepts."""
    module = importlib.import_module(f"detclipv2_jax.{COMMANDS[command][0]}")
    make = getattr(module, "parser", None) or module.build_parser
    found, parsers = set(), [make()]
    for parser in parsers:
        for action in parser._actions:
            found.update(action.option_strings)
            choices = getattr(action, "choices", None)
            parsers += choices.values() if isinstance(choices, dict) else []
    return found


@pytest.mark.parametrize("command", ["evaluate", "detect", "export", "page", "prepare"])
def test_flags_in_commands_exist(command):
    starts = [rf"detclip {command}", rf"python -m detclipv2_jax\.{COMMANDS[command][0]}"]
    starts += [r"(?:python )?scripts/prepare_data\.py"] if command == "prepare" else []
    known = flags_of(command)
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(rf"(?:{'|'.join(starts)})\b([^\n`]*)", text):
            for flag in re.findall(r"(?<!\S)(--[a-z_-]+)", line):
                assert flag in known, f"{page.name}: {command} has no {flag}"
