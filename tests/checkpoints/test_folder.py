"""Checkpoint folders are self-contained, relocatable, readable from read-only media, and independent of devices."""

import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import ONE_DEVICE
from flax.traverse_util import flatten_dict, unflatten_dict

import ast_jax

CONFIG = ast_jax.ASTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3,
    id2label=("Speech", "Music", "Beep, bleep"), problem_type="multi_label_classification", max_length=64,
    num_mel_bins=32, head_layer_norm_eps=1e-5, unknown_keys='{"torch_dtype": "float32"}',
)  # fmt: skip
FRONTEND = ast_jax.FrontendConfig(max_length=64, num_mel_bins=32, mean=-6.5, std=5.25)


@pytest.fixture(scope="module")
def checkpoint():
    params = jax.tree.map(np.asarray, ast_jax.init(jax.random.key(3), CONFIG))
    return ast_jax.Checkpoint(params, CONFIG, FRONTEND, json.dumps({"trained_on": "nothing"}))


@pytest.fixture
def folder(checkpoint, tmp_path):
    ast_jax.save(tmp_path / "model", checkpoint)
    return tmp_path / "model"


def assert_same(got, want):
    assert got.config == want.config
    assert got.frontend == want.frontend
    assert got.metadata == want.metadata
    assert got.provenance == want.provenance
    got_leaves, want_leaves = flatten_dict(got.params, sep="/"), flatten_dict(want.params, sep="/")
    assert got_leaves.keys() == want_leaves.keys()
    for path, leaf in got_leaves.items():
        assert isinstance(leaf, np.ndarray)
        np.testing.assert_array_equal(leaf, want_leaves[path])


def test_round_trip(folder, checkpoint):
    assert_same(ast_jax.load(folder), checkpoint)


def test_unpacks_and_is_a_pytree(checkpoint):
    params, config, frontend = checkpoint
    assert (params, config, frontend) == (checkpoint.params, CONFIG, FRONTEND)
    assert len(jax.tree.leaves(checkpoint)) == len(jax.tree.leaves(params))
    doubled = jax.jit(lambda c: jax.tree.map(lambda leaf: 2 * leaf, c))(checkpoint)
    assert doubled.config == CONFIG
    np.testing.assert_array_equal(doubled.params["layernorm"]["scale"], 2 * params["layernorm"]["scale"])


def test_folder_describes_itself(folder):
    assert json.loads((folder / "ast_jax.json").read_text())["format"] == 1
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "Speech", "1": "Music", "2": "Beep, bleep"}
    assert config["problem_type"] == "multi_label_classification"
    assert config["torch_dtype"] == "float32"
    assert json.loads((folder / "preprocessor_config.json").read_text())["mean"] == -6.5


def test_loads_from_a_moved_folder(folder, checkpoint, tmp_path):
    moved = tmp_path / "else where" / "mødel"
    moved.parent.mkdir()
    shutil.move(folder, moved)
    assert_same(ast_jax.load(moved), checkpoint)


def run_python(code, *arguments, **environment):
    """Run code in a fresh process with this package importable."""
    root = pathlib.Path(ast_jax.__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": ONE_DEVICE, **environment}
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=env)


def test_loads_from_a_read_only_folder(folder, checkpoint, tmp_path):
    """Without write permission, in a process without root's override of permissions."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for parent in tmp_path.parents:  # pytest creates its folders with mode 700
        if parent.name.startswith(("pytest-", "popen-")):  # popen-: the folders of pytest-xdist
            parent.chmod(0o755)
    tmp_path.chmod(0o755)
    code = """
import os, pathlib, sys
import ast_jax
ast_jax.load(sys.argv[2])  # import everything before dropping root, which may be needed to read Python itself
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
try:
    (pathlib.Path(sys.argv[1]) / "probe").write_text("x")
    sys.exit("the folder is writable")
except PermissionError:
    pass
print(float(ast_jax.load(sys.argv[1]).params["embeddings"]["cls_token"].sum()))
"""
    try:
        done = run_python(code, folder, copy, HOME=str(tmp_path))
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == float(checkpoint.params["embeddings"]["cls_token"].sum())


def test_saved_on_eight_devices_loads_on_one(checkpoint, tmp_path):
    assert jax.local_device_count() == 8
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    shard = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    replicate = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.tree.map(
        lambda leaf: jax.device_put(leaf, shard if leaf.shape[0] % 8 == 0 else replicate), checkpoint.params
    )
    ast_jax.save(tmp_path / "eight", checkpoint.replace(params=params))
    code = """
