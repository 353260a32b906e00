"""`dsv4 generate` and `dsv4.generate`: text out, facts beside it."""

import json
import shutil

import pytest

import dsv4 as library
from dsv4.cli.generate import cache_bytes
from dsv4.config import CACHE_FORMATS, Execution, load_config, replace
from dsv4.cost import bytes_per_token, compressor_state_bytes, count_parameters, entry_bytes, window_bytes
from dsv4.model.cache import MAX_STEP, init_cache

PROMPT = "In the beginning"
NEW = 9


@pytest.fixture(scope="module")
def model(released):
    return library.load(released)


def test_text_goes_to_stdout_and_facts_beside_it(dsv4, released, model, tmp_path):
    path = tmp_path / "facts.json"
    result = dsv4("generate", PROMPT, "--checkpoint", released, "--max-new", NEW, "--temperature", "0", "--json", path)
    assert result.code == 0
    expected = library.generate(model, PROMPT, max_new=NEW)
    assert expected and result.out == expected + "\n"
    facts = json.loads(path.read_text())
    assert facts["text"] == expected and facts["prompt"] == PROMPT
    assert facts["prompt_tokens"] == len(PROMPT) + 1  # a token a letter, and the begin id
    assert facts["new_tokens"] == NEW and facts["decode_tokens_per_second"] > 0
    for words in ("prefill", "decode", "active per token", "B per token of context", "every head and layer"):
        assert words in result.err


def test_measured_cache_bytes_are_those_of_the_formula(dsv4, released, tmp_path):
    path = tmp_path / "facts.json"
    assert dsv4("generate", PROMPT, "--checkpoint", released, "--max-new", NEW, "--json", path).code == 0
    facts, config = json.loads(path.read_text()), load_config(released).model
    form = CACHE_FORMATS["fp8"]  # of a quantised checkpoint
    drafts = len(config.layers) * (MAX_STEP - 1) * entry_bytes(config.attention, "fp8")
    assert facts["cache"] == {"window": "fp8", "entries": "fp8", "index": "fp8"}
    assert facts["cache_bytes_per_token"] == bytes_per_token(config, form)
    assert facts["cache_bytes_fixed"] == window_bytes(config, form) + drafts + compressor_state_bytes(config)
    assert facts["parameters"]["active"] == count_parameters(config).active


@pytest.mark.parametrize("layers", ["full,window", "full*2", "window,csa:4,hca:8"])
def test_every_kind_of_layer_is_counted_as_by_the_formula(layers):
    config = replace(load_config("tiny").model, "layers", layers)
    growing, fixed = cache_bytes(config, init_cache(config, Execution(), 1, capacity=64))
    form = CACHE_FORMATS["float32"]
    drafts = len(config.layers) * (MAX_STEP - 1) * config.attention.head_dim * 4
    assert growing == bytes_per_token(config, form) > 0
    assert fixed == window_bytes(config, form) + drafts + compressor_state_bytes(config)


def test_a_prompt_may_come_from_a_file(dsv4, released, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    options = ("--checkpoint", released, "--max-new", NEW, "--seed", "3")
    from_file = dsv4("generate", "--prompt-file", tmp_path / "prompt.txt", *options).out
    assert from_file == dsv4("generate", PROMPT, *options).out
    assert from_file != dsv4("generate", PROMPT, *options[:-1], "4").out


def test_control_characters_do_not_reach_a_terminal(dsv4, released, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("dsv4.decoding.text.TextDecoder.feed", lambda self, token: "\x1b]0;x\x07\n")
    result = dsv4("generate", PROMPT, "--checkpoint", released, "--max-new", "1")
    assert result.out.endswith("\ufffd]0;x\ufffd\n\n") and PROMPT in result.out


def test_ids_are_a_prompt_too_and_begin_is_put_once(model):
    ids = list(range(7, 27))
    assert library.generate(model, ids, max_new=3) == library.generate(model, [0, *ids], max_new=3)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([""], 1, "the prompt is empty"),
        (["--prompt-file", "nowhere.txt"], 1, "nowhere.txt"),
        (["x", "--max-new", "10000000"], 1, "10000000 new tokens do not fit"),
        (["x", "--max-new", "0"], 2, "--max-new is 0"),
        (["x", "--seed", str(2**64)], 2, f"--seed is {2**64}"),
        (["x", "--temperature", "-1"], 2, "temperature is -1.0"),
        (["x", "--top-k", "-1"], 2, "top_k is -1"),
        (["x", "--top-p", "2"], 2, "top_p is 2.0"),
    ],
)
def test_bad_values_are_2_and_prompts_that_do_not_fit_1(dsv4, released, argv, code, message):
    result = dsv4("generate", *argv, "--checkpoint", released)
    assert result.code == code and result.out == "" and message in result.err.splitlines()[-1]


def test_a_prompt_is_given_once(fails, tmp_path):
    fails("generate", code=2)
    fails("generate", "x", "--prompt-file", tmp_path / "x", code=2)


def test_a_prompt_longer_than_the_context(dsv4, released, edited):
    directory = edited(max_position_embeddings=12)
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(released / name, directory)
    result = dsv4("generate", PROMPT, "--checkpoint", directory)
    assert result.code == 1
    assert "the prompt has 17 tokens but the model's context is 12" in result.err.splitlines()[-1]


def test_a_file_that_is_no_text(fails, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in fails("generate", "--prompt-file", tmp_path / "prompt.txt")


def test_an_unknown_checkpoint(fails):
    assert "no checkpoint 'nope'" in fails("generate", "x", "--checkpoint", "nope")


def test_a_quantised_checkpoint_may_run_with_another_cache(dsv4, fails, released, tmp_path):
    """A bf16 cache is always there, to find out what a format is to blame for."""
    path = tmp_path / "facts.json"
    chosen = ("--set", "execution.cache=bf16", "--set", "execution.activations=none")
    assert dsv4("generate", PROMPT, "--checkpoint", released, "--max-new", 2, *chosen, "--json", path).code == 0
    assert json.loads(path.read_text())["cache"] == {"window": "bfloat16", "entries": "bfloat16", "index": "bfloat16"}
    error = fails("generate", PROMPT, "--checkpoint", released, "--set", "execution.cache=fp9", code=2)
    assert "execution.cache is 'fp9'" in error and "bf16" in error
    assert "no field 'model'" in fails("generate", PROMPT, "--checkpoint", released, "--set", "model.width=3", code=2)
