"""Files of weights of every type, damaged and hostile ones."""

import json
import os
import pickle
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.weights import activation, archives, files

CASE = b'X\0\0\0\0\0\0\0{"layers.0.blocks.0.norm1.weight":{"dtype":"F8_E4M3","shape":[4],"data'
CASE += b'_offsets":[0,4]}} 8888'


def raw(path, header, content=b""):
    """Write a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def small_float(byte, exponent_bits, bias, fnuz=False, infinite=False):
    """The value of an 8-bit float, from its definition."""
    mantissa_bits = 7 - exponent_bits
    sign, exponent = -1.0 if byte & 128 else 1.0, (byte & 127) >> mantissa_bits
    mantissa = byte & ((1 << mantissa_bits) - 1)
    if fnuz and byte == 128:
        return np.nan
    if infinite and exponent == (1 << exponent_bits) - 1:
        return np.nan if mantissa else sign * np.inf
    if not fnuz and not infinite and byte & 127 == 127:
        return np.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize(
    ("dtype", "definition"),
    [
        ("F8_E4M3", {"exponent_bits": 4, "bias": 7}),
        ("F8_E5M2", {"exponent_bits": 5, "bias": 15, "infinite": True}),
        ("F8_E4M3FNUZ", {"exponent_bits": 4, "bias": 8, "fnuz": True}),
        ("F8_E5M2FNUZ", {"exponent_bits": 5, "bias": 16, "fnuz": True}),
    ],
)
def test_8_bit_floats_become_float32_with_their_values(tmp_path, dtype, definition):
    every = {byte: small_float(byte, **definition) for byte in range(256)}
    finite = bytes(byte for byte, value in every.items() if np.isfinite(value))
    path = raw(
        tmp_path / "w.safetensors", {"w": entry(dtype, [len(finite)], 0, len(finite))}, finite
    )
    found = files.as_float32(files.read(path)["w"], "w", path)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [every[byte] for byte in finite])
    bad = bytes(byte for byte, value in every.items() if not np.isfinite(value))
    for byte in bad:
        raw(path, {"w": entry(dtype, [1], 0, 1)}, bytes([byte]))
        with pytest.raises(UserError, match="w has values that are not finite"):
            files.as_float32(files.read(path)["w"], "w", path)


def test_the_case_of_the_quantized_file(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(CASE)
    ((name, array),) = files.read(tmp_path / "w.safetensors").items()
    found = files.as_float32(array, name, "w.safetensors")
    assert found.dtype == np.float32 and found.tolist() == [1, 1, 1, 1]


def test_all_types_are_read_as_the_package_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        str(np.dtype(dtype)): rng.integers(0, 2, (3, 5)).astype(dtype)
        for dtype in (
            *(np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.bool_, np.complex64),
            *(np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64),
        )
    }
    tensors |= {"scalar": np.array(3.0, np.float32), "none": np.zeros((0, 4), np.float32)}
    path = tmp_path / "all.safetensors"
    save_file(tensors, path, {"about": "ü"})
    found, expected = files.read(path), load_file(path)
    assert set(found) == set(expected) and files.metadata(path) == {"about": "ü"}
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()


ONE = {"w": entry("F32", [2], 0, 8)}
EIGHT = bytes(8)


@pytest.mark.parametrize(
    ("header", "content", "reason"),
    [
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
         b'"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', EIGHT, "'w' occurs twice"),
        (b"{", EIGHT, "its header is not valid"),
        (b"\xff\xfe", EIGHT, "its header is not valid"),
        (b"[" * 100_000, EIGHT, "its header is not valid"),
        (b"[]", EIGHT, "its header is not an object"),
        (ONE, EIGHT[1:], "its tensors have 8 bytes, but it contains 7"),
        (ONE, EIGHT + b"x", "its tensors have 8 bytes, but it contains 9"),
        ({"w": entry("F32", [3], 0, 8)}, EIGHT, "w has 8 bytes, but F32 .3. needs 12"),
        ({"w": entry("F32", [True, 2], 0, 8)}, EIGHT, "entry of 'w' is not valid"),
        ({"w": entry("F32", [-2], 0, 8)}, EIGHT, "entry of 'w' is not valid"),
        ({"w": entry("F32", [2.0], 0, 8)}, EIGHT, "entry of 'w' is not valid"),
        ({"w": {"dtype": "F32"}}, EIGHT, "entry of 'w' is not valid"),
        ({"w": 3}, EIGHT, "entry of 'w' is not valid"),
        ({"w": entry("F32", [1], 4, 8)}, EIGHT, "w begins at byte 4, expected 0"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, EIGHT[:6],
         "b begins at byte 2, expected 4"),
        ({"__metadata__": {"x": 1}}, b"", "__metadata__ is not an object of texts"),
        ({"w": entry("F32", [1 << 40, 1 << 40], 0, 8)}, EIGHT, "needs"),
    ],
)  # fmt: skip
def test_a_header_that_contradicts_itself_is_refused(tmp_path, header, content, reason):
    path = raw(tmp_path / "w.safetensors", header, content)
    with pytest.raises(UserError, match=rf"w.safetensors: not a complete .*{reason}.*Download it"):
        files.read(path)
    assert files.metadata(path) == {}


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 64, EIGHT + b"{}"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"w.safetensors: not a complete safetensors file"):
        files.read(path)


def test_misordered_positions_are_valid(tmp_path):
    values = np.arange(3, dtype=np.float32)
    header = {"b": entry("F32", [1], 8, 12), "a": entry("F32", [2], 0, 8)}
    found = files.read(raw(tmp_path / "w.safetensors", header, values.tobytes()))
    assert found["a"].tolist() == [0, 1] and found["b"].tolist() == [2]


def test_8_bit_values_with_a_scale_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    for scale in ("a.weight_scale", "a.weight_scale_inv", "a.scale_weight"):
        header = {"a.weight": entry("F8_E4M3", [4], 0, 4), scale: entry("F32", [1], 4, 8)}
        raw(path, header, EIGHT)
        with pytest.raises(
            UserError, match=f"a.weight has 8-bit values, to be multiplied by {scale}"
        ):
            files.read(path)
    # Names of the model itself that only sound like it.
    header = {"norm.bias": entry("F8_E4M3", [4], 0, 4), "norm.scale": entry("F8_E4M3", [4], 4, 8)}
    assert len(files.read(raw(path, header, EIGHT))) == 2


def test_types_that_cannot_be_weights_are_named():
    for dtype, text in (("int8", "int8, as quantized"), ("bool", "bool"), ("complex64", "complex")):
        with pytest.raises(UserError, match=rf"^f: w has type {text}.*floating-point weights"):
            files.as_float32(np.zeros(2, dtype), "w", "f")
    with pytest.raises(UserError, match="w has values that are too large for float32"):
        files.as_float32(np.array([1e300]), "w", "f")
    with pytest.raises(UserError, match="w has values that are not finite"):
        files.as_float32(np.array([np.inf]), "w", "f")
    assert files.as_float32(np.array([0.1]), "w", "f")[0] == np.float32(0.1)


def test_a_type_that_cannot_be_read_is_refused_on_access(tmp_path):
    header = {"w": entry("F4", [4], 0, 2), "v": entry("F32", [1], 2, 6)}
    found = files.read(raw(tmp_path / "w.safetensors", header, EIGHT[:6]))
    assert found["v"].tolist() == [0]
    with pytest.raises(UserError, match="w.safetensors: w has type F4, which cannot be read"):
        found["w"]


def test_an_index_of_several_files_is_read_as_one(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "m-00001-of-00002.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, tmp_path / "m-00002-of-00002.safetensors")
    parts = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    found = files.read(index)
    assert sorted(found) == ["a", "b"] and found["a"].tolist() == [1, 1] and len(found["b"]) == 3
    for wrong in ("../m-00001-of-00002.safetensors", str(index), index.name, 3, None):
        index.write_text(json.dumps({"weight_map": {"a": wrong}}))
        with pytest.raises(UserError, match="is not an index of weights"):
            files.read(index)
    for text in ("{", "[]", "{}", '{"weight_map": []}'):
        index.write_text(text)
        with pytest.raises(UserError, match="is not an index of weights"):
            files.read(index)
    index.write_text(json.dumps({"weight_map": {"c": parts["a"]}}))
    with pytest.raises(UserError, match="c is not in m-00001-of-00002.safetensors"):
        files.read(index)
    index.write_text(json.dumps({"weight_map": {"c": "m-3.safetensors"}}))
    with pytest.raises(UserError, match="m-3.safetensors: no such file"):
        files.read(index)


# ---- PyTorch's formats.


class Payload:
    """Creates a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_refused_and_never_executed(tmp_path):
    pytest.importorskip("torch")
    for suffix in (".bin", ".pth", ".pt", ".ckpt"):
        path = tmp_path / f"w{suffix}"
        path.write_bytes(pickle.dumps({"w": Payload(tmp_path / "executed")}))
        with pytest.raises(UserError, match=f"w{suffix}: not a complete file of tensors"):
            files.read(path)
    assert not (tmp_path / "executed").exists()