import sys, jax, ast_jax
assert jax.local_device_count() == 1
checkpoint = ast_jax.load(sys.argv[1])
print(float(checkpoint.params["layers"]["mlp"]["fc1"]["kernel"].sum()))
"""
    done = run_python(code, tmp_path / "eight")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == float(checkpoint.params["layers"]["mlp"]["fc1"]["kernel"].sum())


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_on_disk_is_float32_when_loaded(dtype, checkpoint, tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), checkpoint.params)
    ast_jax.save(tmp_path / "half", checkpoint.replace(params=half))
    loaded = flatten_dict(ast_jax.load(tmp_path / "half").params, sep="/")
    for path, leaf in flatten_dict(half, sep="/").items():
        assert loaded[path].dtype == np.float32
        np.testing.assert_array_equal(loaded[path], leaf.astype(np.float32))


def test_headless_params_are_a_checkpoint(checkpoint, tmp_path):
    body = {name: value for name, value in checkpoint.params.items() if name != "classifier"}
    ast_jax.save(tmp_path / "body", checkpoint.replace(params=body))
    assert "classifier" not in ast_jax.load(tmp_path / "body").params


def test_mismatched_params_are_listed_and_nothing_is_written(checkpoint, tmp_path):
    flat = flatten_dict(checkpoint.params, sep="/")
    del flat["layernorm/scale"]
    flat["layernorm/gamma"] = np.ones(32)
    flat["classifier/dense/bias"] = np.ones(4)
    with pytest.raises(ast_jax.CheckpointError) as caught:
        ast_jax.save(tmp_path / "bad", checkpoint.replace(params=unflatten_dict(flat, sep="/")))
    message = str(caught.value)
    assert "missing: layernorm/scale" in message
    assert "unexpected: layernorm/gamma" in message
    assert "wrong shape: classifier/dense/bias (expected (3,), got (4,))" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("field", "value"), [("max_length", 128), ("num_mel_bins", 64)])
def test_features_of_another_size_are_refused(field, value, folder, checkpoint, tmp_path):
    message = f"the features do not fit the model: config.json has {field} {getattr(CONFIG, field)}, .*json {value};"
    with pytest.raises(ast_jax.CheckpointError, match=message):
        ast_jax.save(tmp_path / "bad", checkpoint.replace(frontend=FRONTEND.replace(**{field: value})))
    assert not (tmp_path / "bad").exists()
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ast_jax.CheckpointError, match=message):
        ast_jax.load(folder)


@pytest.mark.parametrize(
    ("name", "field", "value", "expected"),
    [
        ("config.json", "hidden_size", None, "an integer, got None"),
        ("config.json", "num_hidden_layers", True, "an integer, got True"),
        ("config.json", "intermediate_size", [3], r"an integer, got \[3\]"),
        ("config.json", "hidden_act", 3, "a string, got 3"),
        ("config.json", "problem_type", {}, "None or one of .*, got {}"),
        ("config.json", "layer_norm_eps", "1e-6", "a finite number, got '1e-6'"),
        ("config.json", "head_layer_norm_eps", [], r"None or a finite number, got \[\]"),
        ("config.json", "hidden_dropout_prob", None, "a finite number, got None"),
        ("config.json", "qkv_bias", "yes", "true or false, got 'yes'"),
        ("config.json", "patch_size", [16, 16, 3], r"an integer or a tuple .*, got \[16, 16, 3\]"),
        ("config.json", "id2label", ["Speech", "Music", "Beep"], r"an object with a name for each index, got \["),
        ("config.json", "id2label", 3, "an object with a name for each index, got 3"),
        ("preprocessor_config.json", "max_length", "64", "an integer, got '64'"),
        ("preprocessor_config.json", "sampling_rate", 16000.5, "an integer, got 16000.5"),
        ("preprocessor_config.json", "mean", None, "a finite number, got None"),
        ("preprocessor_config.json", "std", True, "a finite number, got True"),
        ("preprocessor_config.json", "mean", float("inf"), "a finite number, got inf"),
        ("preprocessor_config.json", "do_normalize", 1, "true or false, got 1"),
        ("preprocessor_config.json", "window_type", ["hanning"], r"a string, got \['hanning'\]"),
    ],
)
def test_values_of_a_wrong_type_name_file_and_field(name, field, value, expected, folder):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ast_jax.CheckpointError, match=f"{name}: {field}( in {name})?: expected {expected}"):
        ast_jax.load(folder)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "ast_jax.json"])
def test_files_without_a_json_object_are_refused(name, folder):
    (folder / name).write_text("[1, 2]")
    with pytest.raises(ast_jax.CheckpointError, match=f"{name}: expected a JSON object, got list"):
        ast_jax.load(folder)


def test_save_replaces_a_checkpoint_but_nothing_else(folder, checkpoint, tmp_path):
    other = checkpoint.replace(params=jax.tree.map(lambda leaf: leaf + 1, checkpoint.params))
    ast_jax.save(folder, other)
    assert_same(ast_jax.load(folder), other)
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ast_jax.CheckpointError, match="got something else"):
        ast_jax.save(precious, checkpoint)
    assert [path.name for path in precious.iterdir()] == ["cat.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "photos"]


def test_failed_save_keeps_the_old_checkpoint(folder, checkpoint, monkeypatch, tmp_path):
    import orbax.checkpoint as ocp

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        ast_jax.save(folder, checkpoint)
    monkeypatch.undo()
    assert_same(ast_jax.load(folder), checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Orbax leaves its event loop open when a read fails, which warns when it is garbage-collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["no params", "truncated params", "bad json", "other format", "no config"])
def test_damaged_folders_are_refused_in_one_line(damage, folder):
    if damage == "no params":
        shutil.rmtree(folder / "params")
    elif damage == "truncated params":
        largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:100])
    elif damage == "bad json":
        (folder / "config.json").write_text('{"hidden_size": ')
    elif damage == "other format":
        (folder / "ast_jax.json").write_text('{"format": 99}')
    else:
        (folder / "config.json").unlink()
    with pytest.raises(ast_jax.CheckpointError) as caught:
        ast_jax.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    del caught
    gc.collect()


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ast_jax.CheckpointError, match="expected a shipped model"):
        ast_jax.load("no-such-model")
    with pytest.raises(ast_jax.CheckpointError, match=r"found no config\.json"):
        ast_jax.load(tmp_path)


def test_hub_id_without_a_network_fails_in_one_line(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConnectionError, match="cannot be reached") as caught:
        ast_jax.load("MIT/ast-finetuned-audioset-10-10-0.4593")
    assert "\n" not in str(caught.value)
