"""Models in Hugging Face format, from the Hub or a folder; no code that comes with them is run."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from simreg.recipe.errors import UserError
from simreg.recipe.files import one_line


def folder(name: str, patterns: list[str]) -> Path:
    """Files of a model in the Hub's cache; UserError if there is no such model or no network."""
    from huggingface_hub import snapshot_download

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no folder {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # many kinds: unknown id, no network, gated
        raise UserError(
            f"there is no folder {name}, and no model of that name could be had from the Hugging "
            f"Face Hub ({type(error).__name__}: {one_line(error)})"
        ) from None


def told(error: Exception) -> str:
    """What transformers says, in one line; it would have code run that came with the files."""
    wants_code = "trust_remote_code" in str(error)
    return "it needs code of its own, which is never run" if wants_code else one_line(error)


def load(model: str | Path, name: str | None = None) -> PreTrainedModel:
    """A causal language model of a folder or of the Hub, in float32; messages call it `name`.

    UserError if it can't be loaded, or has not all of its weights (transformers would draw the
    missing ones at random), or reads the tokens that it is to predict.
    """
    auto: Any = AutoModelForCausalLM.from_pretrained
    name = name or str(model)
    try:
        with quiet():
            loaded, info = auto(
                model, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
    except Exception as error:  # many kinds: missing, damaged or unknown files
        raise UserError(
            f"cannot load the model {name} (it must be a causal language model): {told(error)}"
        ) from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"the model {name} lacks weights: {', '.join(missing[:3])}")
    found: PreTrainedModel = loaded
    with quiet():
        _require_causal(found, name)
    return found


def tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """That of a model of a folder or of the Hub; UserError if it can't be loaded."""
    try:
        with quiet():
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                model, trust_remote_code=False
            )
            return found
    except Exception as error:  # many kinds: missing, damaged or unknown files
        raise UserError(f"cannot load the tokenizer in {model}: {told(error)}") from None


@torch.no_grad()
def _require_causal(model: PreTrainedModel, name: str) -> None:
    """UserError for BERT and its like, which load as causal models without being one."""
    ids = torch.tensor([[1, 1, 1], [1, 1, 2]])
    try:
        first, second = model(input_ids=ids, use_cache=False).logits[:, :2].float()
    except Exception:  # it may need another device: whoever runs it will see
        return
    if (first - second).abs().max() > 1e-4 * first.abs().max():  # rounding: 2e-6
        raise UserError(
            f"the model {name} ({type(model).__name__}) is no causal language model: what it says "
            "of a token depends on later ones (`is_decoder` in its config?)"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own progress bars and remarks out of the output."""
    logs: Any = transformers.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()
