"""Scaled dot-product attention: one function, four ways to compute it.

Letters: B batch, N tokens, H heads, K width of a head. Below the public function everything takes [..., N, K], and
masks [..., N, 1] of the keys.
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
Three = tuple[jax.Array, jax.Array, jax.Array]
Four = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


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
        ValueError: an unknown implementation, or dropout without a key.
        RuntimeError: "cudnn" where there is none.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention_implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"
        )
    if implementation == "cudnn" and _suits_cudnn(query, mask) and not (return_weights or dropout_rate):
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn"), None
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # [B, H, N, K]
    mask = None if mask is None else jnp.asarray(mask)[:, None, :, None]
    if return_weights or dropout_rate:
        weights = _weights(query, key, mask)
        if dropout_rate:
            if dropout_key is None:
                raise ValueError(f"dropout_key: expected a random key for a dropout_rate of {dropout_rate}, got none")
            keep = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights.shape)
            weights = jnp.where(keep, weights / (1 - dropout_rate), 0.0)
        return _weighted(weights, value).swapaxes(1, 2), weights if return_weights else None
    if implementation == "auto":
        output = jax.lax.platform_dependent(
            query, key, value,
            cpu=functools.partial(_by_heads, mask=mask), default=functools.partial(_in_tiles, mask=mask),
        )  # fmt: skip
    else:
        function = {"plain": _plain, "heads": _by_heads}.get(implementation, _in_tiles)
        output = function(query, key, value, mask)
    return output.swapaxes(1, 2), None


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
    """Return the softmax [..., N, N] in at least float32."""
    return jax.nn.softmax(_scores(query, key, mask), axis=-1)


def _scores(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return the scaled products [..., N, N] in at least float32, -inf where nothing may be seen."""
    scores = _product("...qd,...kd->...qk", query * query.shape[-1] ** -0.5, key)
    if mask is not None:
        scores = jnp.where(mask.swapaxes(-1, -2), scores, -jnp.inf)  # the two prefix tokens are never masked
    return scores


def _weighted(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Return the values [..., N, K] weighted with [..., N, N]."""
    weights = weights.astype(value.dtype)
    return jnp.einsum("...qk,...kd->...qd", weights, value, precision=full_precision(value.dtype))


def full_precision(dtype: Any) -> jax.lax.Precision | None:
    """Return what keeps a product of this dtype from being rounded to less; None for half precision."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else None


def _plain(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attend to all at once."""
    return _weighted(_weights(query, key, mask), value)


def _late(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attend to all at once, and divide by the softmax's sum at last: once less through all the scores."""
    scores = _scores(query, key, mask)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))  # [..., N, N]
    product = _weighted(weights, value)  # in the value's dtype, or the gradient's products would not be
    return (product / weights.sum(-1, keepdims=True)).astype(value.dtype)


