"""Every number of every training script has its least value, what contradicts itself is refused, the demo's settings."""

import json
import math
from argparse import Namespace

import pytest

from acpo_utils.training.arguments import (
    ABOVE_ZERO,
    AT_LEAST,
    at_step,
    check_numbers,
    check_objective,
    read_demo_settings,
)
from tests.training.test_run_state import SCRIPTS, actions, defaults


# Numbers of which any value makes sense, or whose bounds something else knows.
UNBOUNDED = {
    "guidance_scale",  # below 1 too: Ho and Salimans' weights of other signs
    "train_guidance_scale",
    "logit_mean",  # a shift of sigmas either way
    "mode_scale",
    "ema_max_decay",  # diffusers' EMAModel clamps
    "evaluator_weight",  # guide_weights
    "structure_layers",  # negative from the end, IPCE checks that they are there
    "mos_range",  # scores may be below 0
}


def numbers(name: str) -> list[str]:
    return [flag for flag, action in actions(name).items() if action.type in (int, float)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_number_has_its_least_value(name):
    """By the parser: a flag that is added without a bound fails here."""
    known = AT_LEAST.keys() | set(ABOVE_ZERO) | UNBOUNDED
    assert [flag for flag in numbers(name) if flag not in known] == []
    check_numbers(Namespace(**defaults(name)), rank=0)


def test_every_bound_is_of_a_number_of_some_script():
    found = {flag for name in SCRIPTS for flag in numbers(name)}
    assert [flag for flag in (*AT_LEAST, *ABOVE_ZERO, *UNBOUNDED) if flag not in found] == []


@pytest.mark.parametrize("flag", AT_LEAST)
def test_a_number_below_its_least_is_one_line(flag):
    least = AT_LEAST[flag]
    for value in (least, least + 1):
        check_numbers(Namespace(**{flag: value}))
        check_numbers(Namespace(**{flag: [value, value]}))
    for value in (least - 1, least - 0.001, math.nan, math.inf, -math.inf):
        for given in (value, [least, value]):
            with pytest.raises(ValueError) as error:
                check_numbers(Namespace(**{flag: given}))
            assert str(error.value) == f"--{flag}: expected at least {least}, found {value}"


@pytest.mark.parametrize("flag", ABOVE_ZERO)
def test_a_number_that_is_not_above_zero_is_one_line(flag):
    check_numbers(Namespace(**{flag: 1e-9}))
    for value in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError) as error:
            check_numbers(Namespace(**{flag: value}))
        assert str(error.value) == f"--{flag}: expected a number above 0, found {value}"


def test_what_is_not_given_is_not_checked_and_a_script_may_ask_for_less_or_more():
    check_numbers(Namespace(tmax=None, judge=["a"], output_dir="-1"))
    check_numbers(Namespace(rank=0), rank=0)
    with pytest.raises(ValueError, match="--rank: expected at least 1, found 0"):
        check_numbers(Namespace(rank=0))
    with pytest.raises(ValueError, match="--eval_batch_size: expected at least 2, found 1"):
        check_numbers(Namespace(eval_batch_size=1), eval_batch_size=2)


def objective(**changes):
    values = {"quality_weight": 0.1, "anchor_weight": 1.0, "diffusion_weight": 1.0, "evaluator": ["a"]}
    values |= {"evaluator_weight": None, "anchor_budget": None, "late_start": "data", "diffusion_timesteps": "full"}
    values |= {"late_steps": 4, "late_backprop_steps": None, "push_to_hub": False, "report_to": "wandb"}
    values |= {
        "hub_token": "secret",
        "guide_perturbation": 0.0,
        "guide_clean_weight": 0.5,
        "guide_clean_weight_end": None,
        "late_every": 1,
    }
    return Namespace(**values | changes)


WEIGHTS_OF_ZERO = {"quality_weight": 0, "anchor_weight": 0, "diffusion_weight": 0}


