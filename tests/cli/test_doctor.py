"""`dsv4 doctor`: what would run, told from an abstract trace."""

import json

import jax

from dsv4.cli.implementations import abstract_parameters, chosen_implementations
from dsv4.config import load_config, replace
from pallas_kernels.dispatch import OPS, Candidate
from pallas_kernels.quant import QuantTensor

SMALL = replace(load_config("tiny").model, "layers", "csa:4,hca:8")


def test_doctor_lists_versions_devices_and_ops(dsv4, tmp_path):
    path = tmp_path / "doctor.json"
    result = dsv4("doctor", "tiny", "--set", "model.layers=csa:4,hca:8", "--json", path)
    assert result.code == 0 and result.err == ""
    facts = json.loads(path.read_text())
    assert facts["versions"]["jax"] == jax.__version__ and facts["devices"][0]["platform"] == "cpu"
    assert {"block_matmul", "expert_gate_up", "expert_down", "router", "index_scores", "top_k"} <= facts["ops"].keys()
    for name, op in facts["ops"].items():
        assert name in result.out and op["prefill"] + op["decode"], f"{name} is used by no phase"


def test_a_refusal_is_told_and_the_registry_left_as_it_was(monkeypatch):
    op = OPS["top_k"]
    fast = Candidate("fast", lambda *_, **__: None, lambda *_, **__: "needs another device")
    candidates = (fast, *op.candidates)
    monkeypatch.setattr(op, "candidates", candidates)
    for _ in range(2):  # jax must not answer the second trace from memory
        found = chosen_implementations(SMALL)["top_k"]
        assert found["decode"] == ["reference"] and found["refused"] == ["fast: needs another device"]
    assert op.candidates is candidates


def test_quantised_weights_are_traced_as_stored():
    config = load_config("flash").model
    found = jax.tree.leaves(abstract_parameters(config), is_leaf=lambda leaf: isinstance(leaf, QuantTensor))
    quantised = [leaf for leaf in found if isinstance(leaf, QuantTensor)]
    assert {leaf.format.name for leaf in quantised} == {"e4m3:128x128:ue8m0", "e2m1:1x32:ue8m0"}
    assert not any(leaf.validate() for leaf in quantised)
