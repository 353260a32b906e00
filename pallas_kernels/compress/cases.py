"""The shapes of compression, named by model and use; tests and benchmarks read them here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CompressCase:
    """batch sequences of `tokens` new tokens each; blocks of `ratio`, overlapping where `halves` is 2.

    kind: "entry", an FP8 entry whose last `rope` of `width` channels stay bfloat16, or "index", an FP8 index key.
    closes: the last of the new tokens closes a block, of every sequence; else no token does.
    """

    name: str
    batch: int
    tokens: int
    ratio: int
    halves: int
    width: int
    rope: int
    kind: str = "entry"
    closes: bool = True


def flash(layer: str, batch: int, tokens: int = 1, *, name: str = "", closes: bool = True) -> CompressCase:
    ratio, halves, width, kind = {
        "csa": (4, 2, 512, "entry"), "hca": (128, 1, 512, "entry"), "csa index": (4, 2, 128, "index")
    }[layer]  # fmt: skip
    name = name or f"flash {layer} b={batch} t={tokens}{'' if closes else ', open'}"
    return CompressCase(name, batch, tokens, ratio, halves, width, 64, kind, closes)


BENCH = (
    *(flash("csa", batch) for batch in (1, 32, 128, 256)),
    flash("csa", 128, 2),
    flash("csa", 128, closes=False),
    *(flash("csa index", batch) for batch in (1, 128)),
    *(flash("hca", batch) for batch in (1, 128)),
    flash("hca", 128, closes=False),
    *(flash(layer, 1, 2048, name=f"flash {layer} prefill 2048") for layer in ("csa", "hca")),
)
# Of the shipped model, for tests.
SMALL = (
    CompressCase("small csa", 2, 4, 4, 2, 64, 16),
    CompressCase("small csa index", 2, 1, 4, 2, 32, 16, "index"),
    CompressCase("small hca", 2, 1, 128, 1, 64, 16),
    CompressCase("small csa chunk", 2, 13, 4, 2, 64, 16),  # the first entries have rows of the open block
)
