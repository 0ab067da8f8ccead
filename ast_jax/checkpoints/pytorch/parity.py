"""Verification of conversions: tensors converted back bit by bit, activations against the PyTorch model.

The reference model is transformers' for its own checkpoints. For those of the original repository, and for the vision
transformers of its ImageNet initialisation, it is the forward pass below, in PyTorch and with PyTorch's names.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from ast_jax.checkpoints.folder import Checkpoint, read_folder
from ast_jax.checkpoints.pytorch.from_torch import strip_data_parallel
from ast_jax.checkpoints.pytorch.names import ORIGINAL, Format, detect
from ast_jax.checkpoints.pytorch.state_dicts import Source, read_source
from ast_jax.checkpoints.pytorch.to_torch import state_dict, with_qkv_bias
from ast_jax.checkpoints.tree import CheckpointError, differing, widen
from ast_jax.config import CONFIG_FILE, PREPROCESSOR_FILE
from ast_jax.labels import label_set_of_size
from ast_jax.model.functional import apply, encode

# Relative to the largest value of a stage. Float32 rounding over twelve layers was measured as 2e-6; the tanh form of
# GELU instead of the erf form, the subtlest of the common mistakes, changes the output of two layers by 1e-4.
TOLERANCE = 3e-5
SEED = 0
VERIFICATION_FILE = "verification.json"
Stages = Callable[[np.ndarray], Iterator[tuple[str, Any]]]  # of a spectrogram: name and activations of each stage


@dataclasses.dataclass(frozen=True)
class Stage:
    """The activations of two models for the same input at one stage.

    Attributes:
        name: "embeddings", "layer 1" and so on, "norm", "pooled", "logits".
        largest_difference: maximum absolute difference.
        mean_difference: mean absolute difference.
        largest_value: maximum absolute value of the reference.
    """

    name: str
    largest_difference: float
    mean_difference: float
    largest_value: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance for rounding."""
        return self.largest_difference <= TOLERANCE * self.largest_value


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        tensors: how many were converted back and compared bit by bit.
        different: names of the tensors that differ from the source.
        summed: names of the tensors that cannot be converted back (an ImageNet kernel summed over colour channels).
        reference: the model that ours was compared with, or why there was none.
        stages: from the embeddings to the logits; empty without a reference.
        of: what was compared.
        given: settings that the source does not contain, which therefore are not verified.
    """

    tensors: int
    different: tuple[str, ...]
    summed: tuple[str, ...]
    reference: str
    stages: tuple[Stage, ...]
    of: str
    given: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether no tensor differs and every stage agrees."""
        return not self.different and all(stage.passed for stage in self.stages)

    def to_json_dict(self) -> dict[str, Any]:
        """Return the content of verification.json."""
        return {**dataclasses.asdict(self), "tolerance": TOLERANCE, "passed": self.passed}

    def __str__(self) -> str:
        """Return a table."""
        lines = [f"compared: {self.of}"]
        lines += [f"{self.tensors} tensors converted back: {len(self.different) or 'none'} different"]
        lines += [f"  {name} is different" for name in self.different]
        lines += [f"  {name} cannot be converted back: summed over colour channels" for name in self.summed]
        lines += [f"reference: {self.reference}"]
        if self.stages:
            lines += [f"{'stage':<12}{'largest difference':>20}{'mean difference':>18}{'largest value':>16}"]
        lines += [
            f"{stage.name:<12}{stage.largest_difference:>20.2e}{stage.mean_difference:>18.2e}"
            f"{stage.largest_value:>16.4g}{'' if stage.passed else '  DIFFERS'}"
            for stage in self.stages
        ]
        if self.given:
            lines += [f"not verified, as the source does not contain them: {', '.join(self.given)}"]
        return "\n".join(lines)


