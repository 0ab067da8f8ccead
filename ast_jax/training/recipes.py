"""The paper's fine-tuning recipes: settings for each data set, and the published results.

Values are those of the original's scripts (`egs/*/run*.sh`) and logs. Mixup is from Beta(10, 10) in all of them
(`data.mixup.MIXUP_ALPHA`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from ast_jax.checkpoints.folder import Checkpoint
from ast_jax.checkpoints.load import load
from ast_jax.config import ProblemType
from ast_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A fine-tuning recipe for one data set.

    Attributes:
        name: name on the command line.
        description: one line.
        training: fields of `TrainConfig` that differ from the defaults.
        frontend: fields of `FrontendConfig`: the data set's mean and standard deviation, and the length in frames.
        problem_type: selects the loss.
        cross_validate: whether to cross-validate over the folds of the data set.
        init: description of the initial checkpoint.
        published: description of the original's results.
        learning_rate_from_scratch: learning rate for an initial model that was not trained on AudioSet, if different.
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
        """Return the recipe's training settings, with overrides.

        Raises:
            ValueError: an unknown field, or a value out of its range.
        """
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        if unknown := sorted(overrides.keys() - known):
            raise ValueError(f"recipe {self.name}: expected settings of TrainConfig, got {', '.join(unknown)}")
        return TrainConfig(**{**self.training, **overrides})

    def training_for(self, init: Checkpoint | None, **overrides: Any) -> TrainConfig:
        """Return the training settings for an initial checkpoint: from scratch and from ImageNet some rates differ.

        Raises:
            ValueError: as in `settings`.
        """
        trained_on_audio = init is not None and not init.provenance.imagenet_only
        if self.learning_rate_from_scratch and not trained_on_audio:
            overrides = {"learning_rate": self.learning_rate_from_scratch, **overrides}
        return self.settings(**overrides)

    def lines(
        self, overrides: Mapping[str, Any] | None = None, frontend: Mapping[str, Any] | None = None, init: str = ""
    ) -> list[str]:
        """Return the settings in use as lines of text, with the recipe's value beside each that differs.

        Args:
            overrides: training settings that override the recipe's.
            frontend: mean, std and max_length where they override the recipe's.
            init: the initial checkpoint; by default the recipe's description is printed.
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
            description="AudioSet, about two million clips, weight averaging over all epochs",
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
            description="AudioSet's balanced subset, about 20,000 clips, weight averaging from epoch 6",
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


def find_recipe(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: expected {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


def load_init(init: Checkpoint | str | os.PathLike[str] | None, recipe: Recipe | None) -> Checkpoint | None:
    """Return an initial checkpoint; one given by its name is loaded with the recipe's input length.

    Raises:
        ValueError: see `load`.
    """
    if init is None or isinstance(init, Checkpoint):
        return init
    return load(init, max_length=recipe.frontend["max_length"]) if recipe else load(init)
