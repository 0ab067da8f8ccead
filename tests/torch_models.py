"""Live transformers models with random weights of unit-like scale, saved as Hugging Face folders."""

import numpy as np
import torch
import transformers

# Ways in which an AST can differ: both widths, both lengths and all stride pairs of the parity contract among them.
CONFIGS = {
    "stride-10-10": {"max_length": 128},
    "stride-16-16": {"frequency_stride": 16, "time_stride": 16, "max_length": 1024},
    "stride-10-16": {"time_stride": 16, "max_length": 128},
    "long": {"max_length": 1024, "frequency_stride": 16, "num_hidden_layers": 2},
    "base-width": {
        "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 2,
        "max_length": 128,
    },
    "no-qkv-bias": {"qkv_bias": False, "max_length": 128},
    "64-mel-bins": {"num_mel_bins": 64, "max_length": 128},
    "relu": {"hidden_act": "relu", "max_length": 128},
    "gelu-tanh": {"hidden_act": "gelu_new", "max_length": 128},
    "other-eps": {"layer_norm_eps": 1e-3, "max_length": 128},
}  # fmt: skip
LABELS = 7


def torch_config(name, **changes):
    """Return a transformers ASTConfig: width 192, 3 layers, 3 heads unless the case says otherwise."""
    fields = {
        "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 3,
        "num_labels": LABELS, **CONFIGS[name], **changes,
    }  # fmt: skip
    return transformers.ASTConfig(**fields)


def randomize(model, seed=0):
    """Draw every tensor, biases, norms, tokens and positions included; transformers' own start hides differences."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim in (2, 4):
                noise = noise * (parameter[0].numel() ** -0.5) * 1.5
            elif "norm" in name and name.endswith("weight"):
                noise = 1 + 0.3 * noise
            elif name.endswith("bias"):
                noise = 0.3 * noise
            parameter.copy_(noise)
    return model.eval()


def saved_model(folder, name, cls=transformers.ASTForAudioClassification, **changes):
    """Save a random model as transformers does and return the live one."""
    config = torch_config(name, **changes)
    config._attn_implementation = "eager"  # SDPA returns no attention maps
    model = randomize(cls(config))
    model.save_pretrained(folder)
    transformers.ASTFeatureExtractor(max_length=config.max_length, num_mel_bins=config.num_mel_bins).save_pretrained(
        folder
    )
    return model


def random_spec(config, batch=2, seed=1):
    """Return normalised features [B, T, F] of a plausible scale."""
    return np.random.default_rng(seed).standard_normal((batch, config.max_length, config.num_mel_bins))
