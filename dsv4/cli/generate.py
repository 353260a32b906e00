"""`dsv4 generate`: text from a model, and what it took."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dsv4.cli import output
from dsv4.cli.app import UsageError
from dsv4.cli.arguments import Checkpoint, JsonFile, Overrides
from dsv4.cli.compilation import keep_compiled_programs
from dsv4.cli.source import checkpoint_config, chosen_execution, load_model
from dsv4.config import DEFAULT_MODEL
from dsv4.cost import count_parameters, dense_multihead_bytes_per_token

if TYPE_CHECKING:
    from dsv4.config import ModelConfig
    from dsv4.decoding.generate import Generation
    from dsv4.model.cache import Cache
    from dsv4.model.handle import Model


@dataclass(frozen=True)
class Generate:
    """Continues a prompt: the text comes to stdout as it is made, then a table of speeds and sizes to stderr.

    The prompt is text. The begin id is put before it, and a special token spelled in it is ordinary text. Compiled
    programs are kept in the user's cache directory, or in $DSV4_COMPILATION_CACHE (`off` for none).

    examples:
      dsv4 generate "In the beginning"
      dsv4 generate "KING HENRY" --temperature 0 --max-new 400
      dsv4 generate "In the beginning" --set execution.cache=bf16
      dsv4 generate --prompt-file prompt.txt --checkpoint runs/tiny/model --json facts.json
    """

    prompt: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[PROMPT]")] = None
    """The text to continue."""
    prompt_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A file that holds the prompt instead (UTF-8)."""
    checkpoint: Checkpoint = DEFAULT_MODEL
    max_new: int = 200
    """The most tokens to make; the end of the document stops earlier."""
    temperature: float = 0.8
    """0 takes the most likely token every time."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0: from all."""
    top_p: float = 1.0
    """Draw from the most likely tokens that together have this probability; 1: from all."""
    seed: int = 0
    """The same seed, prompt and options give the same text on the same device."""
    set: Annotated[
        Overrides,
        tyro.conf.arg(
            help="Changes how the model runs: execution.cache=bf16 (or float32, fp8, fp8_fp4_index, fp8_tensor, int8), "
            "execution.activations=none, execution.dtype=bfloat16, execution.implementation=reference."
        ),
    ] = ()
    json: JsonFile = None

    def run(self) -> None:
        from dsv4.decoding.generate import stream
        from dsv4.decoding.inputs import InputError
        from dsv4.decoding.sample import Sampling
        from dsv4.decoding.text import encode, load_tokenizer, prompt_ids

        prompt = self._prompt()
        if self.max_new < 1:
            raise UsageError(f"--max-new is {self.max_new}: ask for at least 1 new token")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed is {self.seed}: it is a number from 0 to {2**32 - 1}")
        try:
            sampling = Sampling(self.temperature, self.top_k, self.top_p)
        except InputError as error:
            raise UsageError(str(error)) from error
        with output.json_file(self.json) as write:
            keep_compiled_programs()
            execution = chosen_execution(checkpoint_config(self.checkpoint), self.set)
            model = load_model(self.checkpoint, execution)
            tokenizer = load_tokenizer(model)
            ids = prompt_ids(model.config, encode(tokenizer, prompt))
            with output.progress("compiling"):
                tokens = stream(model, ids, max_new=self.max_new, sampling=sampling, seed=self.seed)
                tokens.warm_up()
            text = _show(tokens, tokenizer, prompt)
            facts = {"prompt": prompt, "text": text} | run_facts(model, tokens)
            write(facts)
        output.table(_rows(facts), ("", ""), file=sys.stderr)

    def _prompt(self) -> str:
        from dsv4.decoding.inputs import InputError

        if (self.prompt is None) == (self.prompt_file is None):
            raise UsageError("give either a prompt, e.g. dsv4 generate 'In the beginning', or --prompt-file")
        if self.prompt is not None:
            prompt, origin = self.prompt, "the prompt"
        else:
            assert self.prompt_file is not None
            origin = str(self.prompt_file)
            try:
                prompt = self.prompt_file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{origin} is not UTF-8 text: {error}") from None
        if not prompt:
            raise InputError(f"{origin} is empty: give some text to continue")
        return prompt


def run_facts(model: Model, tokens: Generation) -> dict[str, Any]:
    """Speeds, parameters and cache bytes of a finished generation, as plain data."""
    stats, parameters = tokens.stats, count_parameters(model.config)
    growing, fixed = cache_bytes(model.config, tokens.cache)
    return {
        **dataclasses.asdict(stats),
        "prefill_tokens_per_second": stats.prefill_tokens_per_second,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
        "parameters": dataclasses.asdict(parameters),
        "cache": dataclasses.asdict(model.execution.cache_format),
        "cache_bytes_per_token": growing,
        "cache_bytes_fixed": fixed,
        "dense_multihead_bytes_per_token": dense_multihead_bytes_per_token(model.config),
    }


def cache_bytes(config: ModelConfig, cache: Cache) -> tuple[float, int]:
    """(bytes a token of context, fixed bytes a sequence) of the arrays of a cache that holds one sequence."""
    growing = fixed = 0
    for kind, layer in zip((layer.kind for layer in config.layers), cache.layers, strict=True):
        kept = cache.capacity if kind == "full" else 0  # slots that grow with the context; the rest are fixed
        slot = layer.window.nbytes // layer.window.shape[1]
        growing += slot * kept
        fixed += slot * (layer.window.shape[1] - kept)
        for part in (layer.compressed, layer.index_keys):
            if part is not None:
                growing += part.entries.nbytes
                fixed += part.state.kv.nbytes + part.state.gate.nbytes
    return growing / cache.capacity, fixed


def _show(tokens: Generation, tokenizer: Any, prompt: str) -> str:
    """Prints the text as it comes and returns it; on a terminal the prompt stands before it, dimmed."""
    from dsv4.decoding.text import TextDecoder, stream_text

    terminal = sys.stdout.isatty()
    if terminal:
        print(f"\033[2m{_harmless(prompt)}\033[0m", end="", flush=True)
    pieces = []
    for piece in stream_text(TextDecoder(tokenizer), tokens):
        pieces.append(piece)
        print(_harmless(piece) if terminal else piece, end="", flush=True)
    print()
    return "".join(pieces)


def _harmless(text: str) -> str:
    """`text` without control characters: a model that emits bytes could otherwise command the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _formats(cache: dict[str, str]) -> str:
    window, entries, index = cache["window"], cache["entries"], cache["index"]
    kinds = window if window == entries else f"window {window}, entries {entries}"
    return kinds if index == entries else f"{kinds}, index keys {index}"


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    parameters, growing = facts["parameters"], facts["cache_bytes_per_token"]
    dense, fixed = facts["dense_multihead_bytes_per_token"], output.size(facts["cache_bytes_fixed"])
    total, active = (output.count(parameters[part]) for part in ("total", "active"))
    return [
        ("prefill", f"{facts['prefill_tokens_per_second']:,.0f} tokens/s ({facts['prompt_tokens']} tokens)"),
        ("decode", f"{facts['decode_tokens_per_second']:,.0f} tokens/s ({facts['new_tokens']} tokens)"),
        ("compilation", f"{facts['compile_seconds']:.1f} s, not part of the above"),
        ("parameters", f"{total} total, {active} active per token"),
        ("cache", f"{growing:,.0f} B per token of context ({_formats(facts['cache'])}), and {fixed} a sequence"),
        ("dense cache", f"{dense:,} B per token of context: every head and layer, bf16"),
    ]
