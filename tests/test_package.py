"""The wheel: what is in it, and that it works from another directory without the repository."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
import tiny_run

PROJECT = tomllib.loads((tiny_run.ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    to = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(to)]
    subprocess.run([*command, str(tiny_run.ROOT)], check=True, capture_output=True)
    (path,) = to.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_its_data_and_the_recipes(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "detclipv2_jax/configs/pretrain.py",
        "detclipv2_jax/text/assets/bpe_simple_vocab_16e6.txt.gz",
        "detclipv2_jax/text/assets/LICENSE",
        "detclipv2_jax/text/assets/senses.tsv",
        "detclipv2_jax/text/assets/wordnet/LICENSE",
        "detclipv2_jax/data/prepare/sources/symbols.csv",
        "detclipv2_jax/exporters/card.md.jinja",
    ):
        assert name in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"detclipv2_jax"}
    sources = {str(p.relative_to(tiny_run.ROOT)) for p in (tiny_run.ROOT / "configs").glob("*.py")}
    assert sources <= {name.removeprefix("detclipv2_jax/") for name in names}


@pytest.fixture(scope="module")
def outside(wheel, tmp_path_factory):
    """`outside(*arguments)` runs the installed wheel's `detclip` where there is no checkout."""
    site = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
    ]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "detclipv2_jax", *arguments],
            cwd=tmp_path_factory.mktemp("elsewhere"), env=environment,
            capture_output=True, text=True,
        )  # fmt: skip

    where = subprocess.run(
        [sys.executable, "-c", "import detclipv2_jax; print(detclipv2_jax.__file__)"],
        cwd=site, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert where.startswith(str(site))
    return run


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "detect", "export", "page"])
def test_every_command_has_help(outside, command):
    done = outside(command, "--help")
    assert done.returncode in (0, 1), done.stderr  # absl's --help exits with 1
    assert f"detclip {command}" in done.stdout or "--workdir" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_recipe_is_found_by_name_from_anywhere(outside, tmp_path):
    """The run stops at the missing data, so the recipe was read."""
    done = outside("train", "--config=pretrain.py:nano", f"--workdir={tmp_path}/run")
    assert done.returncode == 2, done.stderr
    assert "prepare" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_an_unknown_command_is_one_sentence(outside):
    done = outside("trian")
    assert done.returncode == 2 and done.stderr.startswith("error: unknown command 'trian'.")


def test_every_dependency_is_pinned():
    pins = (tiny_run.ROOT / "requirements.txt").read_text().lower().replace("_", "-")
    for dependency in PROJECT["dependencies"]:
        name = re.match(r"[A-Za-z0-9_.-]+", dependency)[0].lower().replace("_", "-")
        assert re.search(rf"^{re.escape(name)}(\[.*\])?==", pins, re.M), name


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_help_of_a_script_installs_nothing(script, tmp_path):
    environment = os.environ | {"VENV": str(tmp_path / "venv")}
    done = subprocess.run(
        ["bash", str(tiny_run.ROOT / "scripts" / script), "--help"],
        env=environment, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr
    assert f"./scripts/{script}" in done.stdout and not (tmp_path / "venv").exists()
