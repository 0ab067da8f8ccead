"""The Audio Spectrogram Transformer in Flax Linen, bottom-up, and the functions that run it.

Letters: B batch, T frames, F mel bins, N tokens, D width, L layers, H heads, M MLP width, C classes; F' and T' are the
patch grid. The modules' parameter tree is the checkpoint format 1 (see ARCHITECTURE.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from .attention import IMPLEMENTATIONS, dot_product_attention, full_precision
from .config import ASTConfig

Params = Mapping[str, Any]

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
    """What `encode` returns; the last two are None unless asked for.

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
    """Return fixed 2-D sine/cosine embeddings [2 + F' T', D]: half the width says frequency, half says time.

    A start for `position_embeddings` from which a model without pretraining learns faster than from noise; the two
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
    """LayerNorm whose statistics are exact and at least float32, whatever the compute dtype."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


class Embeddings(nn.Module):
    """Spectrogram to tokens (paper section 2.1): patches, two prefix tokens, positions."""

    config: ASTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, spec: jax.Array, deterministic: bool) -> jax.Array:
        """Map spec [B, T, F] to tokens [B, N, D]."""
        config, width = self.config, self.config.hidden_size
        image = spec.swapaxes(1, 2)[..., None].astype(self.dtype)  # [B, F, T, 1]: patches count along frequency first
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
        tokens = jnp.concatenate([*prefix, tokens], axis=1) + positions.astype(self.dtype)  # [B, N, D]
        return nn.Dropout(config.hidden_dropout_prob, deterministic=deterministic)(tokens)


class Attention(nn.Module):
    """Multi-head self-attention with query, key and value in one product."""

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
        rate = 0.0 if deterministic else config.attention_probs_dropout_prob
        output, weights = dot_product_attention(
            qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], valid,
            implementation=self.implementation, dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate else None, return_weights=return_weights,
        )  # fmt: skip  # [B, N, H, K]
        return nn.DenseGeneral(config.hidden_size, axis=(-2, -1), dtype=self.dtype, name="out")(output), weights


