"""Where a model can be opened from: a folder on this machine, for any way to name a model."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.models.fetching import is_gguf, is_hub_id, localized
from pipeline.models.gguf_files import folder_of_gguf
from pipeline.storage import hub_cache, make_cache

# The last is what `pmet apply` records beside a model.
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", ".pmet_edits/*")


def open_model_folder(model: str, cache_dir: Path) -> Path:
    """Return a local folder with the model.

    Args:
        model: a folder, a GGUF file, a URL of either, or a hub id.
        cache_dir: where copies of remote models and dequantised GGUF files are kept.

    Raises:
        ModelError: the model does not exist, or is a GGUF file that cannot be read.
        StorageError: it cannot be copied.
    """
    if is_gguf(model):
        return folder_of_gguf(model, cache_dir)
    path = Path(localized(model, cache_dir)).expanduser()
    if path.is_dir():
        return path
    if is_hub_id(model):
        return _hub_snapshot(model)
    raise ModelError(
        f"model {model} is not a folder; give a model folder, a GGUF file, a URL or a hub id"
    )


def _hub_snapshot(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = list(_HUB_FILES)
    try:
        if (cache := hub_cache()) is None:
            return Path(snapshot_download(model, allow_patterns=files))
        # An image may contain the model, in a read-only folder.
        with suppress(LocalEntryNotFoundError):
            return Path(snapshot_download(model, allow_patterns=files, local_files_only=True))
        make_cache(cache)
        return Path(snapshot_download(model, allow_patterns=files, cache_dir=cache))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model {model} is neither a local folder nor available from the hub ({reason}); check "
            "the path or the id"
        ) from None
