"""The file format: agreement with the reference implementation, and hostile files."""

import json
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.checkpoint import CheckpointError
from dsv4.checkpoint import safetensors as ours
from dsv4.checkpoint.safetensors import DTYPES, SafetensorsFile
from dsv4.checkpoint.safetensors_write import Source, write_file

ORACLE = Path(__file__).parents[1] / "oracle" / "ckpt"
DTYPE_NAMES = st.sampled_from(sorted(DTYPES))
TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(DTYPE_NAMES, st.lists(st.integers(0, 5), max_size=3).map(tuple), st.integers(0, 2**32 - 1)),
    min_size=1,
    max_size=5,
)


def random_array(dtype, shape, seed):
    size = int(np.prod(shape, dtype=int)) * DTYPES[dtype].itemsize
    raw = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return raw.view(DTYPES[dtype]).reshape(shape)


def content(file, name):
    return b"".join(chunk.tobytes() for chunk in file.chunks(name))


@settings(max_examples=60, deadline=None)
@given(TENSORS)
def test_round_trip_of_any_bits_through_both_implementations(specs):
    """We write and both read; the reference writes and we read. Chunks of 8 bytes, so that tensors need several."""
    arrays = {name: random_array(*spec) for name, spec in specs.items()}
    sources = [
        Source(name, spec[0], spec[1], lambda a=arrays[name]: np.array_split(a.reshape(-1), 3))
        for name, spec in specs.items()
    ]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "CHUNK", 8)
        path, theirs = Path(folder) / "ours.safetensors", Path(folder) / "theirs.safetensors"
        write_file(path, sources)
        reference = {
            name: (t["dtype"], tuple(t["shape"]), bytes(t["data"]))
            for name, t in safetensors.deserialize(path.read_bytes())
        }
        assert reference == {n: (specs[n][0], a.shape, a.tobytes()) for n, a in arrays.items()}
        assert all(entry.start % DTYPES[entry.dtype].itemsize == 0 for entry in SafetensorsFile(path).entries.values())
        safetensors.numpy.save_file(arrays, theirs)
        for file in (SafetensorsFile(path), SafetensorsFile(theirs)):
            assert file.entries.keys() == arrays.keys()
            for name, array in arrays.items():
                assert (file.entries[name].shape, content(file, name)) == (array.shape, array.tobytes())


def pack(header, data):
    """The bytes of a file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def header(**tensors):
    return {name: dict(zip(("dtype", "shape", "data_offsets"), spec, strict=True)) for name, spec in tensors.items()}


HOSTILE = {
    "empty file": (b"", "0 bytes long"),
    "no header": (b"\x01\x02", "2 bytes long"),
    "header longer than the file": ((1000).to_bytes(8, "little") + b"{}", "header of 1000"),
    "header length of 2^63": ((2**63).to_bytes(8, "little") + b"{}", "header of 9223372036854775808"),
    "not JSON": (pack(b"{'a': 1}", b""), "not JSON"),
    "not UTF-8": (pack(b'{"\xff": 1}', b""), "not JSON"),
    "nested too deep": (pack(b"[" * 200_000, b""), "not JSON"),
    "not an object": (pack(b"[1]", b""), "header is list"),
    "the same name twice": (
        pack(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}', b""),
        "'a' twice",
    ),
    "entry without a shape": (pack({"a": {"dtype": "U8", "data_offsets": [0, 0]}}, b""), "a: header entry"),
    "unknown dtype": (pack(header(a=("F4", [2], [0, 1])), b"\0"), "a: dtype 'F4', supported are F32"),
    "negative size": (pack(header(a=("U8", [-1], [0, 0])), b""), "integers >= 0"),
    "boolean size": (pack(header(a=("U8", [True], [0, 1])), b"\0"), "integers >= 0"),
    "fractional offset": (pack(header(a=("U8", [1], [0, 1.0])), b"\0"), "integers >= 0"),
    "three offsets": (pack(header(a=("U8", [0], [0, 0, 0])), b""), "expected [begin, end]"),
    "offsets that run backwards": (pack(header(a=("U8", [0], [1, 0])), b"\0"), "expected [begin, end]"),
    "size that does not fit the dtype": (
        pack(header(a=("F32", [2], [0, 4])), bytes(4)),
        "F32 [2] takes 8 bytes, data_offsets [0, 4] span 4",
    ),
    "size beyond 64 bits": (pack(header(a=("U8", [2**40, 2**40], [0, 0])), b""), "takes 1208925819614629174706176"),
    "overlapping tensors": (
        pack(header(a=("U8", [4], [0, 4]), b=("U8", [4], [2, 6])), bytes(6)),
        "b overlaps a by 2 bytes",
    ),
    "a hole": (
        pack(header(a=("U8", [1], [0, 1]), b=("U8", [1], [3, 4])), bytes(4)),
        "2 bytes between a and b belong to no tensor",
    ),
    "truncated data": (pack(header(a=("F32", [4], [0, 16])), bytes(15)), "truncated"),
    "bytes after the data": (pack(header(a=("U8", [1], [0, 1])), bytes(3)), "2 bytes after the last tensor (a)"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file_is_refused_by_name(kind, tmp_path):
    data, expected = HOSTILE[kind]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert expected in str(caught.value) and str(path) in str(caught.value)


def test_header_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "MAX_HEADER", 8)
    (tmp_path / "a").write_bytes(pack(b" " * 10, b""))
    with pytest.raises(CheckpointError, match="header of 10 bytes, at most 8"):
        SafetensorsFile(tmp_path / "a")


SMALL = pack(header(a=("F32", [2], [0, 8]), b=("F8_E8M0", [3], [8, 11])), bytes(range(11)))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SMALL) - 1), st.integers(0, 255), st.integers(0, len(SMALL)))
def test_a_damaged_file_is_read_within_its_bounds_or_refused(at, byte, length):
    damaged = bytearray(SMALL)
    damaged[at] = byte
    with tempfile.NamedTemporaryFile() as file:
        file.write(damaged[:length])
        file.flush()
        try:
            opened = SafetensorsFile(file.name)
        except CheckpointError:
            return
        for name, entry in opened.entries.items():
            assert entry.stop <= length and len(content(opened, name)) == entry.nbytes


def test_writing_is_atomic(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"what was there")
    good = Source("a", "U8", (2,), lambda: [np.zeros(2, np.uint8)])
    short = Source("b", "U8", (3,), lambda: [np.zeros(2, np.uint8)])
    other = Source("b", "U8", (8,), lambda: [np.zeros(2, np.float32)])
    for bad, message in ((short, r"b: 2 bytes given, \[3\] takes 3"), (other, "a chunk of float32")):
        with pytest.raises(ValueError, match=message):
            write_file(path, [good, bad])
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == b"what was there"
    write_file(path, [good])
    assert SafetensorsFile(path).entries.keys() == {"a"}


def test_header_carries_what_transformers_asks_for(tmp_path):
    write_file(tmp_path / "a", [Source("a", "F8_E8M0", (1,), lambda: [np.ones(1, ml_dtypes.float8_e8m0fnu)])])
    data = (tmp_path / "a").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_chunks_are_lazy_views(monkeypatch):
    """Opening reads the header alone, and a chunk is a view of the mapping, not a copy."""
    file = SafetensorsFile(ORACLE / "swa" / "model.safetensors")
    monkeypatch.setattr(ours, "CHUNK", 1024)
    chunk = next(file.chunks("embed.weight"))
    assert chunk.nbytes == 1024 and not chunk.flags.owndata and not chunk.flags.writeable
