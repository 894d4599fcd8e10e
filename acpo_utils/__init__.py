"""The pieces of ACPO (Anchor-Constrained Perceptual Optimization for Diffusion Models) that its training scripts share.

Import what you need from the module that holds it: `acpo_utils.losses`, `acpo_utils.late_step`, `acpo_utils.anchor`,
`acpo_utils.evaluators.loading`, `acpo_utils.data.captioned`, `acpo_utils.checkpoints`, `acpo_utils.lora`, `acpo_utils.hub`,
`acpo_utils.statistics`.
"""

__version__ = "0.1.0"
