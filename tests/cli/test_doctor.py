"""`dsv4 doctor`: what would run, here and on devices that are not, told from an abstract trace."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import pytest

from dsv4.cli.device_table import markdown, recipe_table
from dsv4.cli.implementations import abstract_parameters, chosen_implementations, traced_calls
from dsv4.config import load_config, replace
from dsv4.config.recipe import RECIPES, find_recipe
from pallas_kernels.device import KINDS
from pallas_kernels.dispatch import OPS, Candidate
from pallas_kernels.products import NO_TRITON
from pallas_kernels.quant import QuantTensor, TreatedWeight

SMALL = replace(load_config("tiny").model, "layers", "csa:4,hca:8")
FLASH = load_config("flash").model
README = Path(__file__).parents[2] / "README.md"
# What a kernel's layer calls where the layer is a kernel's, which it is nowhere on a CPU.
WITHIN_KERNELS = {"quantize_rows"}


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    """Tables are those of XLA's defaults."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def test_doctor_lists_versions_devices_and_ops(dsv4, tmp_path):
    path = tmp_path / "doctor.json"
    result = dsv4("doctor", "tiny", "--set", "model.layers=csa:4,hca:8", "--recipe", "int8", "--json", path)
    assert result.code == 0 and result.err == ""
    facts = json.loads(path.read_text())
    assert facts["versions"]["jax"] == jax.__version__ and facts["devices"][0]["platform"] == "cpu"
    assert {"block_matmul", "experts", "router", "index_scores", "top_k"} <= facts["ops"].keys()
    for name, op in facts["ops"].items():
        assert name in result.out and bool(op["prefill"] + op["decode"]) != (name in WITHIN_KERNELS), name
    experts = next(row for row in facts["table"] if row["op"] == "experts")
    assert facts["recipe"] == "int8" and experts["operands"] == "int8_row x int8_row"
    assert experts["cells"]["TPU"]["runs"] == ["scaled_dot"]
    hopper, xla = experts["cells"]["A100"]["refused"]
    assert hopper == "sm90: A100 is no Hopper GPU (compute capability 9.0)"
    assert xla.startswith("scaled_dot: XLA's own INT8 products are wrong on GPUs") and NO_TRITON in xla
    assert "the device has no INT8 matrix units that XLA uses" in result.out


def test_bad_arguments(fails):
    assert "no recipe 'fp7': bf16, released" in fails("doctor", "--recipe", "fp7", code=2)
    assert "leave out --json" in fails("doctor", "--markdown", "--json", "x.json", code=2)


def test_a_recipe_that_does_not_fit(fails):
    error = fails("doctor", "tiny", "--recipe", "released")
    assert "experts.w2.weight cannot be e2m1:1x32:ue8m0: tiles of 1 x 32 do not divide" in error
    wide = ("--set", "model.width=192", "--set", "model.layers=window")
    error = fails("doctor", "tiny", *wide, "--set", "model.moe.hash_layers=0", "--recipe", "fp8")
    assert "do not fit the config" in error and "tiles of 1 x 128 do not divide" in error


def test_a_refusal_is_told(monkeypatch):
    op = OPS["top_k"]
    fast = Candidate("fast", lambda *_, **__: None, lambda *_, **__: "needs another device")
    monkeypatch.setattr(op, "candidates", (fast, op.candidates[-1]))
    for _ in range(2):  # jax must not answer the second trace from memory
        found = chosen_implementations(traced_calls(SMALL))["top_k"]
        assert found["decode"] == ["reference"] and found["refused"] == ["fast: needs another device"]


def test_quantised_weights_are_traced_as_stored():
    found = jax.tree.leaves(abstract_parameters(FLASH), is_leaf=lambda leaf: isinstance(leaf, QuantTensor))
    quantised = [leaf for leaf in found if isinstance(leaf, QuantTensor)]
    assert {leaf.format.name for leaf in quantised} == {"e4m3:128x128:ue8m0", "e2m1:1x32:ue8m0"}
    assert not any(leaf.validate() for leaf in quantised)


