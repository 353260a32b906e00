"""`Execution.batch_invariant` reaches every product with weights of the model."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsv4.cli.implementations import abstract_parameters
from dsv4.config import Execution, load_config, replace
from dsv4.decoding.run import extend_body
from dsv4.model.cache import init_cache
from dsv4.model.handle import Model
from pallas_kernels.dispatch import UnsupportedError, listen

PRODUCTS = {"block_matmul", "block_diagonal_matmul", "experts"}
CONFIG = replace(load_config("tiny").model, "layers", "csa:4,hca:8")


def traced(execution):
    """Every call of an op in a step of two sequences and in the prediction of tokens after the next."""
    model = Model(CONFIG, abstract_parameters(CONFIG), execution)
    ids, count = jax.ShapeDtypeStruct((2, 3), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    cache = jax.eval_shape(lambda: init_cache(CONFIG, execution, 2, 64))
    streams = jax.ShapeDtypeStruct((2, 3, CONFIG.residual.streams, CONFIG.width), jnp.float32)
    with listen() as calls:
        jax.eval_shape(lambda *args: extend_body(*args), model, ids, count, cache)
        jax.eval_shape(lambda model, *args: model.bind().predict_next(*args)[0], model, streams, ids)
    return calls


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_every_product_is_told(batch_invariant):
    calls = [call for call in traced(Execution(batch_invariant=batch_invariant)) if call.op.name in PRODUCTS]
    assert {call.op.name for call in calls} == PRODUCTS
    assert {call.kwargs["batch_invariant"] for call in calls} == {batch_invariant}


def test_a_named_implementation_that_cannot_promise_it_raises():
    execution = Execution(batch_invariant=True, implementation="block_matmul=block_dot")
    with pytest.raises(UnsupportedError, match="XLA chooses by the number of rows"):
        traced(dataclasses.replace(execution))
