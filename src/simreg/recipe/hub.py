"""Models of the Hugging Face Hub."""

from pathlib import Path

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
            f"there is no folder {name}, and no such model could be had from the Hugging Face Hub: "
            f"{one_line(error)[:200]}"
        ) from None
