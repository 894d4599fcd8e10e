"""The pieces of ACPO (Anchor-Constrained Perceptual Optimization for Diffusion Models) that its training scripts share.

Import what you need from the module that holds it: `acpo_utils.losses`, `acpo_utils.late_step`, `acpo_utils.anchor`,
`acpo_utils.evaluators.loading`, `acpo_utils.data.captioned`, `acpo_utils.checkpoints`, `acpo_utils.lora`, `acpo_utils.training.hub`,
`acpo_utils.statistics`.
"""

__version__ = "0.2.0"


def check_min_version(minimum: str) -> None:
    """For scripts that were copied: raises ImportError, in one line, if the installed acpo_utils is older than `minimum`."""
    installed, needed = (tuple(int(part) for part in version.split(".")) for version in (__version__, minimum))
    if installed < needed:
        raise ImportError(
            f"This script needs acpo_utils {minimum} or later, found {__version__}: update your clone of the repository it "
            "came from and `pip install .` there, or take the script of the installed version."
        )
