"""Which implementation runs: a named one or an error, "auto" the first that can, saying once why others could not."""

import logging

import jax
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.device import KINDS, pretend
from pallas_kernels.dispatch import Candidate, Op, UnsupportedError, listen, reference


@pytest.fixture
def op(monkeypatch):
    """Two picky candidates and a reference; each says who ran."""
    monkeypatch.setattr(dispatch, "OPS", {})

    def candidate(name, refuses_above):
        return Candidate(
            name, lambda x: (name, x), lambda x: f"{x} is above {refuses_above}" if x > refuses_above else None
        )

    return Op("probe", [candidate("fast", 10), candidate("faster", 100), reference(lambda x: ("reference", x))])


def test_auto_takes_the_first_that_can(op):
    assert [op(x)[0] for x in (1, 50, 500)] == ["fast", "faster", "reference"]


def test_a_named_implementation_runs_or_raises(op):
    assert op(50, implementation="faster") == ("faster", 50)
    assert op(1, implementation="reference") == ("reference", 1)
    with pytest.raises(UnsupportedError, match="probe cannot run: fast: 50 is above 10"):
        op(50, implementation="fast")


def test_an_unknown_name_lists_the_known_ones(op):
    with pytest.raises(UnsupportedError, match="probe has no implementation 'sm90': auto, fast, faster, reference"):
        op(1, implementation="sm90")


def test_a_fallback_is_said_once_for_each_reason(op, caplog):
    """With the device and what runs instead; at a level that is silent unless asked for."""
    with caplog.at_level(logging.INFO, logger="pallas_kernels"), pretend(KINDS["A100"]):
        for x in (500, 500, 1, 50, 50):
            op(x)
    assert caplog.messages == [
        "probe on A100 runs reference, not fast: 500 is above 10",
        "probe on A100 runs reference, not faster: 500 is above 100",
        "probe on A100 runs faster, not fast: 50 is above 10",
    ]
    assert {record.levelno for record in caplog.records} == {logging.INFO}


def test_listeners_see_every_call_as_shapes(op):
    """Also what jit traces, and only while they listen; one inside another hears the same."""
    op(1)
    x = np.zeros((2, 3), np.int8)
    deaf = Op("deaf", [Candidate("never", lambda x: x, lambda x: "never"), reference(lambda x: x)])
    with listen() as outer:
        op(50)
        with listen() as inner:
            jax.jit(lambda x: deaf(x))(x)
    op(1)
    assert [(call.op.name, call.ran) for call in outer] == [("probe", "faster"), ("deaf", "reference")]
    assert outer[1:] == inner
    assert inner[0].args == (jax.ShapeDtypeStruct((2, 3), np.int8),) and inner[0].refusals == ("never: never",)
    assert outer[0].args == (50,) and outer[0].refusals == ("fast: 50 is above 10",)


def test_what_would_run_is_known_without_running(op):
    candidate, refusals = op.choose((50,), {})
    assert (candidate.name, refusals) == ("faster", ("fast: 50 is above 10",))


def test_a_choice_for_some_ops_leaves_the_others_to_auto(op):
    other = Op("other", [reference(lambda x: ("reference", x))])
    choice = "probe=faster,other=reference"
    assert (op(1, implementation=choice)[0], other(1, implementation=choice)[0]) == ("faster", "reference")
    assert op(1, implementation="other=reference")[0] == "fast"
    with pytest.raises(UnsupportedError, match="no op called prob: there are .*other, probe"):
        op(1, implementation="prob=fast")


def test_a_choice_that_cannot_be_read_says_so(op):
    assert op(1, implementation="probe=reference, top_k = auto") == ("reference", 1)
    assert op(50, implementation="router=reference,top_k=reference")[0] == "faster", "their modules may not be imported"
    with pytest.raises(UnsupportedError, match="'foo' in 'probe=fast,foo' chooses nothing"):
        op(1, implementation="probe=fast,foo")


def test_every_op_ends_with_a_reference_that_never_refuses():
    """What makes "auto" total, and every kernel testable against something."""
    import dsv4.model.transformer  # noqa: F401  registers every op the model uses

    assert dispatch.OPS.keys() == dispatch.NAMES
    for op in dispatch.OPS.values():
        assert op.candidates[-1].name == "reference"
        assert op.candidates[-1].unsupported_reason() is None
        assert len({c.name for c in op.candidates}) == len(op.candidates)
