"""The released config.json: read exactly, written exactly, and refused by the name of what is wrong."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4.config import ConfigError, LayerConfig, load_config, read_released, write_released
from dsv4.config.layers import parse_layers
from dsv4.config.released import from_released, to_released
from dsv4.config.released_keys import FIXED, KEYS, SECTIONS, section

CKPT = Path(__file__).parents[1] / "oracle" / "ckpt"
CASES = sorted(path.parent.name for path in CKPT.glob("*/config.json"))
ABSENT = object()
RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


def raw(case="mixed_fp8fp4", **changes):
    """The config.json of an oracle case, changed; a dotted key is one inside an object."""
    found = json.loads((CKPT / case / "config.json").read_text())
    for name, value in changes.items():
        outer, _, key = name.rpartition(".")
        holder = found[outer] if outer else found
        if value is ABSENT:
            del holder[key]
        else:
            holder[key] = value
    return found


def refused(config):
    with pytest.raises(ConfigError) as caught:
        from_released(config)
    return str(caught.value)


def test_there_are_cases():
    assert {"mixed", "mixed_fp8fp4", "hca16"} <= set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_every_oracle_file_makes_the_round_trip(case, tmp_path):
    config = read_released(CKPT / case)
    assert to_released(config) == raw(case)
    assert from_released(to_released(config)) == config
    write_released(config, tmp_path / "config.json")
    assert read_released(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["flash", "pro", "tiny", "small"])
def test_named_configs_make_the_round_trip(name):
    config = load_config(name).model
    if name == "tiny":
        assert to_released(config)["compress_rates"]["heavily_compressed_attention"] == 8
    assert from_released(json.loads(json.dumps(to_released(config)))) == config


def test_documented_differences_of_the_round_trip():
    """Absent keys come back with the value their absence means, MTP's ratios are written, second names are not."""
    fp8_experts = raw(expert_dtype=ABSENT)
    assert to_released(from_released(fp8_experts)) == fp8_experts | {"expert_dtype": "fp8"}
    shorter = raw("mixed")["compress_ratios"][:7]
    assert to_released(from_released(raw("mixed", compress_ratios=shorter))) == raw("mixed")
    renamed = raw(torch_dtype=ABSENT, dtype="bfloat16")
    renamed["rope_scaling"]["rope_type"] = renamed["rope_scaling"].pop("type")
    assert to_released(from_released(renamed)) == raw()
    nulls = dict.fromkeys((name for name, key in KEYS.items() if not key.required), None)
    nulls |= {"quantization_config": None, "rope_scaling": None, "layer_types": None, "compress_rates": None}
    defaults = raw() | nulls
    assert to_released(from_released(defaults)) == {
        key: raw()[key] for key in raw() if nulls.get(key, 0) is not None
    } | {
        "torch_dtype": "bfloat16",
        "num_nextn_predict_layers": 0,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def test_whole_numbers_of_float_keys_are_written_with_a_fraction():
    config = load_config("tiny").model
    config = replace(config, moe=replace(config.moe, swiglu_limit=10))
    assert '"swiglu_limit": 10.0' in json.dumps(to_released(config))
    assert isinstance(from_released(raw(swiglu_limit=10)).moe.swiglu_limit, float)


def test_what_is_written_shares_nothing_with_the_tables():
    first = to_released(load_config("flash").model)
    again = copy.deepcopy(first)
    first["quantization_config"]["weight_block_size"].append(1)
    first["architectures"].append("other")
    assert to_released(load_config("flash").model) == again


def wrong_kinds():
    for name, key in KEYS.items():
        if name == "dtype":
            continue
        wrong = {int: ["7", -1, 16.0, True, [1]], float: ["16", True, {}, float("nan"), float("inf")]}
        wrong[bool] = ["false", 0, 1]
        values = wrong.get(key.kind, ["other", 3, ["fp8"], True])
        yield from ((name, value) for value in values + ([None] if key.required else []))


@pytest.mark.parametrize(("key", "value"), list(wrong_kinds()))
def test_a_value_of_the_wrong_kind_is_named(key, value):
    assert f"{key} is {value!r}, expected " in refused(raw(**{key: value}))


@pytest.mark.parametrize("key", sorted({name for name, key in KEYS.items() if key.required} | {"num_hidden_layers"}))
def test_a_missing_key_is_named(key):
    assert refused(raw(**{key: ABSENT})) == f"{key} is missing"


@pytest.mark.parametrize("key", FIXED)
def test_a_key_with_one_value_takes_no_other(key):
    for value in ("linear", 2, [128, 128.0], None, not FIXED[key]):
        message = refused(raw(**{key: value}))
        assert f"{key} is {value!r}" in message and ("only" in message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", "7", "num_hidden_layers is '7', expected an integer of at least 1"),
        ("num_hidden_layers", -1, "num_hidden_layers is -1, expected an integer of at least 1"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("num_hidden_layers", True, "num_hidden_layers is True"),
        ("num_hidden_layers", 3.0, "num_hidden_layers is 3.0"),
        ("compress_ratios", 4, "compress_ratios is 4, expected a list"),
        ("compress_ratios", [0, "4", 128], "expected a list of integers"),
        ("compress_ratios", [0, True, 128], "expected a list of integers"),
        ("compress_ratios", [0, 1, 128], "0, or at least 2"),
        ("compress_ratios", [0, -4, 128], "expected a list of integers"),
        ("compress_ratios", [0, 4], "compress_ratios has 2 entries for num_hidden_layers 3"),
        ("compress_ratios", [0, 4, 128, 0], "num_nextn_predict_layers 0"),
        ("compress_ratios", [0, 4, 128, 0, 0], "compress_ratios has 5 entries"),
        ("layer_types", 3, "layer_types 3 contradicts"),
        ("layer_types", ["sliding_attention"] * 3, "contradicts compress_ratios [0, 4, 128]"),
        ("layer_types", ["sliding_attention", "compressed_sparse_attention"], "contradicts"),
        ("compress_rates", [1], "compress_rates is [1], expected an object"),
        ("compress_rates", RATES | {"heavily_compressed_attention": 64}, "is 64 but compress_ratios has [128]"),
        ("compress_rates", RATES | {"heavily_compressed_attention": "128"}, "is '128', expected an integer"),
        ("compress_rates", RATES | {"heavily_compressed_attention": [128]}, "is [128], expected an integer"),
        ("quantization_config", [1], "quantization_config is [1], expected an object"),
        ("quantization_config", {}, "quantization_config.fmt is missing; quantization_config.quant_method is missing"),
        ("quantization_config", None, "expert_dtype is 'fp4' but there is no quantization_config"),
        ("rope_scaling", "yarn", "rope_scaling is 'yarn', expected an object"),
        ("rope_scaling", {}, "rope_scaling.type is missing, only 'yarn' is supported"),
        ("rope_scaling.rope_type", "linear", "rope_scaling.rope_type is 'linear', only 'yarn' is supported"),
        ("dtype", "float32", "dtype is 'float32' but torch_dtype is 'bfloat16'"),
        ("num_experts_per_tok", 9, "num_experts_per_tok is 9: it must be between 1 and n_routed_experts 8"),
        ("rope_scaling.factor", 0, "rope_scaling.factor is 0.0: it must be positive"),
        ("num_hash_layers", 9, "num_hash_layers is 9 but there are 3 layers"),
        ("hidden_size", 0, "hidden_size is 0: it must be at least 1"),
    ],
)
def test_contradictions_are_named(key, value, message):
    assert message in refused(raw(**{key: value}))


def test_more_ratios_than_mtp_blocks_are_refused_and_none_or_all_are_read():
    ratios = raw("mixed")["compress_ratios"]
    assert len(from_released(raw("mixed", compress_ratios=ratios[:7])).layers) == 7
    assert "num_nextn_predict_layers 1" in refused(raw("mixed", compress_ratios=[*ratios, 0]))
    assert "the last [4]" in refused(raw("mixed", compress_ratios=[*ratios[:7], 4]))


def test_all_problems_are_one_error():
    message = refused(
        raw(
            **{
                "vocab_size": "many",
                "hidden_size": ABSENT,
                "topk_method": "greedy",
                "num_hidden_layers": "7",
                "rope_scaling.factor": "16",
                "quantization_config.fmt": "e5m2",
                "hc_mult": 0,
                "scoring_func": "linear",
            }
        )  # fmt: skip
    )
    assert sorted(message.split("; ")) == [
        "hc_mult is 0: it must be at least 1",
        "hidden_size is missing",
        "num_hidden_layers is '7', expected an integer of at least 1",
        "quantization_config.fmt is 'e5m2', only 'e4m3' is supported",
        "rope_scaling.factor is '16', expected a finite number",
        "scoring_func is 'linear', expected sqrtsoftplus, softmax or sigmoid",
        "topk_method is 'greedy', only 'noaux_tc' is supported",
        "vocab_size is 'many', expected an integer of at least 0",
    ]


@pytest.mark.parametrize("value", ["llama", None, 4, ["deepseek_v4"]])
def test_another_architecture_is_refused_before_anything_else(value):
    assert refused({"model_type": value}).startswith(f"model_type is {value!r}: this is another architecture")


@pytest.mark.parametrize(
    "changes",
    [
        {"compress_ratios": [0, 4, 128, 0, 0, 0]},
        {"compress_ratios": [0, 4, 128, 0, 0, 0], "num_nextn_predict_layers": 3},
        {"compress_ratios": [0, 4, 128, 0, 0, 0], "num_nextn_predict_layers": 1},
        {"compress_ratios": [0, 4, 128, 128, 0, 4]},
        {"num_nextn_predict_layers": 2},
        {"num_nextn_predict_layers": 3, "vocab_size": "many"},
        {"dspark_block_size": 5},
        {"DSpark": None},
        {"draft": {"dspark_stages": 3}},
        {"architectures": ["DeepseekV4DSparkForCausalLM"]},
        {"markov_rank": 256},
        {"quantization_config.modules_to_not_convert": ["mtp.2.confidence_head"]},
    ],
)
def test_the_later_release_is_always_refused_by_name(changes):
    assert refused(raw(**changes)).startswith("this checkpoint has dspark stages instead of MTP blocks")


def test_the_folder_a_file_came_from_is_no_hint():
    from_released(raw(_name_or_path="/models/not-dspark"))


def test_unknown_keys_are_one_warning_and_known_ones_none():
    changes = {"n_group": 8, "rope_scaling.mscale": 1.0, "quantization_config.fmt2": 1, "transformers_version": "5"}
    rates = RATES | {"other_attention": 3}
    with pytest.warns(UserWarning) as caught:
        config = from_released(raw(compress_rates=rates, **changes))
    assert config == from_released(raw())
    assert [str(warning.message) for warning in caught] == [
        "config.json keys not known to dsv4, ignored: "
        "compress_rates.other_attention, n_group, quantization_config.fmt2, rope_scaling.mscale"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "does not exist"), ("{", "is not JSON"), ("[]", "holds list, expected an object"), ("\xff", "is not JSON")],
)
def test_a_file_that_is_no_config_is_named(text, message, tmp_path):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message) as caught:
        read_released(path)
    assert str(path) in str(caught.value)