def verify(source: Source, checkpoint: Checkpoint) -> Verification:
    """Compare PyTorch weights with the checkpoint that they were converted to or from.

    Both models run in float32 on the CPU on one spectrogram of Gaussian noise.

    Args:
        source: the weights.
        checkpoint: with the source's input and labels, as `convert` returns it.
    """
    state = strip_data_parallel(source.state)
    form = detect(state)
    assert form is not None  # `convert` has checked it
    has_head = "classifier" in checkpoint.params
    names = form.exported_names(checkpoint.config, has_head)
    back = state_dict(checkpoint, form.exported())
    summed = tuple(name for name, other in names.items() if state[name].shape != back[other].shape)
    invertible = {name: other for name, other in names.items() if name not in summed}
    different = tuple(
        differing({name: state[name] for name in invertible}, {name: back[other] for name, other in invertible.items()})
    )
    given: tuple[str, ...] = ()
    if not (form.is_transformers and source.read_json(CONFIG_FILE)):
        given += ("strides", "input size", "heads")
    known = label_set_of_size(checkpoint.config.num_labels)
    if has_head and known and checkpoint.config.id2label == known.labels and not _names_in(source):
        given += ("names of the labels",)
    if not (form.is_transformers and source.read_json(PREPROCESSOR_FILE)):
        given += ("mean and standard deviation of the features",)
    try:
        run, reference = _reference(source, state, form, checkpoint)
        spec = np.random.default_rng(SEED).standard_normal(
            (1, checkpoint.config.max_length, checkpoint.config.num_mel_bins), np.float32
        )
        ours = _our_stages(checkpoint, spec)
        theirs = dict(run(spec))
        stages = tuple(_stage(name, ours[name], theirs[name]) for name in theirs)
    except ImportError as error:
        stages, reference = (), f"none: {error.name or error} is not installed or cannot be imported here"
    return Verification(len(names) - len(summed), different, summed, reference, stages, source.label, given)


def _names_in(source: Source) -> bool:
    """Whether a source has class names other than LABEL_0, LABEL_1, ..."""
    names = (source.read_json(CONFIG_FILE) or {}).get("id2label") or {}
    return any(str(name) != f"LABEL_{index}" for index, name in names.items())


def verify_exported(destination: str | os.PathLike[str], checkpoint: Checkpoint) -> Verification:
    """Compare what `to_torch` wrote with the checkpoint that it was exported from.

    The model runs with the eps of the target format; `to_torch` reports where that differs from the checkpoint's.
    """
    source, config = read_source(destination), checkpoint.config
    if pathlib.Path(destination).is_dir():
        config = config.replace(head_layer_norm_eps=None)
    else:
        checkpoint = with_qkv_bias(checkpoint)
        config = checkpoint.config.replace(layer_norm_eps=ORIGINAL.eps[0], head_layer_norm_eps=ORIGINAL.eps[1])
    return verify(source, checkpoint.replace(config=config))


def verify_saved(destination: str | os.PathLike[str], checkpoint: Checkpoint) -> int:
    """Compare a checkpoint folder with the checkpoint that was saved there; return the number of arrays.

    Raises:
        CheckpointError: they differ.
    """
    got = read_folder(pathlib.Path(destination))
    expected, read = flatten_dict(checkpoint.params, sep="/"), flatten_dict(got.params, sep="/")
    different = differing(expected, read)
    different += [name for name in ("config", "frontend") if getattr(got, name) != getattr(checkpoint, name)]
    if different:
        raise CheckpointError(f"{destination}: what was read back differs from what was saved: {', '.join(different)}")
    return len(expected)


def _stage(name: str, ours: Any, theirs: Any) -> Stage:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference = np.abs(ours - theirs)
    return Stage(name, float(difference.max()), float(difference.mean()), float(np.abs(theirs).max()))


def _our_stages(checkpoint: Checkpoint, spec: np.ndarray) -> dict[str, Any]:
    """Return the activations of our model at each stage."""
    params, config = checkpoint.params, checkpoint.config
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        device = None
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        out = jax.jit(encode, static_argnames=("config", "output_hidden_states"))(
            params, spec, config=config, output_hidden_states=True
        )
        stages = _named(out.hidden_states, out.last_hidden_state, out.pooler_output)
        if "classifier" in params:
            stages["logits"] = jax.jit(apply, static_argnames="config")(params, spec, config=config)
    return stages


def _named(hidden: Any, normed: Any, pooled: Any) -> dict[str, Any]:
    """Return the stages of the encoder by name."""
    names = ["embeddings", *(f"layer {index}" for index in range(1, len(hidden)))]
    return {**dict(zip(names, hidden, strict=True)), "norm": normed, "pooled": pooled}


