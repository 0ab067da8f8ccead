"""Configurations have transformers' fields and defaults, and survive a round trip through its files."""

import dataclasses
import functools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from feature_oracles import transformers_ast

from ast_jax import PRESETS, ASTConfig, FrontendConfig
from ast_jax.config import HIDDEN_ACTS, WINDOW_TYPES, ProblemType, base, small, tiny

MODEL_FIELDS = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
                "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps",
                "patch_size", "qkv_bias", "frequency_stride", "time_stride", "max_length", "num_mel_bins"]  # fmt: skip
FRONTEND_FIELDS = ["feature_size", "sampling_rate", "num_mel_bins", "max_length", "padding_value", "do_normalize",
                   "mean", "std", "return_attention_mask"]  # fmt: skip
# Every field with a value that is not its default.
MODEL_CHANGES = {
    "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 200,
    "hidden_act": "gelu_new", "hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.125,
    "initializer_range": 0.5, "layer_norm_eps": 1e-6, "patch_size": 12, "qkv_bias": False, "frequency_stride": 7,
    "time_stride": 9, "max_length": 200, "num_mel_bins": 64,
}  # fmt: skip
FRONTEND_CHANGES = {
    "sampling_rate": 32000, "num_mel_bins": 64, "max_length": 512, "padding_value": -1.5, "do_normalize": False,
    "mean": -6.5, "std": 5.5, "return_attention_mask": True,
}  # fmt: skip


def test_model_fields_are_those_of_transformers():
    """The same set of fields, with the same defaults."""
    theirs = {field.name for field in dataclasses.fields(transformers.ASTConfig)} - {
        field.name for field in dataclasses.fields(transformers.PreTrainedConfig)
    }
    assert theirs == set(MODEL_FIELDS)
    for name in MODEL_FIELDS:
        assert getattr(ASTConfig(), name) == getattr(transformers.ASTConfig(), name), name


@pytest.mark.parametrize("name", FRONTEND_FIELDS)
def test_frontend_defaults_are_those_of_transformers(name):
    assert getattr(FrontendConfig(), name) == getattr(transformers_ast.ASTFeatureExtractor(), name)


def test_defaults_that_transformers_does_not_have():
    config = ASTConfig()
    assert (config.num_labels, config.id2label, config.problem_type) == (527, (), None)
    assert config.head_eps == 1e-12
    assert config.replace(layer_norm_eps=1e-6, head_layer_norm_eps=1e-5).head_eps == 1e-5
    frontend = FrontendConfig()
    assert (frontend.frame_length, frontend.frame_shift, frontend.low_freq, frontend.high_freq) == (25, 10, 20, 0)
    assert (frontend.window_type, frontend.preemphasis_coefficient, frontend.dither) == ("hanning", 0.97, 0)
    assert frontend.remove_dc_offset


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (ASTConfig(), ASTConfig(), ASTConfig(max_length=512)),
        (ASTConfig(patch_size=(16, 8)), ASTConfig(patch_size=[16, 8]), ASTConfig(patch_size=(8, 16))),
        (tiny(num_labels=2, id2label=["a", "b"]), tiny(num_labels=2, id2label=("a", "b")), tiny(num_labels=2)),
        (FrontendConfig(), FrontendConfig(), FrontendConfig(mean=0.0)),
    ],
)
def test_equal_hashable_and_static_under_jit(one, same, other):
    assert one == same != other
    assert hash(one) == hash(same) != hash(other)
    assert {one: 1}[same] == 1
    traces = []

    @functools.partial(jax.jit, static_argnames="config")
    def length(x, config):
        traces.append(config)
        return x * config.max_length

    for config in (one, same, other):
        assert length(jnp.ones(()), config=config) == config.max_length
    assert len(traces) == 2, "traced once for equal configurations"


def test_numpy_integers_become_int():
    """JSON cannot write NumPy's."""
    model = ASTConfig(max_length=np.int64(512), patch_size=(np.int32(16), 8), num_labels=np.int64(3))
    assert json.loads(json.dumps(model.to_json_dict()))["max_length"] == 512
    assert model == ASTConfig(max_length=512, patch_size=(16, 8), num_labels=3)
    assert json.loads(json.dumps(FrontendConfig(max_length=np.int64(512)).to_json_dict()))["max_length"] == 512


def test_fields_cannot_be_set():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ASTConfig().hidden_size = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        FrontendConfig().mean = 1


