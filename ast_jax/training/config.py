"""How to train, as data: every setting with its default, its meaning and its range, each said once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ast_jax.config import check_types

OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("constant", "step", "cosine")
DTYPES = ("float32", "bfloat16")


class Range(NamedTuple):
    """The values that a setting may have: in words, and as a test."""

    text: str
    holds: Callable[[Any], bool]


def _one_of(names: tuple[str, ...]) -> Range:
    return Range(f"one of {', '.join(names)}", names.__contains__)


_FLAG = Range("true or false", lambda value: isinstance(value, bool))
_MIN_1 = Range("1 or more", lambda value: value >= 1)
_MIN_0 = Range("0 or more", lambda value: value >= 0)
_POSITIVE = Range("more than 0", lambda value: value > 0)
_SHARE = Range("a number in [0, 1]", lambda value: 0 <= value <= 1)
_BELOW_ONE = Range("a number in [0, 1)", lambda value: 0 <= value < 1)
_FACTOR = Range("a number in (0, 1]", lambda value: 0 < value <= 1)


def _setting(default: Any, meaning: str, allowed: Range) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning, "range": allowed.text, "holds": allowed.holds})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are the original's optimizer with no augmentation.

    `dataclasses.fields(TrainConfig)` has each field's meaning and range, `metadata["help"]` and `metadata["range"]`.

    Raises:
        ValueError: a value of another type, out of its range, or at odds with another; the message names the range.
    """

    batch_size: int = _setting(32, "examples a step, over all devices", _MIN_1)
    accumulate: int = _setting(1, "parts in which a step takes its batch one after another, to save memory", _MIN_1)
    epochs: int = _setting(25, "passes over the training split", Range("1 to 9999", lambda value: 1 <= value < 10_000))
    patience: int = _setting(0, "epochs without a better one after which training ends; 0 never", _MIN_0)
    optimizer: str = _setting("adam", "adam (L2 in the gradient: the paper's) or adamw", _one_of(OPTIMIZERS))
    learning_rate: float = _setting(1e-4, "learning rate after warm-up and before decay", _POSITIVE)
    schedule: str = _setting("step", "constant, step (falls between epochs) or cosine to zero", _one_of(SCHEDULES))
    warmup_steps: int = _setting(0, "steps in which the rate rises to its peak", _MIN_0)
    warmup_hold: int = _setting(0, "steps for which warm-up holds each rate; 0 rises at every step", _MIN_0)
    decay_start: int = _setting(10, "step schedule: epoch, from 1, at whose end the rate first falls", _MIN_0)
    decay_step: int = _setting(5, "step schedule: epochs from one fall to the next", _MIN_1)
    decay_factor: float = _setting(0.5, "step schedule: what the rate is multiplied by", _FACTOR)
    layer_decay: float = _setting(1.0, "what the rate is multiplied by from each block to the one below", _FACTOR)
    head_multiplier: float = _setting(1.0, "what the classifier's rate is multiplied by", _POSITIVE)
    freeze_layers: int = _setting(0, "blocks, from the input on, that stay fixed with the embeddings", _MIN_0)
    linear_probe: bool = _setting(False, "train the classifier alone", _FLAG)
    weight_decay: float = _setting(5e-7, "L2 (adam) or decay a step in units of the rate (adamw)", _MIN_0)
    clip_norm: float = _setting(0.0, "norm to which longer gradients are shortened; 0: none", _MIN_0)
    beta1: float = _setting(0.95, "Adam's decay of the mean gradient", _BELOW_ONE)
    beta2: float = _setting(0.999, "Adam's decay of the mean squared gradient", _BELOW_ONE)
    balanced: bool = _setting(False, "draw examples with rare labels more often, with replacement", _FLAG)
    mixup: float = _setting(0.0, "probability that an example is mixed with another", _SHARE)
    frequency_mask: int = _setting(0, "SpecAugment: upper bound of the masked mel bins", _MIN_0)
    time_mask: int = _setting(0, "SpecAugment: upper bound of the masked frames", _MIN_0)
    frequency_shift: int = _setting(0, "mel bins by which spectra move at most, either way", _MIN_0)
    time_shift: int = _setting(0, "frames by which sounds move at most, the end coming round", _MIN_0)
    noise: bool = _setting(False, "add noise, and roll in time by up to 10 frames", _FLAG)
    ramp_epochs: float = _setting(0.0, "epochs over which mixup and masks grow to full strength", _MIN_0)
    patchout_frequency: int = _setting(0, "rows of the patch grid (frequency) left out, drawn anew", _MIN_0)
    patchout_time: int = _setting(0, "columns of the patch grid (time) left out, drawn anew", _MIN_0)
    patchout: int = _setting(0, "single patches left out of those that remain, drawn anew", _MIN_0)
    label_smoothing: float = _setting(0.0, "share of the targets that is spread evenly", _BELOW_ONE)
    teacher_weight: float = _setting(0.5, "share of a teacher's scores in the targets, if there is one", _SHARE)
    ema: float = _setting(0.0, "decay a step of the parameters' moving average, which is kept; 0: none", _BELOW_ONE)
    average_from: int = _setting(0, "first of the epochs, to the last, whose weights are averaged; 0: none", _MIN_0)
    rematerialize: bool = _setting(False, "compute blocks again in the backward pass, to save memory", _FLAG)
    dtype: str = _setting(
        "float32", "float32 or bfloat16: precision of the computation; parameters stay float32", _one_of(DTYPES)
    )
    strict: bool = _setting(False, "stop at a sound that cannot be read, instead of passing it over", _FLAG)
    seed: int = _setting(0, "of everything random", _MIN_0)

    def __post_init__(self) -> None:
        """Check types, ranges, and what must hold between fields."""
        check_types(self)
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if isinstance(value, int | float) and not -(2**31) < value < 2**31:
                raise ValueError(f"{name}: {value!r} is out of range; expected a number below 2**31")
            if not field.metadata["holds"](value):
                raise ValueError(f"{name}: {value!r} is out of range; expected {field.metadata['range']}")
        for name, good, expected in _together(self):
            if not good:
                raise ValueError(f"{name}: {getattr(self, name)!r} is out of range; expected {expected}")


def _together(config: TrainConfig) -> Iterator[tuple[str, bool, str]]:
    """Yield what must hold between fields: whose message it is, whether it holds, and what is expected."""
    yield "accumulate", config.batch_size % config.accumulate == 0, f"a divisor of batch_size {config.batch_size}"
    hold = config.warmup_hold <= config.warmup_steps or not config.warmup_steps
    yield "warmup_hold", hold, f"at most warmup_steps, which is {config.warmup_steps}"
    yield "average_from", config.average_from <= config.epochs, f"at most epochs, which is {config.epochs}"
    probe = "where linear_probe trains the classifier alone"
    yield "freeze_layers", not (config.linear_probe and config.freeze_layers), f"0 {probe}"
    yield "layer_decay", not config.linear_probe or config.layer_decay == 1, f"1 {probe}"


TrainConfig.__doc__ = f"{(TrainConfig.__doc__ or '').rstrip()}\n\n    Args:\n" + "".join(
    f"        {field.name}: {field.metadata['help']}; {field.metadata['range']}.\n"
    for field in dataclasses.fields(TrainConfig)
)
