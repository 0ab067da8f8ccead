"""Scaled dot-product attention: one public function, several implementations.

Letters: B batch, N tokens, H heads, K head width. The private functions take query, key and value as [..., N, K] and
the key mask as [..., N, 1].
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

IMPLEMENTATIONS = ("auto", "dense", "chunked", "per_head", "cudnn")
CHUNK = 1280  # most queries and keys in one block of scores; beyond it memory is linear in the number of tokens
CUDNN_HEAD_WIDTH = 128  # widest head that cuDNN supports on every card
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
    """Compute softmax(q kᵀ / sqrt(K)) v, with scores and softmax in at least float32.

    float32 operands are multiplied at `Precision.HIGHEST`: the default on TPU and newer GPUs rounds them to bfloat16 or
    TensorFloat-32 first.

    Args:
        query: [B, N, H, K].
        key: [B, N, H, K].
        value: [B, N, H, K].
        mask: [B, N] bool, True for the keys to attend to; None for all.
        implementation: "dense" computes the whole score matrix and keeps it for the backward pass. "chunked" recomputes
            the scores in the backward pass and, beyond `CHUNK` tokens, computes them in blocks of at most `CHUNK`
            queries and keys with an online softmax, so memory is linear in N (no forward-mode derivatives there).
            "per_head" is "chunked" one head at a time, which keeps the scores in the CPU's cache. "auto" is "per_head"
            in programs compiled for CPU, else "chunked". "cudnn" is cuDNN's fused attention (NVIDIA GPUs, half
            precision, no mask) and falls back to "chunked". Attention weights and dropout always use "dense".
        dropout_rate: fraction of attention weights set to zero.
        dropout_key: random key, required if `dropout_rate` is not 0.
        return_weights: also return the weights, after dropout.

    Returns:
        The output [B, N, H, K] and the weights [B, H, N, N] or None.

    Raises:
        ValueError: an unknown implementation, or dropout without a key.
        RuntimeError: "cudnn" without cuDNN.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention_implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"
        )
    if implementation == "cudnn" and _cudnn_supports(query, mask) and not (return_weights or dropout_rate):
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn"), None
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # [B, H, N, K]
    mask = None if mask is None else jnp.asarray(mask)[:, None, :, None]
    if return_weights or dropout_rate:
        weights = _softmax(query, key, mask)
        if dropout_rate:
            if dropout_key is None:
                raise ValueError(f"dropout_key: expected a random key for a dropout_rate of {dropout_rate}, got none")
            keep = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights.shape)
            weights = jnp.where(keep, weights / (1 - dropout_rate), 0.0)
        return _weighted_sum(weights, value).swapaxes(1, 2), weights if return_weights else None
    if implementation == "auto":
        output = jax.lax.platform_dependent(
            query, key, value,
            cpu=functools.partial(_per_head, mask=mask), default=functools.partial(_chunked, mask=mask),
        )  # fmt: skip
    else:
        function = {"dense": _dense, "per_head": _per_head}.get(implementation, _chunked)
        output = function(query, key, value, mask)
    return output.swapaxes(1, 2), None


def fastest_implementation(dtype: Any) -> str:
    """Return the fastest implementation for a program that runs on this process's devices only.

    Args:
        dtype: of the computation.
    """
    cuda = jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version
    return "cudnn" if cuda and _is_half(dtype) else "auto"


def full_precision(dtype: Any) -> jax.lax.Precision | None:
    """Return the `precision` that keeps a product of this dtype exact; None for half precision."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else None


def _is_half(dtype: Any) -> bool:
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)


def _cudnn_supports(query: jax.Array, mask: jax.Array | None) -> bool:
    """Whether cuDNN takes these inputs; a mask would have to be materialised as [B, H, N, N]."""
    return mask is None and _is_half(query.dtype) and query.shape[-1] % 8 == 0 and query.shape[-1] <= CUDNN_HEAD_WIDTH


def _scores(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return scaled scores [..., N, N] in at least float32, -inf for masked keys."""
    scores = _einsum("...qd,...kd->...qk", query * query.shape[-1] ** -0.5, key)
    if mask is not None:
        scores = jnp.where(mask.swapaxes(-1, -2), scores, -jnp.inf)  # the two prefix tokens are never masked
    return scores


