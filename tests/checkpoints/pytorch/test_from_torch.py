"""`from_torch`: identical bits from every kind of source, no tensor unaccounted for, errors in one line."""

import json
import shutil
import types

import numpy as np
import pytest
import safetensors.torch
import torch
import torch_models
import torch_original
import transformers
import typer.testing
from flax.traverse_util import flatten_dict
from torch_original import OriginalAST

import ast_jax
from ast_jax import CheckpointError
from ast_jax.checkpoints.provenance import SourceFormat
from ast_jax.cli import main
from ast_jax.labels import label_set_of_size

HF = "audio_spectrogram_transformer."
WEIGHTS = "model.safetensors"
LAYERS = 2
# The original's names in transformers' files, independent of the tables in names.py that are tested here.
RENAMED = [
    ("mlp_head.0", "classifier.layernorm"), ("mlp_head.1", "classifier.dense"), ("v.norm", f"{HF}layernorm"),
    ("v.cls_token", f"{HF}embeddings.cls_token"), ("v.dist_token", f"{HF}embeddings.distillation_token"),
    ("v.pos_embed", f"{HF}embeddings.position_embeddings"), ("v.blocks", f"{HF}encoder.layer"),
    ("v.patch_embed.proj", f"{HF}embeddings.patch_embeddings.projection"), (".norm1", ".layernorm_before"),
    (".attn.qkv.", ".attention.attention.qkv."), (".attn.proj", ".attention.output.dense"),
    (".norm2", ".layernorm_after"), (".mlp.fc1", ".intermediate.dense"), (".mlp.fc2", ".output.dense"),
]  # fmt: skip


def tensors_of(folder, model):
    """Return a live model, the folder that it was saved in, and the state dict of each."""
    disk = safetensors.torch.load_file(folder / WEIGHTS)
    return types.SimpleNamespace(folder=folder, model=model, live=model.state_dict(), disk=disk)


