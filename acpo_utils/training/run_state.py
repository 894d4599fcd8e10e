"""What a checkpoint keeps of a run beside weights, optimizer and schedule, and which settings may differ on resume."""

import json
import math
from pathlib import Path

from accelerate.logging import get_logger

from acpo_utils.checkpoints import RUN_STATE, checkpoint_step, read_run_state
from acpo_utils.files import one_line
from acpo_utils.sharding import load_state


logger = get_logger(__name__, log_level="INFO")
SKIPPED_IN_A_ROW = 10
# The rule: a resumed run is the run that was interrupted. So a flag may differ only if it changes nothing of what is
# trained; every flag that is not named here has to be as it was.
LENGTH = {"max_train_steps", "num_train_epochs", "num_epochs"}  # a schedule that depends on it follows the new one
MEASURED = {
    "validation_prompt",
    "validation_steps",
    "validation_data_dir",
    "num_validation_images",
    "num_validation_prompts",
    "eval_prompts",
    "num_eval_prompts",
    "num_eval_images",
    "eval_batch_size",
    "judge",
    "on_hacking",
    "balance_steps",
    "group_column",
    "mismatch_column",
    "reference_column",
    "max_robustness_samples",
    "max_validation_samples",
    "max_test_samples",
}
WRITTEN = {
    "output_dir",
    "logging_dir",
    "report_to",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "save_images_epochs",
    "save_model_epochs",
    "weight_dtype",  # of the files
    "data_description",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
}
COMPUTED = {  # another way to the same numbers, but for rounding
    "cache_dir",
    "cache_latents",
    "dataloader_num_workers",
    "gradient_checkpointing",
    "decode_batch_size",
    "torch_compile",
}
MAY_DIFFER = LENGTH | MEASURED | WRITTEN | COMPUTED


def changed_settings(saved: dict, settings: dict) -> list[str]:
    """The names of those that both runs have, that are not the same in both, and that have to be: `MAY_DIFFER`.

    Args:
        saved, settings: of the interrupted and of the resumed run, as JSON has them.
    """
    may_differ = _may_differ(saved) & _may_differ(settings)
    return [name for name in settings if name in saved and saved[name] != settings[name] and name not in may_differ]


def _may_differ(settings: dict) -> set[str]:
    names = MAY_DIFFER
    if settings.get("late_start") == "data":  # the training samples nothing: these are of validation alone
        names = names | {"num_inference_steps"}
        # FLUX.1 is told the scale in every late pass.
        if not (settings.get("scored_guidance") or "train_guidance_scale" in settings):
            names = names | {"guidance_scale", "cfg_normalization", "cfg_truncation"}
    if "mos_column" in settings:  # stage 1: validation chooses the evaluator that is kept
        names = names - {"validation_steps", "max_validation_samples"}
    if settings.get("validation_data_dir", "") is None:  # the images held out are taken from the training's
        names = names - {"validation_data_dir", "num_validation_images"}
    return names


class RunState:
    """A checkpoint's run_state.json: the settings of the training, the steps that were skipped, and what is kept of monitors.

    JSON, and not `register_for_checkpointing`, whose pickles accelerate reads without restriction.

    Args:
        args: the script's, before anything is filled in. checkpoint: to go on from, as `find_checkpoint` returns it.
    Raises:
        ValueError: if the checkpoint's run has other settings.
    """

    def __init__(self, accelerator, args, checkpoint: Path | None = None):
        self.accelerator, self.checkpoint = accelerator, checkpoint
        settings = {name: value for name, value in vars(args).items() if name != "hub_token"}
        # A launcher's configuration counts where the flag is left out.
        settings["mixed_precision"] = accelerator.mixed_precision
        self.settings = json.loads(json.dumps(settings))
        self.skipped_steps = self.skipped_in_a_row = 0
        self.parts = {}
        if checkpoint is not None:
            self._check_settings(read_run_state(checkpoint)["settings"])
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def _check_settings(self, saved: dict) -> None:
        if changed := changed_settings(saved, self.settings):
            found = ", ".join(f"--{name} {saved[name]} (now {self.settings[name]})" for name in changed)
            raise ValueError(
                f"{self.checkpoint} is of a run with {found}: resume with the same settings, or start a new run from its "
                "weights in another --output_dir."
            )

    def keep(self, **parts) -> None:
        """`parts`, each with `state_dict` and `load_state_dict` of plain numbers and strings, are in every checkpoint."""
        self.parts |= parts

    def resume(self) -> int:
        """Loads the checkpoint, if there is one, into all that was prepared and kept; returns its step, else 0.

        Raises ValueError if it is of other models.
        """
        if self.checkpoint is None:
            return 0
        try:
            load_state(self.accelerator, self.checkpoint)
        except RuntimeError as error:
            reason = one_line(error)[:200]
            raise ValueError(f"{self.checkpoint} is of another model: {reason}") from error
        step = checkpoint_step(self.checkpoint)
        logger.info(f"Resuming from {self.checkpoint} at step {step}")
        return step

    def _save(self, models: list, weights: list, output_dir: str) -> None:
        if self.accelerator.is_main_process:
            state = {
                "step": checkpoint_step(output_dir.removesuffix(".tmp")),
                "settings": self.settings,
                "skipped_steps": self.skipped_steps,
                "skipped_in_a_row": self.skipped_in_a_row,
            }
            state |= {name: part.state_dict() for name, part in self.parts.items()}
            Path(output_dir, RUN_STATE).write_text(json.dumps(state, indent=2))

    def _load(self, models: list, input_dir: str) -> None:
        state = read_run_state(input_dir)
        if missing := {"skipped_steps", "skipped_in_a_row", *self.parts} - state.keys():
            raise ValueError(
                f"{input_dir} is of another kind of run: {RUN_STATE} has no {', '.join(sorted(missing))}."
            )
        self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def clip_grad_norm(self, optimizer, parameters: list, max_grad_norm: float, step: int) -> float:
        """Clips the gradients of `step` and returns their norm; they are dropped, and counted, if it is not finite.

        A `max_grad_norm` of 0 clips nothing. Raises FloatingPointError at the tenth such step in a row.
        """
        accelerator = self.accelerator
        norm = float(accelerator.clip_grad_norm_(parameters, max_grad_norm or math.inf))  # DeepSpeed gives no tensor
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            return norm
        # fp16's loss scaler skips the step itself, and must see it in order to lower its scale.
        if accelerator.scaler is None:
            optimizer.zero_grad()
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"the gradient was not finite in ten steps in a row, up to step {step}: lower --learning_rate, and in "
                "stage 2 --quality_weight, or use bf16 in place of fp16. Checkpoints in "
                f"{accelerator.project_dir} are as they were."
            )
        return norm