def test_presets():
    assert set(PRESETS) == {"tiny", "small", "base"}
    assert base() == ASTConfig()
    sizes = {name: (c.hidden_size, c.num_attention_heads, c.intermediate_size, c.num_hidden_layers)
             for name, c in ((name, preset()) for name, preset in PRESETS.items())}  # fmt: skip
    assert sizes == {"tiny": (192, 3, 768, 12), "small": (384, 6, 1536, 12), "base": (768, 12, 3072, 12)}
    assert small(max_length=512).grid == (12, 50)
    assert tiny(intermediate_size=100).intermediate_size == 100


@pytest.mark.parametrize(
    ("max_length", "stride", "grid"),
    [
        (1024, 10, (12, 101)),
        (1024, 12, (10, 85)),
        (1024, 14, (9, 73)),
        (1024, 16, (8, 64)),
        (512, 10, (12, 50)),
        (256, 10, (12, 25)),
        (128, 10, (12, 12)),
        (100, 10, (12, 9)),
    ],
)
def test_grid(max_length, stride, grid):
    config = ASTConfig(max_length=max_length, frequency_stride=stride, time_stride=stride)
    assert config.grid == grid
    assert config.num_tokens == 2 + grid[0] * grid[1]


def test_grid_with_unequal_strides_and_rectangular_patches():
    config = ASTConfig(patch_size=(128, 2), frequency_stride=1, time_stride=2, max_length=100)
    assert config.patch_shape == (128, 2)
    assert config.grid == (1, 50)
    assert ASTConfig(frequency_stride=16, time_stride=10).grid == (8, 101)
    assert ASTConfig(patch_size=(8, 16)).grid == (13, 101)
    assert ASTConfig().patch_shape == (16, 16)


def test_derived_numbers_of_the_frontend():
    frontend = FrontendConfig()
    assert (frontend.window_samples, frontend.shift_samples) == (400, 160)
    assert frontend.max_samples == 400 + 1023 * 160
    assert frontend.max_seconds == pytest.approx(10.255)
    assert frontend.top_frequency == 8000
    assert frontend.replace(high_freq=-400.0).top_frequency == 7600
    assert frontend.replace(high_freq=7000.0).top_frequency == 7000


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "want"),
    [
        (None, 527, "multi_label_classification"),
        (None, 35, "single_label_classification"),
        ("single_label_classification", 527, "single_label_classification"),
        ("multi_label_classification", 35, "multi_label_classification"),
        ("regression", 1, "regression"),
    ],
)
def test_problem_type(problem_type, num_labels, want):
    assert ASTConfig(problem_type=problem_type, num_labels=num_labels).resolved_problem_type == want


def test_problem_types_are_those_of_transformers():
    """Members and plain strings give the same configuration, hash and JSON."""
    for kind in ProblemType:
        assert transformers.ASTConfig(problem_type=str(kind)).problem_type == kind
        config, plain = ASTConfig(problem_type=kind), ASTConfig(problem_type=kind.value)
        assert config == plain
        assert hash(config) == hash(plain)
        assert type(plain.problem_type) is type(plain.resolved_problem_type) is ProblemType
        assert plain.problem_type == kind.value
        written = json.loads(json.dumps(plain.to_json_dict()))
        assert written["problem_type"] == kind.value
        assert ASTConfig.from_json_dict(written) == config
        assert pickle.loads(pickle.dumps(plain)) == config


def test_labels_without_names_are_those_of_transformers():
    assert ASTConfig(num_labels=12).labels == tuple(transformers.ASTConfig(num_labels=12).id2label.values())
    assert ASTConfig(num_labels=2, id2label=("a", "b")).labels == ("a", "b")


def through_transformers(config, folder):
    """Load our `config.json` with transformers and save it; return the loaded configuration and the saved content."""
    (folder / "config.json").write_text(json.dumps(config.to_json_dict()))
    loaded = transformers.ASTConfig.from_pretrained(folder)
    loaded.save_pretrained(folder)
    return loaded, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", MODEL_CHANGES)
def test_each_model_field_survives_transformers(name, tmp_path):
    config = ASTConfig(**{**MODEL_CHANGES, "hidden_size": 96, "num_labels": 12})
    assert set(MODEL_CHANGES) == set(MODEL_FIELDS)
    assert getattr(config, name) != getattr(ASTConfig(), name)
    loaded, written = through_transformers(config, tmp_path)
    assert getattr(loaded, name) == getattr(config, name)
    assert getattr(ASTConfig.from_json_dict(written), name) == getattr(config, name)


LABELS = tuple(f"sound {index}" for index in range(12))
ROUND_TRIPS = {
    "labels": ASTConfig(num_labels=12, id2label=LABELS, problem_type="multi_label_classification"),
    "no names": ASTConfig(num_labels=5),
    "AudioSet's number": ASTConfig(),
    "two labels": ASTConfig(num_labels=2),
    "rectangular": ASTConfig(patch_size=(16, 8), num_labels=3),
    "head eps": ASTConfig(layer_norm_eps=1e-6, head_layer_norm_eps=1e-5, num_labels=3),
    "everything": ASTConfig(**MODEL_CHANGES, num_labels=12, id2label=LABELS, problem_type="regression"),
}


