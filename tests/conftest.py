"""Strict settings for every test: eight virtual CPU devices, no implicit rank promotion, and cheap compilation.

Most of the tests' CPU time is compilation. All processes of a run, those that tests start among them, share a cache of
compiled programs, which lives as long as the run. XLA compiles with fewer optimisations and without fusion emitters,
which take most of that time; with `XLA_FLAGS=--xla_cpu_use_fusion_emitters=true` it compiles as it does for users, and
so .ci/run repeats the comparisons with PyTorch.
"""

import gc
import mmap
import os
import pathlib
import shutil
import sys
import tempfile

import jaxlib


def xla_knows(flag):
    """Return whether this jaxlib has an XLA flag: XLA aborts the process at an unknown one."""
    for library in pathlib.Path(jaxlib.__file__).parent.glob("libjax_common.*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(flag.encode()) >= 0
    return False


FUSION_EMITTERS = "xla_cpu_use_fusion_emitters"
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:  # pytest-xdist's workers inherit it
    flags += " --xla_force_host_platform_device_count=8"
if FUSION_EMITTERS not in flags and xla_knows(FUSION_EMITTERS):
    flags += f" --{FUSION_EMITTERS}=false --xla_backend_optimization_level=1"
os.environ["XLA_FLAGS"] = flags
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

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """Spare the garbage collector the hundreds of thousands of objects of the imported libraries."""
    gc.collect()
    gc.freeze()


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
