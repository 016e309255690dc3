import os
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import tyro

from simreg.recipe import config as recipe
from simreg.recipe.errors import UserError
from simreg.recipe.values import parse_assignments, read_yaml
from simreg.study import plan, run
from simreg.study.options import DEMO_MINUTES, CompareOptions, from_options
from simreg.study.plan import Cell

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs/results/tiny"


def test_the_demo():
    study = from_options(CompareOptions())
    assert [(c.arm, c.budget, c.seed) for c in study.cells()] == [
        ("baseline", 1.0, 0),
        ("simreg", 0.6, 0),
        ("simreg", 0.8, 0),
        ("simreg", 1.0, 0),
    ]
    assert study.out == "runs/demo"
    assert study.minutes == DEMO_MINUTES
    assert study.config(study.cells()[0]).simreg.weight == 0
    assert study.config(study.cells()[1]).simreg.weight > 0


def test_other_text_than_the_demos_has_a_folder_of_its_own():
    assert from_options(CompareOptions(data=["a.txt"])).out == "runs/compare"
    assert from_options(CompareOptions(data=["a.txt"], out="b")).out == "b"


def test_other_text_comes_with_validation_text_of_its_own(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("base: {data: {source: theirs.txt, validation: held.txt, seq_len: 64}}")
    ours = partial(CompareOptions, str(file), data=["a.txt"])
    data = from_options(ours()).base.data
    assert (data.source, data.validation, data.seq_len) == ("a.txt", None, 64)
    assert from_options(ours(set=["data.validation=b.txt"])).base.data.validation == "b.txt"
    assert from_options(CompareOptions(str(file))).base.data.validation == "held.txt"


def test_config_of_a_run():
    study = plan.from_dict({"base": {"train": {"tokens": 100_000}}, "seeds": [3], "out": "x"})
    config = study.config(Cell("simreg", 0.6, 3))
    assert (config.out, config.train.tokens, config.train.seed) == (
        "x/simreg/0.6/seed-3",
        60_000,
        3,
    )


def test_a_seeds_arms_run_together_reference_first():
    study = plan.from_dict({"arms": {"b": {}, "a": {}}, "seeds": [5, 2], "budgets": [1.0, 0.5]})
    assert [(c.seed, c.arm, c.budget) for c in study.cells()][:6] == [
        (5, "baseline", 1.0),
        (5, "b", 0.5),
        (5, "b", 1.0),
        (5, "a", 0.5),
        (5, "a", 1.0),
        (2, "baseline", 1.0),
    ]


def test_arms_of_one_name_are_refused():
    arms = ["a:simreg.weight=1", "a:simreg.weight=2"]
    with pytest.raises(UserError, match="--arm: two of them have the same name"):
        from_options(CompareOptions(arm=arms))


def test_budgets_for_each_arm():
    budgets = {"baseline": [1.0, 1.2], "a": [0.5]}
    study = plan.from_dict({"arms": {"a": {}, "b": {}}, "budgets": budgets})
    assert study.budgets_of("baseline") == [1.0, 1.2]
    assert study.budgets_of("a") == [0.5]
    assert study.budgets_of("b") == [1.0]


def test_an_arm_to_be_timed_is_one_of_the_study():
    with pytest.raises(UserError, match="timed: unknown arms strong"):
        plan.from_dict({"arms": {"simreg": {}}, "timed": ["strong", "simreg"]})
    assert plan.from_dict({"timed": []}).times("simreg") is False
    assert plan.from_dict({}).times("simreg") is True


SCALED = """
out: docs/results/x
base: {train: {tokens: 1000000}, optim: {lr: 0.01}}
seeds: [1, 2]
arms: {simreg: {}, strong: {simreg: {weight: 3}}}
scales:
  gpu: {base: {model: {preset: llama-60m}, train: {tokens: 9000000}}, seeds: [7], arms: {big: {}}}
  far: {out: elsewhere}
"""


def test_a_study_at_another_scale(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(SCALED)
    plain, gpu, far = (
        from_options(CompareOptions(str(file), scale=scale)) for scale in (None, "gpu", "far")
    )
    assert (plain.out, gpu.out, far.out) == ("docs/results/x", "docs/results/x-gpu", "elsewhere")
    assert (gpu.base.model.preset, gpu.base.train.tokens, gpu.base.optim.lr) == (
        "llama-60m",
        9_000_000,
        0.01,
    )
    assert (gpu.seeds, plain.seeds) == ([7], [1, 2])
    assert gpu.arms.keys() == {"baseline", "simreg", "strong", "big"}
    assert (plain.base.model.preset, plain.base.train.tokens) == ("llama-tiny", 1_000_000)
    over = from_options(CompareOptions(str(file), scale="gpu", out="mine", tokens=5_000_000))
    assert (over.out, over.base.train.tokens) == ("mine", 5_000_000)


def test_a_scale_named_by_a_number(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("scales: {16: {seeds: [7]}}\n")
    found = from_options(CompareOptions(str(file), scale="16"))
    assert (found.seeds, Path(found.out).name) == ([7], "s-16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "cpu"}, "--scale cpu: the study has gpu, far"),
        ({"scale": "cpu", "study": None}, "--scale cpu: the study has no scales"),
    ],
)
def test_a_scale_that_is_not_there(tmp_path, options, message):
    file = tmp_path / "x.yaml"
    file.write_text(SCALED)
    with pytest.raises(UserError, match=message):
        from_options(CompareOptions(**{"study": str(file), **options}))


def test_another_reference():
    study = plan.from_dict({"reference": "plain", "arms": {"plain": {}, "new": {}}})
    assert list(study.arms) == ["plain", "new"]
    assert study.cells()[0] == Cell("plain", 1.0, 0)


def test_file_flags_and_round_trip(tmp_path):
    path = tmp_path / "lambda.yaml"
    path.write_text("base: {optim: {lr: 1e-3}, train: {tokens: 50000}}\narms: {a: {}}\n")
    options = tyro.cli(
        CompareOptions,
        args=[
            *(str(path), "--seeds", "0", "1", "--model", "llama-60m", "--set", "optim.warmup=0.2"),
            *("--arm", "x:simreg.weight=1e-1,simreg.variant=in", "--arm", "y:optim.lr=2e-3"),
        ],
    )
    study = from_options(options)
    assert (study.name, study.seeds, study.minutes) == ("lambda", [0, 1], None)
    assert list(study.arms) == ["baseline", "a", "x", "y"]
    assert (study.base.optim.lr, study.base.optim.warmup) == (1e-3, 0.2)
    assert study.base.model.preset == "llama-60m"
    x = study.config(Cell("x", 1.0, 0))
    assert (x.simreg.weight, x.simreg.variant, x.optim.lr) == (0.1, "in", 1e-3)
    plan.save(study, tmp_path / "again.yaml")
    assert plan.load(tmp_path / "again.yaml") == study


def test_tokens_replace_the_minutes(tmp_path):
    path = tmp_path / "study.yaml"
    plan.save(from_options(CompareOptions()), path)
    study = from_options(CompareOptions(study=str(path), tokens=123_456))
    assert (study.minutes, study.base.train.tokens) == (None, 123_456)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "repeat"),
        ({"seeds": [-1]}, "seeds"),
        ({"budgets": [0]}, "budgets"),
        ({"budgets": []}, "budgets"),
        ({"budgets": [True]}, "budgets"),
        ({"seeds": [True]}, "seeds"),
        ({"budgets": [0.9999999]}, "0.9999999 of arm .* would pass for 1.0"),
        ({"budgets": {"nobody": [1.0]}}, "nobody"),
        ({"budgets": {"baseline": [0.5]}}, "needs the budget 1.0"),
        ({"reference": "nobody"}, "not among the arms"),
        ({"base": {"optim": {"lr": -1}}}, "lr"),
        ({"arms": {"a": {"simreg": {"wait": 1}}}}, "arm 'a'.*wait"),
        ({"arms": {"a": {"data": {"seq_len": 8}}}}, "arm 'a' may not set data"),
        ({"arms": {"a": {"train": {"seed": 8}}}}, "arm 'a' may not set train.seed"),
        ({"arms": {"a/b": {}}}, "a/b"),
        ({"arms": {"..": {}}}, "name"),
        ({"minutes": 0}, "minutes"),
        ({"sides": 1}, "^study: sides: there is no such field; did you mean seeds"),
        ({"sede": 1}, "^study: sede: there is no such field; did you mean seeds"),
        (
            {"base": {"lr": 1}},
            r"^study: base\.lr: there is no such field; did you mean base",
        ),
        ({"seeds": [2**32]}, "seeds"),
        ({"arms": {"baseline": {"simreg": {"weight": 0.2}}}}, r"'baseline'.*weight=0.2.*another"),
        ({"arms": {"a": {"train": {"evals": 3}}}}, "arm 'a' may not set train.evals"),
        ({"arms": {"a": {"train": {"eval_tokens": None}}}}, "may not set train.eval_tokens"),
        ({"base": {"train": {"seed": 7}}}, r"base.train.seed=7.*seeds: \[7\]"),
        (
            {"base": {"train": {"tokens": 10_000}}},
            r"0.6 and 0.8 of arm 'simreg' both come to 2 steps",
        ),
        ({"budgets": [0.3333333, 0.3333334, 1.0]}, "0.3333333 and 0.3333334.*too alike"),
        ({"budgets": [0.5, -1]}, r"^study: budgets: a list of .*\(got -1\)$"),
        ({"budgets": [1e-9, 1.0]}, "arm 'simreg': train.tokens"),
        ({"arms": {"Results.JSON": {}}}, "named like a file"),
        ({"arms": ["a"]}, "arms"),
        ({"base": 5}, "base"),
        ({"base": {"train": 5}}, "base.train"),
        ({"arms": {"a": 5}}, "arms.a"),
        ({"arms": {"a": {"optim": 5}}}, "arm 'a'.*optim"),
        ({"arms": {"baseline": {"simreg": 5}}}, "arm 'baseline'.*simreg"),
    ],
)
def test_mistakes_in_a_plan(values, message):
    with pytest.raises(UserError, match=message) as error:
        plan.from_dict(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 5, "minutes": 1.0}, "--tokens and --minutes"),
        ({"arm": ["weight=1"]}, "NAME:section.key=value"),
        ({"arm": [":optim.lr=1"]}, "NAME:section.key=value"),
        ({"arm": ["a:weight"]}, "section.key=value"),
        ({"arm": ["baseline:optim.lr=1"]}, "reference"),
        ({"set": ["optim.lr"]}, "section.key=value"),
        ({"set": ["optim.lr=["]}, "cannot read the value"),
        ({"study": "/nonexistent/x.yaml"}, "cannot read"),
        ({"study": "/proc"}, "/proc is a folder: name a study's file$"),
        ({"study": str(RECORD)}, f"; go on .* compare {RECORD}/study.yaml --out {RECORD}$"),
    ],
)
def test_mistakes_on_the_command_line(options, message):
    with pytest.raises(UserError, match=message):
        from_options(CompareOptions(**options))


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("base: 5", {}, "base must be a mapping"),
        ("base: {train: 5}", {}, "base.train must be a mapping"),
        ("base: [1]", {"tokens": 5}, "base must be a mapping"),
        ("base: {train: [1]}", {"tokens": 5}, "base.train must be a mapping"),
        ("arms: [a]", {"arm": ["x:optim.lr=1"]}, "arms must be a mapping"),
        ("seeds: 5", {}, "seeds"),
        (
            "optim: {lr: 1}\ntrain: {}",
            {},
            r"s\.yaml holds settings of one run \(optim, train\)",
        ),
        ("- 5", {}, "mapping"),
    ],
)
def test_files_of_another_shape(tmp_path, text, flags, message):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        from_options(CompareOptions(study=str(path), **flags))


