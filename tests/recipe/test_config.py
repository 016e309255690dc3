"""The run's config: validation, files, overrides."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from simreg import SimRegLoss
from simreg.parallel import ShardedSimRegLoss
from simreg.recipe import config
from simreg.recipe.config import RunConfig
from simreg.recipe.errors import UserError
from simreg.recipe.values import parse_assignments, parse_yaml


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    made = config.from_dict(
        {
            "data": {"source": ["a.txt", "b.txt"], "max_tokens": 1000},
            "simreg": {"chunk_size": 8, "variant": "decoupled"},
            "optim": {"lr": 1e-4},
        }
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(made), encoding="utf-8")
    assert config.load(path) == made


@pytest.mark.parametrize("read", [config.load, config.recorded])
def test_a_file_that_is_wrong_is_named(tmp_path: Path, read: Callable[[Path], RunConfig]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(RunConfig()).replace("beta1:", "beta_one:"))
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: optim\.beta_one: there is no"):
        read(path)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"optim": {"lr": -1}}, r"optim\.lr: .*greater than 0 \(got -1\)"),
        ({"optim": {"lr": float("nan")}}, r"optim\.lr"),
        ({"train": {"tokens": 10**30}}, r"train\.tokens: .*less than or equal to"),
        ({"simreg": {"weight": -0.1}}, r"simreg\.weight: .*greater than or equal to 0"),
        ({"simreg": {"temperature": 0}}, r"simreg\.temperature"),
        ({"simreg": {"variant": "inout"}}, r"simreg\.variant: .*'out', 'in' or 'decoupled'"),
        ({"simreg": {"depths": [0]}}, r"simreg\.depths\.0: .*greater than 0"),
        ({"simreg": {"depths": [1]}}, r"simreg\.depths\.0: .*less than 1"),
        ({"simreg": {"depths": 0.5}}, r"simreg\.depths: .*list"),
        ({"simreg": {"depths_offset": [1, 0, 2]}}, r"simreg\.depths_offset: 3 for 2 of depths"),
        *(
            (
                {"simreg": {"depths_offset": wrong}},
                r"^simreg\.depths_offset: Input should be a whole number or a list of them",
            )
            for wrong in (0.5, [0.5], [1, None], [], "x")
        ),
        (
            {"simreg": {"depths_offset": [-6]}, "data": {"seq_len": 8}},
            r"simreg\.depths_offset: \[-6, -6\] leave no two tokens to compare",
        ),
        (
            {"simreg": {"depths_offset": 6}, "data": {"seq_len": 8}},
            r"\.depths_offset: \[6, 6\] leave no two tokens to compare in rows of data\.seq_len=8 ",
        ),
        (
            {"simreg": {"depths": [0.5, 0.5]}},
            r"simreg\.depths: \[0\.5, 0\.5\] are layers \[2, 2\] of 4",
        ),
        (
            {"model": {"layers": 2}, "simreg": {"depths": [0.3, 0.5]}},
            r"simreg\.depths: .* are layers \[1, 1\] of 2, each may come once",
        ),
        ({"simreg": {"depths": [0.9]}}, r"\[0\.9\] are layers \[4\] of 4, .* the last has SimReg"),
        ({"train": {"tokens": 0}}, r"train\.tokens"),
        ({"train": {"keep_checkpoints": 1}}, r"train\.keep_checkpoints"),
        ({"train": {"seed": True}}, r"train\.seed"),
        ({"simreg": {"temperature": 1e-31}}, r"simreg\.temperature"),
        ({"simreg": {"chunk_size": 1}}, r"simreg\.chunk_size: .*greater than or equal to 2"),
        ({"simreg": {"schedule_fraction": 0}}, r"simreg\.schedule_fraction: .*greater than 0"),
        ({"trian": {}}, r"^trian: there is no such field; did you mean train\?$"),
        ({"optim": {"lrr": 1}}, r"^optim\.lrr: there is no such field; did you mean optim\.lr\?$"),
        ({"lr": 1}, r"^lr: there is no such field; did you mean optim\.lr\?$"),
        ({"xyz": 1}, r"^xyz: there is no such field \(there are out, model,[a-z, ]*train\)$"),
        ({"train": {"lr": 1}}, r"^train\.lr: there is no such field; did you mean optim\.lr\?$"),
        ({"train": {"tokens": True}}, r"train\.tokens: .*should be a number \(got True\)"),
        ({"optim": {"lr": True}, "data": {"validation_fraction": True}}, r"fraction.*optim\.lr"),
        ({"train": {"batch_rows": 6, "accumulate": 4}}, r"^train\.accumulate=4 does not divide"),
        ({"optim": {"schedule": "wsd", "warmup": 0.9}}, r"no room for the decay"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        config.from_dict(values)
    assert "\n" not in str(error.value)


def test_without_weight_depths_do_not_matter() -> None:
    plain = config.from_dict({"simreg": {"weight": 0, "depths": [0.9]}})
    assert plain.simreg.depths == [0.9]


@pytest.mark.parametrize("given", [2, "2e0", [2], [2, 2.0]])
def test_offsets_that_are_one_are_that_one(given: Any) -> None:
    found = config.from_dict({"simreg": {"depths": [0.25, 0.5], "depths_offset": given}})
    assert found.simreg.depths_offset == 2


def test_an_offset_may_reach_the_end_of_a_row_and_means_nothing_without_depths() -> None:
    short = {"seq_len": 8}
    last = config.from_dict({"simreg": {"depths_offset": 5}, "data": short})
    none = config.from_dict({"simreg": {"depths_offset": 8, "depths": []}, "data": short})
    assert (last.simreg.depths_offset, none.simreg.depths) == (5, [])


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(UserError, match=r"optim\.lr.*train\.seed"):
        config.from_dict({"optim": {"lr": 0}, "train": {"seed": -1}})


def test_powers_of_ten_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    text = "train: {tokens: 2e+6}\noptim: {lr: 1E-3, warmup: 1.5e-1}\nout: 1e6\n"
    file.write_text(text + "model: {vocab_size: 1e5}")
    read = config.load(file)
    assert (read.train.tokens, read.optim.lr, read.optim.warmup) == (2_000_000, 1e-3, 0.15)
    assert (read.out, read.model.vocab_size) == ("1e6", 100_000)
    file.write_text(config.to_yaml(read))
    assert config.load(file) == read
    with pytest.raises(UserError, match=r"train\.tokens"):
        config.from_dict({"train": parse_yaml("tokens: 2.5e0")})


def test_keys_that_are_merged_in_may_be_said_anew() -> None:
    text = "base: &base {lr: 1, warmup: 0.1}\noptim:\n  <<: *base\n  lr: 2\n"
    assert parse_yaml(text)["optim"] == {"lr": 2, "warmup": 0.1}
    for twice in ("off: 1\noff: 2", "a: {b: 1, b: 1}"):
        with pytest.raises(yaml.YAMLError, match="twice"):
            parse_yaml(twice)


def test_a_folder_without_a_name() -> None:
    with pytest.raises(UserError, match=r"out: String should have at least 1 character"):
        config.from_dict({"out": ""})


def test_construction_by_hand_is_checked_too() -> None:
    with pytest.raises(UserError, match=r"simreg\.weight"):
        config.SimRegConfig(weight=-1)
    with pytest.raises(UserError, match=r"^optim\.lrr: .* did you mean optim\.lr\?$"):
        config.OptimConfig(lrr=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1, 2]", "must hold a mapping"),
        ("a: [", "not valid YAML"),
        ("\xff", "not valid YAML"),
        ("optim: {lrr: 1}", r"c.yaml: optim\.lrr: there is"),
        ("optim: {lr: 0.1}\noptim: {warmup: 0.2}", "'optim' twice"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=says):
        config.load(path)


def test_a_study_is_told_from_a_run(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("base: {}\narms: {}\n")
    with pytest.raises(UserError, match=r"s.yaml is a study, of several runs: simreg compare "):
        config.load(tmp_path / "s.yaml")


def test_text_is_not_taken_for_damaged_settings(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text('Notes\n  : a\n"')
    with pytest.raises(UserError, match=r"notes.txt is not valid YAML \(it was taken for settings"):
        config.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        config.load(tmp_path / "absent.yaml")


def test_empty_file_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").touch()
    assert config.load(tmp_path / "c.yaml") == config.RunConfig()


def test_defaults_of_the_loss_are_the_same_everywhere() -> None:
    ours, sharded, recipe = SimRegLoss(), ShardedSimRegLoss(), config.SimRegConfig()
    assert ours.form == sharded.form
    for name in ("weight", "chunk_size", *ours.form._fields):
        assert getattr(ours, name) == getattr(sharded, name) == getattr(recipe, name)


def test_overrides_reach_inside_and_leave_the_rest() -> None:
    base = config.from_dict({"optim": {"lr": 1e-4, "warmup": 0.2}})
    changed = config.with_overrides(base, {"optim": {"lr": 2e-4}})
    assert (changed.optim.lr, changed.optim.warmup, base.optim.lr) == (2e-4, 0.2, 1e-4)


@pytest.mark.parametrize(
    ("changes", "name", "options"),
    [
        ({"name": "cosine"}, "cosine", {}),
        ({"name": "simctg", "options": {"margin": 0.4}}, "simctg", {"margin": 0.4}),
        ({"name": None}, None, {}),
        ({"options": {"depth": 0.5}}, "nitp", {"weight": 0.1, "depth": 0.5}),
        ({"name": "nitp"}, "nitp", {"weight": 0.1}),
    ],
)
def test_options_do_not_pass_to_another_loss(
    changes: dict[str, Any], name: str | None, options: dict[str, Any]
) -> None:
    base = config.from_dict({"auxiliary": {"name": "nitp", "options": {"weight": 0.1}}})
    found = config.with_overrides(base, {"auxiliary": changes}).auxiliary
    assert (found.name, found.options) == (name, options)
    assert base.auxiliary.options == {"weight": 0.1}


def test_an_auxiliary_loss_may_be_named_after_its_options() -> None:
    assigned = parse_assignments("auxiliary.options.weight=2,auxiliary.name=cosine", "--set")
    assert assigned == {"auxiliary": {"options": {"weight": 2}, "name": "cosine"}}


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (4096, 1), (4097, 2), (40_960, 10)])
def test_steps_round_up(tokens: int, steps: int) -> None:
    assert config.from_dict({"train": {"tokens": tokens}}).steps == steps


def test_a_record_without_a_field_is_of_before_there_was_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("simreg: {weight: 0.3}")
    own = config.recorded(path).simreg
    assert (own.push, own.depths, own.depths_offset) == (0.0, [], 0)
    assert (own.schedule, own.schedule_fraction) == ("constant", 0.5)
