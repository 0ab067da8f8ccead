"""`ASTConfig` and `FrontendConfig`, the settings of a model and its features, and their JSON files.

Both are frozen, hashable dataclasses, so that they can be static arguments of `jax.jit`. Field names and defaults are
those of `transformers.ASTConfig` and `transformers.ASTFeatureExtractor`; fields that transformers does not have come
last. Unknown JSON keys are kept and written back.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Self, TypeVar

from ast_jax.runtime.fields import check_types

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
HIDDEN_ACTS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "quick_gelu")
WINDOW_TYPES = ("hanning", "hamming", "povey", "rectangular", "blackman")
AUDIOSET_CLASSES = 527


class ProblemType(enum.StrEnum):
    """The kind of classification, which decides loss, scores and metrics; the values are those of transformers."""

    SINGLE_LABEL = "single_label_classification"
    MULTI_LABEL = "multi_label_classification"
    REGRESSION = "regression"


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


@dataclasses.dataclass(frozen=True)
class ASTConfig:
    """Configuration of an Audio Spectrogram Transformer (Gong, Chung, Glass 2021, section 2).

    Args:
        hidden_size: D, width of the token embeddings.
        num_hidden_layers: L, number of transformer blocks.
        num_attention_heads: H, must divide `hidden_size`.
        intermediate_size: M, hidden width of the MLP in a block.
        hidden_act: activation of the MLP, one of `HIDDEN_ACTS`; "gelu" is the exact (erf) form.
        hidden_dropout_prob: dropout rate after the embeddings, the attention and the MLP, in training only.
        attention_probs_dropout_prob: dropout rate of the attention weights, in training only.
        initializer_range: standard deviation of the tokens and of the classifier in `init`.
        layer_norm_eps: eps of every LayerNorm (transformers 1e-12, the original repository 1e-6).
        patch_size: side of a square patch in mel bins and frames, or the pair (frequency, time).
        qkv_bias: whether the query, key and value projections have a bias.
        frequency_stride: stride of the patches in mel bins.
        time_stride: stride of the patches in frames.
        max_length: T, input length in frames.
        num_mel_bins: F, number of mel bins.
        num_labels: C, number of classes.
        id2label: class names in index order; empty if there are none.
        problem_type: a `ProblemType` or its value; None: multi-label for AudioSet's 527 classes, else single-label.
        head_layer_norm_eps: eps of the LayerNorm before the classifier; None means `layer_norm_eps`.
        unknown_keys: the other keys of `config.json`, as a JSON string.

    Raises:
        ValueError: a field of the wrong type or out of range; the message has the expected and the given value.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    patch_size: int | tuple[int, int] = 16
    qkv_bias: bool = True
    frequency_stride: int = 10
    time_stride: int = 10
    max_length: int = 1024
    num_mel_bins: int = 128
    num_labels: int = AUDIOSET_CLASSES
    id2label: tuple[str, ...] = ()
    problem_type: ProblemType | str | None = None
    head_layer_norm_eps: float | None = None
    unknown_keys: str = "{}"

    def __post_init__(self) -> None:
        """Check types and ranges, and convert the fields to plain values."""
        check_types(self)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_labels",
                     "frequency_stride", "time_stride", "max_length", "num_mel_bins"):  # fmt: skip
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name, bound in _MODEL_BOUNDS.items():
            _require(getattr(self, name) <= bound, name, f"at most {bound:,}", getattr(self, name))
        for name in ("layer_norm_eps", "head_layer_norm_eps"):
            _require((getattr(self, name) or 0) >= 0, name, "0 or more", getattr(self, name))
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            _require(0 <= getattr(self, name) < 1, name, "a probability in [0, 1)", getattr(self, name))
        _require(self.hidden_size % self.num_attention_heads == 0, "num_attention_heads",
                 f"a divisor of hidden_size {self.hidden_size}", self.num_attention_heads)  # fmt: skip
        _require(self.hidden_act in HIDDEN_ACTS, "hidden_act", f"one of {', '.join(HIDDEN_ACTS)}", self.hidden_act)
        _require(len(self.id2label) in (0, self.num_labels), "id2label", f"{self.num_labels} names (num_labels)",
                 len(self.id2label))  # fmt: skip
        frequency, time = self.patch_shape
        _require(1 <= frequency <= self.num_mel_bins, "patch_size", f"1 to {self.num_mel_bins} mel bins", frequency)
        _require(1 <= time <= self.max_length, "patch_size", f"1 to {self.max_length} frames", time)
        _require(self.num_tokens <= MAX_TOKENS, "max_length and the strides", f"at most {MAX_TOKENS:,} tokens",
                 self.num_tokens)  # fmt: skip

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Patch size as (mel bins, frames)."""
        return (self.patch_size, self.patch_size) if isinstance(self.patch_size, int) else self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along (frequency, time): 12 × 101 for the published model."""
        frequency, time = self.patch_shape
        return (
            (self.num_mel_bins - frequency) // self.frequency_stride + 1,
            (self.max_length - time) // self.time_stride + 1,
        )

    @property
    def num_tokens(self) -> int:
        """N: the class token, the distillation token and one token per patch."""
        return 2 + self.grid[0] * self.grid[1]

    @property
    def head_eps(self) -> float:
        """Eps of the LayerNorm before the classifier."""
        return self.layer_norm_eps if self.head_layer_norm_eps is None else self.head_layer_norm_eps

    @property
    def resolved_problem_type(self) -> ProblemType:
        """`problem_type`, or the type that None means."""
        if self.problem_type is not None:
            return ProblemType(self.problem_type)
        return ProblemType.MULTI_LABEL if self.num_labels == AUDIOSET_CLASSES else ProblemType.SINGLE_LABEL

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in index order; without `id2label` "LABEL_0", "LABEL_1", ... as in transformers."""
        return self.id2label or tuple(f"LABEL_{index}" for index in range(self.num_labels))

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_json_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the configuration in a parsed Hugging Face `config.json`.

        As in transformers, a file with neither `id2label` nor `num_labels` has two classes.

        Raises:
            ValueError: another `model_type`, or a field of the wrong type or out of range.
        """
        values = dict(values)
        kind = values.pop("model_type", MODEL_TYPE)
        _require(kind == MODEL_TYPE, "model_type in config.json", repr(MODEL_TYPE), kind)
        id2label = values.pop("id2label", None)
        values.pop("label2id", None)  # the inverse of id2label
        _require(id2label is None or isinstance(id2label, Mapping), "id2label in config.json",
                 "an object with a name for each index", id2label)  # fmt: skip
        if id2label:
            _require(all(str(index).isdecimal() for index in id2label), "id2label in config.json",
                     "integers as keys", list(id2label))  # fmt: skip
            names = {int(index): str(name) for index, name in id2label.items()}
            _require(sorted(names) == list(range(len(names))), "id2label in config.json",
                     f"the indices 0 to {len(names) - 1}", sorted(names))  # fmt: skip
            values["id2label"] = tuple(names[index] for index in range(len(names)))
            values["num_labels"] = len(names)
        values.setdefault("num_labels", 2)
        return _from_known(cls, values)

    def to_json_dict(self) -> dict[str, Any]:
        """Return the content of a `config.json` that transformers can read."""
        values = _known(self)
        if isinstance(self.patch_size, tuple):
            values["patch_size"] = list(self.patch_size)
        if self.head_layer_norm_eps is None:
            del values["head_layer_norm_eps"]
        del values["id2label"]
        if self.id2label:
            values["id2label"] = {str(index): name for index, name in enumerate(self.id2label)}
            values["label2id"] = {name: index for index, name in enumerate(self.id2label)}
        return {"model_type": MODEL_TYPE, **values}


