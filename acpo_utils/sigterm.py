"""SIGTERM, by which schedulers say that a machine is about to be taken away, ends a training with a checkpoint."""

import logging
import signal
import sys
from pathlib import Path

from acpo_utils.checkpoints import save_checkpoint


logger = logging.getLogger(__name__)


def catch_sigterm(accelerator) -> None:
    """From now on SIGTERM, in any process, makes `accelerator.check_trigger()` true in all of them, at the same step."""
    signal.signal(signal.SIGTERM, lambda *_: accelerator.set_trigger())


def release_sigterm() -> None:
    """SIGTERM ends the process at once again."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def checkpoint_or_stop(accelerator, output_dir: str | Path, step: int, due: bool, total_limit: int | None) -> None:
    """Saves a checkpoint if one is due. After a SIGTERM saves one in any case, closes the trackers and exits with 143,
    a shell's status for SIGTERM, so that no script takes the run as done. To be called by every process."""
    stopping = accelerator.check_trigger()
    if due or stopping:
        save_checkpoint(accelerator, output_dir, step, total_limit)
    if stopping:
        accelerator.end_training()
        if accelerator.is_main_process:
            logger.warning(f"Stopped by SIGTERM after step {step}: --resume_from_checkpoint latest goes on from here.")
        sys.exit(128 + signal.SIGTERM)
