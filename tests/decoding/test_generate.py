"""The decode loop: the same tokens as the plain steps, in place, with honest times and clear errors."""

import time
from dataclasses import replace

import numpy as np
import pytest

from dsv4 import checkpoint
from dsv4.decoding.generate import Generation, GenerationStats, _chunks, generate, stream
from dsv4.decoding.inputs import InputError
from dsv4.decoding.sample import Sampling
from dsv4.model.handle import Model

PROMPT = [0, 17, 33, 250, 9, *range(40, 55)]
NEW = 12


@pytest.fixture(scope="module")
def model(oracle):
    return Model(*checkpoint.read(oracle / "ckpt" / "mixed_fp8fp4"))


@pytest.fixture(scope="module")
def recorded(oracle):
    return np.load(oracle / "data" / "mixed_fp8fp4__main.npz")


def test_greedy_continues_as_recorded(model, recorded):
    prompt, expected = recorded["input_ids"][0], recorded["decode_tokens"][0]
    tokens = stream(model, prompt, max_new=len(expected), stop_at_eos=False)
    assert list(tokens) == expected.tolist()
    assert tokens.stats.prompt_tokens == len(prompt) and tokens.stats.new_tokens == len(expected)


def test_a_long_prompt_is_cut_and_its_last_part_padded():
    ids = np.arange(150)[None]
    parts = list(_chunks(ids, 64))
    assert [part.shape for part, _ in parts] == [(1, 64), (1, 64), (1, 32)]
    assert np.concatenate([part[:, : count[0]] for part, count in parts], axis=1).tolist() == ids.tolist()
    assert [part.shape[1] for part, _ in _chunks(np.zeros((1, 3)), 512)] == [16]


def test_draws_depend_on_the_seed_alone(model):
    def drawn(seed, **changes):
        sampling = Sampling(temperature=1.0, **changes)
        return list(stream(model, PROMPT, max_new=NEW, sampling=sampling, seed=seed, stop_at_eos=False))

    first = drawn(0)
    assert drawn(0) == first != drawn(1)
    assert drawn(0, top_k=1) == list(stream(model, PROMPT, max_new=NEW, stop_at_eos=False))


def test_a_longer_run_begins_with_the_shorter_one(model):
    long, short = (list(stream(model, PROMPT, max_new=n, sampling=Sampling(1.0), stop_at_eos=False)) for n in (NEW, 5))
    assert long[:5] == short


def test_the_end_id_is_the_last_token(model):
    greedy = list(stream(model, PROMPT, max_new=NEW, stop_at_eos=False))
    eos = next(token for token in greedy[1:] if token != greedy[0])
    ended = Generation(model, np.array([PROMPT], np.int32), NEW, Sampling(), seed=0, ends={eos})
    assert list(ended) == greedy[: greedy.index(eos) + 1]


@pytest.mark.parametrize("name", ["eos_id", "bos_id"])
def test_a_text_ends_with_the_end_id_or_where_the_next_would_begin(model, name):
    greedy = list(stream(model, PROMPT, max_new=NEW, stop_at_eos=False))
    end = next(token for token in greedy[1:] if token != greedy[0])
    ending = model.replace(config=replace(model.config, **{name: end}))
    assert list(stream(ending, PROMPT, max_new=NEW)) == greedy[: greedy.index(end) + 1]


def test_the_cache_is_updated_in_place(model):
    tokens = stream(model, PROMPT, max_new=NEW, stop_at_eos=False)
    next(tokens)
    before = tokens.cache
    next(tokens)
    before, after = (cache.layers[0].window.body for cache in (before, tokens.cache))
    assert before.is_deleted() and not after.is_deleted()


def test_times_are_of_finished_work_and_leave_compilation_out(model):
    begin = time.perf_counter()
    tokens = stream(model, PROMPT, max_new=NEW, stop_at_eos=False)
    tokens.warm_up()
    list(tokens)
    wall, stats = time.perf_counter() - begin, tokens.stats
    assert stats.compile_seconds + stats.prefill_seconds + stats.decode_seconds <= wall
    assert stats.prefill_seconds > 0 < stats.decode_seconds
    assert stats.decode_tokens_per_second == pytest.approx((NEW - 1) / stats.decode_seconds)
    assert stats.prefill_tokens_per_second == pytest.approx(len(PROMPT) / stats.prefill_seconds)


def test_a_single_token_has_no_decode_rate(model):
    tokens = stream(model, PROMPT, max_new=1)
    assert len(list(tokens)) == 1 and tokens.stats.decode_tokens_per_second == 0
    assert GenerationStats(prompt_tokens=3).prefill_tokens_per_second == 0


def test_a_second_run_compiles_nothing(model):
    stream(model, PROMPT, max_new=NEW)
    assert stream(model, PROMPT, max_new=NEW).stats.compile_seconds < 0.5
    assert stream(model, [*PROMPT, 3, 4], max_new=NEW + 7).stats.compile_seconds < 0.5


@pytest.mark.parametrize(
    ("ids", "max_new", "message"),
    [
        ([], 4, "the prompt is empty"),
        ([0, 256], 4, r"token id 256 is out of range: the vocabulary has ids 0\.\.255"),
        ([0, -1], 4, "token id -1 is out of range"),
        ([0.5], 4, "integers are needed"),
        ([0] * 41, 4, "the prompt has 41 tokens but the model's context is 40: shorten it by at least 2"),
        ([0] * 30, 11, "11 new tokens do not fit: the prompt has 30 tokens .* leaves 10"),
        ([0], 0, "max_new is 0"),
    ],
)
def test_bad_requests_are_refused_at_once(model, ids, max_new, message):
    short = model.replace(config=replace(model.config, max_context=40))
    with pytest.raises(InputError, match=message):
        stream(short, ids, max_new=max_new)


def test_text_needs_a_tokenizer(model, tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer: put its tokenizer\.json beside"):
        generate(model, "In the beginning")
    with pytest.raises(InputError, match="does not exist"):
        generate(model.replace(tokenizer_path=str(tmp_path / "tokenizer.json")), "In the beginning")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer"):
        generate(model.replace(tokenizer_path=str(tmp_path / "tokenizer.json")), "In the beginning")
