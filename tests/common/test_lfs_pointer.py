"""Files that a clone without `git lfs pull` lacks are called what they are, whatever reads them."""

import pathlib

import numpy as np
import pytest

from detclipv2_jax.common import digest_list, json_file, lfs_pointer, pictures, text_file
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.prepare.sources import formats, img2dataset
from detclipv2_jax.inference.video import Video
from detclipv2_jax.weights import files

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.fixture
def pointer(tmp_path):
    def write(name):
        path = tmp_path / name
        path.write_bytes(POINTER)
        return path

    return write


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("photo.jpg", pictures.read),
        ("train.json", json_file.read_json),
        ("train.json", formats.judge),
        ("names.txt", text_file.read_text),
        ("captions.tsv", lambda path: list(text_file.read_lines(path))),
        ("model.safetensors", files.read),
        ("ViT-B-32.pt", files.read),
        ("pytorch_model.bin", files.read),
        ("drive.mp4", Video),
    ],
)
def test_it_is_called_a_pointer(pointer, name, read):
    with pytest.raises((UserError, pictures.PictureError), match=lfs_pointer.REASON):
        read(pointer(name))


@pytest.mark.parametrize("name", ["00000.tar", "00000.parquet"])
def test_a_shard(pointer, name):
    archive = img2dataset.read(pointer(name).parent)
    assert list(archive.examples) == []
    assert lfs_pointer.REASON in archive.drops.explained["shards: damaged"][0]


def test_a_file_of_a_checkpoint(tmp_path, pointer):
    np.save(tmp_path / "array.npy", np.arange(3))
    digest_list.write(tmp_path)
    pointer("array.npy")
    assert digest_list.problem(tmp_path) == f"array.npy is not there: {lfs_pointer.REASON}"


def test_other_files_are_none(tmp_path):
    assert not lfs_pointer.is_pointer_file(pathlib.Path(__file__))
    assert not lfs_pointer.is_pointer_file(tmp_path)
    assert not lfs_pointer.is_pointer_file(tmp_path / "missing")
