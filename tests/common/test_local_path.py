"""Paths of options: the home directory, and paths of another system."""

import argparse
import importlib
import pathlib

import pytest

from detclipv2_jax.common.cli import local_path, local_text


def test_home_and_other_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/photos") == pathlib.Path("/home/me/photos")
    assert local_path("c:d") == pathlib.Path("c:d") and local_path(".") == pathlib.Path()


@pytest.mark.parametrize("text", ["C:\\photos", "d:/photos", "\\\\server\\share"])
def test_windows_paths_are_named(text):
    with pytest.raises(argparse.ArgumentTypeError, match="Windows path.*/mnt/c"):
        local_path(text)


@pytest.mark.parametrize(
    "text", ["-", "", ".", "a//b/", "https://a.org/b.jpg", "lvis", "a~b", "~~"]
)
def test_everything_else_stays_as_it_is(text):
    assert local_text(text) == text


_NEEDED = {
    "detect": ["--checkpoint=c", "--names=n", "--output=o", "i.jpg"],
    "evaluate": ["--checkpoint=c", "--dataset=lvis", "--output=o"],
    "export": ["--checkpoint=c", "--output=o"],
    "page": ["--checkpoint=c"],
}


@pytest.mark.parametrize("command", _NEEDED)
def test_every_path_option_of_every_command(command, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = importlib.import_module(f"detclipv2_jax.{command}").parser()
    paths = [one for one in parser._actions if one.metavar in ("DIR", "FILE", "FILE.json", "IMAGE")]
    assert len(paths) == {"detect": 6, "evaluate": 5, "export": 3, "page": 1}[command]
    dataset = [one for one in parser._actions if one.dest == "dataset"]  # a name or a file
    for one in [*paths, *dataset]:
        given = [one.option_strings[0], "~/a b"] if one.option_strings else ["~/a b"]
        excluded = {"captions_file": "--names", "names_file": "--names"}
        excluded["predictions"] = "--checkpoint"
        needed = [n for n in _NEEDED[command] if not n.startswith(excluded.get(one.dest, "none"))]
        value = getattr(parser.parse_args([*needed, *given]), one.dest)
        assert value in ("/home/me/a b", ["i.jpg", "/home/me/a b"]), one.dest


@pytest.mark.parametrize("command", _NEEDED)
def test_windows_paths_end_every_command(command, capsys):
    main = importlib.import_module(f"detclipv2_jax.{command}").main
    with pytest.raises(SystemExit) as ended:
        main([*_NEEDED[command], "--checkpoint=C:\\runs\\a"])
    assert ended.value.code == 2 and "is a Windows path" in capsys.readouterr().err