class MLP(nn.Module):
    """Two dense layers with an activation between them."""

    config: ASTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, N, D] to [B, N, D]."""
        hidden = nn.Dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(x)  # [B, N, M]
        hidden = ACTIVATIONS[self.config.hidden_act](hidden)
        return nn.Dense(self.config.hidden_size, dtype=self.dtype, name="fc2")(hidden)


class Block(nn.Module):
    """A pre-norm transformer block, in the form `nn.scan` wants: carry in, (carry, what to collect) out."""

    config: ASTConfig
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, valid: jax.Array | None, deterministic: bool, states: bool, attentions: bool
    ) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
        """Map [B, N, D] to [B, N, D]; `states` and `attentions` say what is collected."""
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
        dtype: dtype of the computation; LayerNorm statistics and softmax are at least float32 all the same.
        attention_implementation: see `ast_jax.attention.dot_product_attention`.
    """

    config: ASTConfig
    dtype: Any = jnp.float32
    attention_implementation: str = "auto"

    def setup(self) -> None:
        """Name the parts; the names are the parameter tree's."""
        self.embeddings = Embeddings(self.config, self.dtype)
        self.layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},  # without the latter every layer draws the same mask
            in_axes=nn.broadcast,
            length=self.config.num_hidden_layers,
        )(self.config, self.dtype, self.attention_implementation)
        self.layernorm = _layer_norm(self.config.layer_norm_eps, self.dtype)

    def __call__(
        self,
        spec: jax.Array,
        lengths: jax.Array | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ASTOutput:
        """Map spec [B, T, F] (and valid frames [B]) to `ASTOutput`."""
        valid = None
        if lengths is not None:
            valid = valid_tokens(lengths, self.config)
            inside = jnp.arange(spec.shape[1]) < lengths[:, None]  # [B, T]
            spec = jnp.where(inside[..., None], spec, 0)  # nothing in the padding, not even NaN, reaches the gradient
        embedded = self.embeddings(spec, not train)  # [B, N, D]
        x, (states, attentions) = self.layers(embedded, valid, not train, output_hidden_states, output_attentions)
        normed = self.layernorm(x)
        return ASTOutput(
            last_hidden_state=normed,
            pooler_output=normed[:, :2].mean(1),
            hidden_states=jnp.concatenate([embedded[None], states]) if output_hidden_states else None,
            attentions=attentions,
        )


class ASTForAudioClassification(ASTModel):
    """The model with its head: LayerNorm and one dense layer on the pooled output, in at least float32."""

    def setup(self) -> None:
        """Add the head to the headless model's parts."""
        super().setup()
        self.classifier = Head(self.config, jnp.promote_types(self.dtype, jnp.float32))

    def __call__(self, spec: jax.Array, lengths: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Map spec [B, T, F] (and valid frames [B]) to logits [B, C]."""
        return self.classifier(super().__call__(spec, lengths, train=train).pooler_output)


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
    """Return which tokens [B, N] lie wholly within the valid frames [B]; the two prefix tokens always do."""
    rows, columns = config.grid
    ends = np.arange(columns) * config.time_stride + config.patch_shape[1]  # [T']
    patches = jnp.tile(ends <= jnp.asarray(lengths)[:, None], (1, rows))  # [B, F' T'], frequency-major
    return jnp.concatenate([jnp.ones((patches.shape[0], 2), bool), patches], axis=1)


def init(key: jax.Array, config: ASTConfig) -> dict[str, Any]:
    """Draw parameters for training from scratch: a nested dict of float32 arrays (float64 under x64).

    Matrices are drawn at 1/sqrt(fan-in) and position embeddings start as sines and cosines, both of which help a model
    without pretraining off the ground; the tokens and the classifier follow `config.initializer_range`.

    Raises:
        ValueError: `key` is a number.
    """
    if isinstance(key, int | np.integer):
        raise ValueError(f"key: expected a random key, got the number {key}; pass jax.random.key({key})")
    model = ASTForAudioClassification(config, dtype=jnp.zeros(0).dtype)
    spec = jnp.zeros((1, config.max_length, config.num_mel_bins))
    return model.init(key, spec)["params"]


def apply(
    params: Params,
    spec: jax.Array,
    config: ASTConfig | None = None,
    *,
    lengths: jax.Array | None = None,
    train: bool = False,
    rngs: Mapping[str, jax.Array] | None = None,
    dtype: Any = None,
    attention_implementation: str = "auto",
) -> jax.Array:
    """Compute logits; a pure function for `jit`, `grad`, `vmap`, `pmap` and `jax.export`.

    Args:
        params: the parameter tree.
        spec: [B, T, F], or one [T, F], normalised log-mel features from `ASTFeatureExtractor`.
        config: the architecture. Without it all that the shapes of `params` tell is read off them, and the rest is the
            published models': strides of 10, eps 1e-12, erf GELU. Pass it for anything that was loaded.
        lengths: [B] valid frames (a scalar for one [T, F]). Tokens that reach beyond are masked in every layer.
        train: switches dropout on; needs `rngs={"dropout": key}` where the configuration has any.
        rngs: random keys by name.
        dtype: dtype of the computation, for instance `jnp.bfloat16`; None is the parameters' own, at least float32.
            In float32 the attention and the head take their products in full; the dense layers take the backend's
            default, which on TPU rounds to bfloat16 first, and on newer GPUs to TensorFloat-32: run under
            `jax.default_matmul_precision("highest")` for a reference's digits there.
        attention_implementation: "auto", "plain" or "heads".

    Returns:
        Logits [B, C], or [C] for one spectrogram, in at least float32.

    Raises:
        ValueError: spec, lengths or params do not fit `config`; the message has both shapes.
    """
    config = config or config_from_params(params, spec)
    if "classifier" not in params:
        raise ValueError("params: expected a classifier, got a headless model; use `encode`")
    batch, lengths, single = _batched(spec, lengths, config)
    model = _module(ASTForAudioClassification, params, config, dtype, attention_implementation, train, rngs)
    logits = model.apply({"params": params}, batch, lengths, train=train, rngs=rngs)
    return logits[0] if single else logits


def encode(
    params: Params,
    spec: jax.Array,
    config: ASTConfig | None = None,
    *,
    lengths: jax.Array | None = None,
    train: bool = False,
    rngs: Mapping[str, jax.Array] | None = None,
    dtype: Any = None,
    attention_implementation: str = "auto",
    output_hidden_states: bool = False,
    output_attentions: bool = False,
) -> ASTOutput:
    """Compute token features; `params` may have a head or none.

    A single spectrogram [T, F] gives the same fields without the batch axis.

    Args:
        params: as in `apply`.
        spec: as in `apply`.
        config: as in `apply`.
        lengths: as in `apply`.
        train: as in `apply`.
        rngs: as in `apply`.
        dtype: as in `apply`.
        attention_implementation: as in `apply`.
        output_hidden_states: also return [L + 1, B, N, D]: the embeddings, then every block's output.
        output_attentions: also return [L, B, H, N, N]; this computes attention the plain way.

    Raises:
        ValueError: spec, lengths or params do not fit `config`.
    """
    config = config or config_from_params(params, spec)
    batch, lengths, single = _batched(spec, lengths, config)
    model = _module(ASTModel, params, config, dtype, attention_implementation, train, rngs)
    body = {name: value for name, value in params.items() if name != "classifier"}
    output = model.apply(
        {"params": body}, batch, lengths, train=train, rngs=rngs,
        output_hidden_states=output_hidden_states, output_attentions=output_attentions,
    )  # fmt: skip
    if not single:
        return output
    per_layer = jax.tree.map(lambda x: x[:, 0], (output.hidden_states, output.attentions))
    return ASTOutput(output.last_hidden_state[0], output.pooler_output[0], *per_layer)


def param_shapes(config: ASTConfig) -> dict[str, Any]:
    """Return the parameter tree that `init` makes as `jax.ShapeDtypeStruct`s, without tracing or computing anything."""
    width, layers, hidden = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    heads = (config.num_attention_heads, width // config.num_attention_heads)
    dtype = jax.dtypes.canonicalize_dtype(float)

    def leaves(**shapes: tuple[int, ...]) -> dict[str, Any]:
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}

    norms = leaves(scale=(layers, width), bias=(layers, width))
    qkv = leaves(kernel=(layers, width, 3, *heads), bias=(layers, 3, *heads))
    if not config.qkv_bias:
        del qkv["bias"]
    return {
        "embeddings": {
            **leaves(cls_token=(width,), distillation_token=(width,), position_embeddings=(config.num_tokens, width)),
            "projection": leaves(kernel=(*config.patch_shape, 1, width), bias=(width,)),
        },
        "layers": {
            "layernorm_before": norms,
            "layernorm_after": norms,
            "attention": {"qkv": qkv, "out": leaves(kernel=(layers, *heads, width), bias=(layers, width))},
            "mlp": {
                "fc1": leaves(kernel=(layers, width, hidden), bias=(layers, hidden)),
                "fc2": leaves(kernel=(layers, hidden, width), bias=(layers, width)),
            },
        },
        "layernorm": leaves(scale=(width,), bias=(width,)),
        "classifier": {
            "layernorm": leaves(scale=(width,), bias=(width,)),
            "dense": leaves(kernel=(width, config.num_labels), bias=(config.num_labels,)),
        },
    }


def num_params(params: Params) -> int:
    """Count the parameters of a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def config_from_params(params: Params, spec: jax.Array) -> ASTConfig:
    """Read the architecture off the shapes of `params` and `spec`; strides, eps and GELU are the published models'.

    Raises:
        ValueError: the position embeddings do not fit the input at strides of 10, or `params` is another tree.
    """
    if jnp.ndim(spec) not in (2, 3):
        raise ValueError(f"spec: expected [B, T, F] or [T, F], got shape {jnp.shape(spec)}")
    shapes = _shapes(params)
    needed = ("embeddings/projection/kernel", "embeddings/position_embeddings", "layers/attention/qkv/kernel",
              "layers/mlp/fc1/kernel")  # fmt: skip
    if missing := [path for path in needed if path not in shapes]:
        raise ValueError(f"params: expected the tree that `init` makes, got one without {', '.join(missing)}")
    patch_frequency, patch_time, _, width = shapes["embeddings/projection/kernel"]
    num_layers, _, _, heads, _ = shapes["layers/attention/qkv/kernel"]
    frames, bins = spec.shape[-2:]
    config = ASTConfig(
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        intermediate_size=shapes["layers/mlp/fc1/kernel"][-1],
        patch_size=patch_frequency if patch_frequency == patch_time else (patch_frequency, patch_time),
        qkv_bias="layers/attention/qkv/bias" in shapes,
        max_length=frames,
        num_mel_bins=bins,
        num_labels=shapes.get("classifier/dense/bias", (1,))[0],
    )
    stored = shapes["embeddings/position_embeddings"][0]
    if stored != config.num_tokens:
        raise ValueError(
            f"params hold {stored} position embeddings, but an input of {frames} frames by {bins} mel bins in patches "
            f"of {config.patch_shape} at strides of 10 makes {config.num_tokens} tokens; "
            "pass the model's own config: apply(params, spec, config)"
        )
    return config


def _batched(spec: jax.Array, lengths: Any, config: ASTConfig) -> tuple[jax.Array, jax.Array | None, bool]:
    """Check the shapes of the input; return it with a batch axis, and whether that axis was added."""
    single = jnp.ndim(spec) == 2
    expected = (config.max_length, config.num_mel_bins)
    if jnp.ndim(spec) not in (2, 3) or jnp.shape(spec)[-2:] != expected:
        raise ValueError(
            f"spec: expected [B, {expected[0]}, {expected[1]}] or [{expected[0]}, {expected[1]}] (frames, mel bins), "
            f"got {jnp.shape(spec)}"
        )
    spec = jnp.asarray(spec)
    if not jnp.issubdtype(spec.dtype, jnp.floating):
        raise ValueError(f"spec: expected floating-point features, got {spec.dtype}")
    batch = spec[None] if single else spec
    if not len(batch):
        raise ValueError("spec: expected one spectrogram or more, got an empty batch")
    if lengths is not None:
        lengths = jnp.atleast_1d(jnp.asarray(lengths))
        if lengths.shape != batch.shape[:1]:
            raise ValueError(f"lengths: expected {batch.shape[:1]}, one for each spectrogram, got {lengths.shape}")
        frames = config.max_length
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(f"lengths: expected whole numbers of frames, got {lengths.dtype}")
        if not isinstance(lengths, jax.core.Tracer) and not ((lengths >= 0) & (lengths <= frames)).all():
            raise ValueError(f"lengths: expected 0 to {frames} frames, got {lengths.min()} to {lengths.max()}")
    return batch, lengths, single


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf) for path, leaf in leaves}


