"""Who may know whom: the rooms of the house, held to by imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

PACKAGE = tiny_run.ROOT / "detclipv2_jax"
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """(imported module, whether it is at the top of the file)."""
    tree, found = ast.parse(path.read_text()), []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [(name, node in tree.body) for name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_know_only_whom_they_may(path):
    room = path.relative_to(PACKAGE).parts[0]
    for name, at_the_top in imports(path):
        if name.split(".")[0] == "tensorflow":
            inside = room == "formats" and not at_the_top
            assert room == "data" or inside, "only data/ and the writing of a SavedModel import it"
        if name.startswith("ml_collections"):
            assert path.name == "main.py", "configs become dataclasses at the entry point"
        if name.startswith("detclipv2_jax."):
            other = name.split(".")[1]
            if room == "ops":
                assert other in ("ops", "errors")
            if room == "models":
                assert other in ("models", "ops", "errors", "fields")
            if room == "evaluation":
                assert other in ("evaluation", "errors")
            if room == "data":
                assert other in ("data", "errors", "structures", "files", "images")


@pytest.mark.parametrize("module", ["step", "checkpoint", "evaluate", "detect", "page", "sharding"])
def test_runs_where_tensorflow_is_not_installed(module):
    program = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "clu", "ml_collections", "spacy", "array_record"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import detclipv2_jax.{module}
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=tiny_run.environment())


def test_the_thread_of_the_data_replaces_no_imports_of_the_others():
    """TensorFlow Datasets does so while it is imported: that comes first, TensorFlow in the thread.

    Once in a while a step was traced at that moment, and JAX did not find its own modules.
    """
    program = """
import sys
import detclipv2_jax.train
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
from etils.epy import lazy_imports_utils
del lazy_imports_utils._lazy_import
import tensorflow
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=tiny_run.environment())


def test_pins_carry_no_address_of_a_registry():
    for path in tiny_run.ROOT.glob("requirements*"):
        text = path.read_text()
        assert "://" not in text and "--index" not in text and "--find-links" not in text
    pins = (tiny_run.ROOT / "requirements.txt").read_text().splitlines()
    assert all(re.match(r"[\w.\-\[\]]+==|\s+#|$", line) for line in pins)
