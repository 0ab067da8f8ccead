"""Hyperparameters of training and how a run is executed; each field has its meaning and range, said once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ast_jax.runtime.fields import check_types

OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("constant", "step", "cosine")
DTYPES = ("float32", "bfloat16")
PARALLEL = ("pmap", "jit")
MAX_WORKERS = 16


class Range(NamedTuple):
    """The valid values of a field: in words, and as a predicate."""

    text: str
    holds: Callable[[Any], bool]


def _one_of(names: tuple[str, ...]) -> Range:
    return Range(f"one of {', '.join(names)}", names.__contains__)


_FLAG = Range("true or false", lambda value: isinstance(value, bool))
_MIN_1 = Range("1 or more", lambda value: value >= 1)
_MIN_0 = Range("0 or more", lambda value: value >= 0)
_WORKERS = Range("0 or more, or None for half of the CPU cores", lambda value: value is None or value >= 0)
_POSITIVE = Range("more than 0", lambda value: value > 0)
_FRACTION = Range("a number in [0, 1]", lambda value: 0 <= value <= 1)
_BELOW_ONE = Range("a number in [0, 1)", lambda value: 0 <= value < 1)
_FACTOR = Range("a number in (0, 1]", lambda value: 0 < value <= 1)


def _field(default: Any, meaning: str, allowed: Range, group: str = "Training") -> Any:
    metadata = {"help": meaning, "range": allowed.text, "holds": allowed.holds, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


def _rate(default: Any, meaning: str, allowed: Range) -> Any:
    return _field(default, meaning, allowed, "Optimizer and learning rate")


def _augmentation(default: Any, meaning: str, allowed: Range) -> Any:
    return _field(default, meaning, allowed, "Augmentation and targets")


def _execution(default: Any, meaning: str, allowed: Range) -> Any:
    return _field(default, meaning, allowed, "Execution")


def _document(cls: Any) -> None:
    """Append a line for each field to a dataclass's docstring."""
    cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n\n    Args:\n" + "".join(
        f"        {field.name}: {field.metadata['help']}; {field.metadata['range']}.\n"
        for field in dataclasses.fields(cls)
    )


