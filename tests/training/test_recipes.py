"""Recipes: the learning rates that the original logged, its scripts' values, and how a recipe is shown."""

import dataclasses

import numpy as np
import pytest

from ast_jax.config import FrontendConfig, ProblemType
from ast_jax.training.config import TrainConfig
from ast_jax.training.optimizers import epoch_rates
from ast_jax.training.recipes import RECIPES

STEPS_PER_EPOCH = {"audioset-full": 162_757, "audioset-balanced": 1_733, "esc50": 34, "speechcommands": 663}
# The published logs' {epoch: rate}, epochs from 1; esc50's has five digits.
LOGGED = {
    "audioset-full": {1: 1e-5, 2: 1e-5, 3: 5e-6, 4: 2.5e-6, 5: 1.25e-6},
    "audioset-balanced": {**dict.fromkeys(range(1, 11), 5e-5), 20: 1.25e-5, 25: 6.25e-6},
    "esc50": {**dict.fromkeys(range(1, 6), 1e-5), 22: 6.3113e-7},
    "speechcommands": {**dict.fromkeys(range(1, 6), 2.5e-4), 6: 2.5e-4 * 0.85},
}


def test_all_recipes_are_tested():
    assert RECIPES.keys() == LOGGED.keys() == STEPS_PER_EPOCH.keys()
    assert [recipe.name for recipe in RECIPES.values()] == list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_learning_rates_are_the_logged_ones(name):
    rates = epoch_rates(RECIPES[name].settings(), STEPS_PER_EPOCH[name])
    assert len(rates) == RECIPES[name].training["epochs"]
    tolerance = 1e-5 if name == "esc50" else 1e-14  # five digits; otherwise as many as float64 has after 17 products
    for epoch, rate in LOGGED[name].items():
        assert rates[epoch - 1] == pytest.approx(rate, rel=tolerance, abs=0)


@pytest.mark.parametrize(
    ("name", "batch_size", "epochs", "masks", "mixup", "noise", "balanced", "warmup", "averaged"),
    [
        ("audioset-full", 12, 5, (48, 192), 0.5, False, True, (1000, 50), 1),
        ("audioset-balanced", 12, 25, (48, 192), 0.5, False, False, (1000, 50), 6),
        ("esc50", 48, 25, (24, 96), 0.0, False, False, (0, 0), 0),
        ("speechcommands", 128, 30, (48, 48), 0.6, True, False, (0, 0), 0),
    ],
)
def test_settings_are_the_scripts(name, batch_size, epochs, masks, mixup, noise, balanced, warmup, averaged):
    settings = RECIPES[name].settings()
    assert (settings.batch_size, settings.epochs) == (batch_size, epochs)
    assert (settings.frequency_mask, settings.time_mask) == masks
    assert (settings.mixup, settings.noise, settings.balanced_sampling) == (mixup, noise, balanced)
    assert (settings.warmup_steps, settings.warmup_hold, settings.average_from) == (*warmup, averaged)
    adam = (settings.optimizer, settings.beta1, settings.beta2, settings.weight_decay, settings.max_grad_norm)
    assert adam == ("adam", 0.95, 0.999, 5e-7, 0.0)


def test_frontends_are_the_data_sets():
    """A padded frame, 0 before normalisation, is what the original's data sets have there."""
    padding = {"audioset-full": 0.467032, "audioset-balanced": 0.467032, "esc50": 0.618349, "speechcommands": 0.615042}
    for name, value in padding.items():
        frontend = FrontendConfig(**RECIPES[name].frontend)
        np.testing.assert_allclose(-frontend.mean / (2 * frontend.std), value, atol=5e-7)  # six digits published
        assert RECIPES[name].problem_type in set(ProblemType)
    lengths = {name: recipe.frontend["max_length"] for name, recipe in RECIPES.items()}
    assert list(lengths.values()) == [1024, 1024, 512, 128]


def test_esc50_alone_is_cross_validated_and_has_two_rates():
    special = {name for name, recipe in RECIPES.items() if recipe.cross_validate or recipe.learning_rate_from_scratch}
    assert special == {"esc50"}
    esc50 = RECIPES["esc50"]
    assert esc50.problem_type == "single_label_classification"
    assert esc50.settings(learning_rate=esc50.learning_rate_from_scratch).learning_rate == 1e-4


def test_every_value_can_be_overridden():
    changes = {
        field.name: {"optimizer": "adamw", "schedule": "cosine", "dtype": "bfloat16"}.get(field.name, field.default)
        for field in dataclasses.fields(TrainConfig)
    }
    for recipe in RECIPES.values():
        assert recipe.settings(**changes) == TrainConfig(**changes)
    with pytest.raises(ValueError, match="recipe esc50: expected settings of TrainConfig, got lr, rate"):
        RECIPES["esc50"].settings(rate=1, lr=2)
    with pytest.raises(ValueError, match="average_from: 6 is out of range; expected at most epochs, which is 3"):
        RECIPES["audioset-balanced"].settings(epochs=3)


def test_lines_show_the_recipes_own_value_beside_another():
    recipe = RECIPES["speechcommands"]
    plain, changed = recipe.lines(), recipe.lines({"epochs": 3, "mixup": 0.6, "ema_decay": 0.99})
    rows = dict(line.split(maxsplit=1) for line in plain[1:])
    assert rows["learning_rate"] == "0.00025"
    assert rows["mean"] == "-6.845978"
    assert recipe.training.keys() <= rows.keys()
    assert "ema_decay" not in rows
    rows = dict(line.split(maxsplit=1) for line in changed[1:])
    assert rows["epochs"] == "3 (recipe: 30)"
    assert rows["ema_decay"] == "0.99 (recipe: 0.0)"
    assert rows["mixup"] == "0.6"
    assert "0.9813" in plain[0]
