"""Bytes at the sizes of the released models: what the formats promise, from shapes and from real arrays."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dsv4.config import RECIPES, load_config
from dsv4.cost import weight_bytes
from dsv4.parameters import leaves, model_specs, tensor_name
from pallas_kernels.quant import quantize

CLASSES = {"dense": ("dense", 0.51), "expert": ("experts", 0.27)}  # tensor class -> field of a recipe, most of bf16


def weights(name):
    """(name, shape, class) of every weight of `name` that the released recipe quantises, one of each shape."""
    found = {
        (spec.kind, spec.shape): tensor_name(path)
        for path, spec in leaves(model_specs(load_config(name).model))
        if spec.kind in CLASSES
    }
    return [(tensor, shape, kind) for (kind, shape), tensor in found.items()]


@pytest.mark.parametrize(("tensor", "shape", "kind"), weights("flash") + weights("pro"))
def test_every_weight_is_small_enough(tensor, shape, kind):
    field, limit = CLASSES[kind]
    form = getattr(RECIPES["released"], field)
    quantised = jax.eval_shape(functools.partial(quantize, form=form), jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    plain = 2 * quantised.size
    assert quantised.nbytes == form.nbytes(shape) <= limit * plain, (tensor, quantised.nbytes / plain)


@pytest.mark.parametrize("kind", CLASSES)
def test_real_arrays_take_as_much(kind):
    """One matrix of Flash: a key projection, and an expert."""
    field, limit = CLASSES[kind]
    config = load_config("flash").model
    shape = {"dense": (config.attention.head_dim, config.width), "expert": (config.moe.expert_width, config.width)}[
        kind
    ]
    weight = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    quantised = jax.jit(quantize, static_argnums=1)(weight, getattr(RECIPES["released"], field))
    assert quantised.values.nbytes + quantised.scale.nbytes == quantised.nbytes <= limit * weight.nbytes


def test_flash_as_released():
    config = load_config("flash").model
    assert config.storage.released
    assert weight_bytes(config) == pytest.approx(160e9, rel=0.01)
