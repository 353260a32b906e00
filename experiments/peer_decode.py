"""Run a released-layout checkpoint with another implementation: its logits, and how fast it decodes.

The other implementation is Hugging Face transformers. This script imports numpy, torch and transformers
only, never jax or dsv4, so it runs in an environment of its own:

    python3 -m venv peer
    peer/bin/pip install torch==2.13.0 transformers==5.23.0 numpy accelerate

(`accelerate` is only needed for checkpoints with a `quantization_config`. Where plain pip would take the
large CUDA build of torch, the CPU build is enough: nothing here leaves the CPU.)

Logits of a checkpoint, float32 [batch, sequence, vocabulary], for the integer token ids [batch, sequence]
of IN.npy:

    peer/bin/python experiments/peer_decode.py logits CHECKPOINT --input-ids IN.npy --output OUT.npy

Expected: one JSON line with the shape, and OUT.npy. On `tests/oracle/ckpt/mixed` the result is within 2e-4
of the `logits` in `tests/oracle/data/mixed__main.npz` (measured: 5.7e-6).

Speed of greedy decoding through the cache (eager, batch 1, float32): a random prompt of N tokens is
prefilled, then M steps are timed, each feeding one token; loading and prefill are not in the time. One
warm-up, then the median of `--repeats` (5):

    peer/bin/python experiments/peer_decode.py decode CHECKPOINT \\
        --prompt 128 --tokens 64 --threads 2 --json FILE

Expected: one JSON line, also written to FILE. Its `tokens_per_s` is the figure to compare with ours on the
same machine; on `tests/oracle/ckpt/mixed` it was 50 to 60 on two cores of a server. `experts` names the
expert loop that ran and `--experts` picks it: `eager` is a python loop over the experts hit, `batched_mm`
and `grouped_mm` are the library's faster ones, `default` leaves the choice to the library. The fastest of
them is the fair opponent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a checkpoint is a directory here: nothing may be looked up

try:
    import numpy as np
    import torch
    import transformers
except ImportError as error:
    sys.exit(
        f"peer_decode.py: {sys.executable} cannot import {error.name}: make an environment with torch and "
        "transformers as the docstring of this file says, and run the script with that environment's python"
    )

EXPERTS = ("eager", "batched_mm", "grouped_mm", "default")


def load_model(checkpoint: Path, experts: str) -> Any:
    """The float32 model of `checkpoint`: config.json and safetensors under the original names.

    Fails unless the checkpoint had every parameter of the model and the model used every tensor of the
    checkpoint, `mtp.*` aside: transformers has no next-token-prediction block and leaves its tensors unread.
    """
    if not (checkpoint / "config.json").is_file():
        sys.exit(
            f"peer_decode.py: {checkpoint} has no config.json: name a directory in the released layout "
            "(config.json beside *.safetensors)"
        )
    if not hasattr(transformers, "DeepseekV4ForCausalLM"):
        sys.exit(
            f"peer_decode.py: transformers {transformers.__version__} has no DeepseekV4ForCausalLM: "
            "install transformers==5.23.0"
        )
    transformers.utils.logging.disable_progress_bar()
    options = {} if experts == "default" else {"experts_implementation": experts}
    model, info = transformers.DeepseekV4ForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
    )
    problems = {kind: sorted(map(str, names))[:8] for kind, names in info.items() if names}
    if problems:
        sys.exit(
            f"peer_decode.py: {checkpoint} did not load cleanly (first 8 of each kind): {problems}: "
            "compare the tensor names and config.json with those of the released checkpoint"
        )
    # A quantised checkpoint leaves some tensors in bfloat16; widening them is exact.
    return model.eval().float()


def run_logits(model: Any, input_ids: np.ndarray) -> np.ndarray:
    """Logits [batch, sequence, vocabulary] of one full forward pass without a cache."""
    if input_ids.ndim != 2 or not np.issubdtype(input_ids.dtype, np.integer):
        sys.exit(
            f"peer_decode.py: --input-ids holds {input_ids.dtype}{list(input_ids.shape)}: "
            "save an integer array [batch, sequence]"
        )
    vocab = model.config.vocab_size
    if input_ids.size == 0 or input_ids.min() < 0 or input_ids.max() >= vocab:
        span = f"{input_ids.min()}..{input_ids.max()}" if input_ids.size else "nothing"
        sys.exit(
            f"peer_decode.py: --input-ids holds {span}, but the vocabulary is 0..{vocab - 1}: save token ids "
            "of this checkpoint"
        )
    with torch.inference_mode():
        return model(torch.from_numpy(input_ids.astype(np.int64)), use_cache=False).logits.numpy()


def decode_once(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[float, list[int]]:
    """Prefill `prompt` [1, N], then time `tokens` greedy steps: their seconds, and the ids they produced."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        token = model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        out = []
        start = time.perf_counter()
        for _ in range(tokens):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            out.append(token)
        seconds = time.perf_counter() - start
    return seconds, torch.cat(out, 1)[0].tolist()


def run_decode(model: Any, prompt: int, tokens: int, repeats: int, seed: int) -> dict[str, Any]:
    """Median speed of `repeats` timed runs after one warm-up, and what is needed to read it."""
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, prompt))
    runs = [decode_once(model, torch.from_numpy(ids), tokens) for _ in range(repeats + 1)]
    speeds = [tokens / seconds for seconds, _ in runs[1:]]
    return {
        "tokens_per_s": round(statistics.median(speeds), 2),
        "tokens_per_s_each": [round(speed, 2) for speed in speeds],
        "prompt": prompt,
        "tokens": tokens,
        "batch": 1,
        "dtype": "float32",
        "attention": model.config._attn_implementation,
        "experts": getattr(model.config, "_experts_implementation", "?"),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "first_tokens": runs[0][1][:8],
    }


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small: give at least 1")
    return value


def parse_args() -> argparse.Namespace:
    """The command line: `logits` or `decode`, see the docstring of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    logits = commands.add_parser("logits", help="write the logits of given token ids")
    logits.add_argument("--input-ids", type=Path, required=True, help=".npy, integers [batch, sequence]")
    logits.add_argument("--output", type=Path, required=True, help=".npy, float32 [batch, sequence, vocabulary]")
    decode = commands.add_parser("decode", help="time greedy decoding through the cache")
    decode.add_argument("--prompt", type=positive, default=128, help="length of the random prompt (%(default)s)")
    decode.add_argument("--tokens", type=positive, default=64, help="greedy steps timed (%(default)s)")
    decode.add_argument("--repeats", type=positive, default=5, help="timed runs, the median counts (%(default)s)")
    decode.add_argument("--seed", type=int, default=0, help="of the prompt (%(default)s)")
    decode.add_argument("--json", type=Path, help="also write the result here")
    for command in (logits, decode):
        command.add_argument("checkpoint", type=Path, help="directory with config.json and *.safetensors")
        command.add_argument("--threads", type=positive, help="torch threads (left to torch)")
        command.add_argument("--experts", choices=EXPERTS, default="eager", help="expert loop (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Run the command and print one JSON line."""
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_model(args.checkpoint, args.experts)
    if args.command == "logits":
        if not args.input_ids.is_file():
            sys.exit(f"peer_decode.py: {args.input_ids} is not a file: save the token ids with numpy.save first")
        logits = run_logits(model, np.load(args.input_ids, allow_pickle=False))
        with args.output.open("wb") as file:
            np.save(file, logits)
        print(
            json.dumps(
                {
                    "shape": list(logits.shape),
                    "dtype": str(logits.dtype),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                }
            )
        )
        return
    result = run_decode(model, args.prompt, args.tokens, args.repeats, args.seed)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