def test_a_baseline_of_ones_own_is_without_simreg():
    arms = {"simreg": {}, "baseline": {"optim": {"lr": 1e-4}}}
    for reference in ("baseline", "simreg"):
        study = plan.from_dict({"arms": arms, "reference": reference})
        config = study.arm_config("baseline")
        assert (config.simreg.weight, config.optim.lr) == (0, 1e-4)
        assert study.arm_config("simreg").simreg.weight > 0
        assert len(study.arms) == 2


def test_home_is_expanded():
    assert plan.from_dict({"out": "~/x"}).out == os.path.expanduser("~/x")


def test_lists_are_values_of_a_flag():
    flags = [
        "data.source=[a.txt, b.txt],optim.lr=1e-3",
        "data.validation={x: [1, 2]},model.preset=p",
        """data.source='a,b[.txt',data.validation=["c,d", 'e'],data.tokenizer=it's,optim.lr=1""",
    ]
    parsed = [parse_assignments(flag, "--set") for flag in flags]
    assert parsed[0] == {"data": {"source": ["a.txt", "b.txt"]}, "optim": {"lr": "1e-3"}}
    assert parsed[1] == {"data": {"validation": {"x": [1, 2]}}, "model": {"preset": "p"}}
    quoted = {"source": "a,b[.txt", "validation": ["c,d", "e"], "tokenizer": "it's"}
    assert parsed[2] == {"data": quoted, "optim": {"lr": 1}}


