"""The contenders of `benchmark.py forward` and `train`: the same weights and input in every library.

`folder` has a model as transformers saves it, `inputs` a file with spectrograms [B, T, F].
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

Work = Callable[[], np.ndarray]


def write_case(folder: pathlib.Path, inputs: pathlib.Path, preset: str, frames: int, batch: int) -> Any:
    """Write a model with random weights in transformers' layout, and spectrograms; return its configuration."""
    import jax

    import ast_jax

    config = ast_jax.PRESETS[preset](max_length=frames)
    params = jax.device_get(ast_jax.init(jax.random.key(0), config))
    ast_jax.to_torch(ast_jax.Checkpoint(params, config, ast_jax.FrontendConfig(max_length=frames)), folder)
    np.save(inputs, np.random.default_rng(0).standard_normal((batch, frames, config.num_mel_bins), np.float32))
    return config


def operations(config: Any) -> float:
    """Return the floating-point operations of a forward pass of one clip, matrix products alone."""
    width, hidden, tokens = config.hidden_size, config.intermediate_size, config.num_tokens
    block = 2 * tokens * width * (4 * width + 2 * hidden) + 4 * tokens**2 * width
    patches = 2 * (tokens - 2) * int(np.prod(config.patch_shape)) * width
    return float(config.num_hidden_layers * block + patches)


# --------------------------------------------------------------- matrix products


def jax_product(size: int, dtype: str) -> Work:
    """Multiply two square matrices in JAX."""
    import jax
    import jax.numpy as jnp

    left = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    multiply = jax.jit(jnp.matmul)
    return lambda: np.asarray(multiply(left, left).block_until_ready()[:1, :1].astype(jnp.float32))


def torch_product(size: int) -> Work:
    """Multiply two square matrices in PyTorch."""
    torch = _torch()
    left = torch.randn(size, size)
    return lambda: torch.mm(left, left)[:1, :1].numpy()


# --------------------------------------------------------------- forward


def ast_jax_forward(folder: str, inputs: str, dtype: str = "float32") -> Work:
    """Run as `classify` does."""
    import jax

    import ast_jax
    from ast_jax import predict

    checkpoint = ast_jax.load(folder)
    params, spec = jax.device_put(checkpoint.params), np.load(inputs)
    return lambda: np.asarray(predict.logits(params, spec, checkpoint.config, dtype=dtype))


def torch_eager(folder: str, inputs: str) -> Work:
    """Run transformers' model with PyTorch's fused attention."""
    return _torch_forward(folder, inputs, lambda model: model)


def torch_compiled(folder: str, inputs: str) -> Work:
    """Run transformers' model through `torch.compile`."""
    return _torch_forward(folder, inputs, _torch().compile)


def _torch_forward(folder: str, inputs: str, wrap: Callable[[Any], Any]) -> Work:
    torch, spec = _torch(), _tensor(inputs)
    model = wrap(_model(folder).eval())

    @torch.inference_mode()
    def forward() -> np.ndarray:
        return model(input_values=spec).logits.numpy()

    return forward


def onnx_runtime(folder: str, inputs: str) -> Work:
    """Run the exported model in ONNX Runtime."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "model.onnx"
        torch, spec = _torch(), _tensor(inputs)
        torch.onnx.export(_Logits(_model(folder).eval()), (spec,), str(path), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: spec.numpy()})[0]


def openvino(folder: str, inputs: str) -> Work:
    """Run the converted model in OpenVINO, in float32."""
    import openvino as ov

    spec = _tensor(inputs)
    converted = ov.convert_model(_Logits(_model(folder).eval()), example_input=spec, input=list(spec.shape))
    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(converted, "CPU", hints)
    return lambda: compiled(spec.numpy())[0]


# --------------------------------------------------------------- training


def ast_jax_train(folder: str, inputs: str) -> Work:
    """Take a step of training as `finetune` does, on spectrograms that are there; its result is the loss."""
    import jax
    import jax.numpy as jnp
    import optax

    import ast_jax
    from ast_jax.optimizers import make_optimizer

    checkpoint = ast_jax.load(folder)
    config, spec = checkpoint.config, jnp.asarray(np.load(inputs))
    labels = jnp.asarray(_labels(len(spec), config.num_labels))
    optimizer = make_optimizer(ast_jax.TrainConfig(schedule="constant"), 1)

    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        def mean_loss(params: Any) -> jax.Array:
            return ast_jax.loss(ast_jax.apply(params, spec, config, train=True), labels, config)

        value, gradients = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    compiled = jax.jit(step, donate_argnums=(0, 1))
    params = jax.device_put(checkpoint.params)
    state = (params, optimizer.init(params))

    def work() -> np.ndarray:
        nonlocal state
        *state, value = compiled(*state)
        return np.asarray(jax.block_until_ready((state, value))[1])

    return work


def torch_train(folder: str, inputs: str) -> Work:
    """Take a step of training of transformers' model in eager PyTorch; its result is the loss."""
    torch, spec = _torch(), _tensor(inputs)
    model = _model(folder).train()
    labels = torch.from_numpy(_labels(len(spec), model.config.num_labels))
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, (0.95, 0.999), weight_decay=5e-7)

    def work() -> np.ndarray:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(model(input_values=spec).logits, labels)
        value.backward()
        optimizer.step()
        return value.detach().numpy()

    return work


def _labels(batch: int, num_labels: int) -> np.ndarray:
    """Return multi-label targets [B, C]."""
    return (np.random.default_rng(1).random((batch, num_labels)) < 0.1).astype(np.float32)


# --------------------------------------------------------------- PyTorch


def _torch() -> Any:
    """Import PyTorch and transformers; a torchaudio that does not load beside this PyTorch is no reason to fail."""
    import importlib.machinery
    import types

    import torch

    stub = types.ModuleType("torchaudio")
    stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules.setdefault("torchaudio", stub)
    return torch


def _tensor(inputs: str) -> Any:
    return _torch().from_numpy(np.load(inputs))


def _model(folder: str) -> Any:
    """Load a model in transformers, with PyTorch's fused attention."""
    _torch()
    import transformers

    return transformers.ASTForAudioClassification.from_pretrained(folder, attn_implementation="sdpa")


def _Logits(model: Any) -> Any:  # noqa: N802 (a module)
    """Return a module that maps spectrograms to logits and nothing else."""
    torch = _torch()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, spec: Any) -> Any:
            return self.model(input_values=spec).logits

    return Logits()
