"""Which model a worker opens, and how: only from safetensors, without the model's own code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ModelError
from pipeline.models.finite import check_loaded
from pipeline.models.node_cache import model_on_node
from pipeline.models.skeleton import NO_CODE, UNREADABLE, model_class
from pmet.model import share_out
from pmet.targets import free_memory


@dataclass(frozen=True)
class ModelSource:
    """Which model to open, and how.

    Attributes:
        folder: a model folder that all nodes have, a URL or a hub id; see
            `pipeline.models.node_cache`.
        on_gpu: whether to load it onto the worker's GPU; split over all GPUs if there are several.
        dtype: of the weights: ``auto``, ``float32`` or ``bfloat16``. By default float32 on a CPU,
            where 16-bit arithmetic is slow and imprecise, and the stored dtype on a GPU.
        digest: the digest that a copy of the model must have; None accepts any.
    """

    folder: str
    on_gpu: bool
    dtype: str = "auto"
    digest: str | None = None

    def open(self) -> tuple[Any, Any]:
        """Open the model in evaluation mode, and its tokenizer.

        Raises:
            ModelError: the model is not here, or holds values that are not finite.
        """
        dtype = "float32" if self.dtype == "auto" and not self.on_gpu else self.dtype
        folder = str(model_on_node(self.folder, self.digest))
        model = self._placed(open_causal_lm(folder, dtype=dtype))
        check_loaded(folder, model)
        return model, open_tokenizer(folder)

    def _placed(self, model: Any) -> Any:
        """Move the model to the GPUs of this process, if it is to run on any."""
        if not self.on_gpu:
            return model
        gpus = visible_gpus()
        if len(gpus) < 2:
            return model.to("cuda")
        return share_out(model, gpus, [free_memory(gpu) for gpu in gpus])


def visible_gpus() -> list[torch.device]:
    """The GPUs that Ray has assigned to this process."""
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def open_causal_lm(folder: str, *, dtype: torch.dtype | str) -> Any:
    """Open a causal language model from a local folder: only safetensors, no custom code."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **NO_CODE)
    model = model_class(config).from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, **NO_CODE
    )
    return model.eval()


def open_tokenizer(folder: str) -> Any:
    """The model's fast tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, **NO_CODE)


def open_fast_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: there is none, or only one that gives no character offsets.
    """
    try:
        tokenizer = open_tokenizer(str(folder))
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model {folder} has no tokenizer that can be opened ({reason})") from None
    # Some tokenizers open even without their files, with an empty vocabulary.
    if not tokenizer("word")["input_ids"]:
        raise ModelError(f"model {folder} has no tokenizer files; add its tokenizer.json")
    if not tokenizer.is_fast:
        raise ModelError(
            f"model {folder} has only a slow tokenizer, which gives no character offsets; add its "
            "tokenizer.json"
        )
    return tokenizer
