"""The Audio Spectrogram Transformer in Flax Linen, bottom-up.

Letters: B batch, T frames, F mel bins, N tokens, K kept patches, D width, L layers, H heads, M MLP width, C classes; F'
and T' are the patch grid. The modules' parameter tree is the checkpoint format 1 (see ARCHITECTURE.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from ast_jax.config import ASTConfig
from ast_jax.model.attention import dot_product_attention, full_precision

# Activations of a block that are stored for the backward pass. Normalisation, activation function and attention scores,
# cheap but large, are recomputed: half the memory, and on CPU less time as well.
SAVED = ("qkv", "attended", "attention_logsumexp", "attention_out", "hidden")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),  # the exact erf form, as in both references
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


@struct.dataclass
class ASTOutput:
    """Output of `encode`; the last two fields are None unless requested.

    Attributes:
        last_hidden_state: [B, N, D] after the final norm.
        pooler_output: [B, D], mean of the class and the distillation token after the final norm.
        hidden_states: [L + 1, B, N, D], the embeddings first, the last one before the final norm.
        attentions: [L, B, H, N, N] weights after the softmax (and dropout, in training).
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    hidden_states: jax.Array | None = None
    attentions: jax.Array | None = None


def sincos_positions(grid: tuple[int, int], width: int) -> np.ndarray:
    """Return 2-D sine/cosine embeddings [2 + F' T', D]: half the width for frequency, half for time.

    With these as initial `position_embeddings`, a model without pretraining learns faster than from noise. The two
    prefix tokens start at zero.
    """

    def one_axis(positions: np.ndarray, size: int) -> np.ndarray:
        rates = 1.0 / 10000 ** (np.arange((size + 1) // 2) / max(size / 2, 1))
        angles = positions[:, None] * rates
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :size]

    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")  # frequency-major
    half = width // 2
    table = np.concatenate([one_axis(rows.ravel(), half), one_axis(columns.ravel(), width - half)], axis=1)
    return np.pad(table, ((2, 0), (0, 0)))


def _layer_norm(eps: float, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with two-pass statistics in at least float32, whatever the compute dtype."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


class Embeddings(nn.Module):
    """Spectrogram to tokens (paper section 2.1): patches, two prefix tokens, positions."""

    config: ASTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, spec: jax.Array, patch_indices: jax.Array | None, deterministic: bool) -> jax.Array:
        """Map spec [B, T, F] to tokens [B, N, D], or [B, 2 + K, D] with `patch_indices` [B, K]."""
        config, width = self.config, self.config.hidden_size
        image = spec.swapaxes(1, 2)[..., None].astype(self.dtype)  # [B, F, T, 1]: frequency-major patches
        patches = nn.Conv(
            width, config.patch_shape, (config.frequency_stride, config.time_stride), padding="VALID",
            dtype=self.dtype, name="projection",
        )(image)  # fmt: skip  # [B, F', T', D]
        tokens = patches.reshape(spec.shape[0], -1, width)  # [B, F' T', D]
        token_init = nn.initializers.normal(config.initializer_range)
        prefix = [
            jnp.broadcast_to(self.param(name, token_init, (width,)).astype(self.dtype), (spec.shape[0], 1, width))
            for name in ("cls_token", "distillation_token")
        ]
        positions = self.param(
            "position_embeddings",
            lambda _, shape: jnp.asarray(sincos_positions(config.grid, width), jnp.zeros(0).dtype).reshape(shape),
            (config.num_tokens, width),
        )
        tokens = jnp.concatenate([*prefix, tokens], axis=1) + positions.astype(self.dtype)[None]  # [B, N, D]
        tokens = tokens if patch_indices is None else select_patches(tokens, patch_indices)
        return nn.Dropout(config.hidden_dropout_prob, deterministic=deterministic)(tokens)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for query, key and value."""

    config: ASTConfig
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, valid: jax.Array | None, deterministic: bool, return_weights: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Map [B, N, D] to [B, N, D] and the weights [B, H, N, N] or None."""
        config, heads = self.config, self.config.num_attention_heads
        shape = (3, heads, config.hidden_size // heads)
        qkv = nn.DenseGeneral(shape, use_bias=config.qkv_bias, dtype=self.dtype, name="qkv")(x)  # [B, N, 3, H, K]
        qkv = checkpoint_name(qkv, "qkv")
        rate = 0.0 if deterministic else config.attention_probs_dropout_prob
        output, weights = dot_product_attention(
            qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], valid,
            implementation=self.implementation, dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate else None, return_weights=return_weights,
        )  # fmt: skip  # [B, N, H, K]
        output = checkpoint_name(output, "attended")
        output = nn.DenseGeneral(config.hidden_size, axis=(-2, -1), dtype=self.dtype, name="out")(output)  # [B, N, D]
        return checkpoint_name(output, "attention_out"), weights


class MLP(nn.Module):
    """Two dense layers and an activation function."""

    config: ASTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, N, D] to [B, N, D]."""
        hidden = nn.Dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(x)  # [B, N, M]
        hidden = ACTIVATIONS[self.config.hidden_act](checkpoint_name(hidden, "hidden"))
        return nn.Dense(self.config.hidden_size, dtype=self.dtype, name="fc2")(hidden)


class Block(nn.Module):
    """A pre-norm transformer block in the signature of `nn.scan`: carry to (carry, collected outputs)."""

    config: ASTConfig
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, valid: jax.Array | None, deterministic: bool, states: bool, attentions: bool
    ) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
        """Map [B, N, D] to [B, N, D]; `states` and `attentions` select what is collected."""
        config = self.config
        dropout = nn.Dropout(config.hidden_dropout_prob, deterministic=deterministic)
        normed = _layer_norm(config.layer_norm_eps, self.dtype, "layernorm_before")(x)
        attended, weights = Attention(config, self.dtype, self.implementation, name="attention")(
            normed, valid, deterministic, attentions
        )
        x = x + dropout(attended)
        normed = _layer_norm(config.layer_norm_eps, self.dtype, "layernorm_after")(x)
        x = x + dropout(MLP(config, self.dtype, name="mlp")(normed))
        return x, (x if states else None, weights)


class ASTModel(nn.Module):
    """The headless model: spectrogram to token features.

    Attributes:
        config: the architecture.
        dtype: dtype of the computation; LayerNorm statistics and softmax use at least float32.
        attention_implementation: see `ast_jax.model.attention.dot_product_attention`.
        rematerialize: store only each block's input, and recompute the block in the backward pass.
    """

    config: ASTConfig
    dtype: Any = jnp.float32
    attention_implementation: str = "auto"
    rematerialize: bool = False

    def setup(self) -> None:
        """Create the submodules; their names are those of the parameter tree."""
        self.embeddings = Embeddings(self.config, self.dtype)
        # No barrier (prevent_cse): the loop over layers already keeps XLA from merging a block with its recomputation.
        policy = None if self.rematerialize else jax.checkpoint_policies.save_only_these_names(*SAVED)
        self.layers = nn.scan(
            nn.remat(Block, prevent_cse=False, static_argnums=(3, 4, 5), policy=policy),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},  # without "dropout" all layers draw the same mask
            in_axes=nn.broadcast,
            length=self.config.num_hidden_layers,
        )(self.config, self.dtype, self.attention_implementation)
        self.layernorm = _layer_norm(self.config.layer_norm_eps, self.dtype)

    def __call__(
        self,
        spec: jax.Array,
        lengths: jax.Array | None = None,
        *,
        patch_indices: jax.Array | None = None,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ASTOutput:
        """Map spec [B, T, F] (with valid frames [B] and patch indices [B, K]) to `ASTOutput`."""
        valid = None
        if lengths is not None:
            valid = valid_tokens(lengths, self.config)
            valid = valid if patch_indices is None else select_patches(valid, patch_indices)
            inside = jnp.arange(spec.shape[1])[None] < lengths[:, None]  # [B, T]
            spec = jnp.where(inside[..., None], spec, 0)  # so that NaN in the padding does not reach the gradient
        embedded = self.embeddings(spec, patch_indices, not train)  # [B, N, D]
        x, (states, attentions) = self.layers(embedded, valid, not train, output_hidden_states, output_attentions)
        normed = self.layernorm(x)
        return ASTOutput(
            last_hidden_state=normed,
            pooler_output=normed[:, :2].mean(1),
            hidden_states=None if states is None else jnp.concatenate([embedded[None], states]),
            attentions=attentions,
        )


class ASTForAudioClassification(ASTModel):
    """The model with its head: LayerNorm and a dense layer on the pooled output, in at least float32."""

    def setup(self) -> None:
        """Add the head to the headless model's submodules."""
        super().setup()
        self.classifier = Head(self.config, jnp.promote_types(self.dtype, jnp.float32))

    def __call__(  # type: ignore[override]  # it returns logits, unlike the headless model
        self,
        spec: jax.Array,
        lengths: jax.Array | None = None,
        *,
        patch_indices: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Map spec [B, T, F] (with valid frames [B] and patch indices [B, K]) to logits [B, C]."""
        return self.classifier(super().__call__(spec, lengths, patch_indices=patch_indices, train=train).pooler_output)


class Head(nn.Module):
    """LayerNorm and classifier."""

    config: ASTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pooled: jax.Array) -> jax.Array:
        """Map [B, D] to [B, C]."""
        normed = _layer_norm(self.config.head_eps, self.dtype, "layernorm")(pooled)
        kernel_init = nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(
            self.config.num_labels, dtype=self.dtype, kernel_init=kernel_init,
            precision=full_precision(self.dtype), name="dense",
        )(normed)  # fmt: skip


def valid_tokens(lengths: jax.Array, config: ASTConfig) -> jax.Array:
    """Return the token mask [B, N]: True for prefix tokens and for patches wholly within the valid frames [B]."""
    rows, columns = config.grid
    ends = np.arange(columns) * config.time_stride + config.patch_shape[1]  # [T']
    patches = jnp.tile(ends[None] <= jnp.asarray(lengths)[:, None], (1, rows))  # [B, F' T'], frequency-major
    return jnp.concatenate([jnp.ones((patches.shape[0], 2), bool), patches], axis=1)


def select_patches(tokens: jax.Array, patch_indices: jax.Array) -> jax.Array:
    """Return the two prefix tokens and the patches [B, K] of `tokens` [B, N, ...]: [B, 2 + K, ...]."""
    index = jnp.pad(patch_indices + 2, ((0, 0), (2, 0))).at[:, 1].set(1)  # [B, 2 + K]: 0, 1, then the patches
    return jnp.take_along_axis(tokens, index.reshape(*index.shape, *[1] * (tokens.ndim - 2)), axis=1)
