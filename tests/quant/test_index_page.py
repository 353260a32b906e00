"""The index page against bytes that a few lines of numpy made, kept in index_pages.npz; its layout byte by byte.

`python tests/quant/test_index_page.py` writes the file again.
"""

import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import quant
from pallas_kernels.quant import Rows, pages
from pallas_kernels.row_format import index_format

RECORDED = Path(__file__).parent / "index_pages.npz"
PAGE, KEYS = 4, 7  # the second page is not full
CASES = [(kind, width) for kind in ("fp8", "fp4") for width in (128, 32)]
BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
encode_rows = jax.jit(quant.encode_rows, static_argnames="form")
decode_rows = jax.jit(quant.decode_rows, static_argnames="dtype")
pack_pages = jax.jit(pages.pack_pages, static_argnames="page_size")
unpack_pages = jax.jit(pages.unpack_pages, static_argnames=("form", "width", "page_size"))


def rotated(x):
    """Hadamard in float64, rounded to bfloat16; None where float32 sums might round another way."""
    matrix = np.ones((1, 1))
    while len(matrix) < x.shape[1]:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    exact = x.astype(np.float64) @ matrix * x.shape[1] ** -0.5
    error = 1e-6 * np.abs(x.astype(np.float64)).max(axis=1, keepdims=True)
    near = [(exact + side).astype(np.float32).astype(BF16) for side in (-error, error)]
    return near[0] if np.array_equal(*near) else None


def key_bytes(key, kind):
    """One rotated key -> (its codes, its scales, both as bytes, the values they mean)."""
    codes, scales, meant = b"", b"", []
    largest, floor = (448, 1e-4) if kind == "fp8" else (6, 6 * 2.0**-126)
    for tile in key.astype(np.float64).reshape(1 if kind == "fp8" else -1, -1 if kind == "fp8" else 32):
        exponent = int(np.ceil(np.log2(max(np.abs(tile).max(), floor) / largest)))
        ratio = tile / 2.0**exponent
        if kind == "fp8":
            code = ratio.astype(E4M3)
            codes, scales = codes + code.tobytes(), scales + struct.pack("<f", 2.0**exponent)
        else:
            code = ratio.astype(ml_dtypes.float4_e2m1fn)
            nibbles = code.view(np.uint8) & 15
            codes, scales = codes + bytes(nibbles[0::2] | nibbles[1::2] << 4), scales + bytes([exponent + 127])
        meant.append(code.astype(np.float64) * 2.0**exponent)
    return codes, scales, np.concatenate(meant)


def page_of(keys, kind):
    """A page of rotated keys: all codes, then all scales, zeros where a key is missing."""
    parts = [key_bytes(key, kind) for key in keys]
    data, scale = (b"".join(part[i] for part in parts) for i in (0, 1))
    missing = PAGE - len(keys)
    return data + bytes(missing * len(parts[0][0])) + scale + bytes(missing * len(parts[0][1]))


def recorded_case(kind, width):
    """Keys: zeros, one below FP8's floor, one huge, the others ordinary."""
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        x = (rng.standard_normal((KEYS, width)) * np.array([0, 1e-6, 1e8, 1, 1, 0.01, 30])[:, None]).astype(BF16)
        if (keys := rotated(x)) is not None:
            break
    else:
        raise ValueError(f"no keys of {width} channels whose rotation is clear of rounding boundaries")
    made = [page_of(keys[at : at + PAGE], kind) for at in range(0, KEYS, PAGE)]
    meant = np.array([key_bytes(key, kind)[2] for key in keys]).astype(np.float32)
    return {"x_bf16": x.view(np.uint16), "pages": np.array([list(page) for page in made], np.uint8), "decoded": meant}


def all_cases():
    made = {f"{kind}_{width}": recorded_case(kind, width) for kind, width in CASES}
    return {f"{case}_{name}": array for case, arrays in made.items() for name, array in arrays.items()}


@pytest.fixture(scope="module")
def recorded():
    return dict(np.load(RECORDED))


def test_the_file_is_what_the_numpy_code_makes(recorded):
    made = all_cases()
    assert recorded.keys() == made.keys()
    for name, array in made.items():
        np.testing.assert_array_equal(recorded[name], array, err_msg=name)


@pytest.mark.parametrize("kind, width", CASES)
def test_keys_to_pages_and_back(recorded, kind, width):
    form, case = index_format(kind), f"{kind}_{width}_"
    rows = encode_rows(recorded[case + "x_bf16"].view(BF16), form)
    written = pack_pages(rows, PAGE)
    np.testing.assert_array_equal(written, recorded[case + "pages"])
    assert written.shape[-1] == pages.page_bytes(form, width, PAGE) == PAGE * form.nbytes(width)
    back = unpack_pages(recorded[case + "pages"], form, width, PAGE)
    assert back.shape == (2 * PAGE, width)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(rows), strict=True):
        np.testing.assert_array_equal(np.asarray(got)[:KEYS].view(np.uint8), np.asarray(want).view(np.uint8))
    decoded = np.asarray(decode_rows(back, np.float32))
    np.testing.assert_array_equal(decoded[:KEYS], recorded[case + "decoded"])
    assert not decoded[KEYS:].any()


def test_any_float32_scale_is_read(recorded):
    """We write powers of two; other writers do not."""
    form, foreign = index_format("fp8"), recorded["fp8_128_pages"].copy()
    foreign[:, PAGE * 128 :] = np.frombuffer(struct.pack("<f", 0.3) * PAGE, np.uint8)
    rows = unpack_pages(foreign, form, 128, PAGE)
    np.testing.assert_array_equal(rows.scale, np.full((2 * PAGE, 1), np.float32(0.3)))
    codes = foreign[:, : PAGE * 128].reshape(-1, 128).view(E4M3).astype(np.float32)
    np.testing.assert_array_equal(decode_rows(rows, np.float32), codes * np.float32(0.3))


@pytest.mark.parametrize("kind, width, codes, scales", [("fp8", 6, 6, 4), ("fp4", 96, 48, 3)])
def test_every_byte_has_its_place(kind, width, codes, scales):
    """Two sequences of two pages of three keys, no byte like its neighbours: planes, never interleaved."""
    form, size = index_format(kind), 3
    rng = np.random.default_rng(0)
    body, scale = rng.integers(0, 256, (2, 6, codes), np.uint8), rng.integers(0, 255, (2, 6, scales), np.uint8)
    stored = scale.view(np.float32) if kind == "fp8" else scale
    assert form.quant is not None
    rows = Rows(body.view(form.quant.values_dtype), None, stored, form)
    written = np.asarray(pack_pages(rows, size))
    assert written.shape == (2, 2, size * (codes + scales))
    for sequence, page, slot in np.ndindex(2, 2, size):
        key, at = page * size + slot, written[sequence, page]
        for i in range(codes):
            assert at[slot * codes + i] == body[sequence, key, i]
        for i in range(scales):
            assert at[size * codes + slot * scales + i] == scale[sequence, key, i]
    back = unpack_pages(written, form, width, size)
    np.testing.assert_array_equal(np.asarray(back.body).view(np.uint8), body)
    np.testing.assert_array_equal(np.asarray(back.scale).view(np.uint8), scale)


if __name__ == "__main__":
    np.savez_compressed(RECORDED, **all_cases())
