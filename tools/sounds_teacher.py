"""Train the teacher of `sounds-tiny`: an ensemble of small CNNs, exported as one program for `finetune --teacher`.

    python tools/sounds_teacher.py DATA TEACHER.stablehlo --epochs 14

CNNs are equivariant to shifts in time and frequency, which a transformer must learn from data: on a small data set they
are more accurate, and a transformer distilled from them is more accurate than one trained on labels only (Gong et al.
2022, CMKD). The test split is not used.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import pathlib
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export

from ast_jax.audio.features import normalize, padded_log_mel
from ast_jax.config import FrontendConfig
from ast_jax.data import audit, datasets
from ast_jax.training import augment, input_pipeline, metrics
from ast_jax.training import step as train
from ast_jax.training.config import TrainConfig

CHANNELS = (24, 48, 96, 128)
AUGMENTATION = TrainConfig(batch_size=64, mixup=0.4, frequency_shift=4, time_shift=20)
FREQUENCY_MASK, TIME_MASK = (
    24,
    48,
)  # maximum widths; applied after normalisation: masked values are the mean
MIXED = 0.95  # target of a label from mixup, whatever its weight
FLOOR = -15.9  # log-mel of digital silence, which pads short sounds
BANDS = (0, 32, 64, 96, 127)  # mel bins of the random equaliser's control points


class Network(nn.Module):
    """Four strided convolutions on the halved spectrogram, then mean and maximum over time."""

    num_labels: int

    @nn.compact
    def __call__(self, spec: jax.Array) -> jax.Array:
        """Return logits [B, C] of normalised features [B, T, F]."""
        hidden = nn.avg_pool(spec[..., None], (2, 2), (2, 2))  # [B, T/2, F/2, 1]
        for number, channels in enumerate(CHANNELS):
            hidden = nn.Conv(channels, (3, 3), (2, 2), kernel_init=nn.initializers.he_normal())(hidden)
            if number:  # not after the first layer, which keeps the level
                hidden = nn.GroupNorm(num_groups=1)(hidden)
            hidden = nn.relu(hidden)
        hidden = hidden.mean(2)  # [B, T/32, 128]
        return nn.Dense(self.num_labels)(jnp.concatenate([hidden.mean(1), hidden.max(1)], -1))


def disturb(key: jax.Array, spec: jax.Array) -> jax.Array:
    """Augment normalised features [B, T, F]: SpecAugment, random gain, and a random smooth equaliser."""
    level_key, band_key, mask_key = jax.random.split(key, 3)
    mask = functools.partial(augment.mask_spec, frequency_mask=FREQUENCY_MASK, time_mask=TIME_MASK)
    spec = jax.vmap(mask)(jax.random.split(mask_key, len(spec)), spec)
    gains = 0.15 * jax.random.normal(band_key, (len(spec), len(BANDS)))
    curve = jax.vmap(lambda gain: jnp.interp(jnp.arange(spec.shape[-1]), jnp.array(BANDS), gain))(gains)  # [B, F]
    return spec + curve[:, None] + 0.25 * jax.random.normal(level_key, (len(spec), 1, 1))


def main() -> None:
    """Train, print the validation mAP after every epoch, and export the mean of the networks' logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path, help="folder of the data set that sounds_data.py built")
    parser.add_argument("output", type=pathlib.Path, help="file to write, *.stablehlo")
    parser.add_argument("--epochs", type=int, default=14, help="number of epochs (default: %(default)s)")
    parser.add_argument("--networks", type=int, default=2, help="size of the ensemble (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    options = parser.parse_args()
    dataset = datasets.read_dataset(options.data, options.seed)
    examples, labels, size = dataset.splits["train"], dataset.labels, AUGMENTATION.batch_size
    frontend = FrontendConfig(max_length=256, padding_value=FLOOR)
    found = audit.statistics(examples, frontend, limit=1000)
    frontend = frontend.replace(mean=round(found.mean, 4), std=round(found.std, 4))
    network = Network(len(labels))
    root = jax.random.key(options.seed)
    blank = jnp.zeros((1, frontend.max_length, frontend.num_mel_bins))
    params = [network.init(key, blank) for key in jax.random.split(root, options.networks)]
    steps = len(examples) // size
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps * options.epochs, 3e-3), weight_decay=1e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch, number):
        key = jax.random.fold_in(root, number)
        keys = jax.random.split(key, size)
        spec = train.augmented_features(keys, batch, frontend, AUGMENTATION, jnp.ones(()))
        specs = [disturb(jax.random.fold_in(key, member), spec) for member in range(len(params))]
        targets = jnp.where(batch["labels"] % 1 > 0, MIXED, batch["labels"])  # what is mixed in is there

        def loss(params):
            logits = jnp.stack(list(map(network.apply, params, specs)))  # [networks, B, C]
            return optax.sigmoid_binary_cross_entropy(logits, targets).mean((1, 2)).sum()  # each trains by itself

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value / len(params)

    def scores(params, waveform, num_samples):
        spec = normalize(padded_log_mel(waveform, num_samples, frontend), frontend)
        return sum(network.apply(member, spec) for member in params) / len(params)

    evaluate = jax.jit(scores)
    training = dataclasses.replace(AUGMENTATION, batch_size=size, epochs=options.epochs, seed=options.seed)
    batches = input_pipeline.train_batches(examples, frontend, len(labels), training)
    for epoch in range(options.epochs):
        began, losses = time.monotonic(), []
        for number, batch in enumerate(itertools.islice(batches, steps)):
            params, state, value = step(params, state, batch, epoch * steps + number)
            losses.append(value)
        results = [
            (np.asarray(evaluate(params, batch["waveform"], batch["num_samples"]))[use], batch["labels"][use])
            for batch in input_pipeline.eval_batches(
                dataset.splits["validation"], frontend, len(labels), batch_size=size
            )
            for use in (batch["usable"],)
        ]
        precisions = metrics.average_precisions(*map(np.concatenate, zip(*results, strict=True)))
        print(
            f"epoch {epoch + 1}: loss {np.mean(losses):.4f}, validation mAP {np.nanmean(precisions):.4f}, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )

    def program(waveform, num_samples):
        logits = scores(params, waveform, num_samples)
        return {label: logits[:, index] for index, label in enumerate(labels)}

    count = export.symbolic_shape("b")
    shapes = (
        jax.ShapeDtypeStruct((*count, frontend.max_samples), jnp.float32),
        jax.ShapeDtypeStruct(count, jnp.int32),
    )
    exported = export.export(jax.jit(program), platforms=("cpu", "cuda", "tpu"))(*shapes)
    options.output.write_bytes(exported.serialize())
    print(f"{options.output}: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")


if __name__ == "__main__":
    main()
