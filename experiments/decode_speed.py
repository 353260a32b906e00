"""Decode speed of a checkpoint, batch 1, float32: the twin of `peer_decode.py decode`.

    python experiments/decode_speed.py tests/oracle/ckpt/mixed --prompt 128 --tokens 64

Prefills a random prompt, then takes greedy steps through the jitted step of `dsv4 generate`; prints tokens/s, the
median of 5 repeats after a warm-up, compilation and prefill excluded. About 20 s, most of it compilation.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import jax
import numpy as np

import dsv4
from dsv4.decoding.generate import stream

REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = dsv4.load(options.checkpoint)
    ids = np.random.default_rng(0).integers(2, model.config.vocab_size, options.prompt)
    rates = []
    for repeat in range(REPEATS + 1):
        run = stream(model, ids, max_new=options.tokens + 1, stop_at_eos=False)
        for _ in run:
            pass
        if repeat:
            rates.append(run.stats.decode_tokens_per_second)
    result = {
        "tokens_per_second": statistics.median(rates),
        "repeats": rates,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
