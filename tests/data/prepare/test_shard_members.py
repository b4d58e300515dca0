"""Every picture in a shard is an example or is counted, however the shard's files are named."""

import gzip
import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import valid_text
from detclipv2_jax.data.prepare import registry
from detclipv2_jax.data.prepare.sources import img2dataset


def picture(shade: int, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(buffer, form)
    return buffer.getvalue()


def write_tar(path, *names, **options):
    """Write a tar whose texts say their key; each picture differs."""
    with tarfile.open(path, "w", **options) as tar:
        for shade, name in enumerate(names):
            if isinstance(name, tarfile.TarInfo):
                tar.addfile(name)
                continue
            is_text = name.endswith((".txt", ".json"))
            content = f"caption of {valid_text(name)}".encode() if is_text else picture(20 * shade)
            content = b"{}" if name.endswith(".json") else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def read(folder):
    """Return (image id: caption) and what was dropped."""
    archive = img2dataset.read(folder)
    found = {e.image_id.partition("/")[2]: e.caption for e in archive.examples}
    return found, dict(archive.drops.dropped)


def pair(key, suffix="jpg"):
    return f"{key}.{suffix}", f"{key}.txt"


def test_keys_with_dots(tmp_path):
    keys = ["000", "photo.v2", "photo.v3", "IMG_2021.05.01", "a.b/c.d", "http.x.org-1.2"]
    write_tar(tmp_path / "0.tar", *(name for key in keys for name in pair(key)))
    found, dropped = read(tmp_path)
    assert found == {key: f"caption of {key}.txt" for key in keys} and not dropped


FIELDS = {  # files of a shard: (captions by key, dropped)
    ("0.jpg", "0.txt", "0.seg.png"): ({"0": "0.txt"}, {"images: further picture of a key": 1}),
    ("0.seg.png", "0.jpg", "0.txt"): ({"0": "0.txt"}, {"images: further picture of a key": 1}),
    ("0.jpg", "0.txt", "0.cls.txt", "0.boxes.json"): ({"0": "0.txt"}, {}),
    ("0.img.jpg", "0.txt"): ({"0": "0.txt"}, {}),
    ("0.jpg", "0.caption.txt"): ({"0": "0.caption.txt"}, {}),
    # The caption of another picture, or a mask, is not taken.
    ("0.jpg", "0.v2.txt"): ({}, {"captions: empty": 1, "images: missing": 1}),
    ("0.txt", "0.seg.png"): ({}, {"captions: empty": 1, "images: missing": 1}),
    ("a.v1.jpg", "a.v2.txt"): ({}, {"captions: empty": 1, "images: missing": 1}),
    ("0.JPG", "0.TXT"): ({"0": "0.TXT"}, {}),
    ("./0.jpg", "0.txt"): ({"0": "0.txt"}, {}),
    ("/0.jpg", "/0.txt"): ({"0": "/0.txt"}, {}),
    ("../../0.jpg", "../../0.txt"): ({"../../0": "../../0.txt"}, {}),
    ("0.jpg", "0.txt", "._0.jpg", "._0.txt", "__MACOSX/0.jpg"): ({"0": "0.txt"}, {}),
    ("0.jpg", "0.txt", "0.jpg"): ({"0": "0.txt"}, {"images: key given twice": 1}),
    ("0.jpg", "0.gif", "0.txt"): ({"0": "0.txt"}, {"images: key given twice": 1}),
    ("0.tiff", "0.txt", "readme.md", "x"): ({"0": "0.txt"}, {}),
    ("0.jpg",): ({}, {"captions: empty": 1}),
    ("0.txt",): ({}, {"images: missing": 1}),
    ("0.json",): ({}, {"images: missing": 1}),
    (".hidden.jpg", ".hidden.txt"): ({".hidden": ".hidden.txt"}, {}),
}


@pytest.mark.parametrize("names", FIELDS, ids=" ".join)
@pytest.mark.parametrize("packed", [True, False])
def test_fields(tmp_path, names, packed):
    expected, reasons = FIELDS[names]
    if packed:
        names = [n.replace(".TXT", ".txt") for n in names]
        expected = {k: v.replace(".TXT", ".txt") for k, v in expected.items()}
        write_tar(tmp_path / "0.tar", *names)
    elif any("/" in name for name in names) or len(set(names)) < len(names):
        pytest.skip("not names of files in one folder")
    else:
        (tmp_path / "00000").mkdir()
        for shade, name in enumerate(names):
            is_text = name.lower().endswith((".txt", ".json", ".md"))
            content = f"caption of {name}".encode() if is_text else picture(20 * shade)
            (tmp_path / "00000" / name).write_bytes(b"{}" if ".json" in name else content)
    found, dropped = read(tmp_path)
    assert found == {key: f"caption of {text}" for key, text in expected.items()}
    assert dropped == reasons


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names(tmp_path, format):
    keys = ["x" * 150 + "/" + "y" * 120 + ".v1", "ü" * 90, os.fsdecode(b"caf\xe9.1")]
    names = [name for key in keys for name in pair(key)]
    write_tar(tmp_path / "0.tar", *names, format=format, errors="surrogateescape")
    found, dropped = read(tmp_path)
    assert list(found)[:2] == keys[:2] and len(found) == 3 and not dropped
    assert all(key.encode() for key in found)


def test_links_never_lead_out_of_the_tar(tmp_path):
    hard, soft, outside = (tarfile.TarInfo(f"{name}.jpg") for name in ("1", "2", "3"))
    hard.type, hard.linkname = tarfile.LNKTYPE, "0.jpg"
    soft.type, soft.linkname = tarfile.SYMTYPE, "/etc/passwd"
    outside.type, outside.linkname = tarfile.LNKTYPE, "/etc/passwd"
    write_tar(tmp_path / "0.tar", *pair("0"), hard, "1.txt", soft, outside)
    found, dropped = read(tmp_path)
    assert list(found) == ["0"]
    assert dropped == {"images: duplicate": 1, "images: missing": 2}


def test_compressed_shards_are_named(tmp_path):
    write_tar(tmp_path / "0.tar", *pair("0"))
    (tmp_path / "1.tar.gz").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    (tmp_path / "2.tar").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    archive = img2dataset.read(tmp_path)
    assert len(list(archive.examples)) == 1
    assert archive.drops.dropped == {"shards: compressed": 1, "shards: damaged": 1}
    for reason in archive.drops.dropped:
        assert "decompress it with gunzip" in archive.drops.explained[reason][0]
    (tmp_path / "0.tar").unlink()
    (tmp_path / "2.tar").unlink()
    (tmp_path / "1.tar.gz").rename(tmp_path / "1.tar.zst")
    (tmp_path / "1.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    for source in (registry.SOURCES["conceptual_captions"], registry.OF_KIND["image_text"]):
        with pytest.raises(UserError, match="1.tar.zst: it is compressed.*unzstd"):
            source.files(tmp_path)


def test_a_truncated_tar_keeps_what_came_before(tmp_path):
    write_tar(tmp_path / "0.tar", *pair("0.a"), *pair("1.b"))
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: whole.index(b"1.b.txt") + 100])
    found, dropped = read(tmp_path)
    assert list(found) == ["0.a"]
    assert dropped == {"shards: damaged": 1, "captions: empty": 1}


def test_a_picture_without_a_text_is_told_as_such(tmp_path):
    write_tar(tmp_path / "0.tar", *pair("0"), "1.jpg")
    archive = img2dataset.read(tmp_path)
    assert len(list(archive.examples)) == 1
    (said,) = archive.drops.explained["captions: empty"]
    assert 'it has no caption (KEY.txt, or "caption" in KEY.json or its row)' in said
