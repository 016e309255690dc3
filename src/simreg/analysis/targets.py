"""Which models to look at: from what the user names to a list of them, each with arm and seed."""

from dataclasses import dataclass
from pathlib import Path

from simreg.recipe import checkpoints, config, hub
from simreg.recipe.config import RunConfig
from simreg.recipe.errors import UserError
from simreg.recipe.files import expanded
from simreg.recipe.folder import SEED_FOLDER, STUDY_FILE, RunFolder, warn


@dataclass(frozen=True)
class Target:
    """One model. `final`: not a checkpoint on the way; only such models enter comparisons."""

    arm: str
    path: str
    """A folder with config.json and weights, or a Hub id."""
    seed: int | None = None
    """None: no run, whose seed is not known."""
    step: int | None = None
    tokens: int | None = None
    final: bool = True
    run: Path | None = None
    config: RunConfig | None = None
    corpus: str | None = None
    """Fingerprint of the data that the run was trained on, once it is finished."""

    @property
    def name(self) -> str:
        """For messages: `simreg, seed 3, step 750`."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        step = "" if self.final or self.step is None else f", step {self.step}"
        return f"{self.arm}{seed}{step}"


def find(names: list[str], *, series: bool) -> list[Target]:
    """The models that the arguments name, without those named twice.

    An argument is the folder of a study (its runs at the full budget), a run's folder, a model's
    folder, or a Hub id; `ARM=` before it says which arm it belongs to. `series` adds the
    checkpoints that runs have kept. Raises UserError if there is no model.
    """
    if not names:
        raise UserError("name a model: the folder of a run, a study or a model, or a Hub id")
    found: dict[tuple[str, str], Target] = {}
    for name in names:
        for target in _expand(name, series):
            found.setdefault((target.arm, target.path), target)
    _require_distinct(list(found.values()))
    return list(found.values())


def study_of(name: str) -> Path | None:
    """The folder of the study that an argument names; None if it names something else."""
    path = expanded(_split(name)[1])
    return path if (path / STUDY_FILE).is_file() else None


def _split(name: str) -> tuple[str, str]:
    """`ARM=PATH` as the two, ARM empty where none is given."""
    arm, _, rest = name.rpartition("=")
    return ("", name) if not arm or Path(name).exists() else (arm, rest)


def _expand(name: str, series: bool) -> list[Target]:
    arm, rest = _split(name)
    path = expanded(rest)
    if (path / STUDY_FILE).is_file():
        runs = _planned(path)
        found = [t for run in runs for t in _of_run(run, arm or run.parents[1].name, series)]
        if not found:
            raise UserError(f"the study in {path} has no run with a model in it")
        return found
    if (path / "config.yaml").is_file():
        found = _of_run(path, arm or _arm_of(path), series)
        if not found:
            kept = not series and checkpoints.found(RunFolder(path).checkpoints)
            advice = ", or look at the checkpoints that it has kept, with --series" if kept else ""
            raise UserError(
                f"the run in {path} has no trained model: finish it by the command that began it"
                f"{advice}"
            )
        return found
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{path} is no run (config.yaml), study ({STUDY_FILE}) or model (config.json)"
        )
    if not path.exists():
        hub.folder(rest, ["config.json"])  # before its tokenizer is looked for
    return [Target(arm or path.name, str(path) if path.exists() else rest)]


def _planned(study: Path) -> list[Path]:
    """The folders of its runs at the full budget, without those that its plan no longer has."""
    plan = config.read_yaml(study / STUDY_FILE)
    seeds = [f"seed-{seed}" for seed in plan.get("seeds") or []]
    budgets = plan.get("budgets") or {}
    arms = [arm for arm in plan.get("arms") or {} if 1.0 in budgets.get(arm, [1.0])]
    planned = [study / arm / "1" / seed for arm in arms for seed in seeds]
    folders = sorted(file.parent for file in study.glob("*/1/seed-*/config.yaml"))
    for folder in folders:
        if folder not in planned:
            warn(f"{folder} is not in the plan of its study: left out")
    missing = [str(folder.relative_to(study)) for folder in planned if folder not in folders]
    if missing:
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        warn(f"{len(missing)} of the {len(planned)} runs planned in {study} have not begun: {few}")
    return [folder for folder in folders if folder in planned]


def _of_run(path: Path, arm: str, series: bool) -> list[Target]:
    """The models of a run, in the order of their steps."""
    folder, run = RunFolder(path), config.recorded(path / "config.yaml")
    corpus = folder.corpus()

    def target(model: Path, step: int, final: bool) -> Target:
        seed, tokens = run.train.seed, step * run.tokens_per_step
        return Target(arm, str(model), seed, step, tokens, final, path, run, corpus)

    finished = (folder.model / "config.json").is_file()
    kept = checkpoints.found(folder.checkpoints)[::-1] if series else []
    steps = [(checkpoints.step_of(checkpoint), checkpoint) for checkpoint in kept]
    found = [target(p, step, False) for step, p in steps if not finished or step < run.steps]
    if finished:
        return [*found, target(folder.model, run.steps, True)]
    if not found:
        warn(f"the run in {path} has no model: left out")
    return found


def _arm_of(run: Path) -> str:
    """ARM of ARM/BUDGET/seed-N, as studies lay out their runs; else the folder's name."""
    path = run.absolute()
    return path.parents[1].name if SEED_FOLDER.fullmatch(path.name) else path.name


def _require_distinct(targets: list[Target]) -> None:
    seen: dict[tuple[str, int | None, int | None], Target] = {}
    for target in targets:
        other = seen.setdefault((target.arm, target.seed, target.step), target)
        if other is not target:
            raise UserError(
                f"{other.path} and {target.path} would both be {target.name}: name their arms, "
                "as in ARM=PATH"
            )
