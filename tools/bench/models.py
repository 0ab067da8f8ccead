"""Contenders of `benchmark.py forward`, `train` and `gpu`: the same weights and input in every library.

`folder` is a model in transformers' format, `inputs` a NumPy file of features [B, T, F]. PyTorch contenders take the
name of their device, "cpu" or "cuda"; ast_jax runs on JAX's default device.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

Work = Callable[[], np.ndarray]


def write_case(folder: pathlib.Path, inputs: pathlib.Path, preset: str, frames: int, batch: int) -> None:
    """Write a model with random weights in transformers' format, and random features."""
    import jax

    import ast_jax

    config = ast_jax.PRESETS[preset](max_length=frames)
    params = jax.device_get(ast_jax.init(jax.random.key(0), config))
    ast_jax.to_torch(ast_jax.Checkpoint(params, config, ast_jax.FrontendConfig(max_length=frames)), folder)
    np.save(inputs, np.random.default_rng(0).standard_normal((batch, frames, config.num_mel_bins), np.float32))


def operations(folder: str) -> float:
    """Return the FLOPs of one clip's forward pass, matrix products only."""
    from ast_jax.config import ASTConfig

    config = ASTConfig.from_json_dict(json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8")))
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


def torch_product(size: int, dtype: str = "float32", device: str = "cpu") -> Work:
    """Multiply two square matrices in PyTorch."""
    torch = _torch()
    left = torch.randn(size, size).to(device, getattr(torch, dtype))
    return lambda: torch.mm(left, left)[:1, :1].float().cpu().numpy()


# --------------------------------------------------------------- forward


def ast_jax_forward(folder: str, inputs: str, dtype: str = "float32") -> Work:
    """Compute logits of features, as `classify` does."""
    import jax

    import ast_jax

    checkpoint = ast_jax.load(folder)
    params, spec = jax.device_put((checkpoint.params, np.load(inputs)))
    return _forward_batch(params, (spec,), checkpoint.config, None, dtype)


def ast_jax_forward_bfloat16(folder: str, inputs: str) -> Work:
    """Compute logits of features in bfloat16."""
    return ast_jax_forward(folder, inputs, "bfloat16")


def ast_jax_exact(folder: str, inputs: str) -> Work:
    """Compute logits in float32 at the highest matmul precision."""
    import jax

    forward = ast_jax_forward(folder, inputs)

    def work() -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return forward()

    return work


def ast_jax_waveforms(folder: str, inputs: str, dtype: str = "float32") -> Work:
    """Compute logits of waveforms, features included, as `classify` does; only the shape of the inputs is used."""
    import jax

    import ast_jax

    checkpoint = ast_jax.load(folder)
    batch, frames, _ = np.load(inputs, mmap_mode="r").shape
    frontend = ast_jax.FrontendConfig(max_length=frames)
    waveforms = 0.1 * np.random.default_rng(0).standard_normal((batch, frontend.max_samples), np.float32)
    lengths = np.full(batch, frontend.max_samples, np.int32)
    params, inputs = jax.device_put((checkpoint.params, (waveforms, lengths)))
    return _forward_batch(params, inputs, checkpoint.config, frontend, dtype)


def _forward_batch(params: Any, inputs: Any, config: Any, frontend: Any, dtype: str) -> Work:
    """Run a batch as `classify` does, in `dtype`."""
    from ast_jax.inference import sliding_window
    from ast_jax.model.attention import fastest_implementation

    options = {
        "chunk_size": sliding_window.chunk_size(len(inputs[0]), config), "dtype": dtype,
        "attention_implementation": fastest_implementation(dtype),
    }  # fmt: skip
    return lambda: np.asarray(sliding_window.forward_batch(params, inputs, config, frontend, **options))


def torch_eager(folder: str, inputs: str, dtype: str = "float32", device: str = "cpu") -> Work:
    """Compute logits in transformers with PyTorch's SDPA."""
    return _torch_forward(folder, inputs, dtype, device, lambda model: model)


def torch_compiled(folder: str, inputs: str, dtype: str = "float32", device: str = "cpu") -> Work:
    """Compute logits in transformers with `torch.compile`."""
    return _torch_forward(folder, inputs, dtype, device, _torch().compile)


def _torch_forward(folder: str, inputs: str, dtype: str, device: str, wrap: Callable[[Any], Any]) -> Work:
    torch = _torch()
    spec = _tensor(inputs).to(device, getattr(torch, dtype))
    model = wrap(_model(folder).eval().to(device, getattr(torch, dtype)))

    @torch.inference_mode()
    def forward() -> np.ndarray:
        return model(input_values=spec).logits.float().cpu().numpy()

    return forward


def onnx_runtime(folder: str, inputs: str) -> Work:
    """Compute logits of the exported model in ONNX Runtime."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "model.onnx"
        torch, spec = _torch(), _tensor(inputs)
        torch.onnx.export(_Logits(_model(folder).eval()), (spec,), str(path), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: spec.numpy()})[0]


def openvino(folder: str, inputs: str) -> Work:
    """Compute logits of the converted model in OpenVINO, in float32."""
    import openvino as ov

    spec = _tensor(inputs)
    converted = ov.convert_model(_Logits(_model(folder).eval()), example_input=spec, input=list(spec.shape))
    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(converted, "CPU", hints)
    return lambda: compiled(spec.numpy())[0]


# --------------------------------------------------------------- training


def ast_jax_train(folder: str, inputs: str, dtype: str = "float32") -> Work:
    """Take a training step with `finetune`'s optimizer on precomputed features; the result is the loss."""
    import jax
    import jax.numpy as jnp
    import optax

    import ast_jax
    from ast_jax.model.attention import fastest_implementation
    from ast_jax.training.optimizers import make_optimizer

    checkpoint = ast_jax.load(folder)
    config, spec = checkpoint.config, jnp.asarray(np.load(inputs))
    labels = jnp.asarray(_labels(len(spec), config.num_labels))
    optimizer = make_optimizer(ast_jax.TrainConfig(schedule="constant"), 1)
    attention = fastest_implementation(dtype)

    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        def mean_loss(params: Any) -> jax.Array:
            logits = ast_jax.apply(params, spec, config, train=True, dtype=dtype, attention_implementation=attention)
            return ast_jax.loss(logits, labels, config)

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


def torch_train(folder: str, inputs: str, dtype: str = "float32", device: str = "cpu") -> Work:
    """Take a training step of transformers' model in eager PyTorch; the result is the loss."""
    return _torch_train(folder, inputs, dtype, device, lambda model: model)


def torch_train_compiled(folder: str, inputs: str, dtype: str = "float32", device: str = "cpu") -> Work:
    """Take a training step of transformers' model with `torch.compile`; the result is the loss."""
    return _torch_train(folder, inputs, dtype, device, _torch().compile)


def _torch_train(folder: str, inputs: str, dtype: str, device: str, wrap: Callable[[Any], Any]) -> Work:
    """Train with float32 parameters, and with autocast for bfloat16, as ast_jax does."""
    torch, spec = _torch(), _tensor(inputs).to(device)
    model = _model(folder).train().to(device)
    forward = wrap(model)
    labels = torch.from_numpy(_labels(len(spec), model.config.num_labels)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, (0.95, 0.999), weight_decay=5e-7)

    def work() -> np.ndarray:
        optimizer.zero_grad()
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            logits = forward(input_values=spec).logits
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), labels)
        value.backward()
        optimizer.step()
        return value.detach().cpu().numpy()

    return work


def _labels(batch: int, num_labels: int) -> np.ndarray:
    """Return multi-label targets [B, C]."""
    return (np.random.default_rng(1).random((batch, num_labels)) < 0.1).astype(np.float32)


# --------------------------------------------------------------- PyTorch


def _torch() -> Any:
    """Import PyTorch, with torchaudio hidden from transformers: it does not load with every build of PyTorch."""
    import torch

    sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]  # as if it were not installed
    return torch


def _tensor(inputs: str) -> Any:
    return _torch().from_numpy(np.load(inputs))


def _model(folder: str) -> Any:
    """Load a model in transformers, with SDPA attention."""
    _torch()
    import transformers

    return transformers.ASTForAudioClassification.from_pretrained(folder, attn_implementation="sdpa")


def _Logits(model: Any) -> Any:  # noqa: N802 (a module)
    """Return a module that maps features to logits."""
    torch = _torch()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, spec: Any) -> Any:
            return self.model(input_values=spec).logits

    return Logits()
