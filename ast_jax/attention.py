"""Scaled dot-product attention: one function, four ways to compute it.

Letters: B batch, N tokens, H heads, K width of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "plain", "blocks", "heads", "cudnn")
BLOCK = 1280  # queries that attend together: with more tokens memory grows with their number, not with its square
CUDNN_WIDTH = 128  # widest head that cuDNN takes on every card


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    implementation: str = "auto",
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    return_weights: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Attend with softmax(q kᵀ / sqrt(K)) v; scores and softmax in at least float32.

    Products of float32 operands are taken in full float32: on TPU and newer GPUs the default rounds them to 8 or 11
    bits first.

    Args:
        query: [B, N, H, K].
        key: [B, N, H, K].
        value: [B, N, H, K].
        mask: [B, N] bool, the keys that may be seen; None for all.
        implementation: "plain" computes all scores at once, and keeps them for the gradient. "blocks" takes `BLOCK`
            queries after the other, and computes their scores once more for the gradient; "heads" does so head by head,
            which keeps the scores in the cache and is faster on CPU. "auto" is "heads" where the program is compiled
            for CPU, else "blocks". "cudnn" is cuDNN's fused attention, for half precision and without a mask, on
            NVIDIA GPUs only; whatever it does not take goes the way of "blocks". Attention weights and dropout always
            take "plain".
        dropout_rate: share of attention weights set to zero.
        dropout_key: random key, needed where `dropout_rate` is not 0.
        return_weights: also return the weights, after dropout.

    Returns:
        The output [B, N, H, K] and the weights [B, H, N, N] or None.

    Raises:
        ValueError: an unknown implementation.
        RuntimeError: "cudnn" where there is none.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention_implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"
        )
    if return_weights or dropout_rate:
        weights = _weights(query, key, mask)
        if dropout_rate:
            keep = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights.shape)
            weights = jnp.where(keep, weights / (1 - dropout_rate), 0.0)
        return _weighted(weights, value), weights if return_weights else None
    if implementation == "auto":
        output = jax.lax.platform_dependent(
            query, key, value,
            cpu=functools.partial(_by_heads, mask=mask), default=functools.partial(_in_blocks, mask=mask),
        )  # fmt: skip
    elif implementation == "cudnn" and _suits_cudnn(query, mask):
        output = jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    else:
        function = {"plain": _plain, "heads": _by_heads}.get(implementation, _in_blocks)
        output = function(query, key, value, mask)
    return output, None


def fastest_implementation(dtype: Any) -> str:
    """Return what suits a program that is compiled for this process's devices, and for no others.

    Args:
        dtype: of the computation.
    """
    cuda = jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version
    return "cudnn" if cuda and _is_half(dtype) else "auto"


def _is_half(dtype: Any) -> bool:
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)


def _suits_cudnn(query: jax.Array, mask: jax.Array | None) -> bool:
    """Whether cuDNN takes it; a mask would have to be written out for every pair of tokens."""
    return mask is None and _is_half(query.dtype) and query.shape[-1] % 8 == 0 and query.shape[-1] <= CUDNN_WIDTH


def _weights(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return the softmax [B, H, N, N] in at least float32."""
    return jax.nn.softmax(_scores(query, key, mask), axis=-1)


def _scores(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return the scaled products [B, H, N, N] in at least float32, -inf where nothing may be seen."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum(
        "bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key,
        preferred_element_type=dtype, precision=full_precision(query.dtype),
    )  # fmt: skip
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, -jnp.inf)  # the two prefix tokens are never masked
    return scores


def _weighted(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Return the values [B, N, H, K] weighted with [B, H, N, N]."""
    weights = weights.astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value, precision=full_precision(value.dtype))


def full_precision(dtype: Any) -> jax.lax.Precision | None:
    """Return what keeps a product of this dtype from being rounded to less; None for half precision."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else None


def _plain(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attend in all heads at once."""
    return _weighted(_weights(query, key, mask), value)


def _late(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attend in all heads at once, and divide by the softmax's sum at last: once less through all the scores."""
    scores = _scores(query, key, mask)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))  # [B, H, N, N]
    sums = weights.sum(-1).swapaxes(1, 2)[..., None]  # [B, N, H, 1]
    product = jnp.einsum(
        "bhqk,bkhd->bqhd", weights.astype(value.dtype), value,
        preferred_element_type=scores.dtype, precision=full_precision(value.dtype),
    )  # fmt: skip
    return (product / sums).astype(value.dtype)


def _in_blocks(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attend for some queries at a time, so that only their scores exist, in the gradient too."""
    batch, tokens, heads, width = query.shape
    count = -(-tokens // BLOCK)
    size = -(-tokens // count)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a loop, where there are many, is no place to undo it
    def attend(some: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return _late(some, key, value, mask)

    if count == 1:
        return attend(query, key, value)
    padded = jnp.pad(query, ((0, 0), (0, count * size - tokens), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(batch, count, size, heads, width), 1, 0)
    output = jax.lax.map(lambda some: attend(some, key, value), blocks)  # [blocks, B, size, H, K]
    return jnp.moveaxis(output, 0, 1).reshape(batch, count * size, heads, width)[:, :tokens]


def _by_heads(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attend in blocks, head by head of each example."""
    batch, tokens, heads, width = query.shape

    def one_head(head: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        *qkv, mask = head
        mask = None if mask is None else mask[None]
        return _in_blocks(*(x[None, :, None] for x in qkv), mask)[0, :, 0]  # [N, K]

    each = tuple(x.swapaxes(1, 2).reshape(-1, tokens, width) for x in (query, key, value))  # 3 × [B H, N, K]
    masks = None if mask is None else jnp.repeat(mask, heads, axis=0)  # [B H, N]
    output = jax.lax.map(one_head, (*each, masks))
    return output.reshape(batch, heads, tokens, width).swapaxes(1, 2)  # [B, N, H, K]
