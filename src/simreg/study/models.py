"""The trained models of studies, alone and among others that a command is given."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from simreg.recipe import trained
from simreg.recipe.errors import UserError
from simreg.recipe.files import expanded
from simreg.recipe.folder import STUDY_FILE, RunFolder
from simreg.recipe.processes import warn
from simreg.recipe.trained import Trained
from simreg.study import plan
from simreg.study.plan import Cell, Study

find = partial(trained.find, of_study=lambda folder, series: _of(load(folder), series))
"""`trained.find`, where the folder of a study stands for its runs at the full budget."""


def load(folder: Path) -> Study:
    """The study in a folder, wherever its file says that it is."""
    return replace(plan.load(folder / STUDY_FILE), out=str(folder))


def named(names: Sequence[str]) -> list[Path]:
    """The folders of studies among what a command is given."""
    folders = [trained.parts_of(name)[1] for name in names]
    return [folder for folder in folders if (folder / STUDY_FILE).is_file()]


def alone(names: Sequence[str]) -> Path | None:
    """The folder of the study that is all a command is given, without an arm; results go there."""
    studies = named(names)
    return studies[0] if len(names) == 1 and studies == [expanded(names[0])] else None


def reference(folders: Sequence[Path], found: Sequence[Trained]) -> str | None:
    """What the reference of the first of these studies that has one among `found` is called there;
    None: of none."""
    for folder in folders:
        name = load(folder).reference
        runs = folder.resolve() / name
        arms = [each.arm for each in found if each.run and runs in each.run.resolve().parents]
        if arms:  # rather the study's own than what was said of one run
            return next((arm for arm in arms if arm.split("/")[-1] == name), arms[0])
    return None


def of_study(study: Study) -> list[Trained]:
    """The trained models at the full budget, the reference first, named as in the study."""
    found = []
    for cell in _cells(study):
        folder = RunFolder(Path(study.out) / cell.folder)
        if folder.model.is_dir() and folder.result.is_file():  # a moment after the model
            [model] = trained.of_run(folder.root)
            found.append(replace(model, name=cell.folder, arm=cell.arm))
    return found


def _cells(study: Study) -> list[Cell]:
    order = [study.reference, *study.others]
    cells = [cell for cell in study.cells() if cell.budget == 1.0]
    return sorted(cells, key=lambda cell: order.index(cell.arm))


def _of(study: Study, series: bool) -> list[Trained]:
    """The same as of a command's argument: with what is missing, and paths for names."""
    out, found, missing = Path(study.out), [], []
    cells = {out / cell.folder: cell for cell in _cells(study)}
    for folder in sorted(file.parent for file in out.glob("*/1/seed-*/config.yaml")):
        if folder not in cells:
            warn(f"{folder} is not in the plan of its study: left out")
    for folder, cell in cells.items():
        if (folder / "config.yaml").is_file():
            models = trained.of_runs([folder], series=series)
            found += [replace(model, arm=cell.arm) for model in models]
        else:
            missing.append(cell.folder)
    if missing:
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        warn(f"{len(missing)} of the {len(cells)} runs planned in {out} have not begun: {few}")
    if not found:
        raise UserError(f"the study in {out} has no trained models at its full budget")
    return found
