"""What implementations ask of a device, for the kinds the project speaks of and for the one that is here."""

from types import SimpleNamespace

import jax
import pytest

from pallas_kernels.device import KINDS, Device, current, default_device, parse_capability, pretend

# kind -> FP8, INT8, bfloat16 matrix units
UNITS = {
    "T4": (False, True, False),
    "L4 / RTX 4090": (True, True, True),
    "A100": (False, True, True),
    "RTX 3090": (False, True, True),
    "H100 / H200": (True, True, True),
    "B200": (True, True, True),
    "TPU": (False, True, True),
    "CPU": (False, False, False),
}


def test_units_of_every_kind():
    assert {name: (d.has_fp8, d.has_int8, d.has_bfloat16) for name, d in KINDS.items()} == UNITS
    assert all(name == device.name for name, device in KINDS.items())


def test_references_multiply_in_what_the_device_has():
    assert {name for name, device in KINDS.items() if device.matmul_dtype == "float32"} == {"T4", "CPU"}


def test_the_default_device_is_the_one_that_jax_was_told():
    for chosen in (jax.local_devices()[-1], "cpu"):
        with jax.default_device(chosen):
            assert default_device().platform == "cpu"
            assert current().platform == "cpu"
    last = jax.local_devices()[-1]
    with jax.default_device(last):
        assert default_device() == last


def test_this_one():
    assert current() == Device(jax.local_devices()[0].device_kind, "cpu")


@pytest.mark.parametrize(
    ("platform", "capability", "want"),
    [
        ("gpu", "9.0", Device("kind", "gpu", (9, 0))),
        ("gpu", "12.1", Device("kind", "gpu", (12, 1))),
        ("gpu", "gfx942", Device("kind", "gpu", None)),
        ("tpu", None, Device("kind", "tpu", None)),
    ],
)
def test_others(monkeypatch, platform, capability, want):
    """A capability that is no CUDA one is unknown, never a crash: the references run there."""
    found = SimpleNamespace(platform=platform, device_kind="kind", compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [found])
    assert current() == want
    assert not parse_capability("") and not (want.capability is None and want.has_fp8)


def test_pretending_ends_with_the_block():
    before = current()
    with pytest.raises(RuntimeError), pretend(KINDS["T4"]):
        with pretend(KINDS["TPU"]):
            assert current().name == "TPU"
        assert current().name == "T4"
        raise RuntimeError
    assert current() == before