def _in_tiles(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attend without keeping scores for the gradient; with many tokens, for some queries and keys at a time."""
    if query.shape[-2] <= TILE:
        return jax.checkpoint(_late, prevent_cse=False)(query, key, value, mask)
    return _tiled(query, key, value, jnp.ones((query.shape[-2], 1), bool) if mask is None else mask)


@jax.custom_vjp
def _tiled(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Attend tile by tile with a running maximum and sum (Rabe and Staats 2021; Dao et al. 2022)."""
    return _tiled_forward(query, key, value, mask)[0]


def _tiled_forward(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    """Return the output, and what the gradient needs: the log of each query's sum beside it, and the arguments."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    others = _cut(key), _cut(value), _cut(mask)

    def attend(some: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add(state: Three, tile: Three) -> tuple[Three, None]:
            output, top, total = state
            keys, values, seen = tile
            scores = _scores(some, keys, seen)  # [..., queries, keys]
            higher = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights, shrink = jnp.exp(scores - higher), jnp.exp(top - higher)
            output = output * shrink + _product("...qk,...kd->...qd", weights, values)
            return (output, higher, total * shrink + weights.sum(-1, keepdims=True)), None

        column = (*some.shape[:-1], 1)
        nothing = (
            jnp.zeros(some.shape, dtype),
            jnp.full(column, jnp.finfo(dtype).min),  # finite: a first tile may be masked as a whole
            jnp.zeros(column, dtype),
        )
        (output, top, total), _ = jax.lax.scan(add, nothing, others)
        return (output / total).astype(value.dtype), top + jnp.log(total)

    outputs, logs = jax.lax.map(attend, _cut(query))
    output = checkpoint_name(_joined(outputs, query.shape[-2]), "attended")
    logs = checkpoint_name(logs, "attention_logs")
    return output, (query, key, value, mask, output, logs)


def _tiled_backward(kept: Any, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    """Return the gradients, for which each tile's weights are computed once more."""
    query, key, value, mask, output, logs = kept
    others = _cut(key), _cut(value), _cut(mask)
    dots = _cut((gradient * output).astype(logs.dtype).sum(-1, keepdims=True))  # [tiles, ..., queries, 1]
    scale = query.shape[-1] ** -0.5

    def of_queries(state: tuple[jax.Array, ...], some: Four) -> tuple[tuple[jax.Array, ...], jax.Array]:
        queries, gradients, log, dot = some

        def of_keys(of_query: jax.Array, tile: Three) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            keys, values, seen = tile
            weights = jnp.exp(_scores(queries, keys, seen) - log)  # [..., queries, keys]
            of_value = _product("...qk,...qd->...kd", weights, gradients)
            of_weights = _product("...qd,...kd->...qk", gradients, values)
            of_scores = weights * (of_weights - dot) * scale
            of_query = of_query + _product("...qk,...kd->...qd", of_scores, keys)
            return of_query, (_product("...qk,...qd->...kd", of_scores, queries), of_value)

        of_query, of_others = jax.lax.scan(of_keys, jnp.zeros(queries.shape, logs.dtype), others)
        return jax.tree.map(jnp.add, state, of_others), of_query

    nothing = tuple(jnp.zeros(tiles.shape, logs.dtype) for tiles in others[:2])
    (of_key, of_value), of_query = jax.lax.scan(of_queries, nothing, (_cut(query), _cut(gradient), logs, dots))
    found = (_joined(tiles, query.shape[-2]) for tiles in (of_query, of_key, of_value))
    return *(one.astype(like.dtype) for one, like in zip(found, (query, key, value), strict=True)), None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _cut(array: jax.Array) -> jax.Array:
    """Cut [..., N, K] into tiles [tiles, ..., size, K] of one size, padded with zeros."""
    *rest, tokens, width = array.shape
    count = -(-tokens // TILE)
    size = -(-tokens // count)
    padded = jnp.pad(array, [*[(0, 0)] * len(rest), (0, count * size - tokens), (0, 0)])
    return jnp.moveaxis(padded.reshape(*rest, count, size, width), -3, 0)


def _joined(tiles: jax.Array, tokens: int) -> jax.Array:
    """Invert `_cut`."""
    count, *rest, size, width = tiles.shape
    return jnp.moveaxis(tiles, 0, -3).reshape(*rest, count * size, width)[..., :tokens, :]


def _product(formula: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiply in the second operand's dtype, summed in at least float32."""
    dtype = jnp.promote_types(right.dtype, jnp.float32)
    return jnp.einsum(
        formula, left.astype(right.dtype), right, preferred_element_type=dtype, precision=full_precision(right.dtype)
    )


def _by_heads(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attend in tiles, head by head of each example."""
    batch, heads, tokens, width = query.shape

    def one_head(head: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        return _in_tiles(*head)  # [N, K]: with more axes, of length 1, products and passes take up to twice as long

    each = tuple(x.reshape(-1, tokens, width) for x in (query, key, value))  # 3 × [B H, N, K]
    masks = None if mask is None else jnp.repeat(mask[:, 0], heads, axis=0)  # [B H, N, 1]
    return jax.lax.map(one_head, (*each, masks)).reshape(batch, heads, tokens, width)