@pytest.mark.parametrize(
    "changes, message",
    [
        (WEIGHTS_OF_ZERO, "one of --quality_weight, --anchor_weight and --diffusion_weight must be above 0"),
        ({"evaluator": None}, "--quality_weight above 0 needs an --evaluator"),
        (
            {"evaluator_weight": [1.0, 2.0]},
            "--evaluator_weight: expected no weight or one for each evaluator, found 2",
        ),
        ({"evaluator_weight": [0.0]}, "--evaluator_weight: expected weights above 0, found 0"),
        ({"anchor_budget": 0.1, "anchor_weight": 0}, "--anchor_budget needs an --anchor_weight above 0"),
        (
            {"late_start": "rollout", "diffusion_timesteps": "late"},
            "--diffusion_timesteps late needs --late_start data",
        ),
        ({"diffusion_timesteps": "late", "diffusion_weight": 0}, "--diffusion_timesteps late has no effect"),
        ({"late_every": 2, "diffusion_weight": 0}, "--diffusion_weight 0 needs --late_every 1"),
        ({"late_every": 2, "diffusion_timesteps": "late"}, "--diffusion_timesteps late needs --late_every 1"),
        ({"late_backprop_steps": 5}, "--late_backprop_steps: expected at most --late_steps 4, found 5"),
        ({"push_to_hub": True}, "--hub_token would be logged by wandb"),
        ({"guide_clean_weight": 1.5}, "--guide_clean_weight: expected a share from 0 to 1, found 1.5"),
        ({"guide_clean_weight_end": 2.0}, "--guide_clean_weight_end: expected a share from 0 to 1, found 2.0"),
    ],
    ids=str,
)
def test_flags_that_contradict_each_other_are_one_line(changes, message):
    with pytest.raises(ValueError) as error:
        check_objective(objective(**changes))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        WEIGHTS_OF_ZERO | {"diffusion_weight": 1.0, "evaluator": None},
        WEIGHTS_OF_ZERO | {"anchor_weight": 1.0, "evaluator": None},
        {"anchor_budget": 0.1},
        {"late_start": "rollout"},
        {"diffusion_timesteps": "late"},
        {"late_backprop_steps": 4},
        {"push_to_hub": True, "hub_token": None},
        {"push_to_hub": True, "report_to": "tensorboard"},
        {"guide_clean_weight": 1.0},
    ],
    ids=str,
)
def test_what_each_of_them_does_without_the_other_is_let_through(changes):
    check_objective(objective(**changes))


def test_the_weights_of_several_guides_sum_to_1():
    for evaluators, weights, expected in (
        (["a", "b"], [3.0, 1.0], [0.75, 0.25]),
        (["a", "b"], None, [0.5, 0.5]),
        (["a"], None, [1.0]),
    ):
        args = objective(evaluator=evaluators, evaluator_weight=weights)
        check_objective(args)
        assert args.evaluator_weight == expected
    args = objective(evaluator=None, quality_weight=0)
    check_objective(args)
    assert args.evaluator_weight is None


def test_the_clean_share_grows_on_a_straight_line():
    args = Namespace(guide_clean_weight=0.2, guide_clean_weight_end=None, max_train_steps=4, late_every=1)
    assert vars(at_step(args, 3)) == vars(args)
    args.guide_clean_weight_end = 0.8
    assert [at_step(args, step).guide_clean_weight for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert args.guide_clean_weight == 0.2, "what is recorded of the run stays"
    args.max_train_steps = 1
    assert at_step(args, 0).guide_clean_weight == 0.2


def test_the_late_window_is_left_out_between_every_nth_step():
    args = Namespace(
        guide_clean_weight_end=None, late_every=3, quality_weight=0.1, anchor_weight=1.0, diffusion_weight=1
    )
    weights = []
    for step in range(7):
        in_force = at_step(args, step)
        assert in_force.diffusion_weight == 1
        weights.append((in_force.quality_weight, in_force.anchor_weight))
    left_out, late = (0.0, 0.0), (0.1, 1.0)
    assert weights == [left_out, left_out, late, left_out, left_out, late, left_out]
    assert (args.quality_weight, args.anchor_weight) == late, "what is recorded of the run stays"


def test_the_demos_settings_are_a_file_beside_the_demo(tmp_path):
    file = tmp_path / "demo" / "settings.json"
    file.parent.mkdir()
    settings = {"model": "$DEMO/model", "evaluator": ["ipce:$DEMO/guide", "$DEMO/b"], "judge": ["$DEMO/judge"]}
    file.write_text(json.dumps(settings | {"rank": 8, "late_start": "rollout"}))
    demo = (tmp_path / "demo").as_posix()
    plain = {"model": f"{demo}/model", "rank": 8, "late_start": "rollout"}
    evaluator, judge = [f"ipce:{demo}/guide", f"{demo}/b"], [f"{demo}/judge"]
    nothing = Namespace(evaluator=None, judge=None, rank=4)
    assert read_demo_settings(file, given=nothing) == plain | {"evaluator": evaluator, "judge": judge}
    # A list that is given takes the demo's place: argparse would append to it.
    given = Namespace(evaluator=["pickscore"], judge=None, rank=4)
    assert read_demo_settings(file, given=given) == plain | {"judge": judge}
    assert read_demo_settings(file, given=Namespace(rank=4)) == plain | {"evaluator": evaluator, "judge": judge}
