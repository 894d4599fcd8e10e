"""Judges: what guides nothing and says whether the images got better. An evaluator, or a distance to real images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from acpo_utils.evaluation.diversity import ShiftTolerantLPIPS
from acpo_utils.evaluation.panel import ST_LPIPS
from acpo_utils.evaluation.real_images import read_prompt_images
from acpo_utils.evaluation.real_pairs import pair_values, pairs_by_caption
from acpo_utils.evaluators import Evaluator, load_evaluator, named_specs
from acpo_utils.evaluators.judge import Judge, load_judge


class RealImageJudge(nn.Module):
    """1 minus the shift-tolerant LPIPS distance of an image to the real image of the same prompt.

    A guide and a judge of its own kind may like what no real image shows; this falls then, whatever a network makes of
    quality. Only prompts that are captions of real images have it, and a good image may be far from the real one: what counts
    is how the mean over many prompts moves.

    Args:
        network: "vgg" or "alex".
        prompts: the first rows of `prompt_file`; of several with the same text the first one's image counts.
        prompt_file: a parquet file with a column `image` or `img`.
    Raises:
        ValueError: in one line, unless each prompt has an image.
        ImportError: if the network's package is not installed; the message has the pip command.
    """

    score_range = (0.0, 1.0)

    def __init__(self, network: str, prompts: Sequence[str], prompt_file: str | Path | None):
        super().__init__()
        self.prompts = list(prompts)
        self.prompt_file = prompt_file
        found = read_prompt_images(prompt_file, len(self.prompts), size=(8, 8))
        if not self.prompts or len(found) < len(self.prompts):
            raise ValueError(
                f"A judge of st-lpips:{network} needs --eval_prompts from a parquet file with an image in each row, "
                f"found {len(found)} images of {len(self.prompts)} prompts in {prompt_file}."
            )
        self.network = ShiftTolerantLPIPS(network)
        self.real: dict[tuple[int, int], torch.Tensor] = {}  # by (width, height): (N, 3, height, width), row after row

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,), higher is better and 1 for the real images, of (B, 3, H, W) in [0, 1] for B of the prompts."""
        size = (images.shape[-1], images.shape[-2])
        if size not in self.real:
            read = read_prompt_images(self.prompt_file, len(self.prompts), size)
            self.real[size] = torch.stack(list(read.values()))
        pairs = pairs_by_caption(prompts, self.prompts)
        return 1 - torch.tensor(pair_values(self.network, images, self.real[size], pairs))


def load_judges(
    specs: Sequence[str],
    device: str | torch.device | None = None,
    prompts: Sequence[str] = (),
    prompt_file: str | Path | None = None,
) -> dict[str, Evaluator | Judge | RealImageJudge]:
    """What guides nothing, by the name of its row in a table: "judge", or "judge NAME" of several.

    Args:
        specs: each `judge:PATH` or PATH, a folder as `load_judge` reads it, one of the panel's `ST_LPIPS`, or one of `load_evaluator`'s.
        prompts, prompt_file: as in `RealImageJudge`, which no other judge needs.
    Raises ValueError and ImportError as `RealImageJudge`, `load_judge` and `load_evaluator` do.
    """
    names = ["judge"] if len(specs) == 1 else [f"judge {name}" for name in named_specs(specs)]
    judges: list[Evaluator | Judge | RealImageJudge] = []
    for spec in specs:
        folder = spec.removeprefix("judge:")
        if spec in ST_LPIPS:
            judges.append(RealImageJudge(ST_LPIPS[spec], prompts, prompt_file).to(device))
        elif folder != spec or Path(folder, "judge.json").is_file():
            judges.append(load_judge(folder).to(device))
        else:
            judges.append(load_evaluator(spec, device))
    return dict(zip(names, judges))