MODEL_TYPE = "audio-spectrogram-transformer"
# Larger values are typing errors or damaged files, and would exhaust the memory.
_MODEL_BOUNDS = {
    "hidden_size": 1_000_000, "num_hidden_layers": 10_000, "intermediate_size": 10_000_000, "num_labels": 10_000_000,
    "max_length": 10_000_000, "num_mel_bins": 10_000,
}  # fmt: skip
MAX_TOKENS = 1_000_000  # two hours of audio in one input


@dataclasses.dataclass(frozen=True)
class FrontendConfig:
    """Settings of the features: Kaldi's filter bank, input length and normalisation.

    Args:
        feature_size: always 1; transformers writes it.
        sampling_rate: Hz.
        num_mel_bins: F (Kaldi `--num-mel-bins`).
        max_length: T, frames; shorter input is padded, longer input truncated.
        padding_value: value of padded frames before normalisation.
        do_normalize: whether to compute (x - mean) / (2 std).
        mean: mean of the data set's log-mel values.
        std: their standard deviation; as in the original, normalisation divides by twice this.
        return_attention_mask: kept for transformers, where it has no effect either; see `ASTFeatureExtractor`.
        frame_length: ms (Kaldi `--frame-length`).
        frame_shift: ms (Kaldi `--frame-shift`).
        low_freq: lower edge of the lowest mel filter, Hz (Kaldi `--low-freq`).
        high_freq: upper edge of the highest one, Hz; 0 or less is relative to Nyquist (Kaldi `--high-freq`).
        window_type: one of `WINDOW_TYPES` (Kaldi `--window-type`).
        preemphasis_coefficient: Kaldi `--preemphasis-coefficient`.
        dither: standard deviation of the noise added to each sample; 0: none (Kaldi `--dither`).
        remove_dc_offset: subtract each frame's mean (Kaldi `--remove-dc-offset`).
        unknown_keys: the other keys of `preprocessor_config.json`, as a JSON string.

    Raises:
        ValueError: a field of the wrong type or out of range.
    """

    feature_size: int = 1
    sampling_rate: int = 16000
    num_mel_bins: int = 128
    max_length: int = 1024
    padding_value: float = 0.0
    do_normalize: bool = True
    mean: float = -4.2677393
    std: float = 4.5689974
    return_attention_mask: bool = False
    frame_length: float = 25.0
    frame_shift: float = 10.0
    low_freq: float = 20.0
    high_freq: float = 0.0
    window_type: str = "hanning"
    preemphasis_coefficient: float = 0.97
    dither: float = 0.0
    remove_dc_offset: bool = True
    unknown_keys: str = "{}"

    def __post_init__(self) -> None:
        """Check types and ranges, and convert the fields to plain values."""
        check_types(self)
        for name in ("sampling_rate", "num_mel_bins", "max_length", "std", "frame_length", "frame_shift"):
            _require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        for name, bound in _FRONTEND_BOUNDS.items():
            _require(getattr(self, name) <= bound, name, f"at most {bound:,}", getattr(self, name))
        _require(self.window_samples >= 2, "frame_length", "at least two samples", f"{self.frame_length} ms")
        _require(self.shift_samples >= 1, "frame_shift", "at least one sample", f"{self.frame_shift} ms")
        _require(0 <= self.preemphasis_coefficient <= 1, "preemphasis_coefficient", "a number in [0, 1]",
                 self.preemphasis_coefficient)  # fmt: skip
        _require(self.dither >= 0, "dither", "0 or more", self.dither)
        _require(self.window_type in WINDOW_TYPES, "window_type", f"one of {', '.join(WINDOW_TYPES)}", self.window_type)
        nyquist = self.sampling_rate / 2
        _require(0 <= self.low_freq < self.top_frequency <= nyquist, "low_freq and high_freq",
                 f"0 <= low < high <= {nyquist:g} Hz", (self.low_freq, self.top_frequency))  # fmt: skip

    @property
    def window_samples(self) -> int:
        """Frame length in samples; 400 by default."""
        return int(self.sampling_rate * self.frame_length * 0.001)

    @property
    def shift_samples(self) -> int:
        """Frame shift in samples; 160 by default."""
        return int(self.sampling_rate * self.frame_shift * 0.001)

    @property
    def top_frequency(self) -> float:
        """Upper edge of the highest mel filter in Hz, `high_freq` resolved."""
        return self.high_freq if self.high_freq > 0 else self.sampling_rate / 2 + self.high_freq

    @property
    def max_samples(self) -> int:
        """Number of samples that give exactly `max_length` frames."""
        return self.window_samples + (self.max_length - 1) * self.shift_samples

    @property
    def max_seconds(self) -> float:
        """`max_samples` in seconds."""
        return self.max_samples / self.sampling_rate

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_json_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the configuration in a parsed Hugging Face `preprocessor_config.json`.

        Raises:
            ValueError: another `feature_extractor_type`, or a field of the wrong type or out of range.
        """
        values = dict(values)
        kind = values.pop("feature_extractor_type", EXTRACTOR_TYPE)
        _require(
            kind == EXTRACTOR_TYPE, "feature_extractor_type in preprocessor_config.json", repr(EXTRACTOR_TYPE), kind
        )
        return _from_known(cls, values)

    def to_json_dict(self) -> dict[str, Any]:
        """Return the content of a `preprocessor_config.json` that transformers can read."""
        return {"feature_extractor_type": EXTRACTOR_TYPE, **_known(self)}


EXTRACTOR_TYPE = "ASTFeatureExtractor"
# Larger values are typing errors, and would exhaust the memory.
_FRONTEND_BOUNDS = {
    "sampling_rate": 1_000_000, "num_mel_bins": 10_000, "max_length": 10_000_000, "frame_length": 60_000,
    "frame_shift": 60_000,
}  # fmt: skip

_Config = TypeVar("_Config", bound=ASTConfig | FrontendConfig)
_Read = TypeVar("_Read", ASTConfig, FrontendConfig)


def _from_known(cls: type[_Config], values: dict[str, Any]) -> _Config:
    """Return a configuration from a JSON object, with keys that are not fields in `unknown_keys`."""
    names = {field.name for field in dataclasses.fields(cls)} - {"unknown_keys"}
    known = {key: value for key, value in values.items() if key in names}
    unknown = {key: value for key, value in values.items() if key not in names}
    return cls(**known, unknown_keys=json.dumps(unknown, sort_keys=True))


def _known(config: ASTConfig | FrontendConfig) -> dict[str, Any]:
    """Return the fields and the unknown keys as one JSON object."""
    values = dataclasses.asdict(config)
    return {**json.loads(values.pop("unknown_keys")), **values}


def read_config(kind: type[_Read], path: pathlib.Path) -> _Read:
    """Read `config.json` or `preprocessor_config.json`.

    Raises:
        ValueError: the file is missing or not a JSON object, or a value has the wrong type or is out of range.
    """
    content = read_json(path)
    try:
        return kind.from_json_dict(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _preset(hidden_size: int, num_attention_heads: int, **changes: Any) -> ASTConfig:
    """Return a DeiT-shaped configuration: head dimension 64, MLP ratio 4, 12 layers."""
    return ASTConfig(**{
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "intermediate_size": 4 * hidden_size,
        **changes,
    })  # fmt: skip


def tiny(**changes: Any) -> ASTConfig:
    """Return the original's `tiny224`: width 192, 3 heads."""
    return _preset(192, 3, **changes)


def small(**changes: Any) -> ASTConfig:
    """Return the original's `small224`: width 384, 6 heads."""
    return _preset(384, 6, **changes)


def base(**changes: Any) -> ASTConfig:
    """Return the original's `base384`, the model of the paper: width 768, 12 heads."""
    return _preset(768, 12, **changes)


PRESETS = {"tiny": tiny, "small": small, "base": base}
"""The original's three model sizes: name to a function that returns an `ASTConfig` with the given fields changed."""
