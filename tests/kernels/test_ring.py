"""Rings: a position always finds its row, only the counted rows are written, and drafts overwrite nothing in sight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ring import MAX_STEP, put_rows, read_ring, write_ring

LOOK_BACK = 5
SLOTS = LOOK_BACK + MAX_STEP - 1
write, read = jax.jit(write_ring), jax.jit(read_ring, static_argnums=2)


def rows_at(positions, version=0):
    """A row says where it belongs."""
    return np.stack([np.asarray(positions), np.full(np.shape(positions), version)], axis=-1).astype(np.float32)


def test_any_chunk_leaves_the_last_rows_in_their_slots():
    """Longer than the ring, empty, padded with NaN; both sequences at their own positions."""
    for start, count in (((0, 3), (2, 5)), ((6, 0), (11, 0)), ((3, 40), (1, 8)), ((0, 7), (9, 11))):
        ring = np.full((2, SLOTS, 2), -1, np.float32)
        chunk = np.full((2, 11, 2), np.nan, np.float32)
        for b in range(2):
            chunk[b, : count[b]] = rows_at(start[b] + np.arange(count[b]))
        got = np.asarray(write(ring, chunk, jnp.array(start), jnp.array(count)))
        for b in range(2):
            want = ring[b].copy()
            for position in range(start[b], start[b] + count[b]):
                want[position % SLOTS] = rows_at(position)
            np.testing.assert_array_equal(got[b], want)


def test_reading_goes_by_position():
    ring = write(
        np.zeros((2, SLOTS, 2), np.float32),
        rows_at([range(20, 28), range(3, 11)]),
        jnp.array([20, 3]),
        jnp.array([8, 8]),
    )
    np.testing.assert_array_equal(read(ring, jnp.array([22, 5]), 6), rows_at([range(22, 28), range(5, 11)]))


def test_rejected_drafts_leave_the_look_back_whole():
    """A full step of drafts at any position, all rejected: a query there still finds every row it looks back on."""
    for start in range(30):
        past = range(max(0, start - SLOTS), start)
        ring = np.zeros((1, SLOTS, 2), np.float32)
        for position in past:
            ring[0, position % SLOTS] = rows_at(position)
        drafts = rows_at([range(start, start + MAX_STEP)], version=9)
        ring = write(ring, drafts, jnp.array([start]), jnp.array([MAX_STEP]))
        # The next query is at `start`: LOOK_BACK rows with its own, so LOOK_BACK - 1 before it.
        first = max(0, start - LOOK_BACK + 1)
        got = read(ring, jnp.array([first]), LOOK_BACK - 1)[0, : start - first]
        np.testing.assert_array_equal(got, rows_at(range(first, start)).reshape(-1, 2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint8, jnp.float8_e4m3fn])
def test_rows_are_put_where_they_belong_in_place(dtype):
    pool = jnp.asarray(np.arange(3 * 64 * 32).reshape(3, 64, 32) % 200, dtype)
    rows = jnp.asarray(np.arange(3 * 2 * 32).reshape(3, 2, 32) % 100 + 7, dtype)
    index = np.array([[5, 64], [0, 63], [70, 71]], np.int32)
    want = np.array(pool)
    for b, line in enumerate(index):
        for i, n in enumerate(line):
            if n < 64:
                want[b, n] = rows[b, i]
    put = jax.jit(put_rows, donate_argnums=0).lower(pool, index, rows).compile()
    memory = put.memory_analysis()
    np.testing.assert_array_equal(np.asarray(put(pool, index, rows)).view(np.uint8), want.view(np.uint8))
    assert memory.alias_size_in_bytes == pool.nbytes
    if dtype != jnp.float8_e4m3fn:  # which XLA converts on CPUs
        assert memory.temp_size_in_bytes < pool.nbytes
