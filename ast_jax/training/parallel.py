"""One step on many devices, of one process or of several; the one place where `pmap` stands.

A step is written for one device's share of the batch. `DataParallel` maps it with `jax.pmap`, `ShardedJit` compiles it
once for the whole batch with `jax.jit` and `NamedSharding`; both take and give the same things.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ast_jax.training.step import TrainState

AXIS = "devices"
Result = TypeVar("Result")


class DataParallel:
    """Run steps on all devices through `pmap`: state replicated, batch split along its first axis.

    With several processes (`jax.distributed`) the devices are those of all of them, and every process passes its own
    rows of the batch: those from `local_rows(batch_size).start` on.

    Attributes:
        devices: of all processes.
        local: of this one.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        """Take the devices; None means all of all processes."""
        # A process's rows are one stretch of the batch, so that its devices must stand together.
        self.devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
        self.local = [device for device in self.devices if device.process_index == jax.process_index()]

    def check_batch_size(self, batch_size: int, parts: int = 1) -> None:
        """Refuse a global batch that does not divide over the devices (and `parts` of each share), naming the nearest.

        Raises:
            ValueError: it does not divide.
        """
        count = len(self.devices) * parts
        if batch_size % count:
            lower = batch_size // count * count
            sizes = f"{lower} or {lower + count}" if lower else str(count)
            over = f"{len(self.devices)} devices" + (f" and {parts} parts on each" if parts > 1 else "")
            raise ValueError(f"batch_size: {batch_size} does not divide over {over}; the nearest are {sizes}")

    def local_rows(self, batch_size: int) -> slice:
        """Return which rows of a whole batch belong to this process."""
        share = batch_size // len(self.devices)
        first = self.devices.index(self.local[0]) * share
        return slice(first, first + len(self.local) * share)

    def compile_train_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step on replicated state and this process's rows of a batch from `step(state, batch, axis=…)`."""
        mapped = jax.pmap(functools.partial(step, axis=AXIS), AXIS, devices=self.devices, donate_argnums=0)

        def run(state: TrainState, batch: dict[str, np.ndarray]) -> tuple[TrainState, jax.Array]:
            state, value = mapped(state, self._split(self._placed(batch)))
            # The first device's own copy: value[0] would be a program over all devices at every step.
            return state, value.addressable_shards[0].data.reshape(())

        return run

    def compile_eval_step(self, step: Callable[..., Any]) -> Callable[..., np.ndarray]:
        """Return a function of replicated params and this process's rows that gives the results of these rows."""
        mapped = jax.pmap(step, AXIS, devices=self.devices)
        return lambda params, batch: _local_rows(mapped(params, self._split(batch)), has_device_axis=True)

    def replicate(self, tree: Any) -> Any:
        """Copy a tree to every device, with a new first axis."""
        # Under the step's own axis: a state on another one would have the step compiled twice.
        copy = jax.pmap(lambda _, x: x, AXIS, in_axes=(0, None), devices=self.devices)
        return copy(np.arange(len(self.local)), tree)

    @staticmethod
    def unreplicate(tree: Any) -> Any:
        """Return one device's copy as NumPy arrays of their own."""
        return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data).reshape(x.shape[1:]), tree)

    def _placed(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return a batch with the place of each row in the whole batch, which random keys fold in."""
        count = len(batch["labels"])
        first = self.local_rows(count // len(self.local) * len(self.devices)).start
        return {**batch, "global_index": np.arange(first, first + count, dtype=np.int32)}

    def _split(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Split every array of a batch [b, …] into [local devices, b / local devices, …]."""
        return {key: value.reshape(len(self.local), -1, *value.shape[1:]) for key, value in batch.items()}


class ShardedJit(DataParallel):
    """Run steps on all devices through `jit`: the whole batch is one array that lies split over them."""

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        """Take the devices; None means all of all processes."""
        super().__init__(devices)
        mesh = Mesh(np.array(self.devices), (AXIS,))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._by_rows = NamedSharding(mesh, PartitionSpec(AXIS))

    def compile_train_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Do as `DataParallel.compile_train_step` does; the compiler finds where to add up over the devices."""
        compiled = jax.jit(step, out_shardings=self._everywhere, donate_argnums=0)

        def run(state: TrainState, batch: dict[str, np.ndarray]) -> tuple[TrainState, jax.Array]:
            state, value = compiled(state, self._whole(self._placed(batch)))
            return state, value.addressable_shards[0].data

        return run

    def compile_eval_step(self, step: Callable[..., Any]) -> Callable[..., np.ndarray]:
        """Do as `DataParallel.compile_eval_step` does."""
        compiled = jax.jit(step, out_shardings=self._by_rows)
        return lambda params, batch: _local_rows(compiled(params, self._whole(batch)), has_device_axis=False)

    def replicate(self, tree: Any) -> Any:
        """Copy a tree to every device."""
        return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), self._everywhere, _part_of(x)), tree)

    @staticmethod
    def unreplicate(tree: Any) -> Any:
        """Return one device's copy as NumPy arrays of their own."""
        return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data), tree)

    def _whole(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Return the global arrays that this process's rows are part of."""
        return {key: jax.make_array_from_process_local_data(self._by_rows, value) for key, value in batch.items()}


METHODS = {"pmap": DataParallel, "jit": ShardedJit}


def _part_of(array: Any) -> Callable[[Any], np.ndarray]:
    """Return a function of an index that cuts it out of an array; whatever is cut is a copy."""
    return lambda index: np.array(np.asarray(array)[index])


def _local_rows(results: jax.Array, has_device_axis: bool) -> np.ndarray:
    """Return what this process's devices hold of a result that lies split over all, in order."""
    shards = sorted(results.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    rows = np.concatenate([np.asarray(shard.data) for shard in shards])
    return rows.reshape(-1, *rows.shape[2:]) if has_device_axis else rows


def broadcast_arrays(tree: Any) -> Any:
    """Return the first process's tree of arrays on all processes; the others pass one of the same shapes."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def allgather_json(content: Any) -> list[Any]:
    """Return what JSON can hold of every process, in their order, on all of them."""
    if jax.process_count() == 1:
        return [content]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(content).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(one[:length].tobytes()) for one, length in zip(texts, lengths, strict=True)]


@overload
def sync_errors(work: Callable[[], Result], *, first_only: Literal[False] = False) -> Result: ...
@overload
def sync_errors(work: Callable[[], Result], *, first_only: bool) -> Result | None: ...
def sync_errors(work: Callable[[], Result], *, first_only: bool = False) -> Result | None:
    """Do what every process does, without a word to the others; what fails in one is raised in all, so that none waits.

    Args:
        work: to be called.
        first_only: in the first process alone; the others have None.

    Returns:
        What `work` returned.

    Raises:
        ValueError: what `work` raised, OSError too where it was in another process.
    """
    result, failure = None, None
    if not (first_only and jax.process_index()):
        try:
            result = work()
        except (ValueError, OSError) as error:
            failure = error
    messages = allgather_json(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for number, message in enumerate(messages):
        if message is not None:
            raise ValueError(f"process {number}: {message}" if number else message)
    return result


def broadcast_json(content: Any) -> Any:
    """Return what JSON can hold of the first process on all processes."""
    if jax.process_count() == 1:
        return content
    text = np.frombuffer(json.dumps(content).encode(), np.uint8)
    length = int(broadcast_arrays(np.array(len(text))))
    return json.loads(broadcast_arrays(np.resize(text, length)).astype(np.uint8).tobytes())
