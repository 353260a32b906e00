"""A reference dequantises the weight it is about to use: never a second, wide copy of the model."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsv4.cli.implementations import abstract_parameters
from dsv4.config import Execution, HyperConnectionConfig, load_config, replace
from dsv4.config.recipe import find_recipe
from dsv4.decoding.run import extend_body
from dsv4.model.cache import init_cache
from dsv4.model.handle import Model
from pallas_kernels.quant import QuantTensor

LAYERS = 2


def quantised_model(recipe):
    """Equal layers whose weights outweigh everything else, as shapes."""
    config = load_config("tiny").model
    for field, value in {"layers": f"window*{LAYERS}", "width": 256, "moe.expert_width": 256, "mtp_blocks": 0}.items():
        config = replace(config, field, value)
    plain = HyperConnectionConfig(kind="plain", streams=1)  # compiled in half the time
    config = dataclasses.replace(config, residual=plain, storage=recipe.storage(config.storage))
    return Model(config, abstract_parameters(config), recipe.execution(Execution()))


@pytest.mark.parametrize(("tokens", "share"), [(8, 1.0), (1, 0.6)], ids=["prefill", "decode"])
def test_the_tree_is_never_dequantised(tokens, share):
    """What a program allocates beside its arguments is less than one of its layers would take in float32.

    A decode step of two experts a token reads only those. Weights depend on nothing, so that a compiler is free to
    dequantise all of them at the start: XLA's did, on the CPU.
    """
    model = quantised_model(find_recipe("released"))
    weights = jax.tree.leaves(model.params, is_leaf=lambda leaf: isinstance(leaf, QuantTensor))
    dequantised = sum(4 * leaf.size for leaf in weights if isinstance(leaf, QuantTensor))
    ids, count = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, tokens), (1,)))
    cache = jax.eval_shape(lambda: init_cache(model.config, model.execution, 1, 16))
    lowered = jax.jit(lambda *args: extend_body(*args)).lower(model, ids, count, cache)
    memory = lowered.compile({"xla_backend_optimization_level": 0}).memory_analysis()
    assert memory.temp_size_in_bytes < share * dequantised / LAYERS
