"""The tables of names against live models, and every layout transform in both directions."""

import re

import numpy as np
import pytest
import safetensors.numpy
import torch_models
import torch_original
import transformers
from flax.traverse_util import flatten_dict

import ast_jax
from ast_jax import ASTConfig, CheckpointError
from ast_jax.checkpoints.pytorch.names import (
    DEIT,
    DENSE,
    HEAD_BIAS,
    HEAD_KERNEL,
    HF_PREFIX,
    HUGGING_FACE,
    LIVE,
    ORIGINAL,
    OUT_KERNEL,
    PATCH,
    POSITIONS,
    QKV_BIAS,
    QKV_KERNEL,
    RGB_PATCH,
    TOKEN,
    detect,
)
from ast_jax.model.functional import param_shapes

CONFIG = ASTConfig(192, 2, 3, 768, max_length=128, num_labels=7)
HEADLESS = {"disk": HUGGING_FACE.with_prefix(""), "live": LIVE.with_prefix(""), "timm": DEIT}
FORMATS = {"disk": HUGGING_FACE, "live": LIVE, "original": ORIGINAL}
FOR_ALL = pytest.mark.parametrize(
    ("name", "form", "head"),
    [
        *(pytest.param(name, form, True, id=name) for name, form in FORMATS.items()),
        *(pytest.param(name, form, False, id=f"{name}, headless") for name, form in HEADLESS.items()),
    ],
)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """Return a function from format and head to the state dict of a model of CONFIG, with the ImageNet heads."""
    models = {
        True: transformers.ASTForAudioClassification(torch_models.torch_config("stride-10-10", num_hidden_layers=2)),
        False: transformers.ASTModel(torch_models.torch_config("stride-10-10", num_hidden_layers=2)),
    }

    def disk(head):
        folder = tmp_path_factory.mktemp("saved")
        models[head].save_pretrained(folder)
        return safetensors.numpy.load_file(folder / "model.safetensors")

    def arrays(tensors):
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    def get(name, head):
        return {
            "disk": disk,
            "live": lambda head: arrays(models[head].state_dict()),
            "original": lambda _: arrays(torch_original.OriginalAST(7, input_tdim=128, depth=2).state_dict()),
            "timm": lambda _: arrays(torch_original.deit_state(depth=2, hw=12)),  # 144 patches as in CONFIG
        }[name](head)

    return get


@FOR_ALL
def test_names_are_those_of_live_models(name, form, head, state):
    names, places = state(name, head).keys(), form.places(CONFIG, head).keys()
    assert sorted(names - form.ignored.keys()) == sorted(places)
    assert form.ignored.keys() <= names
    assert all(form.ignored.values())  # each has a reason


@pytest.mark.parametrize("bias", [True, False])
@FOR_ALL
def test_every_parameter_is_filled_exactly_once(name, form, head, bias):
    config = CONFIG.replace(qkv_bias=bias)
    filled = {path: np.zeros(leaf.shape, int) for path, leaf in flatten_dict(param_shapes(config), sep="/").items()}
    for row, index in form.places(config, head).values():
        filled[row.target][index] += 1
    for path, times in filled.items():
        assert (times == (head or not path.startswith("classifier/"))).all(), path


def test_both_hugging_face_tables_have_the_same_order():
    """The export maps names between the two tables by position."""
    orders = [[(row.target, row.part, row.transform) for row in form.rows] for form in (HUGGING_FACE, LIVE)]
    assert orders[0] == orders[1]
    assert HUGGING_FACE.head == LIVE.head


