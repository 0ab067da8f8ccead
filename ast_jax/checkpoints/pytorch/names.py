"""The names that PyTorch checkpoints of AST have, and how each tensor lies there and here: one literal table a format.

Each row says where one PyTorch tensor goes: its name with {n} for the layer, the path in the parameter tree, and how it
is turned round, both ways. Letters: D width, H heads, K = D / H, M MLP width, C classes, Pf and Pt the patch.
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
class Turn:
    """How a tensor lies here and in PyTorch; both functions return views where they can."""

    here: Callable[[Array, ASTConfig], Array]
    there: Callable[[Array, ASTConfig], Array]


def _heads(array: Array, config: ASTConfig) -> Array:
    """[..., D] -> [..., H, K]."""
    return array.reshape(*array.shape[:-1], config.num_attention_heads, -1)


SAME = Turn(lambda x, _: x, lambda x, _: x)
TOKEN = Turn(lambda x, _: x[0, 0], lambda x, _: x[None, None])  # [1, 1, D] and [D]
POSITIONS = Turn(lambda x, _: x[0], lambda x, _: x[None])  # [1, N, D] and [N, D]
DENSE = Turn(lambda x, _: x.T, lambda x, _: x.T)  # [out, in] and [in, out]
PATCH = Turn(lambda x, _: x.transpose(2, 3, 1, 0), lambda x, _: x.transpose(3, 2, 0, 1))  # [D,1,Pf,Pt], [Pf,Pt,1,D]
# The sum over red, green and blue is what the original makes of an ImageNet model's kernel; there is no way back.
RGB_PATCH = Turn(lambda x, c: PATCH.here(x.sum(1, keepdims=True, dtype=x.dtype), c), lambda x, c: PATCH.there(x, c))
HEAD_KERNEL = Turn(lambda x, c: _heads(x.T, c), lambda x, c: x.reshape(x.shape[0], -1).T)  # [D, D] and [D, H, K]
HEAD_BIAS = Turn(_heads, lambda x, c: x.reshape(-1))  # [D] and [H, K]
OUT_KERNEL = Turn(  # [D, D] and [H, K, D]
    lambda x, c: x.T.reshape(c.num_attention_heads, -1, x.shape[0]), lambda x, c: x.reshape(-1, x.shape[-1]).T
)
QKV_KERNEL = Turn(  # [3 D, D], rows q | k | v, and [D, 3, H, K]
    lambda x, c: _heads(x.T.reshape(x.shape[1], 3, -1), c), lambda x, c: x.reshape(x.shape[0], -1).T
)
QKV_BIAS = Turn(lambda x, c: _heads(x.reshape(3, -1), c), lambda x, c: x.reshape(-1))  # [3 D] and [3, H, K]


@dataclasses.dataclass(frozen=True)
class Row:
    """Where one tensor goes.

    Attributes:
        source: name in the PyTorch state dict; {n} stands for the layer.
        target: path in the parameter tree.
        turn: how it lies there and here.
        part: of query, key, value (0, 1, 2), which share one array; None for all else.
    """

    source: str
    target: str
    turn: Turn
    part: int | None = None


# In every Hugging Face file on disk, whichever version of transformers wrote it.
HUGGING_FACE_ROWS = (
    Row("embeddings.cls_token", "embeddings/cls_token", TOKEN),
    Row("embeddings.distillation_token", "embeddings/distillation_token", TOKEN),
    Row("embeddings.position_embeddings", "embeddings/position_embeddings", POSITIONS),
    Row("embeddings.patch_embeddings.projection.weight", "embeddings/projection/kernel", PATCH),
    Row("embeddings.patch_embeddings.projection.bias", "embeddings/projection/bias", SAME),
    Row("encoder.layer.{n}.layernorm_before.weight", "layers/layernorm_before/scale", SAME),
    Row("encoder.layer.{n}.layernorm_before.bias", "layers/layernorm_before/bias", SAME),
    Row("encoder.layer.{n}.attention.attention.query.weight", "layers/attention/qkv/kernel", HEAD_KERNEL, 0),
    Row("encoder.layer.{n}.attention.attention.query.bias", "layers/attention/qkv/bias", HEAD_BIAS, 0),
    Row("encoder.layer.{n}.attention.attention.key.weight", "layers/attention/qkv/kernel", HEAD_KERNEL, 1),
    Row("encoder.layer.{n}.attention.attention.key.bias", "layers/attention/qkv/bias", HEAD_BIAS, 1),
    Row("encoder.layer.{n}.attention.attention.value.weight", "layers/attention/qkv/kernel", HEAD_KERNEL, 2),
    Row("encoder.layer.{n}.attention.attention.value.bias", "layers/attention/qkv/bias", HEAD_BIAS, 2),
    Row("encoder.layer.{n}.attention.output.dense.weight", "layers/attention/out/kernel", OUT_KERNEL),
    Row("encoder.layer.{n}.attention.output.dense.bias", "layers/attention/out/bias", SAME),
    Row("encoder.layer.{n}.layernorm_after.weight", "layers/layernorm_after/scale", SAME),
    Row("encoder.layer.{n}.layernorm_after.bias", "layers/layernorm_after/bias", SAME),
    Row("encoder.layer.{n}.intermediate.dense.weight", "layers/mlp/fc1/kernel", DENSE),
    Row("encoder.layer.{n}.intermediate.dense.bias", "layers/mlp/fc1/bias", SAME),
    Row("encoder.layer.{n}.output.dense.weight", "layers/mlp/fc2/kernel", DENSE),
    Row("encoder.layer.{n}.output.dense.bias", "layers/mlp/fc2/bias", SAME),
    Row("layernorm.weight", "layernorm/scale", SAME),
    Row("layernorm.bias", "layernorm/bias", SAME),
)
# In the `state_dict()` of a model that transformers 5 holds in memory.
LIVE_ROWS = (
    Row("embeddings.cls_token", "embeddings/cls_token", TOKEN),
    Row("embeddings.distillation_token", "embeddings/distillation_token", TOKEN),
    Row("embeddings.position_embeddings", "embeddings/position_embeddings", POSITIONS),
    Row("embeddings.patch_embeddings.projection.weight", "embeddings/projection/kernel", PATCH),
    Row("embeddings.patch_embeddings.projection.bias", "embeddings/projection/bias", SAME),
    Row("layers.{n}.layernorm_before.weight", "layers/layernorm_before/scale", SAME),
    Row("layers.{n}.layernorm_before.bias", "layers/layernorm_before/bias", SAME),
    Row("layers.{n}.attention.q_proj.weight", "layers/attention/qkv/kernel", HEAD_KERNEL, 0),
    Row("layers.{n}.attention.q_proj.bias", "layers/attention/qkv/bias", HEAD_BIAS, 0),
    Row("layers.{n}.attention.k_proj.weight", "layers/attention/qkv/kernel", HEAD_KERNEL, 1),
    Row("layers.{n}.attention.k_proj.bias", "layers/attention/qkv/bias", HEAD_BIAS, 1),
    Row("layers.{n}.attention.v_proj.weight", "layers/attention/qkv/kernel", HEAD_KERNEL, 2),
    Row("layers.{n}.attention.v_proj.bias", "layers/attention/qkv/bias", HEAD_BIAS, 2),
    Row("layers.{n}.attention.o_proj.weight", "layers/attention/out/kernel", OUT_KERNEL),
    Row("layers.{n}.attention.o_proj.bias", "layers/attention/out/bias", SAME),
    Row("layers.{n}.layernorm_after.weight", "layers/layernorm_after/scale", SAME),
    Row("layers.{n}.layernorm_after.bias", "layers/layernorm_after/bias", SAME),
    Row("layers.{n}.mlp.fc1.weight", "layers/mlp/fc1/kernel", DENSE),
    Row("layers.{n}.mlp.fc1.bias", "layers/mlp/fc1/bias", SAME),
    Row("layers.{n}.mlp.fc2.weight", "layers/mlp/fc2/kernel", DENSE),
    Row("layers.{n}.mlp.fc2.bias", "layers/mlp/fc2/bias", SAME),
    Row("layernorm.weight", "layernorm/scale", SAME),
    Row("layernorm.bias", "layernorm/bias", SAME),
)
HUGGING_FACE_HEAD = (
    Row("classifier.layernorm.weight", "classifier/layernorm/scale", SAME),
    Row("classifier.layernorm.bias", "classifier/layernorm/bias", SAME),
    Row("classifier.dense.weight", "classifier/dense/kernel", DENSE),
    Row("classifier.dense.bias", "classifier/dense/bias", SAME),
)
# timm's distilled vision transformer, which is what the original repository has under `v.`.
TIMM_ROWS = (
    Row("cls_token", "embeddings/cls_token", TOKEN),
    Row("dist_token", "embeddings/distillation_token", TOKEN),
    Row("pos_embed", "embeddings/position_embeddings", POSITIONS),
    Row("patch_embed.proj.weight", "embeddings/projection/kernel", PATCH),
    Row("patch_embed.proj.bias", "embeddings/projection/bias", SAME),
    Row("blocks.{n}.norm1.weight", "layers/layernorm_before/scale", SAME),
    Row("blocks.{n}.norm1.bias", "layers/layernorm_before/bias", SAME),
    Row("blocks.{n}.attn.qkv.weight", "layers/attention/qkv/kernel", QKV_KERNEL),
    Row("blocks.{n}.attn.qkv.bias", "layers/attention/qkv/bias", QKV_BIAS),
    Row("blocks.{n}.attn.proj.weight", "layers/attention/out/kernel", OUT_KERNEL),
    Row("blocks.{n}.attn.proj.bias", "layers/attention/out/bias", SAME),
    Row("blocks.{n}.norm2.weight", "layers/layernorm_after/scale", SAME),
    Row("blocks.{n}.norm2.bias", "layers/layernorm_after/bias", SAME),
    Row("blocks.{n}.mlp.fc1.weight", "layers/mlp/fc1/kernel", DENSE),
    Row("blocks.{n}.mlp.fc1.bias", "layers/mlp/fc1/bias", SAME),
    Row("blocks.{n}.mlp.fc2.weight", "layers/mlp/fc2/kernel", DENSE),
    Row("blocks.{n}.mlp.fc2.bias", "layers/mlp/fc2/bias", SAME),
    Row("norm.weight", "layernorm/scale", SAME),
    Row("norm.bias", "layernorm/bias", SAME),
)
ORIGINAL_HEAD = (
    Row("mlp_head.0.weight", "classifier/layernorm/scale", SAME),
    Row("mlp_head.0.bias", "classifier/layernorm/bias", SAME),
    Row("mlp_head.1.weight", "classifier/dense/kernel", DENSE),
    Row("mlp_head.1.bias", "classifier/dense/bias", SAME),
)
_UNUSED_HEAD = "the classifier of 1,000 ImageNet classes, which AST does not use"
IMAGENET_HEADS = {name: _UNUSED_HEAD for name in ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")}


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to name the tensors.

    Attributes:
        kind: the naming scheme.
        rows: of the body, after `prefix`.
        head: rows of the classifier.
        prefix: before the body's names, where there is a classifier beside it.
        ignored: names, with the prefix, that may be there and are passed over, and why.
        eps: of the LayerNorms in the body and in the head, where no config.json says so.
    """

    kind: SourceFormat
    rows: tuple[Row, ...]
    head: tuple[Row, ...] = ()
    prefix: str = ""
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    eps: tuple[float, float] = (1e-12, 1e-12)

    def with_prefix(self, prefix: str) -> Format:
        """Return the format with another prefix before the body's names."""
        return dataclasses.replace(self, prefix=prefix)

    def all_rows(self, with_head: bool) -> Iterator[Row]:
        """Yield the rows with the names that a state dict has."""
        for row in self.rows:
            yield dataclasses.replace(row, source=self.prefix + row.source)
        yield from self.head if with_head else ()

    def places(self, config: ASTConfig, with_head: bool) -> dict[str, tuple[Row, tuple[Any, ...]]]:
        """Return {name: (row, the index in the target)} with the layers written out."""
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
                    index = (layer, slice(None), row.part) if row.turn is HEAD_KERNEL else (layer, row.part)
                places[row.source.format(n=layer)] = row, index
        return places

    def going_back(self) -> Format:
        """Return the format in which transformers writes what it holds in memory; any other as it is."""
        return HUGGING_FACE.with_prefix(self.prefix) if self.kind is SourceFormat.HUGGING_FACE_LIVE else self

    def names_back(self, config: ASTConfig, with_head: bool) -> dict[str, str]:
        """Return {name here: the name that the same tensor has when it goes back}."""
        return dict(zip(self.places(config, with_head), self.going_back().places(config, with_head), strict=True))

    @property
    def is_transformers(self) -> bool:
        """Whether the names are those of transformers, on disk or in memory."""
        return self.kind in (SourceFormat.HUGGING_FACE, SourceFormat.HUGGING_FACE_LIVE)

    def name_of(self, target: str) -> str:
        """Return the name, with {n} for the layer, of the first tensor that goes to a target."""
        return next(row.source for row in self.all_rows(with_head=True) if row.target == target)

    def find(self, names: Iterable[str], target: str) -> str | None:
        """Return such a name, of any layer, that is among `names`, or None."""
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
    tuple(dataclasses.replace(row, turn=RGB_PATCH) if row.turn is PATCH else row for row in TIMM_ROWS),
    ignored=IMAGENET_HEADS, eps=(1e-6, 1e-5),
)  # fmt: skip


def detect(names: Iterable[str]) -> Format | None:
    """Return the format that has names like these, or None."""
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
