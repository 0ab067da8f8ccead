"""`to_torch`: transformers and the original's class load the export, and round trips are bit-exact."""

import json
import stat

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import torch_models
import torch_original
import transformers
from flax.traverse_util import flatten_dict

import ast_jax
from ast_jax.checkpoints.pytorch import to_torch


def hf_logits(folder, spec, cls=transformers.ASTForAudioClassification):
    """Load a folder with transformers, assert that no key is missing or unexpected, and return its logits."""
    model, found = cls.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    with torch.no_grad():
        out = model.eval()(torch.from_numpy(spec))
    return (out.logits if hasattr(out, "logits") else out.pooler_output).numpy()


def original_model(**arguments):
    return torch_original.randomized(torch_original.OriginalAST(**{"label_dim": 5, "input_tdim": 128, **arguments}))


def saved_original(path, model):
    torch.save(torch.nn.DataParallel(model).state_dict(), path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("cls", [transformers.ASTForAudioClassification, transformers.ASTModel])
def test_hugging_face_round_trip_is_bit_exact(cls, dtype, tmp_path):
    torch_models.saved_model(tmp_path / "hf", "stride-10-10", cls=cls).to(dtype).save_pretrained(tmp_path / "hf")
    ast_jax.save(tmp_path / "ours", ast_jax.load(tmp_path / "hf"))  # through a checkpoint folder
    notes = ast_jax.to_torch(ast_jax.load(tmp_path / "ours"), tmp_path / "back")
    assert notes == ()
    want = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    got = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype == dtype
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_mixed_dtypes_are_restored(tmp_path):
    torch_models.saved_model(tmp_path / "hf", "stride-10-10")
    path = tmp_path / "hf" / "model.safetensors"
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    mixed = {
        name: tensor.to(kinds[index % 3])
        for index, (name, tensor) in enumerate(safetensors.torch.load_file(path).items())
    }
    safetensors.torch.save_file(mixed, path)
    ast_jax.to_torch(ast_jax.load(tmp_path / "hf"), tmp_path / "back")
    got = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in got.items()} == {name: t.dtype for name, t in mixed.items()}
    assert all(torch.equal(got[name], mixed[name]) for name in mixed)


def test_dtypes_are_restored_under_another_prefix(tmp_path):
    """A headless model with prefixed names, and one that gets a classifier: names are recorded without prefix."""
    model = torch_models.saved_model(tmp_path / "hf", "stride-10-10")
    odd = "audio_spectrogram_transformer.encoder.layer.0.output.dense.weight"
    state = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    body = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
    checkpoint = ast_jax.from_torch({**body, odd: body[odd].half()}, config=ast_jax.from_torch(model).config)
    ast_jax.to_torch(checkpoint, tmp_path / "headless")
    ast_jax.to_torch(ast_jax.resize(checkpoint, num_labels=3), tmp_path / "with_head")
    for folder, prefix in (("headless", ""), ("with_head", "audio_spectrogram_transformer.")):
        got = safetensors.torch.load_file(tmp_path / folder / "model.safetensors")
        name = odd.removeprefix("audio_spectrogram_transformer.")
        halves = [key for key, tensor in got.items() if tensor.dtype == torch.float16]
        assert halves == [prefix + name]