def test_saving_changes_a_file_only_where_it_must(tmp_path):
    path, study = tmp_path / "study.yaml", plan.from_dict({})
    plan.save(study, path)
    before = path.stat()
    plan.save(study, path)
    after = path.stat()  # whose time of the last access may be another
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    path.write_text("")
    with pytest.raises(UserError, match=r"study.yaml is damaged \(it is empty\)"):
        plan.load(path)
    path.write_text("seeds: []")
    with pytest.raises(UserError, match=r"study.yaml is damaged \(study: seeds"):
        plan.load(path)


def test_a_study_of_before_an_option_is_none_with_it(tmp_path):
    path = tmp_path / "study.yaml"
    plan.save(plan.from_dict({"base": {"simreg": {"push": 1.0}}}), path)
    lines = path.read_text().splitlines()
    at = lines.index("    depths:")
    assert lines[at + 1 : at + 3] == ["    - 0.25", "    - 0.5"]
    path.write_text("\n".join(lines[:at] + lines[at + 3 :]))
    found = plan.load(path).base.simreg
    assert (found.depths, found.push) == ([], 1.0)


def test_a_failed_save_keeps_the_file(tmp_path, monkeypatch):
    path = tmp_path / "study.yaml"
    plan.save(plan.from_dict({}), path)
    before = path.read_text()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        plan.save(plan.from_dict({"seeds": [1]}), path)
    assert path.read_text() == before