def test_torch_tensors_of_all_types(tmp_path):
    torch = pytest.importorskip("torch")
    values = torch.tensor([1.0, -0.5, 448.0])
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    for kind in kinds:
        torch.save({"w": values.to(kind), 3: values}, tmp_path / "w.pth")
        found = files.read(tmp_path / "w.pth")
        assert list(found) == ["w"]
        expected = values.to(kind).float().numpy()
        np.testing.assert_array_equal(files.as_float32(found["w"], "w", "f"), expected)
    torch.save({"w": torch.nn.Parameter(values)}, tmp_path / "w.pth")
    assert files.read(tmp_path / "w.pth")["w"].tolist() == values.tolist()
    torch.save({"a.weight": values.to(kinds[3]), "a.weight_scale": values}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="to be multiplied by a.weight_scale"):
        files.read(tmp_path / "w.pth")
    torch.save({"w": values.to_sparse()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="w is a tensor of type torch.float32 that cannot be read"):
        files.read(tmp_path / "w.pth")


def tensor(count, shape, strides, key="0"):
    """The pickled opcodes of a float32 tensor in a TorchScript archive."""
    plain = lambda value: pickle.dumps(value, 2)[2:-1].replace(b"q\x00", b"").replace(b"q\x01", b"")
    storage = b"(" + plain("storage") + b"ctorch\nFloatStorage\n" + plain(key) + plain("cpu")
    storage += plain(count) + b"tQ"
    shape, strides = (b"(" + b"".join(map(plain, x)) + b"t" for x in (shape, strides))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + plain(0) + shape + strides + b"tR"


def archive(path, state, values=EIGHT, name="x/data/0", compression=zipfile.ZIP_STORED):
    """Write a TorchScript archive whose state is {"w": `state` (opcodes)}."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/code/__torch__/m.py", "class QuickGELU(Module):")
        file.writestr("x/data.pkl", b"\x80\x02}(X\x01\x00\x00\x00w" + state + b"u.")
        file.writestr(name, values)
    return path


def test_a_torchscript_archive_is_read(tmp_path):
    values = np.arange(6, dtype=np.float32)
    path = archive(tmp_path / "m.pt", tensor(6, (2, 3), (1, 2)), values.tobytes())
    np.testing.assert_array_equal(files.read(path)["w"], values.reshape(3, 2).T)
    assert activation.stated(path).activation == "quick_gelu"


@pytest.mark.parametrize(
    ("state", "values", "reason"),
    [
        (tensor(2, (1 << 40,), (0,)), EIGHT, "is not inside its storage"),
        (tensor(2, (3,), (1,)), EIGHT, "is not inside its storage"),
        (tensor(2, (2,), (-1,)), EIGHT, "is not inside its storage"),
        (tensor(2, (2,), (9,)), EIGHT, "is not inside its storage"),
        (tensor(1 << 40, (2,), (1,)), EIGHT, "is shorter than its 1099511627776 elements"),
        (tensor(2, (2,), (1,), key="../0"), EIGHT, "no item named 'x/data/../0'"),
        (b"}q\x05(X\x01\x00\x00\x00wh\x05u", EIGHT, "contains itself"),
        (b"\xff", EIGHT, "invalid load key"),
    ],
)
def test_a_damaged_or_hostile_archive_is_refused(tmp_path, state, values, reason):
    path = archive(tmp_path / "m.pt", state, values)
    match = rf"m.pt: not a complete TorchScript archive \(.*{reason}.*\)"
    with pytest.raises(UserError, match=match):
        files.read(path)


def test_an_archive_that_expands_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_SMALL", 1000)
    bomb = dict(values=bytes(4_000_000), compression=zipfile.ZIP_DEFLATED)
    path = archive(tmp_path / "m.pt", tensor(1_000_000, (1_000_000,), (1,)), **bomb)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(zipfile.ZipFile, "open", None)  # nothing is read
    for read in (files.read, activation.stated):
        with pytest.raises(UserError, match=r"m.pt: expands from [\d,]+ to 4,0\d\d,\d\d\d bytes"):
            read(path)


def test_only_what_the_tensors_need_is_read_of_a_storage(tmp_path):
    path = archive(tmp_path / "m.pt", tensor(2, (2,), (1,)), bytes(8_000_000))
    tracemalloc.start()
    try:
        assert files.read(path)["w"].tolist() == [0, 0]
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
