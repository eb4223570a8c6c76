"""A model's files before anything is loaded from them: which hold its weights, and whether they are whole."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

POINTER = b"version https:"  # a checkout without git-lfs has a note that begins so in a file's place
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # as transformers looks for them; several have an index
SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def weight_files(folder: Path) -> list[str]:
    """The files that hold a folder's weights, there or not; a damaged index is named in their place."""
    for name in WEIGHTS:
        if (folder / name).exists():
            return [name]
        index = folder / f"{name}.index.json"
        if index.exists():
            try:
                return sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                return [f"{index.name} (whole)"]
    return [WEIGHTS[0]]


def absent_files(folder: Path) -> list[str]:
    """The files without which a folder's model cannot be loaded, and that are not there."""
    return [name for name in ("config.json", *weight_files(folder)) if not (folder / name).exists()]


def damage(folder: Path) -> str:
    """What is wrong with the files that are there, or "". Reads headers alone: milliseconds at any size."""
    names = [name for name in (*SMALL, *weight_files(folder)) if (folder / name).exists()]
    for name in names:
        with open(folder / name, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                return f"{name} is a git-lfs pointer, not the file: run `git lfs pull` in {folder}"
    for name in names:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, framework="pt"):
                    pass  # the header says how long the file must be
            except (SafetensorError, OSError) as error:
                return f"{name} is cut off or damaged ({error}): copy or download it again"
    return ""


def weight_names(folder: Path) -> list[str]:
    """Names of the weights in a folder's safetensors files; none where it has others."""
    names: list[str] = []
    for name in weight_files(folder):
        if name.endswith(".safetensors"):
            with safe_open(folder / name, framework="pt") as file:
                names += file.keys()
    return names
