"""The Hugging Face Hub: the only module that touches the network."""

from __future__ import annotations

import logging
import pathlib

logger = logging.getLogger(__name__)
JSON_FILES = ("config.json", "preprocessor_config.json", "ast_jax.json")
OTHER_FORMATS = ("*.bin", "*.bin.index.json")  # downloaded only if there is no safetensors file


def download(repo_id: str) -> pathlib.Path:
    """Return the local snapshot of a Hub repository, downloading what Hugging Face's cache does not have.

    Raises:
        ConnectionError: the Hub cannot be reached and the repository is not in the cache; one line.
        ValueError: the repository does not exist, or `repo_id` is not a valid id.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        logger.info("%s: looking it up on the Hugging Face Hub", repo_id)
        first = [*JSON_FILES, "params/*", "*.safetensors", "*.safetensors.index.json"]
        folder = pathlib.Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=first))
        if not (any(folder.glob("*.safetensors")) or (folder / "params").is_dir()):
            folder = pathlib.Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=[*first, *OTHER_FORMATS]))
        return folder
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ValueError(f"{repo_id}: neither a local folder nor a model on the Hub that you have access to") from error
    except Exception as error:  # the exceptions depend on which HTTP client the installed huggingface_hub uses
        raise ConnectionError(
            f"{repo_id}: not a local folder, not in the cache, and the Hugging Face Hub cannot be reached "
            f"({type(error).__name__})"
        ) from error