def _check_ranges(config: Any) -> None:
    """Raise ValueError where a field is of another type than its annotation, or out of its range."""
    check_types(config)
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if isinstance(value, int | float) and not -(2**31) < value < 2**31:
            raise ValueError(f"{name}: {value!r} is out of range; expected a number below 2**31")
        if not field.metadata["holds"](value):
            raise ValueError(f"{name}: {value!r} is out of range; expected {field.metadata['range']}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of a training run; the defaults are the original's optimizer without augmentation.

    `dataclasses.fields(TrainConfig)` has each field's meaning and range, `metadata["help"]` and `metadata["range"]`.

    Raises:
        ValueError: a value of another type, out of its range, or at odds with another; the message names the range.
    """

    batch_size: int = _field(32, "global batch size: examples a step, over all devices", _MIN_1)
    grad_accum_steps: int = _field(1, "gradient accumulation steps: micro-batches per optimizer step", _MIN_1)
    epochs: int = _field(
        25, "epochs: passes over the training split", Range("1 to 9999", lambda value: 1 <= value < 10_000)
    )
    patience: int = _field(0, "early stopping: epochs without improvement before training ends; 0: off", _MIN_0)
    optimizer: str = _rate("adam", "optimizer: adam (L2 penalty, as in the paper) or adamw", _one_of(OPTIMIZERS))
    learning_rate: float = _rate(1e-4, "peak learning rate, after warm-up and before decay", _POSITIVE)
    schedule: str = _rate(
        "step", "learning rate schedule: constant, step (decays between epochs) or cosine to zero", _one_of(SCHEDULES)
    )
    warmup_steps: int = _rate(0, "linear warm-up steps", _MIN_0)
    warmup_hold: int = _rate(0, "warm-up in stairs of this many steps; 0: a new rate every step", _MIN_0)
    decay_start: int = _rate(10, "step schedule: epoch, from 1, after which the rate first decays", _MIN_0)
    decay_step: int = _rate(5, "step schedule: epochs between decays", _MIN_1)
    decay_factor: float = _rate(0.5, "step schedule: factor of each decay", _FACTOR)
    layer_decay: float = _rate(1.0, "layer-wise learning rate decay: factor from each block to the one below", _FACTOR)
    head_multiplier: float = _rate(1.0, "learning rate multiplier of the classifier", _POSITIVE)
    freeze_layers: int = _rate(0, "frozen blocks, counted from the input; the embeddings freeze with them", _MIN_0)
    linear_probe: bool = _rate(False, "linear probe: train the classifier only", _FLAG)
    weight_decay: float = _rate(5e-7, "weight decay: L2 penalty (adam) or decoupled (adamw)", _MIN_0)
    max_grad_norm: float = _rate(0.0, "global-norm gradient clipping: maximum norm; 0: off", _MIN_0)
    beta1: float = _rate(0.95, "Adam's beta1", _BELOW_ONE)
    beta2: float = _rate(0.999, "Adam's beta2", _BELOW_ONE)
    balanced_sampling: bool = _augmentation(
        False, "class-balanced sampling with replacement: rare labels are drawn more often", _FLAG
    )
    mixup: float = _augmentation(0.0, "waveform mixup: probability per example", _FRACTION)
    frequency_mask: int = _augmentation(0, "SpecAugment frequency masking: maximum width, mel bins", _MIN_0)
    time_mask: int = _augmentation(0, "SpecAugment time masking: maximum width, frames", _MIN_0)
    frequency_shift: int = _augmentation(0, "random frequency shift: maximum shift up or down, mel bins", _MIN_0)
    time_shift: int = _augmentation(0, "random circular time shift: maximum shift either way, frames", _MIN_0)
    noise: bool = _augmentation(False, "additive noise, and a circular time shift of up to 10 frames", _FLAG)
    ramp_epochs: float = _augmentation(
        0.0, "augmentation ramp: epochs until mixup and masks have full strength", _MIN_0
    )
    patchout_frequency: int = _augmentation(0, "structured patchout: rows of the patch grid dropped each step", _MIN_0)
    patchout_time: int = _augmentation(0, "structured patchout: columns of the patch grid dropped each step", _MIN_0)
    patchout: int = _augmentation(0, "unstructured patchout: further patches dropped each step", _MIN_0)
    label_smoothing: float = _augmentation(0.0, "label smoothing: share of the target spread evenly", _BELOW_ONE)
    teacher_weight: float = _augmentation(
        0.5, "distillation weight: share of the teacher's scores in the targets", _FRACTION
    )
    ema_decay: float = _field(
        0.0, "exponential moving average of the parameters: decay per step; 0: off; the average is kept", _BELOW_ONE
    )
    average_from: int = _field(0, "weight averaging: first epoch of the mean that ends with the last; 0: off", _MIN_0)
    rematerialize: bool = _field(
        False, "gradient checkpointing: recompute each block in the backward pass, to save memory", _FLAG
    )
    dtype: str = _field("float32", "compute dtype: float32 or bfloat16; parameters stay float32", _one_of(DTYPES))
    strict: bool = _field(False, "stop at a file that cannot be read, instead of skipping it", _FLAG)
    seed: int = _field(0, "random seed", _MIN_0)

    def __post_init__(self) -> None:
        """Check types, ranges, and constraints between fields."""
        _check_ranges(self)
        for name, good, expected in _constraints(self):
            if not good:
                raise ValueError(f"{name}: {getattr(self, name)!r} is out of range; expected {expected}")

    def replace(self, **changes: Any) -> TrainConfig:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def _constraints(config: TrainConfig) -> Iterator[tuple[str, bool, str]]:
    """Yield each constraint between fields: the field to name, whether it holds, and what is expected."""
    divides = config.batch_size % config.grad_accum_steps == 0
    yield "grad_accum_steps", divides, f"a divisor of batch_size {config.batch_size}"
    hold = config.warmup_hold <= config.warmup_steps or not config.warmup_steps
    yield "warmup_hold", hold, f"at most warmup_steps, which is {config.warmup_steps}"
    yield "average_from", config.average_from <= config.epochs, f"at most epochs, which is {config.epochs}"
    probe = "where linear_probe trains the classifier only"
    yield "freeze_layers", not (config.linear_probe and config.freeze_layers), f"0 {probe}"
    yield "layer_decay", not config.linear_probe or config.layer_decay == 1, f"1 {probe}"


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How a run is executed: devices and worker processes. Another value gives the same run, up to rounding.

    Worker processes import the main module anew: a script that uses them keeps its calls under
    `if __name__ == "__main__":`.

    Raises:
        ValueError: a value of another type or out of its range.
    """

    parallel: str = _execution(
        "pmap", "data parallelism over devices: pmap, or jit with NamedSharding", _one_of(PARALLEL)
    )
    num_workers: int | None = _execution(0, "worker processes that decode audio; 0: threads", _WORKERS)
    save_minutes: float = _execution(10.0, "minutes between saved states within an epoch", _POSITIVE)

    def __post_init__(self) -> None:
        """Check types and ranges."""
        _check_ranges(self)

    @property
    def workers(self) -> int:
        """Worker processes, with None resolved: half of the cores, 1 to 16."""
        return max(1, min(MAX_WORKERS, (os.cpu_count() or 1) // 2)) if self.num_workers is None else self.num_workers


for _config in (TrainConfig, ExecutionConfig):
    _document(_config)
