"""The alarm rings where the guide rises and a judge falls, both beyond chance, and nowhere else."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from acpo_utils.statistics import paired_comparison
from acpo_utils.training.hacking_alarm import ALARM_LEVEL, HackingAlarm, deceived
from tests.guides import brightness, darkness
from tests.launching import EXAMPLES, run_script


SCRIPT = EXAMPLES / "train_acpo_lora_sd.py"


def compared(shift: float, n: int = 40):
    """Base against fine-tuned, `shift` standard errors apart."""
    noise = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()
    return paired_comparison(torch.zeros(n), noise + shift / n**0.5)


def test_both_must_be_beyond_chance_and_in_opposite_directions():
    critical = stats.t.ppf(1 - ALARM_LEVEL, 39)
    more, less = critical + 0.01, critical - 0.01
    assert deceived(compared(more), {"judge": compared(-more)}) == ["judge"]
    assert deceived(compared(less), {"judge": compared(-more)}) == []
    assert deceived(compared(more), {"judge": compared(-less)}) == []
    assert deceived(compared(more), {"judge": compared(more)}) == []
    assert deceived(compared(-more), {"judge": compared(-more)}) == []
    assert deceived(compared(more), {"a": compared(more), "b": compared(-more)}) == ["b"]
    same = paired_comparison([0.5, 0.5], [0.5, 0.5])
    assert math.isnan(same["p"]) and deceived(same, {"judge": same}) == []


class Accelerator:
    def __init__(self):
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))


class Scorer:
    def __init__(self, function):
        self.score = function


@pytest.fixture
def pipeline():
    """What the alarm needs of one: a U-Net with an adapter to switch; it paints in one brightness."""
    from types import SimpleNamespace

    pipeline = SimpleNamespace(brightness=0.5, on=True)
    pipeline.unet = SimpleNamespace(
        disable_adapters=lambda: setattr(pipeline, "on", False), enable_adapters=lambda: setattr(pipeline, "on", True)
    )
    return pipeline


def paint(pipeline, prompts):
    noise = torch.rand(len(prompts), 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (0.3 + 0.1 * noise) * (pipeline.brightness / 0.5 if pipeline.on else 1)


def build_alarm(tmp_path, judge=darkness, **options):
    prompts = [f"prompt {i}" for i in range(9)]
    return HackingAlarm(prompts, paint, Scorer(brightness), {"judge": Scorer(judge)}, "cpu", tmp_path, **options)


def test_a_check_compares_with_the_base_model_and_logs_it(pipeline, tmp_path):
    alarm, accelerator = build_alarm(tmp_path), Accelerator()
    pipeline.brightness = 0.6
    assert alarm.check(accelerator, pipeline, 10) and pipeline.on
    pipeline.brightness = 0.4  # now the guide falls
    assert not alarm.check(accelerator, pipeline, 20)
    (first, logged), (second, later) = accelerator.logged
    assert (first, second) == (10, 20) and alarm.alarms == {10: ["judge"]}
    base = brightness(paint(pipeline, range(9)) / 0.8).mean()
    assert logged["validation/guide minus base"] == pytest.approx(0.2 * base.item(), rel=1e-4)
    assert logged["validation/judge minus base"] == pytest.approx(-0.2 * base.item(), rel=1e-4)
    assert (logged["validation/hacking_alarm"], later["validation/hacking_alarm"]) == (1, 0)
    assert (tmp_path / "validation" / "base-beside-step-20.png").stat().st_size > 5000
    again = build_alarm(tmp_path)
    again.load_state_dict(json.loads(json.dumps(alarm.state_dict())))
    assert vars(again)["alarms"] == alarm.alarms


def resumed_alarm(tmp_path, **changes):
    """Of a run whose best check was at step 20 and whose alarm rang at 30; `changes` are the next run's."""
    first = build_alarm(tmp_path, keep_best=True)
    first.best_step, first.best_score, first.alarms = 20, 0.75, {30: ["judge"]}
    resumed = build_alarm(tmp_path, keep_best=True)
    for name, value in changes.items():
        setattr(resumed, name, value)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    return resumed


def test_the_best_check_goes_on_with_the_same_prompts_and_judges_and_begins_anew_with_others(tmp_path):
    """Scores of other prompts, or by another judge, cannot be compared; that the alarm rang stays true."""
    same = resumed_alarm(tmp_path)
    assert (same.best_step, same.best_score, same.alarms) == (20, 0.75, {30: ["judge"]})
    for changes in ({"prompts": ["another", "and one more"]}, {"judges": {"other": Scorer(darkness)}}, {"judges": {}}):
        other = resumed_alarm(tmp_path, **changes)
        assert (other.best_step, other.best_score, other.alarms) == (0, None, {30: ["judge"]})


def test_without_a_guide_or_with_one_prompt_nothing_is_sampled(pipeline, tmp_path):
    """There is no comparison to make: not even the picture is drawn."""
    no_guide = HackingAlarm(["a", "b"], None, None, {"judge": Scorer(darkness)}, "cpu", tmp_path)
    one_prompt = HackingAlarm(["a"], None, Scorer(brightness), {}, "cpu", tmp_path)
    for alarm in (no_guide, one_prompt):
        accelerator = Accelerator()
        assert not alarm.enabled and not alarm.check(accelerator, pipeline, 10)
        assert accelerator.logged == [] and list(tmp_path.iterdir()) == []
    assert build_alarm(tmp_path).enabled


def test_a_judge_that_rises_too_rings_nothing(pipeline, tmp_path):
    alarm = build_alarm(tmp_path, judge=brightness)
    pipeline.brightness = 0.6
    assert not alarm.check(Accelerator(), pipeline, 10) and alarm.alarms == {}


OPTIONS = {
    "evaluator": "python:tests.guides:brightness",
    "judge": "python:tests.guides:darkness",
    "late_start": "rollout",
    "num_inference_steps": 4,
    "guidance_scale": 1,
    "quality_weight": 1000,
    "anchor_weight": 0,
    "diffusion_weight": 0,
    "learning_rate": 0.01,
    "max_train_steps": 12,
    "validation_steps": 3,
    "tmax": 300,
}


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"a wall {i}\n" for i in range(10)))
    return tmp_path / "prompts.txt"


def test_a_training_that_deceives_its_guide_is_stopped(sd_flags, prompts, tmp_path):
    run_script(SCRIPT, *sd_flags(**OPTIONS, eval_prompts=prompts, on_hacking="stop", report_to="tensorboard"))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    ((step, judges),) = metrics["hacking_alarms"].items()
    assert judges == ["judge"] and int(step) < 12 and metrics["comparisons"]["judge"]["mean_difference"] < 0
    assert (tmp_path / "out" / "validation" / f"base-beside-step-{step}.png").is_file()
    assert not (tmp_path / "out" / "validation" / f"base-beside-step-{int(step) + 3}.png").exists()


def test_keep_best_saves_the_lora_of_before_the_alarm(sd_flags, prompts, tmp_path):
    """At this learning rate the first check is still silent."""
    options = OPTIONS | {"learning_rate": 3e-5, "validation_steps": 1, "max_train_steps": 60, "lr_scheduler": "linear"}
    run_script(SCRIPT, *sd_flags(**options, lr_warmup_steps=60, eval_prompts=prompts, on_hacking="keep_best"))
    (alarm,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["hacking_alarms"]
    assert int(alarm) > 1
    best, saved = (load_file(tmp_path / "out" / n / "pytorch_lora_weights.safetensors") for n in ("best", "."))
    assert all(torch.equal(best[name], saved[name]) for name in best)