def _softmax(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return attention weights [..., N, N] in at least float32."""
    return jax.nn.softmax(_scores(query, key, mask), axis=-1)


def _weighted_sum(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Return weights [..., N, N] @ value [..., N, K] in the value's dtype."""
    weights = weights.astype(value.dtype)
    return jnp.einsum("...qk,...kd->...qd", weights, value, precision=full_precision(value.dtype))


def _einsum(formula: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiply in the second operand's dtype, accumulated in at least float32."""
    dtype = jnp.promote_types(right.dtype, jnp.float32)
    return jnp.einsum(
        formula, left.astype(right.dtype), right, preferred_element_type=dtype, precision=full_precision(right.dtype)
    )


def _dense(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attend with the whole score matrix at once."""
    return _weighted_sum(_softmax(query, key, mask), value)


def _per_head(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Apply `_chunked` to one head of one example at a time: [B, H, N, K]."""
    batch, heads, tokens, width = query.shape

    def one_head(head: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        return _chunked(*head)  # [N, K]: leading axes of length 1 make the products up to twice as slow

    per_head = tuple(x.reshape(-1, tokens, width) for x in (query, key, value))  # 3 × [B H, N, K]
    masks = None if mask is None else jnp.repeat(mask[:, 0], heads, axis=0)  # [B H, N, 1]
    return jax.lax.map(one_head, (*per_head, masks)).reshape(batch, heads, tokens, width)  # [B, H, N, K]


def _chunked(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attend without storing scores for the backward pass; beyond `CHUNK` tokens, block by block."""
    if query.shape[-2] <= CHUNK:
        return jax.checkpoint(_normalized_last, prevent_cse=False)(query, key, value, mask)
    return _online_softmax(query, key, value, jnp.ones((query.shape[-2], 1), bool) if mask is None else mask)


def _normalized_last(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attend and divide by the softmax's denominator after the product, which saves a pass over the scores."""
    scores = _scores(query, key, mask)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))  # [..., N, N]
    product = _weighted_sum(weights, value)  # in the value's dtype, so that the gradient's products are too
    return (product / weights.sum(-1, keepdims=True)).astype(value.dtype)


@jax.custom_vjp
def _online_softmax(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Attend block by block with a running maximum and sum (Rabe and Staats 2021; Dao et al. 2022)."""
    return _online_softmax_forward(query, key, value, mask)[0]


def _online_softmax_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> tuple[jax.Array, Any]:
    """Return the output and the residuals: the arguments, the output and each query's log-sum-exp."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    key_chunks = _split(key), _split(value), _split(mask)

    def attend(queries: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add(state: Three, chunk: Three) -> tuple[Three, None]:
            output, maximum, total = state
            keys, values, visible = chunk
            scores = _scores(queries, keys, visible)  # [..., queries, keys]
            new_maximum = jnp.maximum(maximum, scores.max(-1, keepdims=True))
            weights, rescale = jnp.exp(scores - new_maximum), jnp.exp(maximum - new_maximum)
            output = output * rescale + _einsum("...qk,...kd->...qd", weights, values)
            return (output, new_maximum, total * rescale + weights.sum(-1, keepdims=True)), None

        column = (*queries.shape[:-1], 1)
        start = (
            jnp.zeros(queries.shape, dtype),
            jnp.full(column, jnp.finfo(dtype).min),  # finite: the first chunk may be masked entirely
            jnp.zeros(column, dtype),
        )
        (output, maximum, total), _ = jax.lax.scan(add, start, key_chunks)
        return (output / total).astype(value.dtype), maximum + jnp.log(total)

    outputs, logsumexp = jax.lax.map(attend, _split(query))
    output = checkpoint_name(_join(outputs, query.shape[-2]), "attended")
    logsumexp = checkpoint_name(logsumexp, "attention_logsumexp")
    return output, (query, key, value, mask, output, logsumexp)


def _online_softmax_backward(residuals: Any, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    """Return the gradients, recomputing the weights of each block."""
    query, key, value, mask, output, logsumexp = residuals
    key_chunks = _split(key), _split(value), _split(mask)
    dtype, scale = logsumexp.dtype, query.shape[-1] ** -0.5
    dots = _split((gradient * output).astype(dtype).sum(-1, keepdims=True))  # [chunks, ..., queries, 1]

    def query_chunk(state: tuple[jax.Array, ...], chunk: Four) -> tuple[tuple[jax.Array, ...], jax.Array]:
        queries, gradients, log_total, dot = chunk

        def key_chunk(query_grad: jax.Array, chunk: Three) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            keys, values, visible = chunk
            weights = jnp.exp(_scores(queries, keys, visible) - log_total)  # [..., queries, keys]
            value_grad = _einsum("...qk,...qd->...kd", weights, gradients)
            weight_grad = _einsum("...qd,...kd->...qk", gradients, values)
            score_grad = weights * (weight_grad - dot) * scale
            query_grad = query_grad + _einsum("...qk,...kd->...qd", score_grad, keys)
            return query_grad, (_einsum("...qk,...qd->...kd", score_grad, queries), value_grad)

        query_grad, key_grads = jax.lax.scan(key_chunk, jnp.zeros(queries.shape, dtype), key_chunks)
        return jax.tree.map(jnp.add, state, key_grads), query_grad

    zeros = tuple(jnp.zeros(chunks.shape, dtype) for chunks in key_chunks[:2])
    query_chunks = (_split(query), _split(gradient), logsumexp, dots)
    (key_grad, value_grad), query_grad = jax.lax.scan(query_chunk, zeros, query_chunks)
    gradients = (_join(chunks, query.shape[-2]) for chunks in (query_grad, key_grad, value_grad))
    return *(x.astype(like.dtype) for x, like in zip(gradients, (query, key, value), strict=True)), None


_online_softmax.defvjp(_online_softmax_forward, _online_softmax_backward)


def _split(array: jax.Array) -> jax.Array:
    """Split [..., N, K] into equal chunks [chunks, ..., size, K], zero-padded."""
    *rest, tokens, width = array.shape
    count = -(-tokens // CHUNK)
    size = -(-tokens // count)
    padded = jnp.pad(array, [*[(0, 0)] * len(rest), (0, count * size - tokens), (0, 0)])
    return jnp.moveaxis(padded.reshape(*rest, count, size, width), -3, 0)  # [chunks, ..., size, K]


def _join(chunks: jax.Array, tokens: int) -> jax.Array:
    """Invert `_split`: [..., N, K]."""
    count, *rest, size, width = chunks.shape
    return jnp.moveaxis(chunks, 0, -3).reshape(*rest, count * size, width)[..., :tokens, :]
