"""The Hugging Face Hub: the only module that touches the network."""

from __future__ import annotations

import pathlib

FILES = ("config.json", "preprocessor_config.json", "model.safetensors", "ast_jax.json", "params/*")


def download(repo_id: str) -> pathlib.Path:
    """Return the local copy of a Hub repository, fetched into Hugging Face's own cache where it is not there yet.

    Raises:
        ConnectionError: the Hub cannot be reached and the cache does not have it; one line.
        ValueError: the Hub has no such repository, or `repo_id` is no id.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=list(FILES)))
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ValueError(f"{repo_id}: neither a local folder nor a model on the Hub that you may read") from error
    except Exception as error:  # the HTTP client below huggingface_hub has changed, and its exceptions with it
        raise ConnectionError(
            f"{repo_id}: not a local folder, not in the cache, and the Hugging Face Hub cannot be reached "
            f"({type(error).__name__})"
        ) from error
