"""The paper's recipes by name: what each data set was fine-tuned with, and what came of it.

Values are those of the original's scripts (`egs/*/run*.sh`) and logs. Mixup is from Beta(10, 10) in all of them
(`data.mixup.MIXUP_ALPHA`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ast_jax.config import ProblemType
from ast_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a data set is trained on.

    Attributes:
        name: as on the command line.
        description: one line.
        training: fields of `TrainConfig`; those not named keep their defaults.
        frontend: fields of `FrontendConfig`: the data set's mean and standard deviation, and the length in frames.
        problem_type: decides the loss.
        cross_validate: train once for each fold of the data set, with that fold held out.
        init: what to start from, in words.
        published: what the original reached, in words.
        learning_rate_from_scratch: the rate where the start has not heard AudioSet, if it differs.
    """

    name: str
    description: str
    training: Mapping[str, Any]
    frontend: Mapping[str, Any]
    problem_type: ProblemType
    init: str
    published: str
    cross_validate: bool = False
    learning_rate_from_scratch: float | None = None

    def settings(self, **overrides: Any) -> TrainConfig:
        """Return the settings, some of them overridden.

        Raises:
            ValueError: an unknown name, or a value out of its range.
        """
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        if unknown := sorted(overrides.keys() - known):
            raise ValueError(f"recipe {self.name}: expected settings of TrainConfig, got {', '.join(unknown)}")
        return TrainConfig(**{**self.training, **overrides})

    def lines(
        self, overrides: Mapping[str, Any] | None = None, frontend: Mapping[str, Any] | None = None, init: str = ""
    ) -> list[str]:
        """Return what is used as text, with the recipe's own value beside what is another.

        Args:
            overrides: settings that are not the recipe's.
            frontend: mean, std and max_length, as far as they are not the recipe's.
            init: what is started from; else the recipe's words for it are printed.
        """
        overrides = overrides or {}
        own, used = {**vars(self.settings()), **self.frontend}, {**vars(self.settings(**overrides)), **self.frontend}
        used |= frontend or {}
        fields = [field.name for field in dataclasses.fields(TrainConfig) if field.name in {*self.training, *overrides}]
        rows = [("starts from", f"{init} (recipe: {self.init})" if init else self.init)]
        for name in (*self.frontend, *fields):
            value = f"{used[name]}" if used[name] == own[name] else f"{used[name]} (recipe: {own[name]})"
            rows.append((name, value))
        rows.append(("problem_type", self.problem_type))
        width = max(len(name) for name, _ in rows)
        head = f"recipe {self.name}: {self.description}; published: {self.published}"
        return [head, *(f"  {name:<{width}}  {value}" for name, value in rows)]


_ADAM = {"optimizer": "adam", "beta1": 0.95, "beta2": 0.999, "weight_decay": 5e-7, "schedule": "step"}
_AUDIOSET = {
    **_ADAM, "batch_size": 12, "warmup_steps": 1000, "warmup_hold": 50, "decay_factor": 0.5,
    "frequency_mask": 48, "time_mask": 192, "mixup": 0.5, "noise": False,
}  # fmt: skip
_AUDIOSET_FRONTEND = {"mean": -4.2677393, "std": 4.5689974, "max_length": 1024}
_IMAGENET = "an ImageNet model (DeiT, converted and resized)"

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="audioset-full",
            description="AudioSet, about two million clips, weights averaged over all epochs",
            training={
                **_AUDIOSET, "epochs": 5, "learning_rate": 1e-5, "decay_start": 2, "decay_step": 1,
                "balanced_sampling": True, "average_from": 1,
            },
            frontend=_AUDIOSET_FRONTEND,
            problem_type=ProblemType.MULTI_LABEL,
            init=_IMAGENET,
            published="mAP 0.4590, its last epoch alone 0.4486",
        ),
        Recipe(
            name="audioset-balanced",
            description="AudioSet's balanced subset, about 20,000 clips, weights averaged from epoch 6 on",
            training={
                **_AUDIOSET, "epochs": 25, "learning_rate": 5e-5, "decay_start": 10, "decay_step": 5,
                "balanced_sampling": False, "average_from": 6,
            },
            frontend=_AUDIOSET_FRONTEND,
            problem_type=ProblemType.MULTI_LABEL,
            init=_IMAGENET,
            published="mAP 0.34999, its last epoch alone 0.3358, with the enhanced label set",
        ),
        Recipe(
            name="esc50",
            description="ESC-50, 2,000 clips of 50 classes, five folds",
            training={
                **_ADAM, "batch_size": 48, "epochs": 25, "learning_rate": 1e-5, "decay_start": 5, "decay_step": 1,
                "decay_factor": 0.85, "frequency_mask": 24, "time_mask": 96, "mixup": 0.0, "noise": False,
                "balanced_sampling": False,
            },
            frontend={"mean": -6.6268077, "std": 5.358466, "max_length": 512},
            problem_type=ProblemType.SINGLE_LABEL,
            init="an AudioSet model; at a learning rate of 1e-4 any other",
            published="accuracy 0.9575 over five folds, 0.887 from ImageNet alone",
            cross_validate=True,
            learning_rate_from_scratch=1e-4,
        ),
        Recipe(
            name="speechcommands",
            description="Speech Commands v2, 35 words",
            training={
                **_ADAM, "batch_size": 128, "epochs": 30, "learning_rate": 2.5e-4, "decay_start": 5, "decay_step": 1,
                "decay_factor": 0.85, "frequency_mask": 48, "time_mask": 48, "mixup": 0.6, "noise": True,
                "balanced_sampling": False,
            },
            frontend={"mean": -6.845978, "std": 5.5654526, "max_length": 128},
            problem_type=ProblemType.MULTI_LABEL,
            init=_IMAGENET,
            published="test accuracy 0.9813, validation 0.9802",
        ),
    )
}  # fmt: skip