@pytest.fixture(scope="module", params=["with head", "headless"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    cls = transformers.ASTModel if request.param == "headless" else transformers.ASTForAudioClassification
    return tensors_of(folder, torch_models.saved_model(folder, "stride-10-10", cls, num_hidden_layers=LAYERS))


WITH_HEAD = pytest.mark.parametrize("made", ["with head"], indirect=True)


def original(**changes):
    return torch_original.randomized(OriginalAST(**{"label_dim": 7, "input_tdim": 128, "depth": LAYERS, **changes}))


def same(got, want):
    """Assert that two parameter trees have the same arrays and dtypes."""
    got, want = flatten_dict(got, sep="/"), flatten_dict(want, sep="/")
    assert got.keys() == want.keys()
    for path, leaf in got.items():
        np.testing.assert_array_equal(leaf, want[path], path, strict=True)


def refused(source, **options):
    """Return the one-line error message for a source."""
    with pytest.raises(CheckpointError) as caught:
        ast_jax.from_torch(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def in_shards(made, folder):
    """Write pytorch_model.bin in two shards with an index, as transformers 4 did."""
    names, weight_map = sorted(made.disk), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: made.disk[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(made.folder / "config.json", folder)
    return folder


def in_bin(made, folder):
    torch.save(made.disk, folder / "pytorch_model.bin")
    shutil.copy(made.folder / "config.json", folder)
    return folder


def in_file(name, get, **options):
    def write(made, folder):
        torch.save(get(made), folder / name, **options)
        return folder / name

    return write


def with_module(state):
    return {f"module.{name}": tensor for name, tensor in state.items()}


def saved_in_shards(made, folder):
    made.model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 5
    return folder


SOURCES = {
    "folder as text": lambda made, _: str(made.folder),
    "file beside config.json": lambda made, _: made.folder / WEIGHTS,
    "file alone": lambda made, folder: shutil.copy(made.folder / WEIGHTS, folder),
    "shards": saved_in_shards,
    "bin": in_bin,
    "bin in shards": in_shards,
    "names of version 4": in_file("w.pth", lambda made: made.disk),
    "names of version 5": in_file("w.pt", lambda made: made.live),
    "before PyTorch 1.6": in_file("w.bin", lambda made: made.live, _use_new_zipfile_serialization=False),
    "in a training checkpoint": in_file("w.ckpt", lambda made: {"epoch": 3, "state_dict": made.live}),
    "DataParallel's names": in_file("w.pth", lambda made: with_module(made.live)),
    "tensors in memory": lambda made, _: made.live,
    "parameters in memory": lambda made, _: dict(made.model.named_parameters()),
    "arrays in memory": lambda made, _: {name: tensor.numpy() for name, tensor in made.disk.items()},
    "live model": lambda made, _: made.model,
    "live model in DataParallel": lambda made, _: torch.nn.DataParallel(made.model),
}
WITH_CONFIG = {"folder as text", "file beside config.json", "shards", "bin", "bin in shards", "live model",
               "live model in DataParallel"}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_bits(kind, made, tmp_path):
    checkpoint, want = ast_jax.from_torch(SOURCES[kind](made, tmp_path)), ast_jax.load(made.folder)
    same(checkpoint.params, want.params)
    provenance = checkpoint.provenance
    assert (provenance.num_tensors, provenance.ignored) == (len(made.live), ())
    assert (provenance.dtype, provenance.other_dtypes) == ("float32", ())
    untold = {"id2label": (), "unknown_keys": "{}"}
    if kind not in WITH_CONFIG and "classifier" not in want.params:
        untold["num_labels"] = 7
    assert checkpoint.config.replace(**untold) == want.config.replace(**untold)
    notes = "\n".join(provenance.notes)
    assert ("of DataParallel" in notes) == ("DataParallel" in kind)
    for assumed in ("no config.json: eps 1e-12", "3 heads of 64", "strides 10 10 and 128 frames: as pub"):
        assert (assumed in notes) != (kind in WITH_CONFIG)


def test_the_configuration_of_a_live_model_is_read():
    """Its configuration is read, inside DataParallel too, and nothing is assumed."""
    model = transformers.ASTForAudioClassification(
        torch_models.torch_config("relu", num_hidden_layers=1, layer_norm_eps=1e-3, num_attention_heads=6)
    )
    for source in (model, torch.nn.DataParallel(model)):
        config = ast_jax.from_torch(source).config
        assert (config.hidden_act, config.layer_norm_eps, config.num_attention_heads) == ("relu", 1e-3, 6)


@pytest.mark.parametrize("kind", ["file alone", "names of version 4", "tensors in memory", "live model"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, kind, tmp_path):
    """Half precision is widened, which is exact, and the provenance says what it was."""
    model = torch_models.saved_model(tmp_path, "stride-10-10", num_hidden_layers=1).to(dtype)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "new").mkdir()
    checkpoint = ast_jax.from_torch(SOURCES[kind](tensors_of(tmp_path / "saved", model), tmp_path / "new"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    same(checkpoint.params, ast_jax.from_torch(model.to(wide)).params)
    assert {leaf.dtype for leaf in flatten_dict(checkpoint.params, sep="/").values()} == {
        np.dtype(str(wide).removeprefix("torch."))
    }
    provenance = checkpoint.provenance
    assert (provenance.dtype, provenance.other_dtypes) == (str(dtype).removeprefix("torch."), ())


MIXED = {  # format: a state dict, the name of a bias of q, k and v in it, and its exported name
    "disk": (lambda made: made.disk, f"{HF}encoder.layer.1.attention.attention.key.bias",
             f"{HF}encoder.layer.1.attention.attention.key.bias"),
    "live": (lambda made: made.live, f"{HF}layers.1.attention.k_proj.bias",
             f"{HF}encoder.layer.1.attention.attention.key.bias"),
    "original": (lambda _: with_module(original().state_dict()), "module.v.blocks.1.attn.qkv.bias",
                 "v.blocks.1.attn.qkv.bias"),
}  # fmt: skip


@WITH_HEAD
@pytest.mark.parametrize("form", MIXED)
def test_mixed_dtypes(form, made):
    """Each tensor keeps its bits; an array stacked from several tensors has the widest of their dtypes."""
    get, name, back = MIXED[form]
    state = {key: tensor.to(torch.bfloat16) for key, tensor in get(made).items()}
    state[name] = get(made)[name].to(torch.float64) / 3
    checkpoint = ast_jax.from_torch(state)
    params, provenance = flatten_dict(checkpoint.params, sep="/"), checkpoint.provenance
    body = back.removeprefix("audio_spectrogram_transformer.").removeprefix("v.")  # the prefix depends on the export
    assert (provenance.dtype, provenance.other_dtypes) == ("bfloat16", ((body, "float64"),))
    assert (provenance.dtype_of(body), provenance.dtype_of("another")) == ("float64", "bfloat16")
    qkv = params.pop("layers/attention/qkv/bias")
    part = qkv[1] if form == "original" else qkv[1, 1]
    np.testing.assert_array_equal(part.ravel(), state[name].numpy())
    assert qkv.dtype == np.float64
    wide = flatten_dict(ast_jax.from_torch({key: tensor.float() for key, tensor in state.items()}).params, sep="/")
    np.testing.assert_array_equal(qkv[0], wide.pop("layers/attention/qkv/bias")[0])
    same(params, wide)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_originals_files(prefix, tmp_path):
    state = original().state_dict()
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "ast_10_10_.pth")
    # An unrelated config.json in the same folder is ignored.
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    checkpoint = ast_jax.from_torch(tmp_path / "ast_10_10_.pth")
    renamed = {}
    for name, tensor in state.items():
        for old, new in RENAMED:
            name = name.replace(old, new)
        parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True) if ".qkv." in name else [("qkv", tensor)]
        renamed |= {name.replace("qkv", part): piece for part, piece in parts if not name.startswith("v.head")}
    same(checkpoint.params, ast_jax.from_torch(renamed).params)
    config, provenance = checkpoint.config, checkpoint.provenance
    assert (config.layer_norm_eps, config.head_eps) == (torch_original.BODY_EPS, torch_original.HEAD_EPS)
    assert (config.grid, config.max_length, config.num_labels, config.id2label) == ((12, 12), 128, 7, ())
    heads = sorted(f"v.head{which}.{what}" for which in ("", "_dist") for what in ("weight", "bias"))
    assert [name for name, _ in provenance.ignored] == heads
    assert all("ImageNet" in reason for _, reason in provenance.ignored)
    assert provenance.num_tensors == len(state) - 4
    assert provenance.format is SourceFormat.ORIGINAL
    assert not provenance.imagenet_only
    without_heads = {name: tensor for name, tensor in state.items() if name not in heads}
    assert ast_jax.from_torch(without_heads).provenance.ignored == ()


def test_other_json_beside_the_originals_files(tmp_path):
    """An unrelated config.json is ignored, even if it is not an object."""
    torch.save(original().state_dict(), tmp_path / "ast.pth")
    (tmp_path / "config.json").write_text("[]")
    assert ast_jax.from_torch(tmp_path / "ast.pth").config.max_length == 128


@pytest.mark.parametrize(
    ("width", "heads", "hw", "wrapped"), [(192, 3, 24, False), (192, 3, 14, True), (384, 6, 14, False)]
)
def test_imagenet_weights(width, heads, hw, wrapped, tmp_path):
    """They are converted like in the original's constructor; the published files are wrapped."""
    state = {name: tensor.double() for name, tensor in torch_original.deit_state(width, 1, heads, hw).items()}
    torch.save({"model": state} if wrapped else state, tmp_path / "deit.pth")
    checkpoint = ast_jax.from_torch(tmp_path / "deit.pth")
    config, provenance = checkpoint.config, checkpoint.provenance
    assert (config.grid, config.max_length, config.num_attention_heads) == ((12, 101), 1024, heads)
    assert sorted(dict(provenance.ignored)) == ["head.bias", "head.weight", "head_dist.bias", "head_dist.weight"]
    assert any(note.startswith("ImageNet initialisation") for note in provenance.notes)
    assert (provenance.imagenet_only, provenance.grid_resized) == (True, True)
    want = OriginalAST.from_imagenet(state, width=width, depth=1, heads=heads).v.state_dict()
    want = flatten_dict(ast_jax.from_torch({f"v.{name}": tensor for name, tensor in want.items()}).params, sep="/")
    got = flatten_dict(checkpoint.params, sep="/")
    assert got.keys() == want.keys()  # no classifier
    for path, leaf in got.items():
        computed = path in ("embeddings/position_embeddings", "embeddings/projection/kernel")
        # Sums of three numbers and means of two: float64 rounds at 1e-16.
        np.testing.assert_allclose(leaf, want[path], rtol=0, atol=1e-13 if computed else 0, strict=True)
    shorter = ast_jax.from_torch(state, max_length=128, num_labels=7)
    assert (shorter.config.grid, shorter.params["classifier"]["dense"]["kernel"].shape) == ((12, 12), (width, 7))


LABELLED = {
    "config.json": lambda count: transformers.ASTForAudioClassification(
        torch_models.torch_config("stride-10-10", num_hidden_layers=1, num_labels=count)
    ),
    "state dict": lambda count: LABELLED["config.json"](count).state_dict(),
    "original": lambda count: original(label_dim=count, depth=1).state_dict(),
}


@pytest.mark.parametrize("kind", LABELLED)
@pytest.mark.parametrize("count", [527, 35, 50, 36])
def test_known_labels_are_attached(count, kind):
    """LABEL_0, the placeholder of transformers, does not count as a name."""
    checkpoint, known = ast_jax.from_torch(LABELLED[kind](count)), label_set_of_size(count)
    notes = [note for note in checkpoint.provenance.notes if "labels" in note]
    said = f"the {count} labels have no names; those of {known.name} are assumed from their number" if known else None
    assert [note.split(" (to")[0] for note in notes] == ([said] if known else [])
    assert checkpoint.config.labels == (known.labels if known else tuple(f"LABEL_{index}" for index in range(count)))
    # The same holds for the statistics of the data set, which the original's weights do not contain.
    means = {35: -6.845978, 50: -6.6268077} if kind == "original" else {}
    assert checkpoint.frontend.mean == means.get(count, -4.2677393)


def test_existing_labels_are_kept():
    names = [f"bird {index}" for index in range(50)]
    config = torch_models.torch_config("stride-10-10", num_labels=50, id2label=dict(enumerate(names)))
    for cls in (transformers.ASTForAudioClassification, transformers.ASTModel):
        checkpoint = ast_jax.from_torch(cls(config))
        assert checkpoint.config.id2label == tuple(names)
        assert not any("labels" in note for note in checkpoint.provenance.notes)
    headless = transformers.ASTModel(torch_models.torch_config("stride-10-10", num_hidden_layers=1, num_labels=527))
    assert ast_jax.from_torch(headless).config.labels[0] == "LABEL_0"


BAD_VALUES = [  # file, its content, the field in the message
    ("config.json", {"hidden_act": "mish"}, "hidden_act"), ("config.json", {"num_attention_heads": 5}, "num_attention"),
    ("config.json", {"hidden_size": "192"}, "hidden_size"), ("config.json", {"layer_norm_eps": None}, "layer_norm_eps"),
    ("config.json", {"id2label": {"0": "a", "2": "b"}}, "id2label"), ("config.json", {"model_type": "vit"}, "model"),
    ("preprocessor_config.json", {"std": 0}, "std"), ("preprocessor_config.json", {"mean": "-4"}, "mean"),
]  # fmt: skip


@WITH_HEAD
@pytest.mark.parametrize(("file", "values", "field"), BAD_VALUES)
def test_bad_values_name_their_file_and_field(file, values, field, made, tmp_path):
    path = shutil.copytree(made.folder, tmp_path / "model") / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    for source in (path.parent, path.parent / WEIGHTS):
        assert refused(source).startswith(f"{path}: {field}")


@WITH_HEAD
def test_features_of_another_size(made, tmp_path):
    path = shutil.copytree(made.folder, tmp_path / "model") / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_length": 1024}))
    assert "config.json has max_length 128, preprocessor_config.json 1024; set both" in refused(path.parent)


def test_a_folder_is_called_by_its_name(tmp_path, monkeypatch):
    torch_models.saved_model(tmp_path / "ast", "stride-10-10", num_hidden_layers=1)
    monkeypatch.chdir(tmp_path / "ast")
    for source in (".", "../ast", tmp_path / "ast"):
        assert ast_jax.from_torch(source).provenance.source == "ast"


RESNET = {"conv1.weight": torch.zeros(2, 3, 7, 7), "layer1.0.bn1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}
BERT = {"encoder.layer.0.attention.self.query.weight": torch.zeros(4, 4), "pooler.dense.bias": torch.zeros(4)}
BAD_FILES = {  # file name: function that writes it
    "resnet.safetensors": lambda path: safetensors.torch.save_file(RESNET, path),
    "resnet.pth": lambda path: torch.save(RESNET, path),
    "bert.bin": lambda path: torch.save(BERT, path),
    "nothing.pth": lambda path: torch.save({}, path),
    "object.pth": lambda path: torch.save(OriginalAST(label_dim=2, depth=1, input_tdim=32), path),
    "empty.pth": lambda path: path.touch(),
    "text.bin": lambda path: path.write_text("not found\n"),
    "cut.safetensors": lambda path: path.write_bytes(safetensors.torch.save(original().state_dict())[:-9]),
    "cut.pth": lambda path: (torch.save(original().state_dict(), path), path.write_bytes(path.read_bytes()[:-99])),
    "missing.pth": lambda path: torch.save(dict(list(original().state_dict().items())[:-1]), path),
    "high.pth": lambda path: torch.save(  # patches higher than the spectrogram
        original().state_dict() | {"v.patch_embed.proj.weight": torch.zeros(192, 1, 130, 16)}, path
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("target", ["ast-jax", "huggingface", "original"])
def test_a_bad_file_is_one_line_and_leaves_nothing(name, target, tmp_path):
    BAD_FILES[name](tmp_path / name)
    arguments = ["convert", str(tmp_path / name), str(tmp_path / "new" / "out.pth"), "--to", target]
    done = typer.testing.CliRunner().invoke(main.app, arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"ast-jax: {tmp_path / name}: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_the_report_lists_source_tensors_and_notes(tmp_path):
    torch.save(with_module(original(label_dim=527, depth=1).state_dict()), tmp_path / "mine_10_10_0.4.pth")
    arguments = ["convert", str(tmp_path / "mine_10_10_0.4.pth"), str(tmp_path / "out")]
    done = typer.testing.CliRunner().invoke(main.app, arguments)
    assert done.exit_code == 0, done.stderr
    for line in (
        "mine_10_10_0.4.pth: original repository, float32",
        "tensors: 23 used, 4 ignored",
        "ignored: v.head.bias, v.head.weight, v.head_dist.bias, v.head_dist.weight: the classifier of 1,000",
        "note: names have the prefix `module.` of DataParallel",
        "note: strides 10 10 and 128 frames: from the file name",
        "note: the 527 labels have no names; those of audioset are assumed from their number "
        "(to rename: --labels FILE --keep-classifier)",
    ):
        assert f"  {line}" in done.stdout
