"""How much each term of eq. 9 moves what is trained, and at which timesteps the guide does."""

import torch
from accelerate.logging import get_logger

from acpo_utils.checkpoints import is_due
from acpo_utils.losses import quality_loss
from acpo_utils.sharding import SHARDED


logger = get_logger(__name__, log_level="INFO")
BUCKETS = 4  # of the late window
FLOOR = 0.01  # of the gradient: a term below it hardly takes part
PATIENCE = 3  # measurements in a row below it, as one batch says little


class GradientBalance:
    """Norms of the gradients of L_diff, L_anchor and L_quality with respect to what is trained, taken one by one.

    A weight in eq. 9 says little by itself: the losses differ in scale, and their gradients more so.

    Args:
        parameters: what is trained, a list. tmax: end of the late window, in timesteps.
        every: how many steps apart it measures; 0: never. Nor does it with DeepSpeed and FSDP, which have a backward
            pass of their own.
    """

    def __init__(self, accelerator, parameters: list[torch.nn.Parameter], tmax: int, every: int):
        self.accelerator, self.parameters, self.tmax = accelerator, parameters, tmax
        self.every = 0 if accelerator.distributed_type in SHARDED else every
        if self.every:
            torch._functorch.config.donated_buffer = False  # else a compiled model refuses more than one backward pass
        self.below_floor: dict[str, int] = {}  # term: measurements in a row

    def measure(
        self,
        terms: dict[str, torch.Tensor],
        diffusion_weight: float,
        anchor_weight: float,
        quality_weight: float,
        step: int,
    ) -> dict[str, float]:
        """What to log, of an optimizer step that is due and has all terms (--late_every); else {}. Draws no numbers.

        Call it in every process, between each micro-step's forward and its backward pass: the last one is measured.

        It costs a backward pass for each term and each bucket of timesteps in the batch.

        Args:
            terms: `training_step`'s, with their graph: `loss_diffusion`, `loss_anchor`, `loss_quality` if they are in
                use, and with the last one `score` (B,) and `late_timesteps` (B,).
            diffusion_weight, anchor_weight, quality_weight: their weights in eq. 9.

        Returns:
            Of each term `balance/NAME_weight`; `balance/NAME_grad_norm`, of the weighted term; `balance/NAME_share`, that
            over the sum of all. Per quarter of the late window: `balance/quality_grad_norm_t_A_to_B`, of the
            unweighted L_quality (eq. 6) of its samples, where the batch has any. Means over the processes, each of
            which takes its own batch's gradient.
        """
        if not (is_due(step, self.every) and self.accelerator.sync_gradients):
            return {}
        weights = {"loss_diffusion": diffusion_weight, "loss_anchor": anchor_weight, "loss_quality": quality_weight}
        used = {name: weight for name, weight in weights.items() if weight}
        if any(name not in terms for name in used):  # a step that --late_every has left out of the late window
            return {}
        norms = [weight * self._gradient_norm(terms[name]) for name, weight in used.items()]
        values = self.accelerator.reduce(torch.stack(norms), "mean").tolist()
        total = sum(values) or 1.0
        shares = {name: value / total for name, value in zip(used, values)}
        logs = {}
        for name, value in zip(used, values):
            logs[f"balance/{name}_weight"] = used[name]
            logs[f"balance/{name}_grad_norm"] = value
            logs[f"balance/{name}_share"] = shares[name]
        by_timestep = self._quality_by_timestep(terms) if "loss_quality" in used else {}
        logger.info(
            f"step {step}: shares of the gradient: "
            + ", ".join(f"{name.removeprefix('loss_')} {share:.1%}" for name, share in shares.items())
            + "".join(f"; quality gradient at t {window}: {norm:.3g}" for window, norm in by_timestep.items())
        )
        self._warn(shares, step)
        return logs | {f"balance/quality_grad_norm_t_{w.replace('-', '_to_')}": n for w, n in by_timestep.items()}

    def _quality_by_timestep(self, terms: dict[str, torch.Tensor]) -> dict[str, float]:
        """{"A-B": norm}: A to B are timesteps, both of the bucket."""
        buckets = (terms["late_timesteps"] * BUCKETS).div(self.tmax, rounding_mode="floor")
        sums, counts = torch.zeros(2, BUCKETS, device=buckets.device)
        for bucket in buckets.unique().tolist():
            sums[bucket] = self._gradient_norm(quality_loss(terms["score"][buckets == bucket]))
            counts[bucket] = 1
        sums, counts = self.accelerator.reduce(torch.stack([sums, counts]), "sum").tolist()
        edges = [-(-self.tmax * bucket // BUCKETS) for bucket in range(BUCKETS + 1)]
        return {
            f"{edges[bucket]}-{edges[bucket + 1] - 1}": sums[bucket] / counts[bucket]
            for bucket in range(BUCKETS)
            if counts[bucket]
        }

    def _gradient_norm(self, loss: torch.Tensor) -> torch.Tensor:
        # fp16's gradients would vanish without the scale that the training gives them too.
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0
        gradients = torch.autograd.grad(loss * scale, self.parameters, retain_graph=True, allow_unused=True)
        norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
        return torch.stack(norms).norm() / scale

    def _warn(self, shares: dict[str, float], step: int) -> None:
        for name, share in shares.items():
            self.below_floor[name] = self.below_floor.get(name, 0) + 1 if share < FLOOR else 0
            if self.below_floor[name] == PATIENCE:
                flag = f"--{name.removeprefix('loss_')}_weight"
                logger.warning(
                    f"step {step}: {name} had less than {FLOOR:.0%} of the gradient {PATIENCE} times in a row, and hardly "
                    f"takes part. Raise {flag}, or set it to 0 and save its cost."
                )

    def state_dict(self) -> dict:
        return {"below_floor": self.below_floor}

    def load_state_dict(self, state: dict) -> None:
        self.below_floor = dict(state["below_floor"])
