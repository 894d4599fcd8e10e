"""The LoRA at inference in the window that it was trained for: t < tmax."""


def late_window(pipeline, tmax: int):
    """A `callback_on_step_end` for a Stable Diffusion pipeline, by which its LoRA acts at timesteps below `tmax` alone.

    The quality and the anchor loss saw no others; elsewhere the LoRA is what the diffusion loss and chance made of it.
    The adapter has to be loaded, not fused. It is off when this returns, as the first steps want it, and off again after
    each run of the pipeline, so that one callback serves many.

        pipeline.load_lora_weights("acpo-lora-sd")
        pipeline(prompt, callback_on_step_end=late_window(pipeline, 100))
    """
    pipeline.disable_lora()

    def callback(pipeline, step: int, timestep, callback_kwargs: dict) -> dict:
        following = pipeline.scheduler.timesteps[step + 1 : step + 2]
        if len(following) and following[0] < tmax:
            pipeline.enable_lora()
        else:
            pipeline.disable_lora()
        return callback_kwargs

    return callback
