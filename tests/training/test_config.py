"""Settings: every field says what it means and what it may be, and refuses the rest."""

import dataclasses
import json

import numpy as np
import pytest

from ast_jax.training.config import TrainConfig

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
BAD = {
    "batch_size": (0, -1), "grad_accum_steps": (0,), "epochs": (0, 10_000), "patience": (-1,), "optimizer": ("sgd", ""),
    "learning_rate": (0.0, -1e-4), "schedule": ("linear",), "warmup_steps": (-1,), "warmup_hold": (-1,),
    "decay_start": (-1,), "decay_step": (0,), "decay_factor": (0.0, 1.5), "layer_decay": (0.0, 1.1),
    "head_multiplier": (0.0,), "freeze_layers": (-1,), "weight_decay": (-1e-9,), "max_grad_norm": (-1.0,),
    "beta1": (1.0, -0.1), "beta2": (1.0,), "mixup": (1.5, -0.1), "frequency_mask": (-1,), "time_mask": (-1,),
    "frequency_shift": (-1,), "time_shift": (-1,), "ramp_epochs": (-1.0,), "patchout_frequency": (-1,),
    "patchout_time": (-1,), "patchout": (-1,), "label_smoothing": (1.0, -0.1), "teacher_weight": (1.1,),
    "ema_decay": (1.0,), "average_from": (-1,), "dtype": ("float16",), "seed": (-1,),
}  # fmt: skip
EDGES = {
    "decay_factor": (1.0,), "layer_decay": (1.0, 0.1), "beta1": (0.0,), "mixup": (0.0, 1.0),
    "teacher_weight": (0.0, 1.0), "ema_decay": (0.0, 0.999), "label_smoothing": (0.0, 0.99), "epochs": (1, 9999),
    "decay_start": (0,), "seed": (2**31 - 1,),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_says_what_it_means(name):
    meaning, allowed = FIELDS[name].metadata["help"], FIELDS[name].metadata["range"]
    assert meaning.strip() == meaning != ""
    assert "\n" not in meaning
    assert f"        {name}: {meaning}; {allowed}.\n" in TrainConfig.__doc__


def test_every_range_is_tested():
    assert BAD.keys() == {name for name, field in FIELDS.items() if field.type != "bool"}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_out_of_range_is_refused_with_the_range(name, value):
    with pytest.raises(ValueError, match=f"^{name}: .* is out of range; expected ") as caught:
        TrainConfig(**{name: value})
    assert str(caught.value).endswith(f"{value!r} is out of range; expected {FIELDS[name].metadata['range']}")


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in EDGES.items() for value in values])
def test_edges_of_ranges_are_taken(name, value):
    assert getattr(TrainConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 25.0, "an integer, got 25.0"), ("seed", "1", "an integer, got '1'"),
        ("batch_size", True, "an integer, got True"), ("noise", 1, "true or false, got 1"),
        ("learning_rate", True, "a finite number, got True"),
        ("learning_rate", float("nan"), "a finite number, got nan"),
        ("max_grad_norm", float("inf"), "a finite number, got inf"), ("schedule", None, "a string, got None"),
        ("linear_probe", None, "true or false, got None"),
    ],
)  # fmt: skip
def test_other_types_are_refused(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name}: expected {expected}$"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("changes", [{"seed": 2**31}, {"time_shift": 10**20}, {"learning_rate": 1e10}])
def test_numbers_that_no_array_holds_are_refused(changes):
    with pytest.raises(ValueError, match=r"expected a number below 2\*\*31"):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 10, "grad_accum_steps": 4},
            "grad_accum_steps: 4 is out of range; expected a divisor of batch_size 10",
        ),
        ({"warmup_steps": 20, "warmup_hold": 50}, "warmup_hold: 50 .* at most warmup_steps, which is 20"),
        ({"epochs": 5, "average_from": 6}, "average_from: 6 .* at most epochs, which is 5"),
        ({"linear_probe": True, "freeze_layers": 2}, "freeze_layers: 2 .* expected 0 where linear_probe"),
        ({"linear_probe": True, "layer_decay": 0.5}, "layer_decay: 0.5 .* expected 1 where linear_probe"),
    ],
)
def test_settings_at_odds_with_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)
    for name in changes:  # neither alone is wrong
        kept = {other: value for other, value in changes.items() if other != name}
        assert TrainConfig(**kept, **{name: FIELDS[name].default}) is not None


def test_a_recipe_without_its_warm_up_may_keep_the_hold():
    assert TrainConfig(warmup_steps=0, warmup_hold=50).warmup_hold == 50


def test_json_gives_the_same_settings_back():
    settings = TrainConfig(epochs=np.int64(3), learning_rate=1, mixup=np.float32(0.5), noise=True, optimizer="adamw")
    assert TrainConfig(**json.loads(json.dumps(dataclasses.asdict(settings)))) == settings
    assert hash(settings) == hash(dataclasses.replace(settings))
