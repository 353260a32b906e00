"""Rows read through a page table are the rows that were put there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quant
from pallas_kernels.row_format import RowFormat, entry_format, index_format

WIDTH, ROTARY, BATCH, PAGE = 96, 32, 3, 4
encode_rows = jax.jit(quant.encode_rows, static_argnums=1)
paged = jax.jit(quant.paged, static_argnums=1)
take_paged, take_rows = jax.jit(quant.take_paged), jax.jit(quant.take_rows)
FORMATS = {
    "bfloat16": entry_format("bfloat16", ROTARY),
    "fp8": entry_format("fp8", ROTARY),
    "int8": entry_format("int8", ROTARY),
    "index fp8": index_format("fp8"),
    "index fp4": index_format("fp4"),
}


@pytest.mark.parametrize("count", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 2])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_rows_come_back(form: RowFormat, count: int) -> None:
    width = 64 if form.hadamard else WIDTH
    rows = encode_rows(jax.random.normal(jax.random.key(0), (BATCH, count, width)), form)
    each = -(-count // PAGE)
    shuffled = np.random.default_rng(0).permutation(BATCH * each).reshape(BATCH, each).astype(np.int32)
    index = jax.random.randint(jax.random.key(1), (BATCH, 7), 0, count)
    for table in (None, jnp.asarray(shuffled)):
        pages = paged(rows, PAGE, table)
        assert pages.rows == each * PAGE
        jax.tree.map(np.testing.assert_array_equal, take_paged(pages, index), take_rows(rows, index))


def test_without_a_table_numbers_are_the_pools() -> None:
    form = FORMATS["fp8"]
    rows = encode_rows(jax.random.normal(jax.random.key(0), (BATCH, 2 * PAGE, WIDTH)), form)
    pages = dataclasses.replace(paged(rows, PAGE), table=None)
    assert pages.rows == BATCH * 2 * PAGE
    index = jnp.array([[0], [3], [1]], jnp.int32)
    through = take_paged(pages, index + 2 * PAGE * jnp.arange(BATCH)[:, None])
    jax.tree.map(np.testing.assert_array_equal, through, take_rows(rows, index))
