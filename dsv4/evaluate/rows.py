"""One variant's measures, from its sums over windows and its greedy tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dsv4.cost import bytes_per_token
from dsv4.evaluate.bootstrap import Estimate, median, ratio_of_sums
from dsv4.evaluate.compare import Sums, first_divergence
from dsv4.evaluate.settings import Settings
from dsv4.model.handle import Model
from dsv4.training.data import EvalWindows


@dataclass(frozen=True)
class Measured:
    """What running a variant gives: sums of each window, and its greedy tokens int32 [P, M], None without prompts."""

    sums: Sums
    tokens: np.ndarray | None


@dataclass(frozen=True)
class Row:
    """One variant. What compares it with the baseline is None where there is none, or nothing of the kind to compare.

    bits_ratio: bits per byte over the baseline's. kl: KL(baseline || variant), nats a token. top1: share of tokens with
    the same most likely successor. greedy_equal: share of greedy tokens that are the baseline's. divergence_mean,
    divergence_median: greedy tokens before the first that differs. index_overlap: share of the baseline's index top-k.
    weight_bytes: of the arrays, MTP blocks included. cache_bytes: of one more token of context.
    """

    recipe: str
    bits_per_byte: Estimate
    bits_ratio: Estimate | None
    kl: Estimate | None
    top1: Estimate | None
    greedy_equal: Estimate | None
    divergence_mean: Estimate | None
    divergence_median: Estimate | None
    index_overlap: Estimate | None
    weight_bytes: int
    cache_bytes: float

    def facts(self) -> dict[str, Any]:
        """As JSON has it: an estimate is an object of value, low and high."""
        found = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value.facts() if isinstance(value, Estimate) else value for name, value in found}


def make_row(
    name: str, model: Model, measured: Measured, baseline: Measured | None, windows: EvalWindows, settings: Settings
) -> Row:
    """The row of `model` compared with `baseline`, None for a model that has none."""
    drawn: dict[str, Any] = {"resamples": settings.resamples, "seed": settings.seed}
    ratio: Callable[..., Estimate] = lambda over, under: ratio_of_sums(over, under, **drawn)  # noqa: E731
    sums, tokens = measured.sums, windows.scored.sum(axis=1)
    compared: dict[str, Estimate | None] = dict.fromkeys(
        ("bits_ratio", "kl", "top1", "greedy_equal", "divergence_mean", "divergence_median", "index_overlap")
    )
    if baseline is not None:
        compared |= {
            "bits_ratio": ratio(sums.nats, baseline.sums.nats),
            "kl": ratio(sums.kl, tokens),
            "top1": ratio(sums.agreed, tokens),
        }
        if sums.choices.sum():
            compared["index_overlap"] = ratio(sums.overlap, sums.choices)
        if measured.tokens is not None and baseline.tokens is not None:
            equal = (measured.tokens == baseline.tokens).mean(axis=1)
            length = first_divergence(measured.tokens, baseline.tokens)
            compared |= {
                "greedy_equal": ratio(equal, np.ones(len(equal))),
                "divergence_mean": ratio(length, np.ones(len(length))),
                "divergence_median": median(length, **drawn),
            }
    return Row(
        name,
        ratio(sums.nats / math.log(2), windows.text_bytes),
        **compared,
        weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        cache_bytes=bytes_per_token(model.config, model.execution.cache_format),
    )
