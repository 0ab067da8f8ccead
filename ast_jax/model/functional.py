"""The model as pure functions of a parameter tree: `init`, `apply`, `encode`; shapes and configuration of a tree.

Letters: B batch, T frames, F mel bins, N tokens, K kept patches, D width, L layers, H heads, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from ast_jax.config import ASTConfig
from ast_jax.model.attention import IMPLEMENTATIONS
from ast_jax.model.modules import ASTForAudioClassification, ASTModel, ASTOutput
from ast_jax.model.tree import differences, shapes_of

Params = Mapping[str, Any]


def init(key: jax.Array, config: ASTConfig) -> dict[str, Any]:
    """Draw parameters for training from scratch: a nested dict of float32 arrays (float64 under x64).

    Kernels are drawn with standard deviation 1/sqrt(fan-in) and position embeddings start as sines and cosines: both
    make a model without pretraining learn faster. Prefix tokens and classifier use `config.initializer_range`.

    Raises:
        ValueError: `key` is a number.
    """
    if isinstance(key, int | np.integer):
        raise ValueError(f"key: expected a random key, got the number {key}; pass jax.random.key({key})")
    return _init(key, config)


@functools.partial(jax.jit, static_argnames="config")  # one compilation instead of a hundred small ones
def _init(key: jax.Array, config: ASTConfig) -> dict[str, Any]:
    """Draw the parameters."""
    model = ASTForAudioClassification(config, dtype=jnp.zeros(0).dtype)
    spec = jnp.zeros((1, config.max_length, config.num_mel_bins))
    return model.init(key, spec)["params"]


def apply(
    params: Params,
    spec: ArrayLike,
    config: ASTConfig | None = None,
    *,
    lengths: ArrayLike | Sequence[int] | None = None,
    patch_indices: ArrayLike | None = None,
    train: bool = False,
    rngs: Mapping[str, jax.Array] | None = None,
    dtype: DTypeLike | None = None,
    attention_implementation: str = "auto",
    rematerialize: bool = False,
) -> jax.Array:
    """Compute logits; a pure function for `jit`, `grad`, `vmap`, `pmap` and `jax.export`.

    Args:
        params: the parameter tree.
        spec: [B, T, F], or one [T, F], normalised log-mel features from `ASTFeatureExtractor`.
        config: the architecture. None infers it from the shapes of `params`, with the published models' strides of 10,
            eps 1e-12 and erf GELU. Pass it for loaded checkpoints.
        lengths: [B] valid frames (a scalar for one [T, F]). Tokens beyond them are masked as keys in every layer.
        patch_indices: [B, K] indices of the patches to keep ([K] for one [T, F]), time varying fastest; None for all.
            The others are dropped after the position embeddings are added (patchout: PaSST, Koutini et al. 2022).
        train: apply dropout; requires `rngs={"dropout": key}` if the configuration has dropout.
        rngs: random keys by name.
        dtype: dtype of the computation, for instance `jnp.bfloat16`; None for the parameters' own, at least float32.
            In float32, attention and head multiply at full precision; dense layers use the backend's default, which is
            bfloat16 on TPU and TensorFloat-32 on newer GPUs unless called under
            `jax.default_matmul_precision("highest")`.
        attention_implementation: "auto", "dense", "chunked", "per_head" or "cudnn", see `dot_product_attention` in
            `ast_jax.model.attention`; its `fastest_implementation` returns the fastest for this process's devices.
        rematerialize: gradient checkpointing: store only each block's input and recompute the block in the backward
            pass.

    Returns:
        Logits [B, C], or [C] for one spectrogram, in at least float32.

    Raises:
        ValueError: spec, lengths, patch_indices or params do not match `config`; the message has both shapes.
    """
    config = config or config_from_params(params, spec)
    if "classifier" not in params:
        raise ValueError("params: expected a classifier, got a headless model; use `encode`")
    batch, lengths, patch_indices, single = _batched(spec, lengths, patch_indices, config)
    model = _module(
        ASTForAudioClassification, params, config, dtype, attention_implementation, train, rngs, rematerialize
    )
    logits: jax.Array = model.apply(  # type: ignore[assignment]  # Flax gives a pair only with `mutable`
        {"params": params},
        batch,
        lengths,
        patch_indices=patch_indices,
        train=train,
        rngs=None if rngs is None else dict(rngs),
    )
    return logits[0] if single else logits


def encode(
    params: Params,
    spec: ArrayLike,
    config: ASTConfig | None = None,
    *,
    lengths: ArrayLike | Sequence[int] | None = None,
    patch_indices: ArrayLike | None = None,
    train: bool = False,
    rngs: Mapping[str, jax.Array] | None = None,
    dtype: DTypeLike | None = None,
    attention_implementation: str = "auto",
    rematerialize: bool = False,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
) -> ASTOutput:
    """Compute token features, with or without a head in `params`.

    For one spectrogram [T, F] the fields have no batch axis.

    Args:
        params: as in `apply`.
        spec: as in `apply`.
        config: as in `apply`.
        lengths: as in `apply`.
        patch_indices: as in `apply`; N below then is 2 + K.
        train: as in `apply`.
        rngs: as in `apply`.
        dtype: as in `apply`.
        attention_implementation: as in `apply`.
        rematerialize: as in `apply`.
        output_hidden_states: also return [L + 1, B, N, D]: the embeddings, then each block's output.
        output_attentions: also return [L, B, H, N, N]; attention is then "dense".

    Raises:
        ValueError: spec, lengths, patch_indices or params do not match `config`.
    """
    config = config or config_from_params(params, spec)
    batch, lengths, patch_indices, single = _batched(spec, lengths, patch_indices, config)
    model = _module(ASTModel, params, config, dtype, attention_implementation, train, rngs, rematerialize)
    body = {name: value for name, value in params.items() if name != "classifier"}
    output: ASTOutput = model.apply(  # type: ignore[assignment]  # as in `apply`
        {"params": body}, batch, lengths, patch_indices=patch_indices, train=train,
        rngs=None if rngs is None else dict(rngs), output_hidden_states=output_hidden_states,
        output_attentions=output_attentions,
    )  # fmt: skip
    if not single:
        return output
    per_layer = jax.tree.map(lambda x: x[:, 0], (output.hidden_states, output.attentions))
    return ASTOutput(output.last_hidden_state[0], output.pooler_output[0], *per_layer)


def param_shapes(config: ASTConfig) -> dict[str, Any]:
    """Return the parameter tree of `init` as `jax.ShapeDtypeStruct`s, without tracing."""
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


def config_from_params(params: Params, spec: ArrayLike) -> ASTConfig:
    """Infer the architecture from the shapes of `params` and `spec`, with the published models' strides, eps and GELU.

    Raises:
        ValueError: the position embeddings do not match the input at strides of 10, or `params` is another tree.
    """
    if jnp.ndim(spec) not in (2, 3):
        raise ValueError(f"spec: expected [B, T, F] or [T, F], got shape {jnp.shape(spec)}")
    shapes = shapes_of(params)
    needed = ("embeddings/projection/kernel", "embeddings/position_embeddings", "layers/attention/qkv/kernel",
              "layers/mlp/fc1/kernel")  # fmt: skip
    if missing := [path for path in needed if path not in shapes]:
        raise ValueError(f"params: expected the tree of `init`, got one without {', '.join(missing)}")
    patch_frequency, patch_time, _, width = shapes["embeddings/projection/kernel"]
    num_layers, _, _, heads, _ = shapes["layers/attention/qkv/kernel"]
    frames, bins = jnp.shape(spec)[-2:]
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


def _batched(
    spec: ArrayLike, lengths: Any, patch_indices: Any, config: ASTConfig
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, bool]:
    """Check the inputs; return them with a batch axis, and whether it was added."""
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
    if batch.shape[0] == 0:
        raise ValueError("spec: expected one spectrogram or more, got an empty batch")
    if lengths is not None:
        lengths = jnp.atleast_1d(jnp.asarray(lengths))
        if lengths.shape != batch.shape[:1]:
            raise ValueError(f"lengths: expected {batch.shape[:1]}, one for each spectrogram, got {lengths.shape}")
        _check_whole("lengths", lengths, config.max_length, f"0 to {config.max_length} frames")
    if patch_indices is not None:
        patch_indices = jnp.asarray(patch_indices)
        patch_indices = patch_indices[None] if single else patch_indices
        if patch_indices.ndim != 2 or len(patch_indices) != len(batch):
            raise ValueError(
                f"patch_indices: expected [{len(batch)}, K], a row for each spectrogram, got {patch_indices.shape}"
            )
        last = config.num_tokens - 3
        _check_whole("patch_indices", patch_indices, last, f"patches 0 to {last}")
    return batch, lengths, patch_indices, single


def _check_whole(name: str, numbers: jax.Array, most: int, expected: str) -> None:
    """Require integers from 0 to `most`; under `jit`, which hides values, only the type is checked."""
    if not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise ValueError(f"{name}: expected whole numbers, got {numbers.dtype}")
    if not isinstance(numbers, jax.core.Tracer) and not ((numbers >= 0) & (numbers <= most)).all():
        raise ValueError(f"{name}: expected {expected}, got {numbers.min()} to {numbers.max()}")


def _check_shapes(params: Params, config: ASTConfig, with_head: bool) -> None:
    """Compare the shapes of params and config: Flax ignores parameters that it does not know."""
    expected, got = shapes_of(param_shapes(config)), shapes_of(params)
    (stored,) = got.get("embeddings/position_embeddings", ())[:1] or (config.num_tokens,)
    if stored != config.num_tokens:  # by far the most common mismatch
        raise ValueError(f"params hold {stored} position embeddings, but config makes {config.num_tokens} tokens")
    if not with_head:
        expected, got = (
            {path: shape for path, shape in shapes.items() if not path.startswith("classifier/")}
            for shapes in (expected, got)
        )
    if different := differences(expected, got):
        raise ValueError(f"params do not fit config; {different}")


def _module(
    cls: type[ASTModel],
    params: Params,
    config: ASTConfig,
    dtype: DTypeLike | None,
    implementation: str,
    train: bool,
    rngs: Any,
    rematerialize: bool,
) -> ASTModel:
    """Build the module, after checks with clearer messages than the module's own errors."""
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
    return cls(config, dtype, implementation, rematerialize)
