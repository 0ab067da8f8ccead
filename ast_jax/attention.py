"""Scaled dot-product attention: one function, four ways to compute it.

Letters: B batch, N tokens, H heads, K width of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

IMPLEMENTATIONS = ("auto", "plain", "tiles", "heads", "cudnn")
TILE = 1280  # queries and keys that attend together: with more tokens memory grows with them, not with their square
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
        implementation: "plain" computes all scores at once, and keeps them for the gradient. "tiles" computes them once
            more for the gradient and, from `TILE` tokens on, never holds more of them than those of as many queries and
            keys (forward-mode derivatives end there); "heads" does so head by head, which keeps the scores in the cache
            and is faster on CPU. "auto" is "heads" where the program is compiled for CPU, else "tiles". "cudnn" is
            cuDNN's fused attention, for half precision and without a mask, on NVIDIA GPUs only; whatever it does not
            take goes the way of "tiles". Attention weights and dropout always take "plain".
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
            cpu=functools.partial(_by_heads, mask=mask), default=functools.partial(_in_tiles, mask=mask),
        )  # fmt: skip
    elif implementation == "cudnn" and _suits_cudnn(query, mask):
        output = jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    else:
        function = {"plain": _plain, "heads": _by_heads}.get(implementation, _in_tiles)
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
    product = _weighted(weights, value)  # in the value's dtype, or the gradient's products would not be
    return (product / _last(weights.sum(-1))).astype(value.dtype)


def _in_tiles(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attend without keeping scores for the gradient; with many tokens, for some queries and keys at a time."""
    if query.shape[1] <= TILE:
        return jax.checkpoint(_late, prevent_cse=False)(query, key, value, mask)
    return _tiled(query, key, value, jnp.ones(query.shape[:2], bool) if mask is None else mask)


@jax.custom_vjp
def _tiled(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Attend tile by tile with a running maximum and sum (Rabe and Staats 2021; Dao et al. 2022)."""
    return _tiled_forward(query, key, value, mask)[0]


def _tiled_forward(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    """Return the output, and what the gradient needs: the log of each query's sum beside it, and the arguments."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    others = _cut(key), _cut(value), _cut(mask)

    def attend(some: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch, size, heads, _ = some.shape

        def add(state: tuple[jax.Array, ...], tile: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], None]:
            output, top, total = state
            keys, values, seen = tile
            scores = _scores(some, keys, seen)  # [B, H, queries, keys]
            higher = jnp.maximum(top, scores.max(-1))
            weights, shrink = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            output = output * _last(shrink) + _product("bhqk,bkhd->bqhd", weights, values)
            return (output, higher, total * shrink + weights.sum(-1)), None

        nothing = (
            jnp.zeros(some.shape, dtype),
            jnp.full((batch, heads, size), jnp.finfo(dtype).min),  # finite: a first tile may be masked as a whole
            jnp.zeros((batch, heads, size), dtype),
        )
        (output, top, total), _ = jax.lax.scan(add, nothing, others)
        return (output / _last(total)).astype(value.dtype), top + jnp.log(total)

    outputs, logs = jax.lax.map(attend, _cut(query))
    output = checkpoint_name(_joined(outputs, query.shape[1]), "attended")
    logs = checkpoint_name(logs, "attention_logs")
    return output, (query, key, value, mask, output, logs)


def _tiled_backward(kept: Any, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    """Return the gradients, for which each tile's weights are computed once more."""
    query, key, value, mask, output, logs = kept
    others = _cut(key), _cut(value), _cut(mask)
    dots = _cut((gradient * output).astype(logs.dtype).sum(-1))  # [tiles, B, queries, H]
    scale = query.shape[-1] ** -0.5

    def of_queries(state: tuple[jax.Array, jax.Array], some: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        queries, gradients, log, dot = some

        def of_keys(of_query: jax.Array, tile: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            keys, values, seen = tile
            weights = jnp.exp(_scores(queries, keys, seen) - log[..., None])  # [B, H, queries, keys]
            of_value = _product("bhqk,bqhd->bkhd", weights, gradients)
            of_weights = _product("bqhd,bkhd->bhqk", gradients, values)
            of_scores = weights * (of_weights - dot.swapaxes(1, 2)[..., None]) * scale
            of_query = of_query + _product("bhqk,bkhd->bqhd", of_scores, keys)
            return of_query, (_product("bhqk,bqhd->bkhd", of_scores, queries), of_value)

        of_query, of_others = jax.lax.scan(of_keys, jnp.zeros(queries.shape, logs.dtype), others)
        return jax.tree.map(jnp.add, state, of_others), of_query

    nothing = tuple(jnp.zeros(tiles.shape, logs.dtype) for tiles in others[:2])
    (of_key, of_value), of_query = jax.lax.scan(of_queries, nothing, (_cut(query), _cut(gradient), logs, dots))
    found = (_joined(tiles, query.shape[1]) for tiles in (of_query, of_key, of_value))
    return *(one.astype(like.dtype) for one, like in zip(found, (query, key, value), strict=True)), None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _cut(array: jax.Array) -> jax.Array:
    """Cut [B, N, …] into tiles [tiles, B, size, …] of one size, padded with zeros."""
    batch, tokens, *rest = array.shape
    count = -(-tokens // TILE)
    size = -(-tokens // count)
    padded = jnp.pad(array, [(0, 0), (0, count * size - tokens), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(padded.reshape(batch, count, size, *rest), 1, 0)


def _joined(tiles: jax.Array, tokens: int) -> jax.Array:
    """Invert `_cut`."""
    count, batch, size, *rest = tiles.shape
    return jnp.moveaxis(tiles, 0, 1).reshape(batch, count * size, *rest)[:, :tokens]


def _last(of_queries: jax.Array) -> jax.Array:
    """Return [B, H, N] as [B, N, H, 1]."""
    return of_queries.swapaxes(1, 2)[..., None]


def _product(formula: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiply in the second operand's dtype, summed in at least float32."""
    dtype = jnp.promote_types(right.dtype, jnp.float32)
    return jnp.einsum(
        formula, left.astype(right.dtype), right, preferred_element_type=dtype, precision=full_precision(right.dtype)
    )


def _by_heads(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attend in tiles, head by head of each example."""
    batch, tokens, heads, width = query.shape

    def one_head(head: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        *qkv, mask = head
        mask = None if mask is None else mask[None]
        return _in_tiles(*(x[None, :, None] for x in qkv), mask)[0, :, 0]  # [N, K]

    each = tuple(x.swapaxes(1, 2).reshape(-1, tokens, width) for x in (query, key, value))  # 3 × [B H, N, K]
    masks = None if mask is None else jnp.repeat(mask, heads, axis=0)  # [B H, N]
    output = jax.lax.map(one_head, (*each, masks))
    return output.reshape(batch, heads, tokens, width).swapaxes(1, 2)  # [B, N, H, K]
