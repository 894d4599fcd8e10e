"""The model card of a trained folder, and its upload to the Hugging Face hub."""

import logging
from collections.abc import Sequence
from pathlib import Path

from acpo_utils.files import atomic_write, one_line
from acpo_utils.lora import LORA_NAME


logger = logging.getLogger(__name__)
IGNORE_PATTERNS = [
    "checkpoint-*",
    "best/*",
    "previous-*/*",
    "stage-*/*.safetensors",
    ".*",
    "*.tmp",
]  # what a training folder holds and a reader of the model has no use for

LORA_USAGE = """
## How to use

```python
from diffusers import DiffusionPipeline

pipeline = {loading}
pipeline.load_lora_weights("{folder}")
image = pipeline("a prompt").images[0]
```
"""


def settings_of(args) -> dict:
    """What was set, for the tracker and the model card; never the token. TensorBoard takes no lists."""
    settings = {k: v for k, v in vars(args).items() if v is not None and k != "hub_token"}
    return {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in settings.items()}


def save_model_card(
    output_dir: str | Path,
    *,
    base_model: str | None,
    model_description: str,
    tags: Sequence[str],
    settings: dict,
    license: str | None = None,
    dataset: str | None = None,
    image_files: Sequence[str] = (),
    metrics: str | None = None,
    usage: str | None = None,
    base_arguments: str = "",
) -> Path:
    """Writes `output_dir/README.md`: what it is, how to load it, the results, and the settings of the run.

    `base_model` is None for what was trained from scratch. `image_files` are names of pictures in `output_dir`,
    `metrics` is a Markdown table, `usage` a Python snippet (of a LoRA that diffusers loads it is known; `base_arguments` are
    what its base model is loaded with, such as "text_encoder_3=None"). Hub ids of the base model and the data set go into
    the card's metadata; local paths stay in its text, since the hub would refuse them there.
    The text is given whole: the template of diffusers' `load_or_create_model_card` leaves "TODO" sections in it, and
    a card that the repository already has on the hub would be kept in place of this run's.
    """
    from diffusers.utils.hub_utils import populate_model_card
    from huggingface_hub import ModelCard, ModelCardData

    output_dir = Path(output_dir)
    data = ModelCardData(
        base_model=None if base_model is None or _is_local(base_model) else base_model,
        datasets=None if dataset is None or _is_local(dataset) else [dataset],
        license=license,
        library_name="diffusers",
    )
    base = base_model or "none, trained from scratch"
    sections = [f"# {output_dir.resolve().name}\n\n{model_description}\n\nBase model: {base}"]
    if dataset is not None:
        sections[0] += f"  \nTraining data: {dataset}"
    if (output_dir / LORA_NAME).is_file():
        arguments = f'"{base_model}", {base_arguments}' if base_arguments else f'"{base_model}"'
        loading = f"DiffusionPipeline.from_pretrained({arguments})"
        sections.append(LORA_USAGE.format(loading=loading, folder=output_dir.resolve().name).strip())
    if usage:
        sections.append(f"## How to use\n\n```python\n{usage.strip()}\n```")
    if metrics or image_files:
        pictures = "\n".join(f"![{Path(name).stem}]({name})" for name in image_files)
        sections.append("\n\n".join(part for part in ("## Results", metrics, pictures) if part))
    rows = "\n".join(f"| `{name}` | {_cell(value)} |" for name, value in sorted(settings.items()))
    sections.append(f"## Training settings\n\n| setting | value |\n|---|---|\n{rows}")

    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n", ignore_metadata_errors=False)
    populate_model_card(card, tags=list(tags))
    with atomic_write(output_dir / "README.md") as temporary:
        card.save(temporary)
    return output_dir / "README.md"


def _is_local(name: str) -> bool:
    return Path(name).exists() or name.count("/") > 1


def _cell(value) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def check_login(token: str | None = None) -> None:
    """Raises ValueError if the hub takes no upload by `token`, or by the one of `hf auth login`; before hours of training.

    A hub that is out of reach now may be there when the training ends: that is a warning.
    """
    from huggingface_hub import get_token, whoami
    from huggingface_hub.errors import HfHubHTTPError

    if not (token or get_token()):
        raise ValueError("--push_to_hub needs a token: `hf auth login`, or --hub_token")
    try:
        whoami(token)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise ValueError(f"--push_to_hub: the hub does not take the token ({one_line(error)[:200]})") from error
        logger.warning(f"--push_to_hub: the hub is out of reach now ({one_line(error)[:200]})")
    except Exception as error:  # of many kinds: no network, offline mode
        logger.warning(f"--push_to_hub: the hub is out of reach now ({one_line(error)[:200]})")


def push_to_hub(
    output_dir: str | Path,
    hub_model_id: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads `output_dir` without its checkpoints and returns the repository's id.

    `hub_model_id` is by default the folder's name, in the account of the token. Raises ValueError with the reason if
    the hub cannot be reached or refuses; what was trained stays in `output_dir`.
    """
    from huggingface_hub import create_repo, upload_folder

    try:
        repo_id = create_repo(hub_model_id or Path(output_dir).resolve().name, exist_ok=True, token=token).repo_id
        upload_folder(
            repo_id=repo_id,
            folder_path=output_dir,
            commit_message=commit_message,
            ignore_patterns=IGNORE_PATTERNS,
            token=token,
        )
    except Exception as error:  # whatever it is, hours of training end here: say where the result lies
        raise ValueError(
            f"{output_dir} was not uploaded: {' '.join(str(error).split())} All of it is still there: "
            f"`hf upload REPOSITORY {output_dir}` tries again."
        ) from error
    return repo_id
