"""`dsv4 logits`: what the model says, exactly, for comparison with other implementations."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dsv4.cli import output
from dsv4.cli.app import UsageError
from dsv4.cli.arguments import Checkpoint, JsonFile
from dsv4.cli.compilation import keep_compiled_programs
from dsv4.cli.source import checkpoint_config, load_model

if TYPE_CHECKING:
    import numpy as np

    from dsv4.model.handle import Model

NpyFile = Annotated[Path, tyro.conf.arg(metavar="FILE.npy")]


@dataclass(frozen=True)
class Logits:
    """Float32 logits [B, S, V] of token ids [B, S], with exact matrix products and nothing quantised on the way.

    Quantised weights are dequantised first (but see --as-stored). The three modes take three paths through the code and
    must agree.

    examples:
      dsv4 logits path/to/checkpoint --input-ids ids.npy --output logits.npy
      dsv4 logits path/to/checkpoint --input-ids ids.npy --output logits.npy --mode chunked --chunk 64
    """

    checkpoint: tyro.conf.Positional[Checkpoint]
    input_ids: NpyFile
    """Token ids, integers [B, S]."""
    output: NpyFile
    """Where the logits go, written whole or not at all."""
    mode: Literal["full", "decode", "chunked"] = "full"
    """full: the whole sequence at once. decode: one token at a time from an empty cache. chunked: --chunk at a time."""
    chunk: int = 128
    """Tokens at a time in mode chunked."""
    as_stored: bool = False
    """Run a quantised checkpoint as `dsv4 generate` does: activations rounded to its format, an FP8 cache."""
    json: JsonFile = None
    """Also writes mode, shape, seconds (with compilation) and tokens per second as JSON to this file."""

    def run(self) -> None:
        from dsv4.config import Execution, execution_for
        from dsv4.decoding.inputs import check_capacity, check_ids

        if self.chunk < 1:
            raise UsageError(f"--chunk is {self.chunk}: at least 1 token at a time")
        ids = read_ids(self.input_ids)
        with output.json_file(self.json) as write, output.replacing(self.output) as temporary:
            # The config says whether the ids fit before the weights, which may take minutes, are read.
            config = checkpoint_config(self.checkpoint)
            check_ids(ids, config)
            check_capacity(ids.shape[1], config.max_context, config)
            keep_compiled_programs()
            # The reference implementations: faster ones may round.
            execution = Execution(dtype="float32", precision="highest", implementation="reference")
            if self.as_stored:
                execution = execution_for(config.storage, execution)
            model = load_model(self.checkpoint, execution)
            begin = time.perf_counter()
            logits = self._compute(model, ids)
            seconds = time.perf_counter() - begin
            _write(temporary, logits)
            facts = {
                "output": str(self.output),
                "mode": self.mode,
                "shape": list(logits.shape),
                "seconds": seconds,  # compilation included
                "tokens_per_second": ids.size / seconds,
            }
            write(facts)
        print(f"{self.output}: float32 {list(logits.shape)}")

    def _compute(self, model: Model, ids: np.ndarray) -> np.ndarray:
        import numpy as np

        from dsv4.decoding.run import forward

        if self.mode == "full":
            return np.asarray(forward(model, ids))
        return _through_cache(model, ids, 1 if self.mode == "decode" else min(self.chunk, ids.shape[1]))


def read_ids(path: Path) -> np.ndarray:
    """The array in an .npy file; raises InputError or OSError. Its content is for `check_ids` to judge."""
    import numpy as np

    from dsv4.decoding.inputs import InputError

    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path} is not an .npy array: {error}") from None


def _through_cache(model: Model, ids: np.ndarray, chunk: int) -> np.ndarray:
    """Logits of every token, `chunk` tokens at a time; the last chunk is padded so that one program does for all."""
    import numpy as np

    from dsv4.decoding.run import extend
    from dsv4.model.cache import init_cache

    batch, tokens = ids.shape
    cache = init_cache(model.config, model.execution, batch, capacity=tokens)
    logits = np.empty((batch, tokens, model.config.vocab_size), np.float32)
    with output.progress(f"{tokens} tokens") as report:
        for begin in range(0, tokens, chunk):
            part = ids[:, begin : begin + chunk].astype(np.int32)
            width = part.shape[1]
            padded = np.pad(part, ((0, 0), (0, chunk - width)))
            some, cache = extend(model, padded, np.full(batch, width, np.int32), cache)
            logits[:, begin : begin + width] = some[:, :width]
            report(begin + width, tokens)
    return logits


def _write(path: Path, array: np.ndarray) -> None:
    import numpy as np

    with path.open("wb") as file:  # given a name, numpy would append .npy to it
        np.save(file, array)
