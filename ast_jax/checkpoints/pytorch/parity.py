"""Proof of a conversion: every tensor turned back and compared and, where PyTorch is there, both models side by side.

The reference is transformers for its own checkpoints. For those of the original repository, and for the vision
transformers that it starts from, it is the forward pass below, in PyTorch and by PyTorch's names.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from ast_jax.checkpoints.folder import Checkpoint, read_folder
from ast_jax.checkpoints.pytorch.from_torch import unwrapped
from ast_jax.checkpoints.pytorch.names import ORIGINAL, Format, detect
from ast_jax.checkpoints.pytorch.state_dicts import Source, read_source
from ast_jax.checkpoints.pytorch.to_torch import state_dict, with_qkv_bias
from ast_jax.checkpoints.tree import CheckpointError, widen
from ast_jax.config import CONFIG_FILE, PREPROCESSOR_FILE
from ast_jax.labels import label_set_of_size
from ast_jax.model.functional import apply, encode

# Of the largest value of a stage. Rounding in float32 came to 2e-6 of it over twelve layers; tanh instead of erf in
# GELU, the smallest of the mistakes that people make, moves two layers by 1e-4.
TOLERANCE = 3e-5
SEED = 0
VERIFICATION_FILE = "verification.json"


@dataclasses.dataclass(frozen=True)
class Stage:
    """What two models make of the same input at one place: differences are absolute.

    Attributes:
        name: "embeddings", "layer 1" and so on, "norm", "pooled", "logits".
        largest_difference: over all its numbers.
        mean_difference: likewise.
        largest_value: of the reference, to compare with.
    """

    name: str
    largest_difference: float
    mean_difference: float
    largest_value: float

    @property
    def passed(self) -> bool:
        """Whether the difference is rounding."""
        return self.largest_difference <= TOLERANCE * self.largest_value


@dataclasses.dataclass(frozen=True)
class Verification:
    """The outcome of `verify`.

    Attributes:
        tensors: how many were turned back and compared, bit for bit.
        different: the names of those that did not come back as they were.
        summed: the names of those that have no way back (an ImageNet kernel, summed over its colours).
        reference: what ran beside our model, or why nothing did.
        stages: from the embeddings to the logits; empty where nothing ran beside our model.
        of: what was compared.
        given: what the source does not say, so that nothing here proves it.
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
        """Whether every tensor came back and every stage agrees."""
        return not self.different and all(stage.passed for stage in self.stages)

    def to_json_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {**dataclasses.asdict(self), "tolerance": TOLERANCE, "passed": self.passed}

    def __str__(self) -> str:
        """Return a table."""
        lines = [f"compared: {self.of}"]
        lines += [f"{self.tensors} tensors turned back: {len(self.different) or 'none'} different"]
        lines += [f"  {name} is different" for name in self.different]
        lines += [f"  {name} has no way back: summed over its colours" for name in self.summed]
        lines += [f"reference: {self.reference}"]
        if self.stages:
            lines += [f"{'stage':<12}{'largest difference':>20}{'mean difference':>18}{'largest value':>16}"]
        lines += [
            f"{stage.name:<12}{stage.largest_difference:>20.2e}{stage.mean_difference:>18.2e}"
            f"{stage.largest_value:>16.4g}{'' if stage.passed else '  DIFFERS'}"
            for stage in self.stages
        ]
        if self.given:
            lines += [f"taken as given, not proved: {', '.join(self.given)}"]
        return "\n".join(lines)