@FOR_ALL
def test_every_transform_is_invertible(name, form, head, state):
    """All bit patterns, with NaN and -0, are restored in the shape of the live model."""
    shapes = {path: leaf.shape for path, leaf in flatten_dict(param_shapes(CONFIG), sep="/").items()}
    random, real = np.random.default_rng(0), state(name, head)
    for source, (row, index) in form.places(CONFIG, head).items():
        tensor = random.integers(0, 2**32, real[source].shape, np.uint32).view(np.float32)
        if row.transform is RGB_PATCH:  # a sum over three channels cannot be inverted
            assert row.transform.to_jax(np.ones(tensor.shape, np.float32), CONFIG).shape == shapes[row.target]
            continue
        here = row.transform.to_jax(tensor, CONFIG)
        assert here.shape == np.empty(shapes[row.target])[index].shape, source
        there = row.transform.to_torch(here, CONFIG)
        assert there.dtype == np.float32
        assert there.shape == tensor.shape, source
        assert np.ascontiguousarray(there).tobytes() == tensor.tobytes(), source


# Indices of one element, from PyTorch's definitions: rows of a weight are outputs, head h has rows h K to (h + 1) K,
# and q, k, v are in this order. Width 6, 2 heads of 3; index in PyTorch, index in JAX.
PLACES = [
    (TOKEN, (1, 1, 6), (0, 0, 4), (4,)),
    (POSITIONS, (1, 5, 6), (0, 3, 4), (3, 4)),
    (DENSE, (8, 6), (7, 2), (2, 7)),
    (PATCH, (6, 1, 2, 3), (5, 0, 1, 2), (1, 2, 0, 5)),
    (HEAD_KERNEL, (6, 6), (4, 2), (2, 1, 1)),  # output 4 is element 1 of head 1
    (HEAD_BIAS, (6,), (5,), (1, 2)),
    (OUT_KERNEL, (6, 6), (0, 5), (1, 2, 0)),
    (QKV_KERNEL, (18, 6), (10, 5), (5, 1, 1, 1)),  # output 4 of the keys
    (QKV_BIAS, (18,), (12,), (2, 0, 0)),
]


@pytest.mark.parametrize(("transform", "shape", "there", "here"), PLACES)
def test_index_of_one_element(transform, shape, there, here):
    config = ASTConfig(6, 1, 2, 8)
    tensor = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    assert transform.to_jax(tensor, config)[here] == tensor[there]
    assert transform.to_torch(transform.to_jax(tensor, config), config)[there] == tensor[there]


def test_colour_channels_are_summed():
    kernel = np.random.default_rng(0).standard_normal((6, 3, 2, 4))
    want = np.einsum("dcft->ftd", kernel)[:, :, None]
    np.testing.assert_allclose(RGB_PATCH.to_jax(kernel, CONFIG), want, rtol=1e-14, atol=1e-14)


@FOR_ALL
def test_formats_are_detected_by_names(name, form, head, state):
    assert detect(state(name, head)) == form
    assert detect(iter(state(name, head))) == form  # an iterator


@pytest.mark.parametrize(
    "names", [(), ("layer1.0.conv1.weight", "fc.bias"), ("layers.0.weight",), ("model.blocks.0.norm1.weight",)]
)
def test_foreign_names(names):
    assert detect(names) is None


def test_find():
    names = list(LIVE.places(CONFIG, True))
    prefix = f"{HF_PREFIX}layers.0."
    assert LIVE.find(names, "layers/mlp/fc1/kernel") == f"{prefix}mlp.fc1.weight"
    assert LIVE.find(names, "layers/attention/qkv/bias") == f"{prefix}attention.q_proj.bias"
    assert LIVE.find(names, "classifier/dense/kernel") == "classifier.dense.weight"
    assert ORIGINAL.find(["v.blocks.3.attn.qkv.bias"], "layers/attention/qkv/bias") == "v.blocks.3.attn.qkv.bias"
    assert LIVE.find(["classifier.dense.bias"], "classifier/dense/kernel") is None


def refused(tensors):
    """Return the one-line error message for a state dict."""
    with pytest.raises(CheckpointError) as caught:
        ast_jax.from_torch(tensors)
    assert "\n" not in str(caught.value)
    return str(caught.value)