RECORDS = sorted(ROOT.glob("docs/results/*/study.yaml"))
STUDIES = [
    (path, scale)
    for path in sorted(ROOT.glob("studies/*.yaml"))
    for scale in (None, *read_yaml(path).get("scales", {}))
]


@pytest.mark.parametrize(("path", "scale"), STUDIES, ids=lambda part: getattr(part, "stem", part))
def test_the_studies_of_the_repository_load(path, scale):
    study = from_options(CompareOptions(study=str(path), scale=scale))
    assert study.arm_config(study.reference).simreg.weight == 0
    assert len(study.cells()) >= 2
    run._check_models(study)
    stated = read_yaml(path)["base"]["simreg"]
    # Defaults come to change.
    assert {"push", "depths", "depths_offset", "schedule"} <= stated.keys()


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_the_records_of_the_repository_state_all_of_simreg(path):
    stated = read_yaml(path)["base"]["simreg"].keys()
    assert stated == {field.name for field in fields(recipe.SimRegConfig)}


def test_an_arms_typo_is_told_before_any_arms_size():
    values = {"arms": {"simreg": {}, "x": {"simreg": {"weigth": 1}}}, "budgets": [0.6, 0.8, 1.0]}
    with pytest.raises(UserError, match=r"arm 'x': .*weigth"):
        plan.from_dict(values | {"base": {"train": {"tokens": 100}}})


