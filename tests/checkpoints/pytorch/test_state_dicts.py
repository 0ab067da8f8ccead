"""State dicts from folders, files, shards, memory, and a fake of the Hugging Face Hub."""

import json
import shutil
import struct

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import torch_models
from flax.traverse_util import flatten_dict
from huggingface_hub import errors

import ast_jax
from ast_jax import CheckpointError
from ast_jax.checkpoints import hub
from ast_jax.checkpoints.pytorch.state_dicts import WEIGHTS, read_safetensors, read_source

INDEX = "model.safetensors.index.json"


def tensors(*names, value=1.0):
    return {name: np.full((2, 3), value, np.float32) for name in names}


def folder_with(folder, files):
    """Fill a folder: dicts of arrays as safetensors or torch files, bytes unchanged, all else as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": {}, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif name.endswith(".safetensors"):
            safetensors.numpy.save_file(content, path)
        elif name.endswith((".bin", ".pth")):
            torch.save({key: torch.from_numpy(array) for key, array in content.items()}, path)
        elif content is not None:
            path.write_text(json.dumps(content))
    return folder


def index_of(**weight_map):
    return {"metadata": {}, "weight_map": weight_map}


def raw_safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


WHOLE = safetensors.numpy.save(tensors("a", "b"))
SHARD = "model-00001-of-00001.safetensors"
F8 = {"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
BEYOND = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
BAD_FOLDERS = {  # content, pattern of the message
    "no config": ({"config.json": None, "model.safetensors": tensors("a")}, r"found no config\.json in it$"),
    "a run": (
        {"config.json": None, "best/config.json": {}, "run.json": {}},
        r"no config\.json in it; the checkpoint of a run is .*best$",
    ),
    "no weights": ({"optimizer.pt": b"x"}, r"expected model\.safetensors, .* or pytorch_model.bin.index.json, found"),
    "missing shard": ({INDEX: index_of(a=SHARD)}, rf"{INDEX}: lists the file '{SHARD}', which is not in "),
    "missing torch shard": (
        {"pytorch_model.bin.index.json": index_of(a="b.bin")},
        r"pytorch_model.bin.index.json: lists the file 'b.bin', which is not in ",
    ),
    # Existing files outside the folder: an index must not lead there.
    "above": ({INDEX: index_of(a="../x.safetensors"), "../x.safetensors": tensors("a")}, r"lists the file '\.\./x\.s"),
    "below": ({INDEX: index_of(a="in/x.safetensors"), "in/x.safetensors": tensors("a")}, "lists the file 'in/x"),
    "itself": ({INDEX: index_of(a=".")}, r"lists the file '\.'"),
    "shard with more": (
        {INDEX: index_of(a=SHARD), SHARD: tensors("a", "c", "b")},
        rf"{SHARD}: the tensors are not those that {INDEX} lists; unexpected: b, c$",
    ),
    "shard with less": ({INDEX: index_of(a=SHARD, d=SHARD), SHARD: tensors("a")}, r"lists; missing: d$"),
    "tensor in another shard": (
        {INDEX: index_of(a=SHARD, b="x.safetensors"), SHARD: tensors("a", "b"), "x.safetensors": tensors("b")},
        rf"{SHARD}: .*unexpected: b$",
    ),
    "cut off shard": ({INDEX: index_of(a=SHARD), SHARD: WHOLE[:-1]}, rf"{SHARD}: not a readable safetensors file"),
    "no weight_map": ({INDEX: {"metadata": {}}}, rf"{INDEX}: expected a file name for each tensor under weight"),
    "weight_map of lists": ({INDEX: index_of(a=["x"])}, rf"{INDEX}: expected a file name for each tensor"),
    "index is a list": ({INDEX: ["a"]}, rf"{INDEX}: expected a JSON object, got list"),
    "index is no JSON": ({INDEX: b"\xff\xfe{"}, rf"{INDEX}: expected a JSON file"),
    "nested index": ({INDEX: b"[" * 200_000}, rf"{INDEX}: expected a JSON file"),
    "cut off": ({"model.safetensors": WHOLE[:-1]}, r"model\.safetensors: not a readable safetensors file"),
    "cut off torch file": ({"pytorch_model.bin": b"PK\3\4" + bytes(100)}, r"pytorch_model.bin: expected a state dict"),
    "config is a list": ({"config.json": [1], "model.safetensors": WHOLE}, r"config\.json: expected a JSON object"),
    "nested config": (
        {"config.json": b'{"a":' * 200_000, "model.safetensors": WHOLE}, r"config\.json: expected a JSON file"
    ),
    "no JSON": ({"preprocessor_config.json": b"{", "model.safetensors": WHOLE}, r"r_config.json: expected a JSON"),
}  # fmt: skip
BAD_FILES = {
    "empty": b"",
    "one byte": b"x",
    "text": b"<!DOCTYPE html><html></html>",
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "header too long": struct.pack("<Q", 1 << 62) + b"{}",
    "header is no JSON": raw_safetensors(b"{{{{"),
    "header is a list": raw_safetensors(b"[1, 2]"),
    "data beyond the end": raw_safetensors(BEYOND, b"1234"),
    "8-bit floats": raw_safetensors(F8, b"12"),
    **{f"cut at {size}": WHOLE[:size] for size in (4, 8, 60, len(WHOLE) - 24, len(WHOLE) - 1)},
    "a byte too many": WHOLE + b"x",
}


def all_of(path):
    """Read a source and the JSON files beside it, which are read lazily."""
    found = read_source(path)
    return found.name, found.state, found.read_json("config.json"), found.read_json("preprocessor_config.json")


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders(case, tmp_path):
    files, message = BAD_FOLDERS[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        all_of(folder_with(tmp_path / "model", files))
    assert one_line(caught).startswith(str(tmp_path / "model"))


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_safetensors(case, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_FILES[case])
    with pytest.raises(CheckpointError) as caught:
        read_source(path)
    what = "a: expected one of F64, F32" if case == "8-bit floats" else "not a readable safetensors"
    assert one_line(caught).startswith(f"{path}: {what}")


@pytest.mark.parametrize("name", ["none", "none.safetensors", "none/none.pth"])
def test_missing_sources(name, tmp_path):
    with pytest.raises(CheckpointError, match="a checkpoint folder, PyTorch weights or a Hub id like owner/name, got"):
        read_source(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a", {"b": np.zeros(3)}), ("a", None), ("a", [[1.0], [1.0, 2.0]]), (0, np.zeros(3)),
        ("a", torch.zeros(2).to(torch.float8_e4m3fn)), ("a", torch.zeros(2, device="meta")),
    ],
    ids=["dict", "None", "ragged", "number as name", "8-bit", "without data"],
)  # fmt: skip
def test_dicts_of_other_values(name, value):
    """One line that names the entry, whatever exception NumPy or PyTorch raise."""
    with pytest.raises(CheckpointError) as caught:
        ast_jax.from_torch({"v.blocks.0.norm1.weight": np.zeros(3), name: value})
    assert one_line(caught).startswith(f"state dict: {name}: expected ")


def test_precedence_of_weight_files(tmp_path):
    """Single files before shards, safetensors before torch files; later ones are not read."""
    files = {
        "model.safetensors": tensors("a", value=1), INDEX: index_of(a=SHARD), SHARD: tensors("a", value=2),
        "pytorch_model.bin": tensors("a", value=3), "pytorch_model.bin.index.json": index_of(a="s.bin"),
        "s.bin": tensors("a", value=4), "other.safetensors": tensors("b"), "training_args.bin": b"no state dict",
    }  # fmt: skip
    folder_with(tmp_path, files)
    for value, name in enumerate(WEIGHTS, 1):
        state = read_source(tmp_path).state
        assert state.keys() == {"a"}
        assert (state["a"] == value).all()
        (tmp_path / name).unlink()


def test_json_files_beside_the_weights(tmp_path):
    """JSON files are found for a file as for its folder; a missing one is None."""
    folder_with(tmp_path, {"config.json": {"c": 1}, "model.safetensors": tensors("a"), "w.pth": tensors("a")})
    for source in (tmp_path, tmp_path / "model.safetensors", str(tmp_path / "w.pth")):
        name, _, *beside = all_of(source)
        assert (name, beside) == (str(source), [{"c": 1}, None])
    (tmp_path / "config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text('{"p": 1}')
    assert all_of(tmp_path / "w.pth")[2:] == (None, {"p": 1})


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.pth"])
def test_arrays_are_read_only_views(name, tmp_path):
    state = read_source(folder_with(tmp_path, {name: tensors("a", "b")}) / name).state
    for array in state.values():
        assert array.base is not None
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


def test_dtypes_and_shapes_of_safetensors(tmp_path):
    """All dtypes of PyTorch with the same bits, with bfloat16; scalars and empty arrays too."""
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool)  # fmt: skip
    written = {f"{kind} {shape}": (torch.rand(shape) * 9).to(kind) for kind in kinds for shape in ((2, 3), (), (0, 4))}
    safetensors.torch.save_file(written, tmp_path / "w.safetensors", {"format": "pt"})
    read = read_safetensors(tmp_path / "w.safetensors")
    in_memory = read_source(written).state
    assert read.keys() == in_memory.keys() == written.keys()
    for name, tensor in written.items():
        want = tensor.to(torch.float64).numpy()
        for got in (read[name], in_memory[name]):
            kind = str(tensor.dtype).removeprefix("torch.")
            assert got.dtype == (ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
            np.testing.assert_array_equal(got.astype(np.float64), want, strict=True)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """Fake the Hub: `remote` is its content, `asked` the requests; the filter is the real one."""

    class Hub:
        remote = tmp_path / "remote"
        asked = ()

        def snapshot_download(self, repo_id, allow_patterns):
            self.asked = [*self.asked, allow_patterns]
            names = [path.relative_to(self.remote).as_posix() for path in self.remote.rglob("*") if path.is_file()]
            for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
                to = tmp_path / "cache" / repo_id / name
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.remote / name, to)
            return str(tmp_path / "cache" / repo_id)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", (made := Hub()).snapshot_download)
    return made


BIN_INDEX = "pytorch_model.bin.index.json"
OTHERS = {"README.md": b"x", "pytorch_model.bin": tensors("a"), BIN_INDEX: index_of(a="s.bin"), "tf_model.h5": b"x"}
JSON = {"config.json", "preprocessor_config.json"}
REPOSITORIES = {  # content beside config.json: downloaded files, number of calls
    "safetensors": ({"model.safetensors": tensors("a"), **OTHERS}, {*JSON, "model.safetensors"}, 1),
    "shards": ({INDEX: index_of(a=SHARD), SHARD: tensors("a"), **OTHERS}, {*JSON, INDEX, SHARD}, 1),
    "our own": ({"ast_jax.json": {}, "params/d/0": b"x", **OTHERS}, {*JSON, "ast_jax.json", "params/d/0"}, 1),
    "torch": (OTHERS, {*JSON, "pytorch_model.bin", BIN_INDEX}, 2),
    "torch shards": ({BIN_INDEX: index_of(a="s.bin"), "s.bin": tensors("a")}, {*JSON, BIN_INDEX, "s.bin"}, 2),
}  # fmt: skip


@pytest.mark.parametrize("case", REPOSITORIES)
def test_only_needed_files_are_downloaded(case, fake_hub):
    files, want, calls = REPOSITORIES[case]
    folder_with(fake_hub.remote, {"preprocessor_config.json": {}, **files})
    folder = hub.download("owner/name")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == want
    assert [any(".bin" in pattern for pattern in patterns) for patterns in fake_hub.asked] == [False, True][:calls]
    if case != "our own":
        assert (read_source(folder).state["a"] == 1).all()


@pytest.mark.parametrize("safe", [True, False])
def test_a_hub_id_loads_as_its_folder_does(safe, fake_hub):
    model = torch_models.saved_model(fake_hub.remote, "stride-10-10", num_hidden_layers=1)
    want = flatten_dict(ast_jax.load(fake_hub.remote).params, sep="/")
    if not safe:
        (fake_hub.remote / "model.safetensors").unlink()
        torch.save(model.state_dict(), fake_hub.remote / "pytorch_model.bin")
    for read in (ast_jax.load, ast_jax.from_torch):
        got = read("owner/name")
        assert flatten_dict(got.params, sep="/").keys() == want.keys()
        assert all(np.array_equal(leaf, want[path]) for path, leaf in flatten_dict(got.params, sep="/").items())
        assert got.provenance.source == "owner/name"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (errors.HFValidationError("no id"), ValueError, "neither a local folder nor a model on the Hub"),
        (errors.LocalEntryNotFoundError("not cached\nand offline"), ConnectionError, r"cannot be reached \(LocalEntry"),
        (OSError("no\nroute"), ConnectionError, r"owner/name: not a local folder, .* cannot be reached \(OSError\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_hub_errors(error, kind, message, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(kind, match=message) as caught:
        ast_jax.load("owner/name")
    one_line(caught)