def _check_shapes(params: Params, config: ASTConfig, with_head: bool) -> None:
    """Compare the shapes of params and config: Flax passes over what it does not know."""
    expected, got = _shapes(param_shapes(config)), _shapes(params)
    (stored,) = got.get("embeddings/position_embeddings", ())[:1] or (config.num_tokens,)
    if stored != config.num_tokens:  # by far the most common misfit
        raise ValueError(f"params hold {stored} position embeddings, but config makes {config.num_tokens} tokens")
    if not with_head:
        expected, got = (
            {path: shape for path, shape in shapes.items() if not path.startswith("classifier/")}
            for shapes in (expected, got)
        )
    if expected != got:
        different = sorted(path for path in expected.keys() | got.keys() if expected.get(path) != got.get(path))
        listed = [f"{path} (expected {expected.get(path)}, got {got.get(path)})" for path in different]
        raise ValueError(f"params do not fit config: {', '.join(listed)}")


def _module(
    cls: type[ASTModel], params: Params, config: ASTConfig, dtype: Any, implementation: str, train: bool, rngs: Any
) -> ASTModel:
    """Build the module for a call, with everything checked that the module itself would fail on obscurely."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention_implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"
        )
    needs_key = train and (config.hidden_dropout_prob or config.attention_probs_dropout_prob)
    if needs_key and "dropout" not in (rngs or {}):
        raise ValueError('train=True with dropout: expected rngs={"dropout": key}, got none')
    _check_shapes(params, config, with_head=cls is not ASTModel)
    if dtype is None:
        dtype = functools.reduce(jnp.promote_types, {leaf.dtype for leaf in jax.tree.leaves(params)}, jnp.float32)
    return cls(config, dtype, implementation)
