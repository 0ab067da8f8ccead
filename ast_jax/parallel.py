"""One step on many devices; the one place where `pmap` stands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from .train import TrainState

AXIS = "devices"


class DataParallel:
    """Run steps on all devices: state replicated, batch split along its first axis.

    This is the one place where `pmap` stands.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        """Take the devices; None means all local ones."""
        self.devices = list(devices or jax.local_devices())

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse a global batch that does not divide over the devices, naming the nearest sizes that do."""
        count = len(self.devices)
        if batch_size % count:
            lower = batch_size // count * count
            sizes = f"{lower} or {lower + count}" if lower else str(count)
            raise ValueError(f"batch_size: {batch_size} does not divide over {count} devices; the nearest are {sizes}")

    def wrap_train(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step on replicated state and a whole batch from `step(state, batch, axis=…)`."""
        mapped = jax.pmap(functools.partial(step, axis=AXIS), AXIS, devices=self.devices, donate_argnums=0)

        def run(state: TrainState, batch: dict[str, np.ndarray]) -> tuple[TrainState, jax.Array]:
            position = np.arange(len(batch["labels"]), dtype=np.int32)
            state, value = mapped(state, self.split({**batch, "position": position}))
            # The first device's own copy: value[0] would be a program over all devices at every step.
            return state, value.addressable_shards[0].data.reshape(())

        return run

    def wrap_eval(self, step: Callable[..., Any]) -> Callable[..., np.ndarray]:
        """Return a function of replicated params and a whole batch whose results are put together again."""
        mapped = jax.pmap(step, AXIS, devices=self.devices)

        def run(params: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
            results = np.asarray(mapped(params, self.split(batch)))
            return results.reshape(-1, *results.shape[2:])

        return run

    def split(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Split every array of a batch [B, …] into [devices, B / devices, …]."""
        return {key: value.reshape(len(self.devices), -1, *value.shape[1:]) for key, value in batch.items()}

    def replicate(self, tree: Any) -> Any:
        """Copy a tree to every device, with a new first axis."""
        copy = jax.pmap(lambda _, x: x, in_axes=(0, None), devices=self.devices)
        return copy(np.arange(len(self.devices)), tree)

    @staticmethod
    def unreplicate(tree: Any) -> Any:
        """Return the first device's copy as NumPy arrays."""
        return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data).reshape(x.shape[1:]), tree)
