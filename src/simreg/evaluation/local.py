"""Local files in place of the Hub: the harness's definitions with only their data replaced."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from simreg.recipe.errors import UserError
from simreg.recipe.files import DECODERS, LocalFile

# Data sets whose many tasks share one file: the file's name, and the field that tells them apart.
_SHARED = {"nyu-mll/blimp": ("blimp", "UID")}


class Local:
    """Finds the file of a task in a folder and puts it into the task's definition.

    A task TASK that evaluates the split SPLIT reads `TASK.jsonl` or `TASK_SPLIT.jsonl`, where the
    file's lines have the field names of the harness's data set; failing that, the file of another
    split, which is noted. Each may be compressed. Tasks of BLiMP share `blimp.jsonl`.

    Args:
        folder: of the files.
        index: the harness's entries (`kind`, `cfg`, `tags`) by name.
        limit: read no more than this many items a task.
    """

    def __init__(self, folder: Path, index: Mapping[str, Any], limit: int | None) -> None:
        if not folder.is_dir():
            raise UserError(f"--data-dir: there is no folder {folder}")
        self.folder, self.index, self.limit = folder, index, limit

    def spec(self, name: str) -> dict[str, Any]:
        """A group for the harness's TaskManager: its own tasks, with another data set each."""
        members = [{"task": leaf, **self._overrides(leaf)} for leaf in self._leaves(name)]
        return {"group": f"local-{name}", "task": members}

    def files(self, name: str) -> list[str]:
        """Names of the files that a task or group reads."""
        return sorted({self._found(leaf)[0].name for leaf in self._leaves(name)})

    def note(self, name: str) -> str:
        """Which split is evaluated, where it is not the harness's."""
        pairs = {(self._split(leaf), self._found(leaf)[1]) for leaf in self._leaves(name)}
        return "; ".join(
            f"{has} split (the harness evaluates {own})" for own, has in sorted(pairs) if own != has
        )

    def require(self, names: Sequence[str]) -> None:
        """UserError that names every file that is missing."""
        missing: dict[str, None] = {}
        for name in names:
            for leaf in self._leaves(name):
                if self._search(leaf) is None:
                    missing[f"{self._stem(leaf)}.jsonl"] = None
        if missing:
            raise UserError(
                f"no {', '.join(missing)} (or .xz, .gz, .zst) in {self.folder}: put files with the "
                "field names of the harness's data sets there, or leave these tasks out by --tasks"
            )

    def _leaves(self, name: str) -> Iterator[str]:
        """The single tasks of a task, group or tag."""
        entry = self.index[name]
        members: Any = sorted(entry.tags) if entry.cfg is None else entry.cfg["task"]
        if isinstance(members, str):
            yield name
            return
        for member in members:
            if not isinstance(member, str):
                raise UserError(f"--data-dir cannot serve the group {name}: name its tasks instead")
            yield from self._leaves(member)

    def _split(self, leaf: str) -> str:
        """The split that the harness evaluates."""
        config = self.index[leaf].cfg
        split = config.get("test_split") or config.get("validation_split")
        if split is None:
            raise UserError(f"--data-dir cannot serve the task {leaf}, which names no split")
        return str(split)

    def _stem(self, leaf: str) -> str:
        shared = _SHARED.get(self.index[leaf].cfg.get("dataset_path"))
        return shared[0] if shared else leaf

    def _search(self, leaf: str) -> tuple[Path, str] | None:
        """The file of a task and the split it holds."""
        own, stem = self._split(leaf), self._stem(leaf)
        splits = [own, *(s for s in ("test", "validation") if s != own)]
        names = [(stem, own), *((f"{stem}_{split}", split) for split in splits)]
        for name, split in names:
            for suffix in ("", *DECODERS):
                path = self.folder / f"{name}.jsonl{suffix}"
                if path.is_file():
                    return path, split
        return None

    def _found(self, leaf: str) -> tuple[Path, str]:
        found = self._search(leaf)
        assert found is not None, leaf  # see `require`
        return found

    def _overrides(self, leaf: str) -> dict[str, Any]:
        """What replaces the data set; only the evaluated split is left."""
        config, (path, _) = self.index[leaf].cfg, self._found(leaf)
        if config.get("num_fewshot"):
            raise UserError(
                f"--data-dir cannot serve the task {leaf}, which shows the model "
                f"{config['num_fewshot']} examples from another split"
            )
        shared = _SHARED.get(config.get("dataset_path"))
        # Items that the harness drops on loading must not count.
        split, limit = self._split(leaf), None if config.get("process_docs") else self.limit

        def data(**settings: Any) -> Any:
            from datasets import Dataset

            rows = _rows(path)
            if shared:
                rows = [row for row in rows if row.get(shared[1]) == config["dataset_name"]]
            if not rows:
                raise UserError(f"{path} holds no item of the task {leaf}")
            return {split: Dataset.from_list(rows[:limit])}

        splits = dict.fromkeys(("training_split", "validation_split", "test_split"))
        name = "test_split" if config.get("test_split") else "validation_split"
        return {"custom_dataset": data, **splits, "fewshot_split": None, name: split}


@lru_cache(maxsize=2)
def _rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, read once for the many tasks that share it."""
    return list(LocalFile(path).records())