@pytest.mark.parametrize("config", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_whole_model_config_survives_transformers(config, tmp_path):
    assert ASTConfig.from_json_dict(json.loads(json.dumps(config.to_json_dict()))) == config
    loaded, written = through_transformers(config, tmp_path)
    assert loaded.num_labels == config.num_labels
    assert tuple(loaded.id2label.values()) == config.labels
    back = ASTConfig.from_json_dict(written)
    assert back.labels == config.labels
    assert back.replace(unknown_keys="{}", id2label=config.id2label) == config


def test_config_that_transformers_wrote_is_read_and_written_back(tmp_path):
    """Including unknown keys."""
    theirs = transformers.ASTConfig(**MODEL_CHANGES, id2label=dict(enumerate(LABELS)), architectures=["ASTModel"])
    theirs.label2id = {name: index for index, name in enumerate(LABELS)}
    theirs.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    assert list(before["id2label"])[:3] == ["0", "1", "2"]
    config = ASTConfig.from_json_dict(before)
    assert config.num_labels == 12
    assert config.id2label == LABELS
    for name, value in MODEL_CHANGES.items():
        assert getattr(config, name) == value, name
    after = config.to_json_dict()
    assert {key: after[key] for key in before} == before
    assert json.loads(config.unknown_keys).keys() == {"architectures", "transformers_version"}


@pytest.mark.parametrize("num_labels", [2, 527])
def test_a_file_without_labels_has_the_default_number_of_transformers(num_labels, tmp_path):
    """transformers does not write `num_labels`, so a file without labels has its default, two."""
    transformers.ASTConfig(num_labels=num_labels).save_pretrained(tmp_path)
    want = transformers.ASTConfig.from_pretrained(tmp_path).num_labels
    assert ASTConfig.from_json_dict(json.loads((tmp_path / "config.json").read_text())).num_labels == want


def test_label_keys_are_ordered_as_numbers():
    """As strings, "10" sorts before "2"; JSON objects are unordered."""
    keys = sorted(str(index) for index in range(12))
    assert keys.index("10") < keys.index("2")
    config = ASTConfig.from_json_dict({"id2label": {key: f"sound {key}" for key in keys}})
    assert config.id2label == LABELS
    assert list(config.to_json_dict()["id2label"]) == [str(index) for index in range(12)]
    assert config.to_json_dict()["label2id"]["sound 10"] == 10


def test_unknown_keys_are_kept_and_written_back():
    extra = {"architectures": ["X"], "dtype": "float32", "nested": {"b": [1, None], "a": True}, "name": "größer"}
    for cls in (ASTConfig, FrontendConfig):
        config = cls.from_json_dict({**extra, "max_length": 512})
        assert config.max_length == 512
        assert hash(config) != hash(cls(max_length=512))
        written = config.to_json_dict()
        assert {key: written[key] for key in extra} == extra
        assert "unknown_keys" not in written
        assert cls.from_json_dict(written) == config


def test_frontend_survives_transformers(tmp_path):
    frontend = FrontendConfig(**FRONTEND_CHANGES, window_type="povey", low_freq=50.0)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(frontend.to_json_dict()))
    loaded = transformers_ast.ASTFeatureExtractor.from_pretrained(tmp_path)
    for name in FRONTEND_FIELDS:
        assert getattr(loaded, name) == getattr(frontend, name), name
    loaded.save_pretrained(tmp_path)
    back = FrontendConfig.from_json_dict(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    assert back.replace(unknown_keys="{}") == frontend


MODEL_ERRORS = [
    ({"hidden_size": 0}, "hidden_size: expected at least 1, got 0"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: expected at least 1, got 0"),
    ({"num_attention_heads": -1}, "num_attention_heads: expected at least 1, got -1"),
    ({"intermediate_size": 0}, "intermediate_size: expected at least 1, got 0"),
    ({"num_labels": 0}, "num_labels: expected at least 1, got 0"),
    ({"frequency_stride": 0}, "frequency_stride: expected at least 1, got 0"),
    ({"time_stride": 0}, "time_stride: expected at least 1, got 0"),
    ({"max_length": 0}, "max_length: expected at least 1, got 0"),
    ({"num_mel_bins": 0}, "num_mel_bins: expected at least 1, got 0"),
    ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob: expected a probability in [0, 1), got 1.0"),
    (
        {"attention_probs_dropout_prob": -0.1},
        "attention_probs_dropout_prob: expected a probability in [0, 1), got -0.1",
    ),
    ({"num_attention_heads": 7}, "num_attention_heads: expected a divisor of hidden_size 768, got 7"),
    ({"hidden_act": "tanh"}, f"hidden_act: expected one of {', '.join(HIDDEN_ACTS)}, got 'tanh'"),
    ({"problem_type": "x"}, f"problem_type: expected None or one of {', '.join(ProblemType)}, got 'x'"),
    ({"id2label": ("a", "b")}, "id2label: expected 527 names (num_labels), got 2"),
    ({"patch_size": 0}, "patch_size: expected 1 to 128 mel bins, got 0"),
    ({"patch_size": (16, 0)}, "patch_size: expected 1 to 1024 frames, got 0"),
    ({"patch_size": 129}, "patch_size: expected 1 to 128 mel bins, got 129"),
    ({"patch_size": (16, 1025)}, "patch_size: expected 1 to 1024 frames, got 1025"),
    (
        {"patch_size": (16, 16, 3)},
        "patch_size: expected an integer or a tuple (an integer, an integer), got (16, 16, 3)",
    ),
]
FRONTEND_ERRORS = [
    ({"sampling_rate": 0}, "sampling_rate: expected a positive number, got 0"),
    ({"sampling_rate": 10**15}, "sampling_rate: expected at most 1,000,000, got 1000000000000000"),
    ({"frame_length": 1e300}, "frame_length: expected at most 60,000, got 1e+300"),
    ({"num_mel_bins": 0}, "num_mel_bins: expected a positive number, got 0"),
    ({"max_length": 0}, "max_length: expected a positive number, got 0"),
    ({"num_mel_bins": 64.0}, "num_mel_bins: expected an integer, got 64.0"),
    ({"std": 0.0}, "std: expected a positive number, got 0.0"),
    ({"std": float("nan")}, "std: expected a finite number, got nan"),
    ({"std": float("inf")}, "std: expected a finite number, got inf"),
    ({"frame_length": -1.0}, "frame_length: expected a positive number, got -1.0"),
    ({"frame_length": 0.1}, "frame_length: expected at least two samples, got '0.1 ms'"),
    ({"frame_shift": 0.0}, "frame_shift: expected a positive number, got 0.0"),
    ({"frame_shift": 0.05}, "frame_shift: expected at least one sample, got '0.05 ms'"),
    ({"preemphasis_coefficient": 1.5}, "preemphasis_coefficient: expected a number in [0, 1], got 1.5"),
    ({"dither": -1.0}, "dither: expected 0 or more, got -1.0"),
    ({"window_type": "hann"}, f"window_type: expected one of {', '.join(WINDOW_TYPES)}, got 'hann'"),
    ({"low_freq": -1.0}, "low_freq and high_freq: expected 0 <= low < high <= 8000 Hz, got (-1.0, 8000.0)"),
    ({"high_freq": 8001.0}, "low_freq and high_freq: expected 0 <= low < high <= 8000 Hz, got (20.0, 8001.0)"),
    ({"high_freq": -7990.0}, "low_freq and high_freq: expected 0 <= low < high <= 8000 Hz, got (20.0, 10.0)"),
]


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [(ASTConfig, *error) for error in MODEL_ERRORS] + [(FrontendConfig, *error) for error in FRONTEND_ERRORS],
    ids=[f"{next(iter(fields))}-{index}" for index, (fields, _) in enumerate(MODEL_ERRORS + FRONTEND_ERRORS)],
)
def test_errors_say_expected_and_got(cls, fields, message):
    for make in (lambda: cls(**fields), lambda: cls().replace(**fields)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
            make()
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "vit"}, "model_type in config.json: expected 'audio-spectrogram-transformer', got 'vit'"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label in config.json: expected the indices 0 to 1, got [0, 2]"),
        ({"id2label": {"1": "a", "2": "b"}}, "id2label in config.json: expected the indices 0 to 1, got [1, 2]"),
        ({"id2label": {"a": 0}}, "id2label in config.json: expected integers as keys, got ['a']"),
        ({"hidden_size": "768"}, "hidden_size: expected an integer, got '768'"),
        ({"max_length": 10.5}, "max_length: expected an integer, got 10.5"),
        ({"patch_size": "16"}, "patch_size: expected an integer or a tuple (an integer, an integer), got '16'"),
        ({"patch_size": 16.5}, "patch_size: expected an integer or a tuple (an integer, an integer), got 16.5"),
    ],
)
def test_errors_of_a_config_file(values, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        ASTConfig.from_json_dict(values)
    assert str(caught.value) == message


# Annotation: values with what they become, values that are refused, and what is expected of them.
