"""Tensor names and layouts of PyTorch checkpoints of AST: one literal table for each format.

Each row maps one PyTorch tensor: its name with {n} for the layer, the path in the parameter tree, and the transform of
its layout in both directions. Letters: D width, H heads, K = D / H, M MLP width, C classes, Pf and Pt the patch size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ast_jax.checkpoints.provenance import SourceFormat
from ast_jax.config import ASTConfig

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Transform:
    """Converts the layout of a tensor from PyTorch's to ours and back; returns views where possible."""

    to_jax: Callable[[Array, ASTConfig], Array]
    to_torch: Callable[[Array, ASTConfig], Array]


def _heads(array: Array, config: ASTConfig) -> Array:
    """[..., D] -> [..., H, K]."""
    return array.reshape(*array.shape[:-1], config.num_attention_heads, -1)


IDENTITY = Transform(lambda x, _: x, lambda x, _: x)
TOKEN = Transform(lambda x, _: x[0, 0], lambda x, _: x[None, None])  # [1, 1, D] and [D]
POSITIONS = Transform(lambda x, _: x[0], lambda x, _: x[None])  # [1, N, D] and [N, D]
DENSE = Transform(lambda x, _: x.T, lambda x, _: x.T)  # [out, in] and [in, out]
PATCH = Transform(  # [D, 1, Pf, Pt] and [Pf, Pt, 1, D]
    lambda x, _: x.transpose(2, 3, 1, 0), lambda x, _: x.transpose(3, 2, 0, 1)
)
# The original sums the kernel of an ImageNet model over the three colour channels, which cannot be inverted.
RGB_PATCH = Transform(
    lambda x, c: PATCH.to_jax(x.sum(1, keepdims=True, dtype=x.dtype), c), lambda x, c: PATCH.to_torch(x, c)
)
HEAD_KERNEL = Transform(lambda x, c: _heads(x.T, c), lambda x, c: x.reshape(x.shape[0], -1).T)  # [D, D] and [D, H, K]
HEAD_BIAS = Transform(_heads, lambda x, c: x.reshape(-1))  # [D] and [H, K]
OUT_KERNEL = Transform(  # [D, D] and [H, K, D]
    lambda x, c: x.T.reshape(c.num_attention_heads, -1, x.shape[0]), lambda x, c: x.reshape(-1, x.shape[-1]).T
)
QKV_KERNEL = Transform(  # [3 D, D], rows q | k | v, and [D, 3, H, K]
    lambda x, c: _heads(x.T.reshape(x.shape[1], 3, -1), c), lambda x, c: x.reshape(x.shape[0], -1).T
)
QKV_BIAS = Transform(lambda x, c: _heads(x.reshape(3, -1), c), lambda x, c: x.reshape(-1))  # [3 D] and [3, H, K]


@dataclasses.dataclass(frozen=True)
class Row:
    """The mapping of one tensor.

    Attributes:
        source: name in the PyTorch state dict; {n} stands for the layer.
        target: path in the parameter tree.
        transform: converts its layout.
        part: index of query, key or value (0, 1, 2) in the array that they share; None for all other tensors.
    """

    source: str
    target: str
    transform: Transform
    part: int | None = None


