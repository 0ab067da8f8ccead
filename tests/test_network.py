"""Checkpoints of the Hugging Face Hub against their published logits; `pytest -m network` runs these."""

import numpy as np
import pytest

import ast_jax

pytestmark = pytest.mark.network

# logits[0, :3] of the sample recording, as the conversion script of transformers states them, to 1e-4.
PUBLISHED = {
    "MIT/ast-finetuned-audioset-10-10-0.4593": (-0.8760, -7.0042, -8.6602),
    "MIT/ast-finetuned-audioset-10-10-0.450": (-1.1986, -7.0903, -8.2718),
    "MIT/ast-finetuned-audioset-10-10-0.448": (-2.6128, -8.0080, -9.4344),
    "MIT/ast-finetuned-audioset-10-10-0.448-v2": (-1.5080, -7.4534, -8.8917),
    "MIT/ast-finetuned-audioset-12-12-0.447": (-0.5050, -6.5833, -8.0843),
    "MIT/ast-finetuned-audioset-14-14-0.443": (-0.3826, -7.0336, -8.2413),
    "MIT/ast-finetuned-audioset-16-16-0.442": (-1.2113, -6.9101, -8.3470),
}


@pytest.fixture(scope="module")
def sample():
    import huggingface_hub

    return huggingface_hub.hf_hub_download(
        "nielsr/audio-spectogram-transformer-checkpoint", "sample_audio.flac", repo_type="dataset"
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_logits(name, sample):
    params, config, frontend = ast_jax.load(name)
    waveform = ast_jax.read_audio(sample, frontend.sampling_rate)[: frontend.max_samples]
    spec = ast_jax.ASTFeatureExtractor(frontend)(waveform, sampling_rate=frontend.sampling_rate)
    logits = ast_jax.apply(params, spec, config)
    assert config.num_labels == 527
    np.testing.assert_allclose(logits[0, :3], PUBLISHED[name], atol=1e-4)  # four decimals were published


def test_speech_commands_loads():
    _, config, frontend = ast_jax.load("MIT/ast-finetuned-speech-commands-v2")
    assert (config.num_labels, config.max_length, frontend.max_length) == (35, 128, 128)
    assert config.resolved_problem_type == "single_label_classification"
