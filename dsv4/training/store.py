"""Training checkpoints through orbax: the newest two, each complete or absent."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax

from dsv4.training.step import TrainState


class StateStore:
    """Saves and loads a TrainState under `folder` by step."""

    def __init__(self, folder: Path):
        # Imported here: orbax takes half a second that only training should pay.
        from orbax.checkpoint import v1

        logging.getLogger("absl").setLevel(logging.ERROR)
        self._ocp: Any = v1  # its own annotations are too narrow for plain paths
        self._folder = folder.absolute()  # orbax refuses relative paths

    def latest(self) -> int | None:
        """The newest complete step, None where there is none."""
        if not self._folder.exists():
            return None
        with self._open() as store:
            return None if store.latest is None else store.latest.step

    def save(self, step: int, state: TrainState) -> None:
        with self._open() as store:
            store.save(step, state)

    def load(self, step: int, abstract: TrainState) -> TrainState:
        """The state at `step`, in the shapes and dtypes of `abstract`, on the default device."""
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
        with self._open() as store:
            return store.load(step, abstract)

    def _open(self) -> Any:
        policies = self._ocp.training.preservation_policies
        return self._ocp.training.Checkpointer(self._folder, preservation_policy=policies.LatestN(2))