# In files on disk, whichever version of transformers wrote them.
HUGGING_FACE_ROWS = (
    Row("embeddings.cls_token", "embeddings/cls_token", TOKEN),
    Row("embeddings.distillation_token", "embeddings/distillation_token", TOKEN),
    Row("embeddings.position_embeddings", "embeddings/position_embeddings", POSITIONS),
    Row("embeddings.patch_embeddings.projection.weight", "embeddings/projection/kernel", PATCH),
    Row("embeddings.patch_embeddings.projection.bias", "embeddings/projection/bias", IDENTITY),
    Row("encoder.layer.{n}.layernorm_before.weight", "layers/layernorm_before/scale", IDENTITY),
    Row("encoder.layer.{n}.layernorm_before.bias", "layers/layernorm_before/bias", IDENTITY),
    Row("encoder.layer.{n}.attention.attention.query.weight", "layers/attention/qkv/kernel", HEAD_KERNEL, 0),
    Row("encoder.layer.{n}.attention.attention.query.bias", "layers/attention/qkv/bias", HEAD_BIAS, 0),
    Row("encoder.layer.{n}.attention.attention.key.weight", "layers/attention/qkv/kernel", HEAD_KERNEL, 1),
    Row("encoder.layer.{n}.attention.attention.key.bias", "layers/attention/qkv/bias", HEAD_BIAS, 1),
    Row("encoder.layer.{n}.attention.attention.value.weight", "layers/attention/qkv/kernel", HEAD_KERNEL, 2),
    Row("encoder.layer.{n}.attention.attention.value.bias", "layers/attention/qkv/bias", HEAD_BIAS, 2),
    Row("encoder.layer.{n}.attention.output.dense.weight", "layers/attention/out/kernel", OUT_KERNEL),
    Row("encoder.layer.{n}.attention.output.dense.bias", "layers/attention/out/bias", IDENTITY),
    Row("encoder.layer.{n}.layernorm_after.weight", "layers/layernorm_after/scale", IDENTITY),
    Row("encoder.layer.{n}.layernorm_after.bias", "layers/layernorm_after/bias", IDENTITY),
    Row("encoder.layer.{n}.intermediate.dense.weight", "layers/mlp/fc1/kernel", DENSE),
    Row("encoder.layer.{n}.intermediate.dense.bias", "layers/mlp/fc1/bias", IDENTITY),
    Row("encoder.layer.{n}.output.dense.weight", "layers/mlp/fc2/kernel", DENSE),
    Row("encoder.layer.{n}.output.dense.bias", "layers/mlp/fc2/bias", IDENTITY),
    Row("layernorm.weight", "layernorm/scale", IDENTITY),
    Row("layernorm.bias", "layernorm/bias", IDENTITY),
)
# In the `state_dict()` of a live transformers 5 model.
LIVE_ROWS = (
    Row("embeddings.cls_token", "embeddings/cls_token", TOKEN),
    Row("embeddings.distillation_token", "embeddings/distillation_token", TOKEN),
    Row("embeddings.position_embeddings", "embeddings/position_embeddings", POSITIONS),
    Row("embeddings.patch_embeddings.projection.weight", "embeddings/projection/kernel", PATCH),
    Row("embeddings.patch_embeddings.projection.bias", "embeddings/projection/bias", IDENTITY),
    Row("layers.{n}.layernorm_before.weight", "layers/layernorm_before/scale", IDENTITY),
    Row("layers.{n}.layernorm_before.bias", "layers/layernorm_before/bias", IDENTITY),
    Row("layers.{n}.attention.q_proj.weight", "layers/attention/qkv/kernel", HEAD_KERNEL, 0),
    Row("layers.{n}.attention.q_proj.bias", "layers/attention/qkv/bias", HEAD_BIAS, 0),
    Row("layers.{n}.attention.k_proj.weight", "layers/attention/qkv/kernel", HEAD_KERNEL, 1),
    Row("layers.{n}.attention.k_proj.bias", "layers/attention/qkv/bias", HEAD_BIAS, 1),
    Row("layers.{n}.attention.v_proj.weight", "layers/attention/qkv/kernel", HEAD_KERNEL, 2),
    Row("layers.{n}.attention.v_proj.bias", "layers/attention/qkv/bias", HEAD_BIAS, 2),
    Row("layers.{n}.attention.o_proj.weight", "layers/attention/out/kernel", OUT_KERNEL),
    Row("layers.{n}.attention.o_proj.bias", "layers/attention/out/bias", IDENTITY),
    Row("layers.{n}.layernorm_after.weight", "layers/layernorm_after/scale", IDENTITY),
    Row("layers.{n}.layernorm_after.bias", "layers/layernorm_after/bias", IDENTITY),
    Row("layers.{n}.mlp.fc1.weight", "layers/mlp/fc1/kernel", DENSE),
    Row("layers.{n}.mlp.fc1.bias", "layers/mlp/fc1/bias", IDENTITY),
    Row("layers.{n}.mlp.fc2.weight", "layers/mlp/fc2/kernel", DENSE),
    Row("layers.{n}.mlp.fc2.bias", "layers/mlp/fc2/bias", IDENTITY),
    Row("layernorm.weight", "layernorm/scale", IDENTITY),
    Row("layernorm.bias", "layernorm/bias", IDENTITY),
)
HUGGING_FACE_HEAD = (
    Row("classifier.layernorm.weight", "classifier/layernorm/scale", IDENTITY),
    Row("classifier.layernorm.bias", "classifier/layernorm/bias", IDENTITY),
    Row("classifier.dense.weight", "classifier/dense/kernel", DENSE),
    Row("classifier.dense.bias", "classifier/dense/bias", IDENTITY),
)
# timm's distilled vision transformer, which the original repository has under the prefix `v.`.
TIMM_ROWS = (
    Row("cls_token", "embeddings/cls_token", TOKEN),
    Row("dist_token", "embeddings/distillation_token", TOKEN),
    Row("pos_embed", "embeddings/position_embeddings", POSITIONS),
    Row("patch_embed.proj.weight", "embeddings/projection/kernel", PATCH),
    Row("patch_embed.proj.bias", "embeddings/projection/bias", IDENTITY),
    Row("blocks.{n}.norm1.weight", "layers/layernorm_before/scale", IDENTITY),
    Row("blocks.{n}.norm1.bias", "layers/layernorm_before/bias", IDENTITY),
    Row("blocks.{n}.attn.qkv.weight", "layers/attention/qkv/kernel", QKV_KERNEL),
    Row("blocks.{n}.attn.qkv.bias", "layers/attention/qkv/bias", QKV_BIAS),
    Row("blocks.{n}.attn.proj.weight", "layers/attention/out/kernel", OUT_KERNEL),
    Row("blocks.{n}.attn.proj.bias", "layers/attention/out/bias", IDENTITY),
    Row("blocks.{n}.norm2.weight", "layers/layernorm_after/scale", IDENTITY),
    Row("blocks.{n}.norm2.bias", "layers/layernorm_after/bias", IDENTITY),
    Row("blocks.{n}.mlp.fc1.weight", "layers/mlp/fc1/kernel", DENSE),
    Row("blocks.{n}.mlp.fc1.bias", "layers/mlp/fc1/bias", IDENTITY),
    Row("blocks.{n}.mlp.fc2.weight", "layers/mlp/fc2/kernel", DENSE),
    Row("blocks.{n}.mlp.fc2.bias", "layers/mlp/fc2/bias", IDENTITY),
    Row("norm.weight", "layernorm/scale", IDENTITY),
    Row("norm.bias", "layernorm/bias", IDENTITY),
)
ORIGINAL_HEAD = (
    Row("mlp_head.0.weight", "classifier/layernorm/scale", IDENTITY),
    Row("mlp_head.0.bias", "classifier/layernorm/bias", IDENTITY),
    Row("mlp_head.1.weight", "classifier/dense/kernel", DENSE),
    Row("mlp_head.1.bias", "classifier/dense/bias", IDENTITY),
)
_UNUSED_HEAD = "the classifier of 1,000 ImageNet classes, which AST does not use"
IMAGENET_HEADS = {name: _UNUSED_HEAD for name in ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")}


@dataclasses.dataclass(frozen=True)
class Format:
    """A naming scheme of PyTorch state dicts.

    Attributes:
        kind: which scheme.
        rows: the encoder, without `prefix`.
        head: the classifier.
        prefix: of the encoder's names in a model with a classifier.
        ignored: {name with prefix: reason} of tensors that may be present and are not used.
        eps: of the LayerNorms in the encoder and in the classifier, where there is no config.json.
    """

    kind: SourceFormat
    rows: tuple[Row, ...]
    head: tuple[Row, ...] = ()
    prefix: str = ""
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    eps: tuple[float, float] = (1e-12, 1e-12)

    def with_prefix(self, prefix: str) -> Format:
        """Return the format with another prefix of the encoder's names."""
        return dataclasses.replace(self, prefix=prefix)

    def all_rows(self, with_head: bool) -> Iterator[Row]:
        """Yield the rows with full names: the encoder's with the prefix."""
        for row in self.rows:
            yield dataclasses.replace(row, source=self.prefix + row.source)
        yield from self.head if with_head else ()

    def places(self, config: ASTConfig, with_head: bool) -> dict[str, tuple[Row, tuple[Any, ...]]]:
        """Return {name: (row, index into the target array)} for every tensor of every layer."""
        places: dict[str, tuple[Row, tuple[Any, ...]]] = {}
        for row in self.all_rows(with_head):
            if not config.qkv_bias and row.target == "layers/attention/qkv/bias":
                continue
            if "{n}" not in row.source:
                places[row.source] = row, ()
                continue
            for layer in range(config.num_hidden_layers):
                index: tuple[Any, ...] = (layer,)
                if row.part is not None:  # [L, D, 3, H, K] for the kernel, [L, 3, H, K] for the bias
                    index = (layer, slice(None), row.part) if row.transform is HEAD_KERNEL else (layer, row.part)
                places[row.source.format(n=layer)] = row, index
        return places

    def exported(self) -> Format:
        """Return the format in which such a checkpoint is exported: that of files for live transformers models."""
        return HUGGING_FACE.with_prefix(self.prefix) if self.kind is SourceFormat.HUGGING_FACE_LIVE else self

    def exported_names(self, config: ASTConfig, with_head: bool) -> dict[str, str]:
        """Return {name in this format: name of the same tensor in the export format}."""
        return dict(zip(self.places(config, with_head), self.exported().places(config, with_head), strict=True))

    @property
    def is_transformers(self) -> bool:
        """Whether this is a format of transformers, on disk or in memory."""
        return self.kind in (SourceFormat.HUGGING_FACE, SourceFormat.HUGGING_FACE_LIVE)

    def name_of(self, target: str) -> str:
        """Return the name, with {n} for the layer, of the first tensor that maps to a target."""
        return next(row.source for row in self.all_rows(with_head=True) if row.target == target)

    def find(self, names: Iterable[str], target: str) -> str | None:
        """Return the name among `names`, in any layer, of a tensor that maps to a target, or None."""
        pattern = re.compile(re.escape(self.name_of(target)).replace(r"\{n\}", r"\d+"))
        return min((name for name in names if pattern.fullmatch(name)), default=None)


HF_PREFIX = "audio_spectrogram_transformer."
HUGGING_FACE = Format(SourceFormat.HUGGING_FACE, HUGGING_FACE_ROWS, HUGGING_FACE_HEAD, HF_PREFIX)
LIVE = Format(SourceFormat.HUGGING_FACE_LIVE, LIVE_ROWS, HUGGING_FACE_HEAD, HF_PREFIX)
ORIGINAL = Format(
    SourceFormat.ORIGINAL, TIMM_ROWS, ORIGINAL_HEAD, "v.",
    {f"v.{name}": reason for name, reason in IMAGENET_HEADS.items()}, (1e-6, 1e-5),
)  # fmt: skip
DEIT = Format(
    SourceFormat.DEIT,
    tuple(dataclasses.replace(row, transform=RGB_PATCH) if row.transform is PATCH else row for row in TIMM_ROWS),
    ignored=IMAGENET_HEADS, eps=(1e-6, 1e-5),
)  # fmt: skip


def detect(names: Iterable[str]) -> Format | None:
    """Return the format of a state dict with these names, None for an unknown one."""
    names = list(names)

    def has(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in names)

    prefix = HF_PREFIX if has(re.escape(HF_PREFIX)) else ""
    if has(re.escape(prefix) + r"encoder\.layer\.\d"):
        return HUGGING_FACE.with_prefix(prefix)
    if has(re.escape(prefix) + r"layers\.\d+\.attention\.[qkvo]_proj\."):
        return LIVE.with_prefix(prefix)
    if has(r"v\.blocks\.\d"):
        return ORIGINAL
    return DEIT if has(r"blocks\.\d") else None