def _reference(source: Source, state: Any, form: Format, checkpoint: Checkpoint) -> tuple[Stages, str]:
    """Return the function that runs the reference model, and its description.

    Raises:
        ImportError: it is not installed.
    """
    import torch

    if not form.is_transformers:
        run = functools.partial(_original_stages, state, form, checkpoint)
        return run, f"the original's forward pass, torch {torch.__version__}"
    import transformers

    try:
        transformers.ASTModel  # noqa: B018 (imported lazily)
    except OSError as error:  # an optional dependency whose shared library does not fit PyTorch
        raise ImportError(f"transformers ({error})") from error
    run = functools.partial(_transformers_stages, source, state, checkpoint)
    return run, f"transformers {transformers.__version__}, torch {torch.__version__}"


def _transformers_stages(
    source: Source, state: Any, checkpoint: Checkpoint, spec: np.ndarray
) -> Iterator[tuple[str, Any]]:
    """Yield the stages of transformers' model, loaded by `from_pretrained` from the state dict."""
    import torch
    import transformers

    kind = transformers.ASTForAudioClassification if "classifier" in checkpoint.params else transformers.ASTModel
    values = dict(source.read_json(CONFIG_FILE) or checkpoint.config.to_json_dict())
    config = transformers.ASTConfig.from_dict({**values, "dtype": "float32"})
    tensors = {name: _tensor(array) for name, array in state.items()}
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = kind.from_pretrained(None, config=config, state_dict=tensors).float().eval()
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    with torch.no_grad():
        body = model.audio_spectrogram_transformer if hasattr(model, "classifier") else model
        out = body(torch.from_numpy(spec), output_hidden_states=True)
        yield from _named(out.hidden_states, out.last_hidden_state, out.pooler_output).items()
        if hasattr(model, "classifier"):
            yield "logits", model.classifier(out.pooler_output)


def _original_stages(state: Any, form: Format, checkpoint: Checkpoint, spec: np.ndarray) -> Iterator[tuple[str, Any]]:
    """Yield the stages of the original's class (paper section 2); image models get the spectrogram in each channel."""
    import torch
    from torch.nn import functional

    config, (eps, head_eps) = checkpoint.config, form.eps
    tensors = {name.removeprefix(form.prefix): _tensor(array) for name, array in state.items()}

    def pair(name: str) -> tuple[Any, Any]:
        return tensors[f"{name}.weight"], tensors.get(f"{name}.bias")

    def norm(x: Any, name: str, eps: float) -> Any:
        return functional.layer_norm(x, x.shape[-1:], *pair(name), eps)

    with torch.no_grad():
        kernel, bias = pair("patch_embed.proj")
        image = torch.from_numpy(spec).transpose(1, 2)[:, None].expand(-1, kernel.shape[1], -1, -1)
        strides = (config.frequency_stride, config.time_stride)
        patches = functional.conv2d(image, kernel, bias, strides).flatten(2).transpose(1, 2)
        x = torch.cat([tensors["cls_token"], tensors["dist_token"], patches], 1) + tensors["pos_embed"]
        hidden = [x]
        for layer in range(config.num_hidden_layers):
            block = f"blocks.{layer}"
            qkv = functional.linear(norm(x, f"{block}.norm1", eps), *pair(f"{block}.attn.qkv"))
            query, key, value = qkv.unflatten(-1, (3, config.num_attention_heads, -1)).permute(2, 0, 3, 1, 4)
            attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            x = x + functional.linear(attended, *pair(f"{block}.attn.proj"))
            wide = functional.gelu(functional.linear(norm(x, f"{block}.norm2", eps), *pair(f"{block}.mlp.fc1")))
            x = x + functional.linear(wide, *pair(f"{block}.mlp.fc2"))
            hidden.append(x)
        normed = norm(x, "norm", eps)
        pooled = normed[:, :2].mean(1)
        yield from _named(hidden, normed, pooled).items()
        if "mlp_head.0.weight" in tensors:
            yield "logits", functional.linear(norm(pooled, "mlp_head.0", head_eps), *pair("mlp_head.1"))


def _tensor(array: np.ndarray) -> Any:
    """Return a float32 copy of an array for PyTorch."""
    import torch

    return torch.from_numpy(np.array(widen(array), np.float32))
