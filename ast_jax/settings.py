"""How to train, as data: every setting with its range."""

from __future__ import annotations

import dataclasses

SCHEDULES = ("constant", "step", "cosine")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are the original's optimizer with no augmentation.

    Args:
        batch_size: over all devices.
        epochs: passes over the training split.
        learning_rate: after warm-up and before decay.
        schedule: "constant", "step" (as the original: at the end of epoch `decay_start` and of every `decay_step`
            epochs after it the rate is multiplied by `decay_factor`), or "cosine" to zero.
        warmup_steps: steps of linear warm-up.
        decay_start: epoch, counted from 1.
        decay_step: epochs.
        decay_factor: multiplier.
        weight_decay: L2 added to the gradient, as in torch's Adam; not AdamW.
        beta1: of Adam.
        beta2: of Adam.
        mixup: probability that an example is mixed with another.
        frequency_mask: upper bound of the masked mel bins.
        time_mask: upper bound of the masked frames.
        frequency_shift: upper bound of the mel bins that a spectrogram is moved by, either way.
        time_shift: the same in frames, the end coming round to the beginning.
        noise: whether to add noise and roll in time by up to 10 frames.
        ramp_epochs: epochs over which mixup and masks grow to full strength; 0 starts at full strength.
        ema: decay at each step of an exponential moving average of the parameters, which then is what is evaluated and
            kept; 0 evaluates and keeps the parameters themselves.
        teacher_weight: share of a teacher's scores in the targets, where there is a teacher.
        seed: of everything random.

    Raises:
        ValueError: a value out of its range.
    """

    batch_size: int = 32
    epochs: int = 25
    learning_rate: float = 1e-4
    schedule: str = "step"
    warmup_steps: int = 0
    decay_start: int = 10
    decay_step: int = 5
    decay_factor: float = 0.5
    weight_decay: float = 5e-7
    beta1: float = 0.95
    beta2: float = 0.999
    mixup: float = 0.0
    frequency_mask: int = 0
    time_mask: int = 0
    frequency_shift: int = 0
    time_shift: int = 0
    noise: bool = False
    ramp_epochs: float = 0.0
    ema: float = 0.0
    teacher_weight: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        checks = {
            "batch_size": self.batch_size >= 1, "epochs": 1 <= self.epochs < 10_000,
            "learning_rate": self.learning_rate > 0,
            "warmup_steps": self.warmup_steps >= 0, "decay_start": self.decay_start >= 0,
            "decay_step": self.decay_step >= 1, "decay_factor": 0 < self.decay_factor <= 1,
            "weight_decay": self.weight_decay >= 0, "beta1": 0 <= self.beta1 < 1, "beta2": 0 <= self.beta2 < 1,
            "mixup": 0 <= self.mixup <= 1, "frequency_mask": self.frequency_mask >= 0, "time_mask": self.time_mask >= 0,
            "frequency_shift": self.frequency_shift >= 0, "time_shift": self.time_shift >= 0,
            "ramp_epochs": self.ramp_epochs >= 0, "ema": 0 <= self.ema < 1,
            "teacher_weight": 0 <= self.teacher_weight <= 1,
            "schedule": self.schedule in SCHEDULES, "seed": self.seed >= 0,
        }  # fmt: skip
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int | float) and not -(2**31) < value < 2**31:
                raise ValueError(f"{name}: {value!r} is out of range; expected a number below 2**31")
        for name, good in checks.items():
            if not good:
                raise ValueError(
                    f"{name}: {getattr(self, name)!r} is out of range; {_RANGES.get(name, 'see TrainConfig')}"
                )


_RANGES = {
    **dict.fromkeys(("batch_size", "decay_step"), "expected 1 or more"),
    "epochs": "expected 1 to 9999",
    **dict.fromkeys(
        (
            "warmup_steps",
            "decay_start",
            "weight_decay",
            "frequency_mask",
            "time_mask",
            "frequency_shift",
            "time_shift",
            "ramp_epochs",
            "seed",
        ),
        "expected 0 or more",
    ),
    **dict.fromkeys(("beta1", "beta2", "ema"), "expected a number in [0, 1)"),
    "learning_rate": "expected more than 0",
    "decay_factor": "expected a number in (0, 1]",
    "mixup": "expected a probability in [0, 1]",
    "teacher_weight": "expected a number in [0, 1]",
    "schedule": f"expected one of {', '.join(SCHEDULES)}",
}
