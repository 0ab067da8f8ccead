"""The model: parameter counts, masking, patch selection, dropout, dtypes, errors, lowering for other platforms."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import ast_jax
from ast_jax import config as presets
from ast_jax.config import HIDDEN_ACTS
from ast_jax.model import functional as model
from ast_jax.model import modules

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = ast_jax.ASTConfig(
    hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, num_labels=5,
    max_length=64, num_mel_bins=32, frequency_stride=8, time_stride=8, layer_norm_eps=1e-6,
)  # fmt: skip
# A jitted program fuses sums in another order: a few roundings of 6e-8 a layer.
ROUNDING = 1e-5


def random_params(config, seed=0):
    """Draw all leaves, so that no zero hides an error; 0.15 is about 1/sqrt(fan-in) at width 48."""
    shapes = model.param_shapes(config)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree,
        [0.15 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)],
    )


@pytest.fixture(scope="module")
def params():
    return random_params(SMALL)


@pytest.fixture(scope="module")
def spec():
    return jax.random.normal(jax.random.key(7), (3, SMALL.max_length, SMALL.num_mel_bins))


# Counted by hand for the base model at 527 classes; the published logs' counts less their unused heads for the rest.
COUNTS = {
    ("tiny", 527, 1024): 5_723_663,
    ("small", 527, 1024): 22_063_631,
    ("base", 527, 1024): 86_594_063,
    ("base", 35, 128): 85_395_491,
    ("base", 50, 512): 85_757_234,
}


@pytest.mark.parametrize("case", COUNTS, ids=str)
def test_parameter_counts(case):
    name, labels, frames = case
    config = presets.PRESETS[name](num_labels=labels, max_length=frames)
    assert model.num_params(model.param_shapes(config)) == COUNTS[case]


def test_every_preset_is_counted():
    assert {name for name, _, _ in COUNTS} == set(presets.PRESETS)


def test_original_logs_count_two_unused_heads_more():
    heads = 2 * (768 * 1000 + 1000)
    assert COUNTS[("base", 527, 1024)] + heads == 88_132_063
    assert COUNTS[("base", 35, 128)] + heads == 86_933_491
    assert COUNTS[("base", 50, 512)] + heads == 87_295_234


def test_parameter_tree_is_format_1():
    shapes = {path: leaf.shape for path, leaf in flatten_dict(model.param_shapes(SMALL), sep="/").items()}
    d, layers, h, m, c, n = 48, 3, 4, 96, 5, SMALL.num_tokens
    assert shapes == {
        "embeddings/cls_token": (d,), "embeddings/distillation_token": (d,),
        "embeddings/position_embeddings": (n, d),
        "embeddings/projection/kernel": (16, 16, 1, d), "embeddings/projection/bias": (d,),
        "layers/layernorm_before/scale": (layers, d), "layers/layernorm_before/bias": (layers, d),
        "layers/layernorm_after/scale": (layers, d), "layers/layernorm_after/bias": (layers, d),
        "layers/attention/qkv/kernel": (layers, d, 3, h, d // h), "layers/attention/qkv/bias": (layers, 3, h, d // h),
        "layers/attention/out/kernel": (layers, h, d // h, d), "layers/attention/out/bias": (layers, d),
        "layers/mlp/fc1/kernel": (layers, d, m), "layers/mlp/fc1/bias": (layers, m),
        "layers/mlp/fc2/kernel": (layers, m, d), "layers/mlp/fc2/bias": (layers, d),
        "layernorm/scale": (d,), "layernorm/bias": (d,),
        "classifier/layernorm/scale": (d,), "classifier/layernorm/bias": (d,),
        "classifier/dense/kernel": (d, c), "classifier/dense/bias": (c,),
    }  # fmt: skip
    assert "layers/attention/qkv/bias" not in flatten_dict(model.param_shapes(SMALL.replace(qkv_bias=False)), sep="/")


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_init_matches_param_shapes(qkv_bias):
    config = SMALL.replace(qkv_bias=qkv_bias)
    drawn = ast_jax.init(jax.random.key(0), config)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.param_shapes(config))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), drawn) == shapes
    fan_in = np.std(drawn["layers"]["mlp"]["fc1"]["kernel"])
    assert abs(fan_in - 48**-0.5) < 0.02  # 13,824 draws around 0.144: a standard error of 0.001


def test_single_equals_batched(params, spec):
    batch = ast_jax.apply(params, spec, SMALL)
    assert batch.shape == (3, 5)
    one = ast_jax.apply(params, spec[1], SMALL)
    assert one.shape == (5,)
    np.testing.assert_allclose(one, batch[1], atol=ROUNDING)


def test_jit_vmap_and_grad(params, spec):
    want = ast_jax.apply(params, spec, SMALL)
    jitted = jax.jit(ast_jax.apply, static_argnames="config")(params, spec, SMALL)
    np.testing.assert_allclose(jitted, want, atol=ROUNDING)
    mapped = jax.vmap(lambda one: ast_jax.apply(params, one, SMALL))(spec)
    np.testing.assert_allclose(mapped, want, atol=ROUNDING)
    gradient = jax.grad(lambda x: ast_jax.apply(params, x, SMALL).sum())(spec)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("implementation", ["auto", "chunked", "per_head"])
def test_attention_implementations_agree(implementation, params, spec):
    lengths = jnp.array([20, 64, 40])

    def run(which):
        def total(p):
            return jnp.sin(ast_jax.apply(p, spec, SMALL, lengths=lengths, attention_implementation=which)).sum()

        return ast_jax.apply(params, spec, SMALL, attention_implementation=which), jax.grad(total)(params)

    (logits, gradient), (dense_logits, dense_gradient) = run(implementation), run("dense")
    np.testing.assert_allclose(logits, dense_logits, atol=ROUNDING)
    norm = max(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(dense_gradient))
    for leaf, dense in zip(jax.tree.leaves(gradient), jax.tree.leaves(dense_gradient), strict=True):
        assert np.abs(leaf - dense).max() < 1e-5 * norm  # the key bias's true gradient is zero: only an absolute bound


def test_encode_collects_every_state(params, spec):
    out = ast_jax.encode(params, spec, SMALL, output_hidden_states=True, output_attentions=True)
    n = SMALL.num_tokens
    assert out.last_hidden_state.shape == (3, n, 48)
    assert out.pooler_output.shape == (3, 48)
    assert out.hidden_states.shape == (4, 3, n, 48)
    assert out.attentions.shape == (3, 3, 4, n, n)
    np.testing.assert_allclose(out.attentions.sum(-1), 1, atol=ROUNDING)
    np.testing.assert_allclose(out.pooler_output, out.last_hidden_state[:, :2].mean(1), atol=ROUNDING)
    lean = ast_jax.encode(params, spec, SMALL)
    assert lean.hidden_states is None
    assert lean.attentions is None
    np.testing.assert_allclose(lean.last_hidden_state, out.last_hidden_state, atol=ROUNDING)
    single = ast_jax.encode(params, spec[0], SMALL, output_hidden_states=True)
    np.testing.assert_allclose(single.hidden_states, out.hidden_states[:, 0], atol=ROUNDING)


def test_apply_equals_the_linen_modules(params, spec):
    logits = ast_jax.ASTForAudioClassification(SMALL).apply({"params": params}, spec)
    np.testing.assert_allclose(logits, ast_jax.apply(params, spec, SMALL), atol=ROUNDING)
    headless = {name: value for name, value in params.items() if name != "classifier"}
    out = ast_jax.ASTModel(SMALL).apply({"params": headless}, spec)
    np.testing.assert_allclose(out.pooler_output, ast_jax.encode(params, spec, SMALL).pooler_output, atol=ROUNDING)


@pytest.mark.parametrize("garbage", [1e3, np.nan, np.inf])
def test_padding_does_not_affect_the_output(garbage, params, spec):
    lengths = jnp.array([16, 40, 64])
    clean = ast_jax.apply(params, spec, SMALL, lengths=lengths)
    dirty = spec.at[0, 16:].set(garbage).at[1, 40:].set(garbage)
    np.testing.assert_array_equal(ast_jax.apply(params, dirty, SMALL, lengths=lengths), clean)
    assert np.abs(ast_jax.apply(params, spec, SMALL) - clean)[:2].min() > 1e-3  # the mask does something

    def gradient(spec):
        return jax.grad(lambda params: jnp.square(ast_jax.apply(params, spec, SMALL, lengths=lengths)).sum())(params)

    for got, want in zip(jax.tree.leaves(gradient(dirty)), jax.tree.leaves(gradient(spec)), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(ast_jax.apply(params, spec, SMALL)[2], clean[2], atol=ROUNDING)


def test_valid_tokens_lie_wholly_inside():
    valid = np.asarray(modules.valid_tokens(jnp.array([0, 15, 16, 23, 24, 64]), SMALL))
    rows, columns = SMALL.grid
    assert valid[:, :2].all()
    patches = valid[:, 2:].reshape(6, rows, columns)
    assert (patches == patches[:, :1]).all()  # the same in every row of the grid
    assert patches[:, 0].sum(-1).tolist() == [0, 0, 1, 1, 2, columns]


def test_masked_equals_shorter_model(params, spec):
    """With all padding masked, the model equals one of that length with cropped position embeddings."""
    short = SMALL.replace(max_length=40)
    rows, columns = SMALL.grid
    positions = params["embeddings"]["position_embeddings"]
    grid = positions[2:].reshape(rows, columns, -1)[:, : short.grid[1]].reshape(-1, 48)
    embeddings = {**params["embeddings"], "position_embeddings": jnp.concatenate([positions[:2], grid])}
    want = ast_jax.apply({**params, "embeddings": embeddings}, spec[:, :40], short)
    got = ast_jax.apply(params, spec, SMALL, lengths=jnp.full(3, 40))
    np.testing.assert_allclose(got, want, atol=ROUNDING)


def test_the_order_of_patches_does_not_matter(params, spec):
    """Position embeddings are added before patches are selected, and attention is permutation-invariant."""
    patches = SMALL.num_tokens - 2
    want = ast_jax.apply(params, spec, SMALL)
    orders = np.stack([np.arange(patches), np.arange(patches)[::-1], np.random.default_rng(0).permutation(patches)])
    np.testing.assert_allclose(ast_jax.apply(params, spec, SMALL, patch_indices=orders), want, atol=ROUNDING)
    one = ast_jax.apply(params, spec[1], SMALL, patch_indices=orders[1])
    np.testing.assert_allclose(one, want[1], atol=ROUNDING)


def test_dropped_patches_equal_masked_ones(params, spec):
    lengths = jnp.full(3, 40)
    valid = np.flatnonzero(modules.valid_tokens(lengths, SMALL)[0, 2:])
    assert len(valid) == 12 < SMALL.num_tokens - 2
    patch_indices = np.tile(valid, (3, 1))
    got = ast_jax.apply(params, spec, SMALL, patch_indices=patch_indices)
    np.testing.assert_allclose(got, ast_jax.apply(params, spec, SMALL, lengths=lengths), atol=ROUNDING)
    some = ast_jax.encode(params, spec, SMALL, patch_indices=patch_indices, output_hidden_states=True)
    every = ast_jax.encode(params, spec, SMALL, output_hidden_states=True)
    assert some.hidden_states.shape == (4, 3, 2 + 12, 48)
    embedded = every.hidden_states[0][:, np.concatenate([[0, 1], 2 + valid])]
    np.testing.assert_allclose(some.hidden_states[0], embedded, atol=ROUNDING)


def test_masks_follow_the_selected_patches(params, spec):
    """With the masked patches first."""
    lengths = jnp.array([40, 24, 64])
    patch_indices = np.argsort(modules.valid_tokens(lengths, SMALL)[:, 2:], axis=1)
    got = ast_jax.apply(params, spec, SMALL, patch_indices=patch_indices, lengths=lengths)
    np.testing.assert_allclose(got, ast_jax.apply(params, spec, SMALL, lengths=lengths), atol=ROUNDING)


@pytest.mark.parametrize(
    ("patch_indices", "message"),
    [
        (np.zeros((2, 4), int), r"expected \[3, K\], a row for each spectrogram, got \(2, 4\)"),
        (np.zeros(4, int), r"expected \[3, K\], a row for each spectrogram, got \(4,\)"),
        (np.zeros((3, 4)), "expected whole numbers, got float"),
        (np.full((3, 4), -1), "expected patches 0 to 20, got -1 to -1"),
        (np.full((3, 4), 21), "expected patches 0 to 20, got 21 to 21"),
    ],
    ids=["rows", "axes", "type", "below", "above"],
)
def test_patch_indices_out_of_range_are_refused(patch_indices, message, params, spec):
    assert SMALL.num_tokens == 23
    with pytest.raises(ValueError, match=f"patch_indices: {message}"):
        ast_jax.apply(params, spec, SMALL, patch_indices=patch_indices)


def test_rematerialisation_saves_memory_and_changes_no_gradient(params, spec):
    """Also with dropout, whose masks are drawn again in the recomputation."""
    config = SMALL.replace(hidden_dropout_prob=0.2)

    def total(params, again):
        rngs = {"dropout": jax.random.key(0)}
        return jnp.square(ast_jax.apply(params, spec, config, train=True, rngs=rngs, rematerialize=again)).sum()

    gradients, memory = {}, {}
    for again in (False, True):
        compiled = jax.jit(jax.grad(functools.partial(total, again=again))).lower(params).compile()
        gradients[again], memory[again] = compiled(params), compiled.memory_analysis().temp_size_in_bytes
    assert memory[True] < 0.7 * memory[False]
    norm = max(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(gradients[False]))
    for leaf, plain in zip(jax.tree.leaves(gradients[True]), jax.tree.leaves(gradients[False]), strict=True):
        assert np.abs(leaf - plain).max() < 1e-5 * norm  # as in test_attention_implementations_agree
    encoded = ast_jax.encode(params, spec, config, rematerialize=True, output_attentions=True)
    assert encoded.attentions.shape == (3, 3, 4, 23, 23)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_masks_differ_between_layers(field, spec):
    """With equal layers and zero biases, equal masks would drop the same elements in each."""
    config = SMALL.replace(**{field: 0.5})
    params = random_params(config)
    run = functools.partial(ast_jax.encode, params, spec, config, output_hidden_states=True, output_attentions=True)
    out = run(train=True, rngs={"dropout": jax.random.key(0)})
    if field == "attention_probs_dropout_prob":
        dropped = np.asarray(out.attentions == 0).reshape(3, -1)
    else:
        # What a block adds: with the last product zeroed but for a constant bias, only the mask shows.
        mlp = {**params["layers"]["mlp"], "fc2": jax.tree.map(jnp.zeros_like, params["layers"]["mlp"]["fc2"])}
        mlp["fc2"]["bias"] = jnp.ones_like(mlp["fc2"]["bias"])
        attention = {**params["layers"]["attention"]}
        attention["out"] = jax.tree.map(jnp.zeros_like, attention["out"])
        layers = {**params["layers"], "mlp": mlp, "attention": attention}
        states = ast_jax.encode(
            {**params, "layers": layers}, spec, config, train=True, rngs={"dropout": jax.random.key(0)},
            output_hidden_states=True,
        ).hidden_states  # fmt: skip
        dropped = np.asarray(states[1:] == states[:-1]).reshape(3, -1)
    share = dropped.mean(1)
    np.testing.assert_allclose(share, 0.5, atol=0.05)
    for first, second in ((0, 1), (1, 2), (0, 2)):
        agreement = (dropped[first] == dropped[second]).mean()
        assert abs(agreement - 0.5) < 0.05  # independent masks agree half the time; the same mask always


def test_dropout_is_off_outside_training_and_requires_a_key(params, spec):
    config = SMALL.replace(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    np.testing.assert_array_equal(ast_jax.apply(params, spec, config), ast_jax.apply(params, spec, SMALL))
    with pytest.raises(ValueError, match="rngs"):
        ast_jax.apply(params, spec, config, train=True)
    key = {"dropout": jax.random.key(1)}
    first = ast_jax.apply(params, spec, config, train=True, rngs=key)
    np.testing.assert_array_equal(first, ast_jax.apply(params, spec, config, train=True, rngs=key))
    assert np.abs(first - ast_jax.apply(params, spec, config)).max() > 1e-3


def test_bfloat16_computation_gives_float32_logits(params, spec):
    logits = ast_jax.apply(params, spec, SMALL, dtype=jnp.bfloat16)
    assert logits.dtype == jnp.float32
    out = ast_jax.encode(params, spec, SMALL, dtype=jnp.bfloat16, output_attentions=True)
    assert out.last_hidden_state.dtype == jnp.bfloat16
    assert out.attentions.dtype == jnp.float32
    want = ast_jax.apply(params, spec, SMALL)
    # bfloat16 keeps 8 bits: about 4e-3 an operation, a few dozen in a row of partly cancelling signs
    assert 1e-5 < np.abs(logits - want).max() < 0.1 * np.abs(want).max()


def test_layer_norm_statistics_are_float32_in_half_precision():
    """bfloat16 sums would lose deviations of 1 from a mean of 300."""
    x = 300 + jnp.tile(jnp.array([-2.0, 2.0]), 384)[None]
    norm = modules._layer_norm(1e-6, jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x)
    got = norm.apply(variables, x.astype(jnp.bfloat16))
    np.testing.assert_allclose(np.asarray(got, np.float32), np.sign(x - 300), atol=1e-2)


def test_float64(x64, spec):
    params = random_params(SMALL)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params))
    out = ast_jax.encode(params, spec.astype(jnp.float64), SMALL, output_attentions=True)
    assert out.attentions.dtype == jnp.float64
    assert ast_jax.apply(params, spec.astype(jnp.float64), SMALL).dtype == jnp.float64


def test_rectangular_patches_and_independent_strides(spec):
    config = SMALL.replace(patch_size=(8, 4), frequency_stride=6, time_stride=3)
    assert config.grid == (5, 21)
    params = random_params(config)
    assert params["embeddings"]["projection"]["kernel"].shape == (8, 4, 1, 48)
    # The token of grid cell (row 2, column 5) is the patch at bin 12, frame 15, times the kernel.
    embedded = ast_jax.encode(params, spec, config, output_hidden_states=True).hidden_states[0]
    patch = spec[0, 15:19, 12:20].T  # [Pf, Pt]
    token = jnp.einsum("ft,ftd->d", patch, params["embeddings"]["projection"]["kernel"][:, :, 0])
    index = 2 + 2 * 21 + 5
    want = token + params["embeddings"]["projection"]["bias"] + params["embeddings"]["position_embeddings"][index]
    np.testing.assert_allclose(embedded[0, index], want, atol=ROUNDING)


def test_config_is_inferred_from_shapes():
    config = presets.tiny(max_length=128, num_labels=9, num_hidden_layers=2)
    params = random_params(config)
    spec = jax.random.normal(jax.random.key(1), (2, 128, 128))
    np.testing.assert_allclose(ast_jax.apply(params, spec), ast_jax.apply(params, spec, config), atol=ROUNDING)
    found = model.config_from_params(params, spec)
    assert found.replace(num_labels=9) == config
    with pytest.raises(ValueError, match=r"146 position embeddings.*1214 tokens"):
        ast_jax.apply(params, jnp.zeros((1, 1024, 128)))
    rectangular = presets.tiny(max_length=128, num_hidden_layers=1, patch_size=(16, 8), qkv_bias=False)
    assert model.config_from_params(random_params(rectangular), spec) == rectangular


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((3, 65, 32), np.float32, r"expected \[B, 64, 32\].*got \(3, 65, 32\)"),
        ((3, 32, 64), np.float32, r"got \(3, 32, 64\)"),
        ((1, 3, 64, 32), np.float32, r"got \(1, 3, 64, 32\)"),
        ((64,), np.float32, r"got \(64,\)"),
        ((64, 32), np.int16, "floating-point features, got int16"),
    ],
)
def test_invalid_input_is_refused(shape, dtype, message, params):
    with pytest.raises(ValueError, match=message):
        ast_jax.apply(params, np.zeros(shape, dtype), SMALL)


def test_other_mismatches_are_refused(params, spec):
    with pytest.raises(ValueError, match=r"lengths: expected \(3,\)"):
        ast_jax.apply(params, spec, SMALL, lengths=jnp.array([1, 2]))
    for wrong, said in (([0, 3, 65], "0 to 65"), ([-5, 64, 64], "-5 to 64")):
        with pytest.raises(ValueError, match=f"lengths: expected 0 to 64 frames, got {said}"):
            ast_jax.apply(params, spec, SMALL, lengths=wrong)
    with pytest.raises(ValueError, match="lengths: expected whole numbers, got float32"):
        ast_jax.apply(params, spec, SMALL, lengths=[3.5, 3, 3])
    with pytest.raises(ValueError, match=r"key: expected a random key, got the number 3; pass jax\.random\.key\(3\)"):
        ast_jax.init(3, SMALL)
    with pytest.raises(ValueError, match="23 position embeddings, but config makes"):
        ast_jax.apply(params, spec, SMALL.replace(time_stride=4))
    for config in (None, SMALL):
        with pytest.raises(ValueError, match=r"embeddings/projection/kernel"):
            ast_jax.apply({"embeddings": {}, "classifier": params["classifier"]}, spec, config)
    with pytest.raises(ValueError, match="attention_implementation: expected one of auto"):
        ast_jax.apply(params, spec, SMALL, attention_implementation="fast")


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_apply_lowers_for_accelerators(platform):
    """The published model lowers for other platforms; compilation and execution are not tested."""
    config = presets.base()
    function = jax.jit(functools.partial(ast_jax.apply, config=config, dtype=jnp.bfloat16))
    spec = jax.ShapeDtypeStruct((2, config.max_length, config.num_mel_bins), jnp.float32)
    exported = jax.export.export(function, platforms=[platform])(model.param_shapes(config), spec)
    assert exported.platforms == (platform,)
    assert exported.out_avals[0].shape == (2, 527)
    assert exported.out_avals[0].dtype == jnp.float32
    assert "1214" in exported.mlir_module()  # the tokens of the default grid are in the program


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scores_and_head_use_full_precision_on_accelerators(dtype):
    """In float32: q k, weights times v, and the head; in bfloat16 only the head. Read from the lowered program."""
    function = jax.jit(functools.partial(ast_jax.apply, config=SMALL, dtype=dtype))
    spec = jax.ShapeDtypeStruct((2, SMALL.max_length, SMALL.num_mel_bins), jnp.float32)
    program = jax.export.export(function, platforms=["tpu"])(model.param_shapes(SMALL), spec).mlir_module()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    full = [line for line in products if "precision = [HIGHEST, HIGHEST]" in line]
    attention = [line for line in products if "batching_dims" in line]
    if dtype == jnp.float32:
        assert len(products) - len(full) == 4  # qkv, out, fc1 and fc2 of the one block that is scanned
        assert len(attention) >= 2  # older versions of JAX write the rest of a map out, even an empty one
        assert set(attention) < set(full)
        full = [line for line in full if line not in attention]
    (head,) = full
    assert f"tensor<2x{SMALL.num_labels}xf32>" in head


@pytest.mark.parametrize("name", HIDDEN_ACTS)
def test_activations_equal_transformers(name):
    import torch
    from transformers.activations import ACT2FN

    x = np.linspace(-4, 4, 101, dtype=np.float32)
    want = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(modules.ACTIVATIONS[name](x), want, atol=2e-6)  # float32 erf and tanh differ by as much


def test_params_that_do_not_match_the_config_are_refused(params, spec):
    for changes, path in (
        ({"qkv_bias": False}, "unexpected: layers/attention/qkv/bias"),
        ({"num_labels": 9}, r"classifier/dense/bias \(expected \(9,\), got \(5,\)"),
        ({"intermediate_size": 48}, "layers/mlp/fc1/bias"),
        ({"num_hidden_layers": 2}, "layers/attention/out/bias"),
    ):
        with pytest.raises(ValueError, match=f"params do not fit config; .*{path}"):
            ast_jax.apply(params, spec, SMALL.replace(**changes))
    with pytest.raises(ValueError, match=r"unexpected: unknown$"):
        ast_jax.apply({**params, "unknown": np.zeros(3)}, spec, SMALL)
    with pytest.raises(ValueError, match=r"missing: layernorm/bias$"):
        ast_jax.encode({**params, "layernorm": {"scale": params["layernorm"]["scale"]}}, spec, SMALL)
    with pytest.raises(ValueError, match="an empty batch"):
        ast_jax.apply(params, np.zeros((0, SMALL.max_length, SMALL.num_mel_bins), np.float32), SMALL)
