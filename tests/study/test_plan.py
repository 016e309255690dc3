import pytest
import tyro

from simreg.recipe.errors import UserError
from simreg.study import plan
from simreg.study.plan import Cell, CompareOptions


def test_the_demo():
    study = plan.from_options(CompareOptions())
    assert [(c.arm, c.budget, c.seed) for c in study.cells()] == [
        ("baseline", 1.0, 0),
        ("simreg", 0.6, 0),
        ("simreg", 0.8, 0),
        ("simreg", 1.0, 0),
    ]
    assert study.out == "runs/demo"
    assert study.minutes == plan.DEMO_MINUTES
    assert study.config(study.cells()[0]).simreg.weight == 0
    assert study.config(study.cells()[1]).simreg.weight > 0


def test_config_of_a_run():
    study = plan.from_dict({"base": {"train": {"tokens": 1000}}, "seeds": [3], "out": "x"})
    config = study.config(Cell("simreg", 0.6, 3))
    assert (config.out, config.train.tokens, config.train.seed) == ("x/simreg/0.6/seed-3", 600, 3)


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


def test_budgets_for_each_arm():
    budgets = {"baseline": [1.0, 1.2], "a": [0.5]}
    study = plan.from_dict({"arms": {"a": {}, "b": {}}, "budgets": budgets})
    assert study.budgets_of("baseline") == [1.0, 1.2]
    assert study.budgets_of("a") == [0.5]
    assert study.budgets_of("b") == [1.0]


def test_another_reference():
    study = plan.from_dict({"reference": "plain", "arms": {"plain": {}, "new": {}}})
    assert list(study.arms) == ["plain", "new"]
    assert study.cells()[0] == Cell("plain", 1.0, 0)


def test_file_flags_and_round_trip(tmp_path):
    path = tmp_path / "lambda.yaml"
    path.write_text("base: {optim: {lr: 1e-3}, train: {tokens: 5000}}\narms: {a: {}}\n")
    options = tyro.cli(
        CompareOptions,
        args=[
            *(str(path), "--seeds", "0", "1", "--model", "llama-60m", "--set", "optim.warmup=0.2"),
            *("--arm", "x:simreg.weight=1e-1,simreg.variant=in", "--arm", "y:optim.lr=2e-3"),
        ],
    )
    study = plan.from_options(options)
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
    plan.save(plan.from_options(CompareOptions()), path)
    study = plan.from_options(CompareOptions(study=str(path), tokens=123))
    assert (study.minutes, study.base.train.tokens) == (None, 123)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "repeat"),
        ({"seeds": [-1]}, "seeds"),
        ({"budgets": [0]}, "budgets"),
        ({"budgets": []}, "budgets"),
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
        ({"sides": 1}, "sides"),
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
        ({"arm": ["a:weight"]}, "section.key=value"),
        ({"arm": ["baseline:optim.lr=1"]}, "reference"),
        ({"set": ["optim.lr"]}, "section.key=value"),
        ({"set": ["optim.lr=["]}, "cannot read the value"),
        ({"study": "/nonexistent/x.yaml"}, "cannot read"),
    ],
)
def test_mistakes_on_the_command_line(options, message):
    with pytest.raises(UserError, match=message):
        plan.from_options(CompareOptions(**options))