def test_an_error_in_a_file_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw(hc_mult="4")))
    with pytest.raises(ConfigError, match="config.json: hc_mult is '4'"):
        read_released(tmp_path)


@pytest.mark.parametrize("layer", ["full", "csa:2", "csa:8", "hca:4"])
def test_a_layer_the_format_cannot_say_is_refused_by_number(layer):
    config = load_config("tiny").model
    odd = replace(config, layers=parse_layers(f"window,{layer},csa:4"))
    with pytest.raises(ConfigError, match=rf"\(a research setting\): layer 1 is {layer}\. Keep it"):
        to_released(odd)


@pytest.mark.parametrize(
    ("group", "changes", "message"),
    [
        ("attention", {"sink": False}, "attention.sink is off"),
        ("residual", {"kind": "plain", "streams": 1}, "residual.kind is plain"),
        ("moe", {"experts": 0, "hash_layers": 0}, "moe.experts is 0"),
        ("moe", {"shared": 0}, "moe.shared is 0"),
        ("moe", {"swiglu_limit": 0.0}, "moe.swiglu_limit is 0"),
    ],
)
def test_a_research_setting_is_not_exported(group, changes, message, tmp_path):
    config = load_config("tiny").model
    odd = replace(config, **{group: replace(getattr(config, group), **changes)}, layers=(LayerConfig("full"),))
    with pytest.raises(ConfigError, match=f"layer 0 is full; {message}"):
        write_released(odd, tmp_path / "config.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalize": False}, "not renormalised"),
        ({"scoring": "softmax"}, "not renormalised"),
        ({"shared": 2}, "2 shared experts"),
    ],
)
def test_what_other_readers_ignore_is_a_warning(changes, message):
    config = load_config("tiny").model
    config = replace(config, moe=replace(config.moe, **changes))
    with pytest.warns(UserWarning, match=message):
        written = to_released(config)
    assert from_released(written) == config


def test_every_dotted_key_is_in_an_object_that_is_known():
    assert {section(key) for key in (*KEYS, *FIXED)} == {"", *SECTIONS}
