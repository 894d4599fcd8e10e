"""The steps of a stage, from what its script has built: trained, validated, kept if they are the best, checkpointed."""

from collections.abc import Callable, Sequence

import torch
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from acpo_utils.checkpoints import catch_signals, checkpoint_or_stop, is_due, release_signals
from acpo_utils.ratings.adversarial import adversarial_loss, fix_batch_norm, is_adversarial
from acpo_utils.ratings.best import Best, best_folder
from acpo_utils.ratings.report import log_measured, measure, predict
from acpo_utils.ratings.stages import ScoreMaps, Stage


logger = get_logger(__name__, log_level="INFO")


def train_steps(
    stage: Stage,
    step: int,
    *,
    model: torch.nn.Module,
    maps: ScoreMaps | None,
    optimizer: torch.optim.Optimizer,
    lr_scheduler,
    train_loader,
    validation_loader,
    training_step: Callable,
    score: Callable,
    image_keys: Sequence[str],
    measure_rows: Callable,
    save: Callable,
    best: Best,
    run,
    accelerator,
    args,
) -> None:
    """Trains from `step` of the run to the end of `stage`; a step beyond its start is that of the run's checkpoint.

    Args:
        maps: of --stages. train_loader: the batches from `step` on. validation_loader: the stage's rows in order.
        training_step: `training_step(model, batch, maps)` returns the loss, a scalar.
        image_keys: under which a batch has its images, for --adversarial_epsilon and --gradient_norm_weight.
        score, measure_rows: as `acpo_utils.ratings.report` calls them.
        save: `save(model, folder)`, of the best evaluator so far.
        best: kept by `run`. run: an `acpo_utils.training.run_state.RunState`. args: a training script's.
    Raises:
        ValueError: if the checkpoint is of another model, or the evaluator that it goes with is missing.
        FloatingPointError: as `RunState.clip_grad_norm` does.
    """
    model, optimizer, lr_scheduler, train_loader, validation_loader = accelerator.prepare(
        model, optimizer, lr_scheduler, train_loader, validation_loader
    )
    if maps is not None:
        maps = accelerator.prepare(maps)
    best.begin(stage.number)
    if step > stage.start:
        run.resume()
        best.check_folder(run.checkpoint, best_folder(args, stage.number))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _log_start(stage, parameters, step, args)
    progress = tqdm(total=stage.end, initial=step, disable=not accelerator.is_local_main_process)
    catch_signals(accelerator)
    _train_mode(model, args)
    for batch in train_loader:
        with accelerator.accumulate(model) if maps is None else accelerator.accumulate(model, maps):
            if is_adversarial(args):
                loss, terms = adversarial_loss(
                    training_step,
                    model,
                    batch,
                    maps,
                    score=score,
                    image_keys=image_keys,
                    accelerator=accelerator,
                    args=args,
                )
            else:
                loss, terms = training_step(model, batch, maps), {}
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = run.clip_grad_norm(optimizer, parameters, args.max_grad_norm, step + 1)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        progress.update()
        logs = {
            "loss": accelerator.reduce(loss.detach(), "mean").item(),
            "grad_norm": grad_norm,
            "lr": lr_scheduler.get_last_lr()[0],
            "skipped_steps": run.skipped_steps,
        }
        logs |= {name: accelerator.reduce(value, "mean").item() for name, value in terms.items()}
        accelerator.log(logs, step=step)
        progress.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
        if is_due(step, args.validation_steps) or step == stage.end:
            scores = predict(model, score, validation_loader, accelerator, "validation")
            lines = best.lines if maps is None else accelerator.unwrap_model(maps).lines()
            measured = measure(stage, "validation", scores, lines, measure_rows, args)
            log_measured(accelerator, measured, step, args)
            if best.improve(step, measured, lines) and accelerator.is_main_process:
                save(accelerator.unwrap_model(model), best_folder(args, stage.number))
            _train_mode(model, args)
        due = is_due(step, args.checkpointing_steps) or step == stage.end
        checkpoint_or_stop(accelerator, args.output_dir, step, due, args.checkpoints_total_limit)
    release_signals()
    progress.close()
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # the next stage has an optimizer, and a schedule, of its own


def _train_mode(model: torch.nn.Module, args) -> None:
    model.train()
    if is_adversarial(args):
        fix_batch_norm(model)


def _log_start(stage: Stage, parameters: Sequence[torch.nn.Parameter], step: int, args) -> None:
    name = f", stage {stage.number}: {', '.join(stage.names)}" if args.stages else ""
    rows = ", ".join(f"{len(rows)} {split}" for split, rows in stage.splits.items())
    number = sum(parameter.numel() for parameter in parameters)
    logger.info(f"***** Running training{name} *****")
    logger.info(f"  rows: {rows}; {number} trained parameters; steps {step}..{stage.end}")
