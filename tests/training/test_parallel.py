"""Data parallelism: the same run on 1, 2, 4 and 8 devices, with `pmap` and `jit`, in one process and in two."""

import functools
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import ast_jax
from ast_jax.config import FrontendConfig
from ast_jax.training import optimizers
from ast_jax.training import step as train
from ast_jax.training.config import TrainConfig
from ast_jax.training.parallel import DataParallel, ShardedJit

CONFIG = ast_jax.ASTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=4,
    problem_type="multi_label_classification", max_length=32, num_mel_bins=32, frequency_stride=16, time_stride=16,
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("quick_compilation")
FRONTEND = FrontendConfig(max_length=32, num_mel_bins=32)
TRAINING = TrainConfig(
    batch_size=16, learning_rate=1e-3, weight_decay=1e-6, frequency_mask=8, time_mask=8, noise=True, warmup_steps=3,
    frequency_shift=3, time_shift=5, ema_decay=0.9, ramp_epochs=1.0, schedule="cosine", epochs=2, patchout_time=1,
    max_grad_norm=1.0, grad_accum_steps=2, rematerialize=True,
)  # fmt: skip


def batches(count, dtype):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "waveform": (0.1 * rng.standard_normal((16, FRONTEND.max_samples))).astype(dtype),
            "num_samples": rng.integers(100, FRONTEND.max_samples, 16).astype(np.int32),
            "labels": (rng.random((16, 4)) < 0.4).astype(dtype),
        }


def run(method, devices, dtype, steps=10):
    """Return the state and the losses after some steps on a number of devices."""
    optimizer = optimizers.make_optimizer(TRAINING, steps_per_epoch=5)
    parallel = method(jax.devices()[:devices])
    step = parallel.compile_train_step(
        functools.partial(
            train.train_step, config=CONFIG, frontend=FRONTEND, training=TRAINING, optimizer=optimizer,
            steps_per_epoch=5,
        )
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), ast_jax.init(jax.random.key(0), CONFIG))
    state = parallel.replicate(train.init_state(params, optimizer, TRAINING))
    values = []
    for batch in batches(steps, dtype):
        state, value = step(state, batch)
        values.append(float(value))
    return parallel.unreplicate(state), np.array(values)


@pytest.fixture(scope="module")
def on_one():
    """The run on one device, in float64."""
    with jax.enable_x64(True):
        return run(DataParallel, 1, np.float64)


@pytest.fixture(scope="module")
def on_one_in_float32():
    return run(DataParallel, 1, np.float32)


MORE = [  # `pmap` on eight is also in test_step, with dropout, and `jit` on two in test_finetune
    (method, devices)
    for method in (DataParallel, ShardedJit)
    for devices in (1, 2, 4, 8)
    if (method, devices) != (DataParallel, 1)
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "devices"), MORE)
def test_any_number_of_devices_gives_the_same_run(method, devices, on_one):
    """Parameters to 1e-9 in float64: sums in another order, 1e-16 each, through ten steps of Adam."""
    with jax.enable_x64(True):
        got, values = run(method, devices, np.float64)
    state, losses = on_one
    np.testing.assert_allclose(values, losses, rtol=1e-9)
    for (path, leaf), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-9, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize("method", [DataParallel, ShardedJit])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_losses_in_float32(method, devices, on_one_in_float32):
    """To 1e-5: float32 rounding errors of 1e-7 each, through ten steps."""
    _, values = run(method, devices, np.float32)
    np.testing.assert_allclose(values, on_one_in_float32[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [DataParallel, ShardedJit])
def test_a_step_is_compiled_once(method):
    """The returned state must have the sharding of the state that the step takes, else the next step compiles again."""
    traces = []

    def step(state, batch, axis=None):
        traces.append(axis)
        mean = batch["labels"].mean()
        mean = mean if axis is None else jax.lax.pmean(mean, axis)
        return state.replace(step=state.step + 1, params=state.params + mean), mean

    parallel = method()
    state = parallel.replicate(train.TrainState(np.zeros((), np.int32), np.ones(3, np.float32), ()))
    run = parallel.compile_train_step(step)
    for batch in batches(3, np.float32):
        state, _ = run(state, batch)
    assert len(traces) == 1
    evaluated = []
    predict = parallel.compile_eval_step(lambda params, batch: evaluated.append(1) or batch["labels"] + params[0])
    for params in (state.params, parallel.replicate(np.ones(3, np.float32))):
        predict(params, next(batches(1, np.float32)))
    assert len(evaluated) == 1


@pytest.mark.parametrize("method", [DataParallel, ShardedJit])
def test_evaluation_gives_the_rows_in_order(method):
    params = ast_jax.init(jax.random.key(0), CONFIG)
    batch = {key: value for key, value in next(batches(1, np.float32)).items() if key != "labels"}
    step = functools.partial(train.eval_step, config=CONFIG, frontend=FRONTEND)
    parallel = method()
    got = parallel.compile_eval_step(step)(parallel.replicate(params), batch)
    assert got.shape == (16, 4)
    np.testing.assert_allclose(got, jax.jit(step)(params, batch), atol=1e-5)  # float32, other batch shapes


@pytest.mark.parametrize(
    ("size", "accumulate", "message"),
    [
        (12, 1, "12 does not divide over 8 devices; the nearest are 8 or 16"),
        (3, 1, "3 does not divide over 8 devices; the nearest are 8"),
        (
            24,
            2,
            "24 does not divide over 8 devices and 2 gradient accumulation steps on each; the nearest are 16 or 32",
        ),
    ],
)
def test_indivisible_batch_names_the_nearest(size, accumulate, message):
    with pytest.raises(ValueError, match=message):
        DataParallel().check_batch_size(size, accumulate)
    DataParallel().check_batch_size(32, accumulate)


WORKER = """
import json, sys
import jax
address, count, number, method = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if count > 1:
    jax.distributed.initialize(address, count, number)
jax.config.update("jax_enable_x64", True)
import numpy as np
from ast_jax.training import parallel
import test_parallel
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 4 // count
everything = test_parallel.batches
rows = parallel.METHODS[method]().local_rows(16)
test_parallel.batches = lambda steps, dtype: (
    {key: value[rows] for key, value in batch.items()} for batch in everything(steps, dtype)
)
state, losses = test_parallel.run(parallel.METHODS[method], 4, np.float64)
first = parallel.broadcast_json({"number": number})
flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
np.savez(sys.argv[5], losses=losses, first=first["number"], **flat)
"""


def spawn(count, method, folder):
    """Run the same training in `count` processes with four devices in total; return the results of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={4 // count}"),
        "PYTHONPATH": os.path.dirname(__file__),
    }
    outputs = [str(folder / f"{method}{count}{number}.npz") for number in range(count)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(count), str(number), method, outputs[number]],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
    return [dict(np.load(path)) for path in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pmap", "jit"])
def test_two_processes_give_what_one_gives(method, tmp_path):
    """`jax.distributed` over the loopback interface: each process loads its half of every batch."""
    (alone,) = spawn(1, method, tmp_path)
    for number, found in enumerate(spawn(2, method, tmp_path)):
        assert found.pop("first") == 0, number  # broadcast from the first process
        assert found.keys() == alone.keys() - {"first"}
        for name, leaf in found.items():
            np.testing.assert_allclose(leaf, alone[name], rtol=0, atol=1e-9, err_msg=f"{number} {name}")
