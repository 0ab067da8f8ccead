"""Data parallelism over all devices of one or several processes, and collectives between processes.

A step is written for one device's share of the batch. `DataParallel` maps it with `jax.pmap`, the only use of `pmap`;
`ShardedJit` compiles it once for the whole batch with `jax.jit` and `NamedSharding`. Both have the same interface.
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
    """Run steps on all devices with `pmap`: the state is replicated, the batch is split along its first axis.

    With several processes (`jax.distributed`) the devices are those of all processes, and each process passes its own
    rows of the batch, `local_rows(batch_size)`.

    Attributes:
        devices: devices of all processes.
        local_devices: devices of this process.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        """Take the devices; None means all devices of all processes."""
        # A process's rows are contiguous in the batch, so its devices must be adjacent.
        self.devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
        self.local_devices = [device for device in self.devices if device.process_index == jax.process_index()]

    def check_batch_size(self, batch_size: int, grad_accum_steps: int = 1) -> None:
        """Check that a global batch divides over the devices, and each device's share over gradient accumulation steps.

        Raises:
            ValueError: it does not; the message names the nearest batch sizes that do.
        """
        count = len(self.devices) * grad_accum_steps
        if batch_size % count:
            lower = batch_size // count * count
            sizes = f"{lower} or {lower + count}" if lower else str(count)
            over = f"{len(self.devices)} devices"
            if grad_accum_steps > 1:
                over += f" and {grad_accum_steps} gradient accumulation steps on each"
            raise ValueError(f"batch_size: {batch_size} does not divide over {over}; the nearest are {sizes}")

    def local_rows(self, batch_size: int) -> slice:
        """Return the rows of a global batch that this process loads."""
        per_device = batch_size // len(self.devices)
        first = self.devices.index(self.local_devices[0]) * per_device
        return slice(first, first + len(self.local_devices) * per_device)

    def compile_train_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return `step(state, batch, axis=…)` as a function of the replicated state and this process's rows."""
        mapped = jax.pmap(functools.partial(step, axis=AXIS), AXIS, devices=self.devices, donate_argnums=0)

        def run(state: TrainState, batch: dict[str, np.ndarray]) -> tuple[TrainState, jax.Array]:
            state, value = mapped(state, self._split(self._with_global_index(batch)))
            # The first device's own copy: value[0] would be a program over all devices at every step.
            return state, value.addressable_shards[0].data.reshape(())

        return run

    def compile_eval_step(self, step: Callable[..., Any]) -> Callable[..., np.ndarray]:
        """Return `step(params, batch)` as a function of replicated params and this process's rows; it returns rows."""
        mapped = jax.pmap(step, AXIS, devices=self.devices)
        return lambda params, batch: _local_results(mapped(params, self._split(batch)), has_device_axis=True)

    def replicate(self, tree: Any) -> Any:
        """Copy a tree to every device, with a new first axis."""
        # With the step's own axis name: under another one the step would be compiled twice.
        copy = jax.pmap(lambda _, x: x, AXIS, in_axes=(0, None), devices=self.devices)
        return copy(np.arange(len(self.local_devices)), tree)

    @staticmethod
    def unreplicate(tree: Any) -> Any:
        """Return one device's replica as NumPy arrays that own their memory."""
        return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data).reshape(x.shape[1:]), tree)

    def _with_global_index(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return a batch with each row's index in the global batch, which random keys fold in."""
        count = len(batch["labels"])
        first = self.local_rows(count // len(self.local_devices) * len(self.devices)).start
        return {**batch, "global_index": np.arange(first, first + count, dtype=np.int32)}

    def _split(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Reshape every array of a batch from [b, …] to [local devices, b / local devices, …]."""
        return {key: value.reshape(len(self.local_devices), -1, *value.shape[1:]) for key, value in batch.items()}


class ShardedJit(DataParallel):
    """Run steps on all devices with `jit`: a global batch is one array sharded over the devices."""

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        """Take the devices; None means all devices of all processes."""
        super().__init__(devices)
        mesh = Mesh(np.array(self.devices), (AXIS,))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._sharded = NamedSharding(mesh, PartitionSpec(AXIS))

    def compile_train_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """See `DataParallel.compile_train_step`; the compiler inserts the reductions over devices."""
        compiled = jax.jit(step, out_shardings=self._replicated, donate_argnums=0)

        def run(state: TrainState, batch: dict[str, np.ndarray]) -> tuple[TrainState, jax.Array]:
            state, value = compiled(state, self._global_arrays(self._with_global_index(batch)))
            return state, value.addressable_shards[0].data

        return run

    def compile_eval_step(self, step: Callable[..., Any]) -> Callable[..., np.ndarray]:
        """See `DataParallel.compile_eval_step`."""
        compiled = jax.jit(step, out_shardings=self._sharded)
        return lambda params, batch: _local_results(compiled(params, self._global_arrays(batch)), has_device_axis=False)

    def replicate(self, tree: Any) -> Any:
        """Copy a tree to every device."""
        return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), self._replicated, _part_of(x)), tree)

    @staticmethod
    def unreplicate(tree: Any) -> Any:
        """Return one device's replica as NumPy arrays that own their memory."""
        return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data), tree)

    def _global_arrays(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Return the global arrays that have this process's rows as its part."""
        return {key: jax.make_array_from_process_local_data(self._sharded, value) for key, value in batch.items()}


METHODS = {"pmap": DataParallel, "jit": ShardedJit}


def _part_of(array: Any) -> Callable[[Any], np.ndarray]:
    """Return a function of an index that returns a copy of that part of an array."""
    return lambda index: np.array(np.asarray(array)[index])


def _local_results(results: jax.Array, has_device_axis: bool) -> np.ndarray:
    """Return the rows of a sharded result that this process's devices hold, in order."""
    shards = sorted(results.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    rows = np.concatenate([np.asarray(shard.data) for shard in shards])
    return rows.reshape(-1, *rows.shape[2:]) if has_device_axis else rows


def broadcast_arrays(tree: Any) -> Any:
    """Return the first process's tree of arrays on all processes; the others pass a tree of the same shapes."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def broadcast_json(content: Any) -> Any:
    """Return the first process's JSON-serialisable content on all processes."""
    return allgather_json(content)[0]


def allgather_json(content: Any) -> list[Any]:
    """Return the JSON-serialisable content of every process, in process order, on all processes."""
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
    """Call `work` on every process; if it fails on one, raise on all, so that none waits for the failed one.

    Args:
        work: function to call; it must not communicate between processes.
        first_only: call it on the first process only.

    Returns:
        What `work` returned; None where it was not called.

    Raises:
        ValueError: the message of another process's error.
        Exception: what `work` raised on this process.
    """
    result: Result | None = None
    failure: Exception | None = None
    if not (first_only and jax.process_index()):
        try:
            result = work()
        except Exception as error:  # whatever it is, the others must not wait
            failure = error
    messages = allgather_json(None if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    for number, message in enumerate(messages):
        if message is not None:
            raise ValueError(f"process {number}: {message}" if number else message)
    return result
