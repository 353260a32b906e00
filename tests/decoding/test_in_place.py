"""A decode step writes its rows into the donated cache and copies nothing of it, as the compiled program shows."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp

import dsv4
from dsv4.config.cache import CACHE_FORMATS
from dsv4.decoding.run import extend_body
from dsv4.model.cache import init_cache

BATCH, STEP = 3, 2
CAPACITY = 1000  # no array of the step but the cache's has one of the shapes that this gives
HLO = {"float32": "f32", "bfloat16": "bf16"}
MADE = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (\w+\[[\d,]*\])\S* ([\w-]+)\(")


def made_of_shapes(text, shapes):
    """Names of the program's instructions, the scatters aside, whose result has one of these shapes."""
    entry = text[text.index("\nENTRY") :]
    found = (MADE.match(line) for line in entry.splitlines())
    return [
        match[1]
        for match in found
        if match and match[2] in shapes and match[3] != "parameter" and "scatter" not in match[1]
    ]


def test_a_decode_step_copies_no_pool():
    """Windows, entries, index keys and open blocks. XLA has no FP8 scatter on CPUs, where an FP8 pool is converted."""
    model = dsv4.load("small", layers=range(3))
    model = model.replace(execution=replace(model.execution, cache=CACHE_FORMATS["bf16"]))
    cache = jax.eval_shape(lambda: init_cache(model.config, model.execution, BATCH, CAPACITY))
    ids, count = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((BATCH, STEP), (BATCH,)))
    step = jax.jit(extend_body, donate_argnames="cache").lower(model, ids, count, cache).compile()
    leaves = jax.tree.leaves(cache.layers)
    shapes = {f"{HLO[leaf.dtype.name]}[{','.join(map(str, leaf.shape))}]" for leaf in leaves}
    text = step.as_text()
    assert made_of_shapes(text, shapes) == []
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert step.memory_analysis().alias_size_in_bytes == nbytes


def test_the_search_finds_copies():
    def step(pool, row):
        return pool.at[0].set(row), pool[0] + pool[1]

    pool, row = jnp.zeros((7, 9)), jnp.ones(9)
    text = jax.jit(step).lower(pool, row).compile().as_text()
    assert made_of_shapes(text, {"f32[7,9]"})
