"""Strict settings for every test: eight virtual CPU devices, warnings are errors, and a cache of compiled programs.

The cache lives as long as the test run. Its processes, those that tests start among them, share it: most of the time
here goes into compiling, and many tests run the same small model.
"""

import os
import shutil
import sys
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.modules["torchaudio"] = None  # transformers' NumPy features are compared with, whatever is installed
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads get in each other's way beside other processes
OWN_CACHE = None  # of the process that made the cache, and removes it
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    OWN_CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ast_jax_programs_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax  # noqa: E402 (after its settings)
import pytest  # noqa: E402


def pytest_unconfigure():
    """Remove the compiled programs."""
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


@pytest.fixture
def x64():
    """Compute in float64 for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def quick_compilation():
    """Compile without most optimisations: for what compiles much, runs little and is no parity test."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
