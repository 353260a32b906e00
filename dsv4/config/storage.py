"""How a checkpoint stores its weights, and what their inputs are rounded to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsv4.config.errors import ConfigError, one_of, require
from pallas_kernels.formats import FORMATS, FP8_GROUP, FormatError, QuantFormat, format_name, parse_format

# Class of a parameter (dsv4.parameters) -> the field that holds its format. Every other class is never quantised.
QUANTIZED_CLASSES = {"dense": "dense", "expert": "experts", "embedding": "embedding", "head": "head"}
TREATED_CLASSES = ("dense", "expert")  # multiplied by activations that are quantised
UNTREATED_INPUTS = ("wo_a",)  # weights whose activations the released code leaves alone


@dataclass(frozen=True)
class Treatment:
    """What is stored with a quantised weight beside its codes and scales.

    static: one float32 scale for its whole input. outliers: as many input channels are kept in 16 bits. rotated: the
    weight's input channels are Hadamard-rotated, which stores nothing.
    """

    static: bool = False
    outliers: int = 0
    rotated: bool = False


@dataclass(frozen=True)
class StorageConfig:
    """Formats by name (pallas_kernels.formats): `plain`, `fp8`, `fp4`, `int8_row`, or spelled out, `e4m3:1x128:ue8m0`.

    dtype: of whatever is not quantised. dense, experts, embedding, head: weights of these classes; what the released
    code keeps in high precision (norms, router, mHC, sinks, compressors) has no field. activations: what the input of
    quantised dense and expert weights is rounded to; None is what the released code does, fp8_group.
    rotate: input channels of quantised dense and expert weights are Hadamard-rotated. outlier_channels: as many of them
    are kept in 16 bits. static_activations: the scale of an input is stored with its weight.

    Released checkpoints have dense fp8 and experts fp8 or fp4; the rest is this project's
    (`beyond_released`).
    """

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    dense: str = "plain"
    experts: str = "plain"
    embedding: str = "plain"
    head: str = "plain"
    activations: str | None = None
    rotate: bool = False
    outlier_channels: int = 0
    static_activations: bool = False

    def __post_init__(self) -> None:
        require(self.dtype in ("bfloat16", "float32"), f"storage.dtype is {self.dtype!r}: bfloat16 or float32")
        for name in (*QUANTIZED_CLASSES.values(), "activations"):
            if (text := getattr(self, name)) is not None:
                object.__setattr__(self, name, format_name(_parse(name, text)))
        if self.activations == format_name(self._implied_activations):
            object.__setattr__(self, "activations", None)  # one way to say it, so that equal settings are equal
        form = self.activation_format
        require(
            form is None or form.tile[0] == 1,
            f"storage.activations is {self.activations!r}: a tile must lie in one row, or a token's result would "
            "depend on the others in its batch",
        )
        require(self.outlier_channels >= 0, f"storage.outlier_channels is {self.outlier_channels}: at least 0")
        treated = self.rotate or self.outlier_channels or self.static_activations
        require(
            not treated or self.dense != "plain" or self.experts != "plain",
            "storage.rotate, outlier_channels and static_activations need quantised dense or expert weights",
        )
        require(
            not self.static_activations or (form is not None and form.scale == "float32"),
            f"storage.static_activations with activations {format_name(form)}: a static scale is a float32, choose "
            "fp8_row or int8_row",
        )

    def format_of(self, kind: str) -> QuantFormat | None:
        """The format of a parameter of class `kind`, None where it is not quantised."""
        field = QUANTIZED_CLASSES.get(kind)
        return None if field is None else parse_format(getattr(self, field))

    def treatment(self, kind: str, name: str, columns: int) -> Treatment | None:
        """How the weight `name`, of class `kind` and with `columns` input channels, is treated; None if it is not."""
        if kind not in TREATED_CLASSES or self.format_of(kind) is None:
            return None
        static = self.static_activations and not untreated_input(name)
        found = Treatment(static, min(self.outlier_channels, columns), self.rotate)
        return None if found == Treatment() else found

    @property
    def activation_format(self) -> QuantFormat | None:
        return self._implied_activations if self.activations is None else parse_format(self.activations)

    @property
    def _implied_activations(self) -> QuantFormat | None:
        return FP8_GROUP if (self.dense, self.experts) != ("plain", "plain") else None

    @property
    def quantized(self) -> bool:
        return any(getattr(self, name) != "plain" for name in QUANTIZED_CLASSES.values())

    @property
    def released(self) -> bool:
        """Whether the released layout, which other implementations read, says all of this."""
        return not self.beyond_released

    @property
    def beyond_released(self) -> tuple[str, ...]:
        """The fields whose value the released layout has no place for, each with what it does have."""
        experts = {"plain": ("plain",), "fp8": ("fp8", "fp4")}.get(self.dense, ("plain", "fp8", "fp4"))
        places = {
            "dense": ("plain", "fp8"),
            "experts": experts,
            "embedding": ("plain",),
            "head": ("plain",),
            "activations": (None,),
            "rotate": (False,),
            "outlier_channels": (0,),
            "static_activations": (False,),
        }
        has = {name: one_of([str(value).lower() for value in allowed]) for name, allowed in places.items()}
        has["experts"] += f" beside dense {self.dense}" if self.dense in ("plain", "fp8") else ""
        has["activations"] = "fp8_group"
        return tuple(
            f"{name} {str(getattr(self, name)).lower()} (it has {has[name]})"
            for name, allowed in places.items()
            if getattr(self, name) not in allowed
        )


def untreated_input(name: str) -> bool:
    """Whether the input of the weight `name` (`layers.0.attn.wo_a.weight`) is never quantised."""
    return name.split(".")[-2] in UNTREATED_INPUTS


def _parse(name: str, text: str) -> QuantFormat | None:
    try:
        return parse_format(text)
    except FormatError:
        raise ConfigError(
            f"storage.{name} is {text!r}: plain, {', '.join(FORMATS)}, or spelled out as e4m3:128x128:ue8m0"
        ) from None