MISFITS = {  # format: names of a token [1, 1, D], of a kernel [D, M], and of two others, sorted
    "disk": ("embeddings.cls_token", "encoder.layer.1.output.dense.weight",
             "encoder.layer.1.attention.attention.key.bias", "layernorm.bias"),
    "live": ("embeddings.cls_token", "layers.1.mlp.fc2.weight", "layernorm.bias", "layers.1.attention.k_proj.bias"),
    "original": ("cls_token", "blocks.1.mlp.fc2.weight", "blocks.1.attn.proj.bias", "norm.bias"),
    "timm": ("cls_token", "blocks.1.mlp.fc2.weight", "blocks.1.attn.proj.bias", "norm.bias"),
}  # fmt: skip


@FOR_ALL
def test_mismatches_are_listed_together(name, form, head, state):
    """One error with three sorted lists, without the ignored ImageNet heads."""
    tensors = state(name, head)
    token, kernel, *missing = (form.prefix + short for short in MISFITS[name])
    for gone in reversed(missing):
        del tensors[gone]
    tensors |= {token: np.zeros(192, np.float32), kernel: np.zeros((768, 192), np.float32)}
    tensors |= {"zero": np.zeros(1), "another.one": np.zeros(1)}
    wrong = {token: "(expected (1, 1, 192), got (192,))", kernel: "(expected (192, 768), got (768, 192))"}
    assert refused(tensors) == (
        f"state dict: the weights do not fit the configuration; missing: {', '.join(missing)}; unexpected: "
        f"another.one, zero; wrong shape: {', '.join(f'{key} {wrong[key]}' for key in sorted(wrong))}"
    )


@FOR_ALL
def test_no_tensor_can_be_missing(name, form, head, state):
    """Nor have another shape; the message names the tensor, also those whose shapes give the architecture."""
    tensors = state(name, head)
    for key in tensors.keys() - form.ignored.keys():
        assert key in refused({other: tensor for other, tensor in tensors.items() if other != key})
        assert key in refused(tensors | {key: tensors[key][None]})
    for key in form.ignored:
        del tensors[key]
        ast_jax.from_torch(tensors)


@FOR_ALL
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, np.complex64])
def test_tensors_are_floats(name, form, head, dtype, state):
    tensors = state(name, head)
    key = form.prefix + MISFITS[name][0]
    kinds = "bfloat16, float16, float32, float64"
    assert refused(tensors | {key: tensors[key].astype(dtype)}) == (
        f"state dict: {key}: expected one of {kinds}, got {np.dtype(dtype)}"
    )


@FOR_ALL
def test_a_huge_layer_index(name, form, head, state):
    """A single layer with a huge index does not list all layers before it."""
    tensors = state(name, head)
    layer = next(row.source for row in form.rows if "{n}" in row.source).format(n=5_000)
    assert len(refused(tensors | {form.prefix + layer: np.zeros(192, np.float32)})) < 5000


def test_long_lists_are_cut_and_counted(state):
    """Long lists end with a count."""
    message = refused(state("original", True) | {f"x{number:03}": np.zeros(1) for number in range(200)})
    shown = re.search(r"unexpected: (x000(?:, x\d{3})*), and (\d+) more$", message)
    assert len(shown[1].split(", ")) + int(shown[2]) == 200
    assert len(message) < 500


FOREIGN = {
    "nothing": (), "a resnet": ("conv1.weight", "layer1.0.bn1.weight", "layer1.0.conv1.weight", "fc.bias"),
    "a BERT": ("encoder.layer.0.attention.self.query.weight", "embeddings.word_embeddings.weight"),
    "a Whisper": ("model.encoder.layers.0.self_attn.k_proj.weight",), "a ViT": ("blocks.0.norm1.weight", "cls_token"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_tensors(kind):
    message = refused({name: np.zeros((4, 4), np.float32) for name in FOREIGN[kind]})
    assert re.match("state dict: .*(expected|missing)", message)
    if kind == "a resnet":
        assert message.endswith("the tensors of an AST, got others: conv1.weight, fc.bias, layer1.0.bn1.weight, …")