def test_treated_weights_are_traced_as_stored():
    recipe = dataclasses.replace(find_recipe("int8"), outlier_channels=4, rotate=True)
    config = dataclasses.replace(SMALL, storage=recipe.storage(SMALL.storage, static=True))
    attention = abstract_parameters(config)["layers"][0]["attn"]
    wo_a, wo_b = (attention[name]["weight"] for name in ("wo_a", "wo_b"))
    assert isinstance(wo_a, TreatedWeight) and isinstance(wo_b, TreatedWeight)
    assert wo_a.input_scale is None and wo_b.input_scale.shape == (1, 1)
    assert wo_b.rotated and wo_b.columns.shape == (*wo_b.shape[:-1], 4) and wo_b.channels.shape == (4,)


@functools.cache
def table(recipe):
    """(op, device) -> cell, of flash's quantised operands (plain ones in bf16)."""
    rows = [row for row in recipe_table(FLASH, find_recipe(recipe)) if row.op in ("block_matmul", "experts")]
    rows = [row for row in rows if row.operands != "plain"] or rows
    assert len({row.op for row in rows}) == len(rows) == 2
    return {(row.op, device): cell for row in rows for device, cell in row.cells.items()}


ALL, FP8 = set(KINDS), {"L4 / RTX 4090", "H100 / H200", "B200"}
HOPPER = {"H100 / H200"}
EXPECTED = {
    # recipe -> {implementation of dense products: where}, {of experts: where}; the reference elsewhere
    "bf16": ({}, {}),
    "released": ({"sm90": HOPPER, "block_dot": FP8 - HOPPER}, {"sm90": HOPPER}),
    "fp8": ({"sm90": HOPPER, "block_dot": FP8 - HOPPER}, {"sm90": HOPPER}),
    "fp8_per_channel": ({"sm90": HOPPER, "scaled_dot": FP8 - HOPPER}, {"scaled_dot": FP8}),
    "int8": ({"scaled_dot": {"TPU"}}, {"scaled_dot": {"TPU"}}),
}


@pytest.mark.parametrize("recipe", EXPECTED)
def test_every_kind_of_device(recipe):
    dense, experts = EXPECTED[recipe]
    for op, fast in {"block_matmul": dense, "experts": experts}.items():
        for device in KINDS:
            cell = table(recipe)[op, device]
            expected = [name for name, where in fast.items() if device in where] or ["reference"]
            assert list(cell.runs) == expected, (op, device)
            assert cell.refused or cell.runs == ("sm90",), f"{op} on {device}: no reason"


def test_int8_runs_on_gpus_where_xla_takes_cublas(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", NO_TRITON)
    for (op, device), cell in table.__wrapped__("int8").items():
        assert cell.runs == (("reference",) if device == "CPU" else ("scaled_dot",)), (op, device)


def test_reasons_name_the_device_or_what_is_missing():
    assert table("released")["block_matmul", "A100"].refused == (
        "sm90: A100 is no Hopper GPU (compute capability 9.0)",
        "scaled_dot: A100 has no FP8 matrix units",
        "block_dot: A100 has no FP8 matrix units",
    )
    for op in ("block_matmul", "experts"):
        assert "scaled_dot: T4 has no FP8 matrix units" in table("fp8_per_channel")[op, "T4"].refused
        assert "scaled_dot: CPU has no INT8 matrix units that XLA uses" in table("int8")[op, "CPU"].refused
    assert table("released")["experts", "B200"].refused == (
        "sm90: B200 is no Hopper GPU (compute capability 9.0)",
        "scaled_dot: XLA's dot takes no e2m1 codes packed two a byte",
    )


def test_a_table_has_one_answer_for_one_name():
    """Entries and index keys of the same recipe are compressed by different implementations: each row says which."""
    lines = markdown(FLASH, [find_recipe("fp8_per_tensor"), find_recipe("released")]).splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][2:-1]
    named = [(recipe, op) for row in rows for recipe in row[0].split(", ") for op in row[1].split(", ")]
    assert len(named) == len(set(named))
    ops = {op: recipe.removeprefix("| ") for recipe, op in named if op.startswith("compress")}
    per_tensor = "fp8_per_tensor"
    assert ops == {"compress (entries)": per_tensor, "compress (index keys)": per_tensor, "compress": "released"}


def test_the_readme_has_this_table():
    """Its text between the markers is what `dsv4 doctor --markdown` prints."""
    found = README.read_text().split("<!-- device table -->\n")[1].split("<!-- end device table -->")[0]
    assert found == markdown(FLASH, RECIPES.values())
