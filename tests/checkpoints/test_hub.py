"""Checkpoints of the Hugging Face Hub against their published logits: `pytest -m network tests/checkpoints`."""

import json
import urllib.request

import numpy as np
import pytest

import ast_jax

pytestmark = pytest.mark.network

# logits[0, :3] of the sample recording, from the conversion script of transformers, rounded to 1e-4.
PUBLISHED = {
    "MIT/ast-finetuned-audioset-10-10-0.4593": (-0.8760, -7.0042, -8.6602),
    "MIT/ast-finetuned-audioset-10-10-0.450": (-1.1986, -7.0903, -8.2718),
    "MIT/ast-finetuned-audioset-10-10-0.448": (-2.6128, -8.0080, -9.4344),
    "MIT/ast-finetuned-audioset-10-10-0.448-v2": (-1.5080, -7.4534, -8.8917),
    "MIT/ast-finetuned-audioset-12-12-0.447": (-0.5050, -6.5833, -8.0843),
    "MIT/ast-finetuned-audioset-14-14-0.443": (-0.3826, -7.0336, -8.2413),
    "MIT/ast-finetuned-audioset-16-16-0.442": (-1.2113, -6.9101, -8.3470),
}
# The same for the first clip of Speech Commands v0.02's validation split, from the dataset viewer of the Hub.
SPEECH_COMMANDS = ("MIT/ast-finetuned-speech-commands-v2", (6.1589, -8.0566, -8.7984))
FIRST_ROWS = "https://datasets-server.huggingface.co/first-rows?dataset={}&config={}&split={}"


@pytest.fixture(scope="module")
def sample():
    import huggingface_hub

    return huggingface_hub.hf_hub_download(
        "nielsr/audio-spectogram-transformer-checkpoint", "sample_audio.flac", repo_type="dataset"
    )


def logits_of(sound, params, config, frontend):
    waveform = ast_jax.read_audio(sound, frontend.sampling_rate)[: frontend.max_samples]
    spec = ast_jax.ASTFeatureExtractor(frontend)(waveform, sampling_rate=frontend.sampling_rate)
    return ast_jax.apply(params, spec, config)[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_logits(name, sample):
    params, config, frontend = ast_jax.load(name)
    assert config.num_labels == 527
    logits = logits_of(sample, params, config, frontend)
    np.testing.assert_allclose(logits[:3], PUBLISHED[name], atol=1e-4)  # four decimals were published


def test_published_logits_of_speech_commands():
    name, published = SPEECH_COMMANDS
    params, config, frontend = ast_jax.load(name)
    assert (config.num_labels, config.max_length, frontend.max_length) == (35, 128, 128)
    assert config.resolved_problem_type == "single_label_classification"
    with urllib.request.urlopen(FIRST_ROWS.format("google%2Fspeech_commands", "v0.02", "validation")) as response:
        (audio,) = json.load(response)["rows"][0]["row"]["audio"]
    with urllib.request.urlopen(audio["src"]) as response:
        logits = logits_of(response.read(), params, config, frontend)
    np.testing.assert_allclose(logits[:3], published, atol=1e-4)  # four decimals were published