def test_config_keeps_its_dtype(tmp_path):
    """Half precision with norms in float32: the dtype key is kept, as transformers loads by it."""
    torch_models.saved_model(tmp_path / "hf", "stride-10-10").half().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors = {name: tensor.float() if "layernorm" in name else tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path)
    ast_jax.to_torch(ast_jax.load(tmp_path / "hf"), tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float16"


def test_features_that_the_original_lacks_are_reported(tmp_path):
    checkpoint = ast_jax.load(saved_original(tmp_path / "a_10_10_0.5.pth", original_model()))
    odd = {"padding_value": -3.0, "do_normalize": False, "sampling_rate": 32000, "window_type": "povey"}
    changed = checkpoint.replace(frontend=checkpoint.frontend.replace(**odd))
    notes = ast_jax.to_torch(changed, tmp_path / "o.pth", format="original")
    for name, value in odd.items():
        assert any(note.startswith(f"the features have {name} {value}, the original uses ") for note in notes)
    padded = checkpoint.replace(frontend=checkpoint.frontend.replace(padding_value=-3.0))
    assert any("padding_value -3.0" in note for note in ast_jax.to_torch(padded, tmp_path / "hf"))


def test_changed_tensors_are_not_rounded(tmp_path):
    """A model that was converted from bfloat16 and then trained in float32 is exported in float32."""
    torch_models.saved_model(tmp_path / "hf", "stride-10-10").to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    checkpoint = ast_jax.load(tmp_path / "hf")
    params = jax.tree.map(lambda leaf: leaf * np.float32(1.001), checkpoint.params)
    ast_jax.to_torch(checkpoint.replace(params=params), tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"
    again = ast_jax.load(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


@pytest.mark.parametrize("name", ["stride-10-10", "stride-10-16", "no-qkv-bias", "64-mel-bins", "gelu-tanh"])
def test_transformers_loads_it_and_gives_the_same_logits(name, tmp_path):
    config = ast_jax.load(folder_of(tmp_path / "hf", name)).config
    spec = torch_models.random_spec(config).astype(np.float32)
    ast_jax.to_torch(ast_jax.load(tmp_path / "hf"), tmp_path / "back")
    np.testing.assert_array_equal(hf_logits(tmp_path / "back", spec), hf_logits(tmp_path / "hf", spec))
    extractor = transformers.ASTFeatureExtractor.from_pretrained(tmp_path / "back")
    assert extractor.to_dict() == transformers.ASTFeatureExtractor.from_pretrained(tmp_path / "hf").to_dict()


def folder_of(folder, name):
    torch_models.saved_model(folder, name)
    return folder


def test_a_native_model_is_exported_to_transformers(tmp_path):
    """A model that was initialised here, with labels."""
    config = ast_jax.ASTConfig(
        hidden_size=64, num_attention_heads=4, intermediate_size=96, num_hidden_layers=2, max_length=100,
        num_mel_bins=64, num_labels=3, id2label=("a", "b", "ü"), problem_type="multi_label_classification",
    )  # fmt: skip
    params = ast_jax.init(jax.random.key(1), config)
    frontend = ast_jax.FrontendConfig(max_length=100, num_mel_bins=64)
    ast_jax.to_torch(ast_jax.Checkpoint(params, config, frontend), tmp_path / "back")
    spec = torch_models.random_spec(config).astype(np.float32)
    want = ast_jax.apply(params, spec, config)
    np.testing.assert_allclose(hf_logits(tmp_path / "back", spec), want, atol=1e-4 * np.abs(want).max())  # float32
    loaded = transformers.ASTConfig.from_pretrained(tmp_path / "back")
    assert (loaded.id2label, loaded.problem_type) == ({0: "a", 1: "b", 2: "ü"}, "multi_label_classification")
    assert loaded.architectures == ["ASTForAudioClassification"]


def test_every_config_key_is_restored(tmp_path):
    folder_of(tmp_path / "hf", "stride-10-10")
    names = {"config.json": {"id2label": {str(index): f"class {index}" for index in range(7)},
                             "label2id": {f"class {index}": index for index in range(7)},
                             "_name_or_path": "somewhere", "our_own_key": {"nested": [1, None, 2.5]}},
             "preprocessor_config.json": {"another_key": "kept", "mean": -5.5}}  # fmt: skip
    want = {}
    for name, more in names.items():
        path = tmp_path / "hf" / name
        want[name] = {**json.loads(path.read_text()), **more}
        path.write_text(json.dumps(want[name]))
    ast_jax.save(tmp_path / "ours", ast_jax.load(tmp_path / "hf"))
    ast_jax.to_torch(ast_jax.load(tmp_path / "ours"), tmp_path / "back")
    for name, content in want.items():
        got = json.loads((tmp_path / "back" / name).read_text())
        assert {key: got.get(key, "missing") for key in content} == content


def test_features_that_transformers_lacks_are_reported(tmp_path):
    checkpoint = ast_jax.load(folder_of(tmp_path / "hf", "stride-10-10"))
    changed = checkpoint.replace(frontend=checkpoint.frontend.replace(window_type="povey", low_freq=50.0))
    notes = ast_jax.to_torch(changed, tmp_path / "back")
    assert notes == (
        "the features have low_freq 50.0, transformers' extractor uses 20.0: its features will differ",
        "the features have window_type povey, transformers' extractor uses hanning: its features will differ",
    )
    assert ast_jax.load(tmp_path / "back").frontend == changed.frontend


def test_exported_files_are_not_private(tmp_path):
    folder_of(tmp_path / "hf", "stride-10-10")
    ast_jax.to_torch(ast_jax.load(tmp_path / "hf"), tmp_path / "back")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "back").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_original_round_trip_is_bit_exact(dtype, tmp_path):
    model = original_model().to(dtype)
    checkpoint = ast_jax.load(saved_original(tmp_path / "a_10_10_0.5.pth", model))
    notes = ast_jax.to_torch(checkpoint, tmp_path / "back.pth", format="original")
    got = torch.load(tmp_path / "back.pth", weights_only=True)
    fresh = torch.nn.DataParallel(torch_original.OriginalAST(label_dim=5, input_tdim=128)).to(dtype)
    fresh.load_state_dict(got)  # strict: all names, all shapes
    for name, tensor in model.state_dict().items():
        back = got[f"module.{name}"]
        assert back.dtype == dtype
        unused = name.startswith(("v.head.", "v.head_dist."))
        assert torch.equal(back, torch.zeros_like(tensor) if unused else tensor), name
    assert "the two ImageNet classifiers, which the original's class has but does not use, are zeros" in notes
    assert any("label_dim=5, fstride=10, tstride=10, input_fdim=128, input_tdim=128" in note for note in notes)


def test_a_head_eps_of_its_own_is_reported_and_its_effect_is_bounded(tmp_path):
    """The original's 1e-5 in the head becomes 1e-6 in transformers, which has one eps; a note has the effect."""
    model = original_model()
    checkpoint = ast_jax.load(saved_original(tmp_path / "a_10_10_0.5.pth", model))
    (note,) = ast_jax.to_torch(checkpoint, tmp_path / "hf")
    assert note.startswith("eps of the classifier's LayerNorm is 1e-05 here and 1e-06 in transformers: where the ")
    assert "changes by a relative 5e-06," in note
    spec = torch_models.random_spec(checkpoint.config).astype(np.float32)
    with torch.no_grad():
        stages = model.features(torch.from_numpy(spec))
    want, head = stages["logits"].numpy(), model.mlp_head[1]
    got = hf_logits(tmp_path / "hf", spec)
    # As in the note: the output of the norm changes by half the difference of eps over the variance of its input.
    variance = stages["pooled"].var(-1, unbiased=False).min().item()
    normed = model.mlp_head[0](stages["pooled"]) - model.mlp_head[0].bias
    bound = (1e-5 - 1e-6) / 2 / variance * (normed.abs() @ head.weight.abs().T).max().item()
    rounding = 1e-5 * np.abs(want).max()
    assert np.abs(got - want).max() <= bound + rounding
    assert bound < 1e-3 * np.abs(want).max()
    # With the head's eps, which our config.json has, nothing is lost in conversion back to ours.
    assert ast_jax.load(tmp_path / "hf").config.head_layer_norm_eps == 1e-5


def test_hugging_face_to_original_names_its_eps(tmp_path):
    size = {"num_hidden_layers": 12}
    model = torch_models.saved_model(tmp_path / "hf", "stride-10-10", **size)
    checkpoint = ast_jax.load(tmp_path / "hf")
    notes = ast_jax.to_torch(checkpoint, tmp_path / "o.pth", format="original")
    assert [note.split(":")[0] for note in notes[:2]] == [
        "eps of every LayerNorm of the encoder is 1e-12 here and 1e-06 in the original",
        "eps of the classifier's LayerNorm is 1e-12 here and 1e-05 in the original",
    ]
    original = torch_original.OriginalAST(label_dim=7, input_tdim=128)
    torch.nn.DataParallel(original).load_state_dict(torch.load(tmp_path / "o.pth", weights_only=True))
    spec = torch.from_numpy(torch_models.random_spec(checkpoint.config).astype(np.float32))
    with torch.no_grad():
        difference = (original.eval()(spec) - model(spec).logits).abs().max() / model(spec).logits.abs().max()
    assert 0 < difference < 1e-3  # eps of 1e-5 under variances near 1, through one norm, and 1e-6 through 25


def test_no_qkv_bias_becomes_zeros_in_the_original(tmp_path):
    torch_models.saved_model(tmp_path / "hf", "no-qkv-bias", num_hidden_layers=12)
    notes = ast_jax.to_torch(ast_jax.load(tmp_path / "hf"), tmp_path / "o.pth", format="original")
    assert any("written as zeros, which is equivalent" in note for note in notes)
    state = torch.load(tmp_path / "o.pth", weights_only=True)
    assert not state["module.v.blocks.3.attn.qkv.bias"].any()
    assert state["module.v.blocks.3.attn.qkv.weight"].any()


@pytest.mark.parametrize(
    ("changes", "format", "message"),
    [
        ({"patch_size": (16, 8)}, "huggingface", r"square patches only, the model has \(16, 8\)"),
        ({"patch_size": (16, 8)}, "original", r"the model has num_hidden_layers 2, patch_shape \(16, 8\)"),
        ({"hidden_act": "relu"}, "original", "num_hidden_layers 2, hidden_act relu"),
        (
            {"hidden_size": 64, "intermediate_size": 256},
            "original",
            "the model has width 64 with 4 heads, num_hidden_layers 2",
        ),
        ({}, "original", "12 layers of width 192, 384 or 768 .*; the model has num_hidden_layers 2"),
        ({}, "onnx", "format: expected one of huggingface, original, got 'onnx'"),
    ],
)
def test_models_that_a_format_cannot_represent_are_refused(changes, format, message, tmp_path):
    width = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    if "hidden_size" in changes:
        width = {"num_attention_heads": 4, "intermediate_size": 256}
    size = {"num_hidden_layers": 2, "max_length": 64, "num_mel_bins": 32, "num_labels": 3}
    config = ast_jax.ASTConfig(**{**size, **width, **changes})
    frontend = ast_jax.FrontendConfig(max_length=64, num_mel_bins=32)
    checkpoint = ast_jax.Checkpoint(ast_jax.init(jax.random.key(0), config), config, frontend)
    with pytest.raises(ValueError, match=message):
        ast_jax.to_torch(checkpoint, tmp_path / "out.pth", format=format)
    assert list(tmp_path.iterdir()) == []


def test_headless_models_and_names_the_original_does_not_load(tmp_path):
    torch_models.saved_model(tmp_path / "hf", "stride-10-10", cls=transformers.ASTModel, num_hidden_layers=12)
    checkpoint = ast_jax.load(tmp_path / "hf")
    with pytest.raises(ValueError, match="the model has none; add one with num_labels"):
        ast_jax.to_torch(checkpoint, tmp_path / "o.pth", format="original")
    with pytest.raises(ValueError, match=r"expected a name that ends in \.pth"):
        ast_jax.to_torch(ast_jax.resize(checkpoint, num_labels=2), tmp_path / "o", format="original")


@pytest.mark.parametrize(("format", "name"), [("huggingface", "used"), ("original", "used.pth")])
def test_nothing_is_overwritten(format, name, tmp_path):
    path = tmp_path / name
    if format == "huggingface":
        path.mkdir()
        (path / "README.md").write_text("mine")
    else:
        path.write_text("mine")
    with pytest.raises(ValueError, match=f"{name}: expected a new"):
        ast_jax.to_torch(ast_jax.load("sounds-tiny"), path, format=format)
    assert [entry.name for entry in tmp_path.rglob("*") if entry.is_file()] == [
        "README.md" if format == "huggingface" else name
    ]


@pytest.mark.parametrize("format", ["huggingface", "original"])
def test_a_failure_leaves_nothing(format, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("No space left on device")

    checkpoint = ast_jax.load(saved_original(tmp_path / "a_10_10_0.5.pth", original_model()))
    monkeypatch.setattr(to_torch, "write_text" if format == "huggingface" else "write_torch_file", fail)
    with pytest.raises(OSError, match="No space left"):
        ast_jax.to_torch(checkpoint, tmp_path / "out.pth", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["a_10_10_0.5.pth"]


def test_three_ways_round(tmp_path):
    """Original to ours to transformers to ours to original: the tensors are identical."""
    path = saved_original(tmp_path / "a_10_10_0.5.pth", original_model())
    ast_jax.to_torch(ast_jax.load(path), tmp_path / "hf")
    ast_jax.to_torch(ast_jax.load(tmp_path / "hf"), tmp_path / "back.pth", format="original")
    want, got = (torch.load(name, weights_only=True) for name in (path, tmp_path / "back.pth"))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want if "v.head" not in name)


def test_the_checkpoint_is_not_modified(tmp_path):
    checkpoint = ast_jax.load(folder_of(tmp_path / "made", "stride-10-10"))
    before = {path: leaf.copy() for path, leaf in flatten_dict(checkpoint.params, sep="/").items()}
    ast_jax.to_torch(checkpoint, tmp_path / "hf")
    for path, leaf in flatten_dict(checkpoint.params, sep="/").items():
        np.testing.assert_array_equal(leaf, before[path])


def test_the_shipped_model_has_patches_that_transformers_lacks(tmp_path):
    with pytest.raises(ValueError, match="square patches only"):
        ast_jax.to_torch(ast_jax.load("sounds-tiny"), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []
