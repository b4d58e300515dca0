"""A package imports only packages above it in one table, and other rules for imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

PACKAGE = tiny_run.ROOT / "detclipv2_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each package may import itself and what it lists: packages further up, and those of EXTERNAL.
# `data/` never imports `data/prepare/`.
PACKAGES = {
    "common": [],
    "text": ["common"],
    "ops": ["common"],
    "models": ["text", "ops", "common"],
    "weights": ["models", "ops", "text", "common"],
    "data": ["text", "common", "tensorflow"],
    "data/prepare": ["data", "weights", "text", "common", "tensorflow"],
    "inference": ["models", "ops", "text", "common"],
    "evaluation": ["inference", "data/prepare", "data", "ops", "text", "models", "common"],
    "training": ["evaluation", "inference", "data", "weights", "models", "ops", "text", "common"],
    "exporters": ["evaluation", "inference", "models", "ops", "text", "common", "tensorflow"],
}
COMMANDS = {"main", "evaluate", "detect", "export", "page", "prepare", "__main__", "__init__"}
EXTERNAL = {"tensorflow"}
# Modules that must work without TensorFlow, which many GPU machines lack.
WITHOUT_TENSORFLOW = [
    "detect", "evaluate", "page", "inference.detector", "evaluation.job", "training.step",
    "training.checkpointer", "training.sharding",
]  # fmt: skip


def package_of(module: str) -> str | None:
    """Return the package of a dotted module path without `detclipv2_jax.`; None for a command."""
    parts = module.split(".")
    if parts[0] in COMMANDS or not parts[0]:
        return None
    return "data/prepare" if parts[:2] == ["data", "prepare"] else parts[0]


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return (imported module, whether at the top level of the file) for every import."""
    tree, found = ast.parse(path.read_text()), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = (PACKAGE.parent / (name.replace(".", "/") + ".py")).exists()
                is_module |= (PACKAGE.parent / name.replace(".", "/")).is_dir()
                found.append((name if is_module else node.module, node in tree.body))
    return found


def test_the_table_lists_rooms_from_the_top_down():
    names = list(PACKAGES)
    for number, (package, allowed) in enumerate(PACKAGES.items()):
        assert set(allowed) - EXTERNAL <= set(names[:number]), package
    on_disk = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert on_disk == {name.split("/")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_above_it(path):
    package = package_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    for name, at_the_top in imports(path):
        first, _, rest = name.partition(".")
        if first == "tensorflow":
            assert package is not None and "tensorflow" in PACKAGES[package], (
                "this package has no TensorFlow"
            )
            assert package != "exporters" or not at_the_top
        if first == "ml_collections":
            assert path.name in ("main.py", "flags.py"), "configs become dataclasses at the command"
        if first == "detclipv2_jax" and rest:
            other = package_of(rest)
            if package is None:
                assert other is not None or path.name == "__main__.py", "nothing imports a command"
            else:
                assert other == package or other in PACKAGES[package], (
                    f"{package} imports {other} ({name})"
                )


def test_no_circle_of_modules():
    """Import statements at the top level of files form no circle."""
    graph = {}
    for path in FILES:
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        graph[module] = {name for name, at_the_top in imports(path) if at_the_top}
    done, active = set(), []

    def visit(module):
        assert module not in active, " -> ".join([*active[active.index(module) :], module])
        if module in done or module not in graph:
            return
        active.append(module)
        for other in sorted(graph[module]):
            visit(other)
        done.add(active.pop())

    for module in graph:
        visit(module)


@pytest.mark.parametrize("module", WITHOUT_TENSORFLOW)
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


def test_tensorflow_datasets_is_imported_before_threads_start():
    """It patches __import__ while it is imported.

    If that happens in the data thread, a step that is traced meanwhile cannot import JAX's modules.
    """
    program = """
import sys
import detclipv2_jax.training.train
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
from etils.epy import lazy_imports_utils
del lazy_imports_utils._lazy_import
import tensorflow
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=tiny_run.environment())


def test_training_handles_signals_before_it_imports_jax():
    """A signal in the middle of an import of C++ code aborts the process."""
    program = "import sys, detclipv2_jax.main; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env=tiny_run.environment())


def test_nothing_edits_sys_path():
    for folder in ("detclipv2_jax", "scripts", "configs", "tests"):
        for path in (tiny_run.ROOT / folder).rglob("*.py"):
            if path != Path(__file__).resolve():
                assert not re.search(r"sys\.path(\.insert|\.append|\[:0\])", path.read_text()), path


def test_pins_carry_no_address_of_a_registry():
    for path in tiny_run.ROOT.glob("requirements*"):
        text = path.read_text()
        assert "://" not in text and "--index" not in text and "--find-links" not in text
    pins = (tiny_run.ROOT / "requirements.txt").read_text().splitlines()
    assert all(re.match(r"[\w.\-\[\]]+==|\s*#|$", line) for line in pins)
