"""Paths of options: the home directory, and paths of another system."""

import argparse
import pathlib

import pytest

from detclipv2_jax.common.cli import local_path


def test_home_and_other_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/photos") == pathlib.Path("/home/me/photos")
    assert local_path("c:d") == pathlib.Path("c:d") and local_path(".") == pathlib.Path()


@pytest.mark.parametrize("text", ["C:\\photos", "d:/photos", "\\\\server\\share"])
def test_windows_paths_are_named(text):
    with pytest.raises(argparse.ArgumentTypeError, match="Windows path.*/mnt/c"):
        local_path(text)