def verify(source: Source, checkpoint: Checkpoint) -> Verification:
    """Compare PyTorch weights with the checkpoint that was made of them, or that they were made of.

    Both models run in float32 on the CPU on one spectrogram of normal noise.

    Args:
        source: the weights.
        checkpoint: with the source's input and labels, as `convert` gives it.
    """
    state = unwrapped(source.state)
    form = detect(state)
    assert form is not None  # or there would be no checkpoint of it
    has_head = "classifier" in checkpoint.params
    names = form.names_back(checkpoint.config, has_head)
    back = state_dict(checkpoint, form.going_back())
    summed = tuple(name for name, other in names.items() if state[name].shape != back[other].shape)
    different = tuple(
        name for name, other in names.items() if name not in summed and not _same(state[name], back[other])
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
        run, reference = _reference(form)
        spec = np.random.default_rng(SEED).standard_normal(
            (1, checkpoint.config.max_length, checkpoint.config.num_mel_bins), np.float32
        )
        ours = _our_stages(checkpoint, spec)
        theirs = dict(run(source, state, form, checkpoint, spec))
        stages = tuple(_stage(name, ours[name], theirs[name]) for name in theirs)
    except ImportError as error:
        stages, reference = (), f"none: {error.name or error} is not installed or cannot be imported here"
    return Verification(len(names) - len(summed), different, summed, reference, stages, source.label, given)


def _names_in(source: Source) -> bool:
    """Whether a source names its labels, other than by numbers."""
    names = (source.read_json(CONFIG_FILE) or {}).get("id2label") or {}
    return any(str(name) != f"LABEL_{index}" for index, name in names.items())


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays have the same dtype and bits."""
    return first.dtype == second.dtype and np.array_equal(
        np.ascontiguousarray(first).view(np.uint8), np.ascontiguousarray(second).view(np.uint8)
    )


def verify_written(destination: str | os.PathLike[str], checkpoint: Checkpoint) -> Verification:
    """Compare what `to_torch` wrote with the checkpoint that it was made of.

    The eps are the target's: where they are others than the checkpoint's, `to_torch` has said so.
    """
    source, config = read_source(destination), checkpoint.config
    if pathlib.Path(destination).is_dir():
        config = config.replace(head_layer_norm_eps=None)
    else:
        checkpoint = with_qkv_bias(checkpoint)
        config = checkpoint.config.replace(layer_norm_eps=ORIGINAL.eps[0], head_layer_norm_eps=ORIGINAL.eps[1])
    return verify(source, checkpoint.replace(config=config))


def read_back(destination: str | os.PathLike[str], checkpoint: Checkpoint) -> int:
    """Compare a checkpoint folder with what should be in it; return the number of arrays.

    Raises:
        CheckpointError: something is other than it should be.
    """
    got = read_folder(pathlib.Path(destination))
    wanted, flat = flatten_dict(checkpoint.params, sep="/"), flatten_dict(got.params, sep="/")
    wrong = sorted(name for name in wanted if not np.array_equal(wanted[name], flat[name], equal_nan=True))
    wrong += [name for name in ("config", "frontend") if getattr(got, name) != getattr(checkpoint, name)]
    if wrong:
        raise CheckpointError(f"{destination}: expected what was written, read others back: {', '.join(wrong)}")
    return len(wanted)


def _stage(name: str, ours: Any, theirs: Any) -> Stage:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference = np.abs(ours - theirs)
    return Stage(name, float(difference.max()), float(difference.mean()), float(np.abs(theirs).max()))


def _our_stages(checkpoint: Checkpoint, spec: np.ndarray) -> dict[str, Any]:
    """Return what each stage of our model makes of a spectrogram."""
    params, config = checkpoint.params, checkpoint.config
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS without the CPU
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
    """Give the stages of the body their names."""
    names = ["embeddings", *(f"layer {index}" for index in range(1, len(hidden)))]
    return {**dict(zip(names, hidden, strict=True)), "norm": normed, "pooled": pooled}


def _reference(form: Format) -> tuple[Any, str]:
    """Return the function that runs the reference, and what it is.

    Raises:
        ImportError: it is not installed.
    """
    import torch

    if not form.is_transformers:
        return _original_stages, f"the original's forward pass, torch {torch.__version__}"
    import transformers

    try:
        transformers.ASTModel  # noqa: B018 (which is imported when it is asked for)
    except OSError as error:  # of a library beside it that does not fit PyTorch
        raise ImportError(f"transformers ({error})") from error
    return _transformers_stages, f"transformers {transformers.__version__}, torch {torch.__version__}"


def _transformers_stages(
    source: Source, state: Any, form: Format, checkpoint: Checkpoint, spec: np.ndarray
) -> Iterator[tuple[str, Any]]:
    """Yield the stages of transformers' model, which finds its tensors by its own means."""
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


def _original_stages(
    source: Source, state: Any, form: Format, checkpoint: Checkpoint, spec: np.ndarray
) -> Iterator[tuple[str, Any]]:
    """Yield the stages of the original's class (paper section 2); a picture gets the spectrogram in all its colours."""
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