def test_a_size_among_what_all_arms_share_is_the_size(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("minutes: 3\n")
    study = from_options(CompareOptions(study=str(path), set=["train.tokens=2000000"]))
    assert (study.minutes, study.base.train.tokens) == (None, 2_000_000)
    with pytest.raises(UserError, match=r"--set train.tokens and --minutes"):
        from_options(CompareOptions(minutes=3, set=["train.tokens=2000000"]))
    with pytest.raises(UserError, match="--set out"):
        from_options(CompareOptions(set=["out=runs/mine"]))


def test_a_recorded_plan_is_of_before_the_fields_that_it_lacks() -> None:
    """As results.json of older studies are, whose defaults were others."""
    found = plan.to_dict(plan.from_dict({"name": "a", "out": "x", "arms": {"baseline": {}}}))
    for field in ("depths", "depths_offset"):
        del found["base"]["simreg"][field]
    simreg = plan.recorded(found).base.simreg
    assert (simreg.depths, simreg.depths_offset) == ([], 0)
    assert plan.from_dict(found).base.simreg.depths == [0.25, 0.5]


def test_what_is_set_on_the_command_line_overrides_the_study_file(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("base: {optim: {lr: 1e-2, clip: 0.5}, train: {tokens: 1000000}}\n")
    study = from_options(CompareOptions(study=str(path), set=["optim.lr=1e-3"]))
    assert (study.base.optim.lr, study.base.optim.clip) == (1e-3, 0.5)


def test_an_arm_is_added_to_the_demo(tmp_path):
    study = from_options(CompareOptions(tokens=1_000_000, arm=["strong:simreg.weight=1"]))
    assert list(study.arms) == ["baseline", "simreg", "strong"]


@pytest.mark.parametrize(("budget", "tokens"), [(0.29, 29), (0.57, 57), (1.1, 110)])
def test_tokens_of_a_budget_are_rounded(budget, tokens):
    study = plan.from_dict({"base": {"train": {"tokens": 100}}, "minutes": 5})
    assert study.config(Cell("simreg", budget, 0)).train.tokens == tokens


def test_what_the_command_line_says_replaces_what_the_file_does(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("name: mine\nbudgets: [0.5, 1.0]\nminutes: 9\n")
    plain = from_options(CompareOptions(str(path)))
    assert (plain.name, plain.out, plain.minutes) == ("mine", "runs/mine", 9)
    changes = CompareOptions(
        str(path), minutes=3, budgets=[0.7, 1.0], data=["a.txt", "b.txt"], model="llama-60m",
        set=["optim.lr=1e-3", "optim.warmup=0.2", "model.head_bias=unigram", "data.seq_len=64"],
    )  # fmt: skip
    study = from_options(changes)
    assert (study.minutes, study.budgets_of("simreg")) == (3, [0.7, 1.0])
    assert (study.base.data.source, study.base.data.seq_len) == (["a.txt", "b.txt"], 64)
    assert (study.base.model.preset, study.base.model.head_bias) == ("llama-60m", "unigram")
    assert (study.base.optim.lr, study.base.optim.warmup) == (1e-3, 0.2)


def test_a_reference_of_the_files_own_is_not_added_again(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("reference: plain\narms: {plain: {}, new: {}}\n")
    with pytest.raises(UserError, match="--arm plain: the reference arm"):
        from_options(CompareOptions(str(path), arm=["plain:optim.lr=1"]))
    study = from_options(CompareOptions(str(path), arm=["baseline:optim.lr=1", "as-it-is:"]))
    assert study.arms.keys() == {"plain", "new", "baseline", "as-it-is"}
