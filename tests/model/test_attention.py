"""All attention implementations: equal values and gradients; memory linear in the number of tokens."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ast_jax.model import attention
from ast_jax.model.attention import dot_product_attention

IMPLEMENTATIONS = ("auto", "dense", "chunked", "per_head", "cudnn")  # cudnn falls back in float32


def qkv(shape, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).standard_normal((3, *shape)).astype(dtype)


def reference(query, key, value, mask=None):
    """Attention for [B, N, H, K] in NumPy."""
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    if mask is not None:
        scores = np.where(mask[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks small enough for a test, with a remainder: 11 tokens in chunks of 4, 4 and 3."""
    monkeypatch.setattr(attention, "CHUNK", 4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [3, 4, 8, 11])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_equals_the_reference(implementation, tokens, masked):
    with jax.enable_x64(True):
        given = qkv((2, tokens, 3, 8))
        mask = np.random.default_rng(1).random((2, tokens)) < 0.6 if masked else None
        if masked:
            mask[:, 0] = True
        output, weights = dot_product_attention(*map(jnp.asarray, given), mask, implementation=implementation)
        assert weights is None
        np.testing.assert_allclose(output, reference(*given, mask), atol=1e-13)  # float64's rounding of sums near 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_those_of_dense_attention(implementation, masked):
    with jax.enable_x64(True):
        given = tuple(map(jnp.asarray, qkv((2, 11, 3, 8))))
        mask = jnp.arange(11)[None] < jnp.array([[11], [6]]) if masked else None

        def total(implementation, given):
            return jnp.sin(dot_product_attention(*given, mask, implementation=implementation)[0]).sum()

        for found, wanted in zip(
            *(jax.grad(total, 1)(which, given) for which in (implementation, "dense")), strict=True
        ):
            np.testing.assert_allclose(found, wanted, atol=1e-13)


@pytest.mark.parametrize("implementation", ["chunked", "per_head"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_is_linear_in_the_number_of_tokens(implementation, backward, monkeypatch):
    """By the compiler's temporary memory; with whole score matrices it would grow 16-fold for 4 times the tokens."""
    monkeypatch.setattr(attention, "CHUNK", 64)

    def run(query, key, value):
        return dot_product_attention(query, key, value, implementation=implementation)[0].sum()

    def temporary(tokens, function):
        arrays = [jax.ShapeDtypeStruct((2, tokens, 3, 16), jnp.float32)] * 3
        return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    function = jax.grad(run, (0, 1, 2)) if backward else run
    small, large = temporary(1024, function), temporary(4096, function)
    assert small < large < 4.2 * small
    assert large < 3 * 4096**2 * 4  # bytes of the scores of three heads


def test_cudnn_supports_half_precision_without_a_mask(monkeypatch):
    taken = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *given, **how: taken.append(how) or given[0])
    for dtype, width, mask in (
        (jnp.bfloat16, 8, None), (jnp.float16, 64, None), (jnp.float32, 8, None), (jnp.bfloat16, 12, None),
        (jnp.bfloat16, 136, None), (jnp.bfloat16, 8, jnp.ones((2, 5), bool)),
    ):  # fmt: skip
        given = jnp.asarray(qkv((2, 5, 3, width)), dtype)
        dot_product_attention(*given, mask, implementation="cudnn")
    assert taken == [{"implementation": "cudnn"}] * 2


LOWER = """
import pathlib, sys
import jax
import jax.numpy as jnp
import ast_jax
from ast_jax.inference.sliding_window import forward_batch
from ast_jax.model.attention import dot_product_attention

def attend(*given):
    return dot_product_attention(*given, implementation="cudnn")[0].astype(jnp.float32).sum()

arrays = [jax.ShapeDtypeStruct((2, 146, 3, 64), jnp.bfloat16)] * 3
config, frontend = ast_jax.PRESETS["base"](), ast_jax.FrontendConfig()
params = jax.eval_shape(lambda key: ast_jax.init(key, config), jax.random.key(0))
inputs = jax.ShapeDtypeStruct((2, frontend.max_samples), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
traced = {
    "forward": jax.jit(attend).trace(*arrays),
    "backward": jax.jit(jax.grad(attend, (0, 1, 2))).trace(*arrays),
    "waveforms": forward_batch.trace(
        params, inputs, config, frontend, chunk_size=2, dtype=jnp.bfloat16, attention_implementation="cudnn"
    ),
}
for name, program in traced.items():
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    pathlib.Path(sys.argv[1], name).write_text(text)
"""


@pytest.fixture(scope="module")
def lowered_for_cuda(tmp_path_factory):
    """Programs lowered for CUDA, by name. JAX asks its CUDA plugin for cuDNN's version; here a stub answers."""
    folder = tmp_path_factory.mktemp("lowered")
    (folder / "jax_cuda12_plugin").mkdir()
    (folder / "jax_cuda12_plugin" / "_versions.py").write_text("def cudnn_get_version():\n    return 91000\n")
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    command = [sys.executable, "-c", LOWER, str(folder)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(("direction", "calls"), [("forward", 1), ("backward", 2)])
def test_cudnn_lowers_for_cuda(direction, calls, lowered_for_cuda):
    text = lowered_for_cuda[direction]
    assert len(re.findall(r"__cudnn\$\w+", text)) == calls
    assert not re.search(r"tensor<2x3x146x146x", text), "the score matrix is materialised"


def test_waveforms_to_logits_lower_for_cuda_as_one_program(lowered_for_cuda):
    """In bfloat16: features, and the model with cuDNN's attention in the loop over layers."""
    text = lowered_for_cuda["waveforms"]
    assert len(re.findall(r"__cudnn\$fmhaSoftmax\b", text)) == 1  # in the loop over layers
    assert "stablehlo.fft" in text
    assert not re.search(r"tensor<2x12x1214x1214x", text)


def test_cudnn_without_a_gpu_is_an_error():
    with pytest.raises(RuntimeError, match="cuDNN"):
        dot_product_attention(*jnp.asarray(qkv((1, 2, 1, 8)), jnp.bfloat16), implementation="cudnn")


def test_the_fastest_implementation_on_cpu():
    assert attention.fastest_implementation(jnp.float32) == "auto"
    assert attention.fastest_implementation("bfloat16") == "auto"


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="expected one of auto, dense, chunked, per_head, cudnn, got 'flash'"):
        dot_product_attention(*jnp.asarray(qkv((1, 2, 1, 4), np.float32)), implementation="flash")
