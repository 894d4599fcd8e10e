"""Generated images that can be continued: what each was made from, and whether it is still what was written."""

import hashlib
import json
from pathlib import Path

import torch
from PIL import Image

from acpo_utils.files import atomic_write


class ImageManifest:
    """The images of one model in one folder, and a line in `manifest*.jsonl` for each.

    A line is {"file", "sha256", "made_from"}. An image is finished if its file has the checksum of a line whose
    `made_from` is what is asked for; anything else, an image of other settings, a torn file or a torn line, is made
    again. Each process appends to a file of its own, and `merge` makes one manifest.jsonl of them at the end.

    Args:
        folder: for the images; made if it does not exist. process_index: of this process.
    """

    def __init__(self, folder: str | Path, process_index: int = 0):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._own = self.folder / f"manifest-{process_index}.jsonl"
        self._lines = self._read()

    def _read(self) -> dict[str, list[dict]]:
        lines = {}
        for path in sorted(self.folder.glob("manifest*.jsonl")):
            # split() and not splitlines(): a prompt may hold U+2028, which JSON leaves as it is.
            for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    line = json.loads(text)
                    known = isinstance(line["file"], str) and isinstance(line["sha256"], str)
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # a line that was being written when the run was ended, or none of ours
                if known:
                    lines.setdefault(line["file"], []).append(line)
        return lines

    def is_finished(self, name: str, made_from: dict) -> bool:
        """Whether the file `name` is there, undamaged, and made from exactly this."""
        candidates = [line for line in self._lines.get(name, []) if line.get("made_from") == _plain(made_from)]
        path = self.folder / name
        return bool(candidates) and path.is_file() and _sha256(path) in {line.get("sha256") for line in candidates}

    def save(self, name: str, image: torch.Tensor, made_from: dict) -> None:
        """Writes `image`, (3, H, W) or (1, H, W) in [0, 1], as the PNG file `name`, then its line."""
        pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        pixels = pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous()  # (H, W, 3)
        with atomic_write(self.folder / name) as temporary:
            Image.fromarray(pixels.numpy()).save(temporary)
        line = {"file": name, "sha256": _sha256(self.folder / name), "made_from": _plain(made_from)}
        with open(self._own, "a+b") as file:
            if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":
                file.write(b"\n")  # after a torn line
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
        self._lines.setdefault(name, []).append(line)

    def merge(self, wanted: dict[str, dict]) -> None:
        """One manifest.jsonl of all processes' lines, when all have finished; `wanted` is {name: made_from}.

        Raises ValueError if one of them is not there as it was written. Lines of other images are kept.
        """
        self._lines = self._read()
        for name, made_from in wanted.items():
            if not self.is_finished(name, made_from):
                raise ValueError(f"{self.folder / name} is not what was written there. Run the command again.")
            current = {"file": name, "sha256": _sha256(self.folder / name), "made_from": _plain(made_from)}
            self._lines[name] = [current]
        lines = [json.dumps(line, ensure_ascii=False) for name in sorted(self._lines) for line in self._lines[name]]
        with atomic_write(self.folder / "manifest.jsonl") as temporary:
            content = "".join(f"{line}\n" for line in dict.fromkeys(lines))
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
        for path in self.folder.glob("manifest-*.jsonl"):
            path.unlink()


def model_fingerprint(*modules: torch.nn.Module) -> str:
    """SHA-256 over the names, types, shapes and values of the modules' tensors, as 16 hexadecimal digits.

    Of what is loaded and not of files: the same for a folder, its copy and the repository on the hub, different with
    a LoRA, another revision or another precision.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plain(value: dict) -> dict:
    """As it comes back from JSON: tuples are lists, keys are strings."""
    return json.loads(json.dumps(value))
