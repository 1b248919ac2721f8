"""A SentenceTransformer directory: `modules.json`, and a folder for each module that it lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from adaptc.errors import TraceError, WeightError
from adaptc.weights import Stored, read_safetensors

MODULES = "modules.json"
WEIGHTS = "model.safetensors"
LIBRARY = "sentence_transformers."
"""How the type of a module begins that comes with the library; any other is code of the directory's author."""
TRANSFORMER = "Transformer"
SETTINGS = "sentence_*_config.json"
"""The file with the settings of a transformer; older versions name it after the model, such as `bert`."""
SHORT_NAMES = {"model_args": "model_kwargs", "config_args": "config_kwargs"}
"""A setting as older versions call it -> as newer ones do."""
TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
"""How a transformer that reads text is called, and which of its outputs holds the embeddings of tokens."""


@dataclass(frozen=True)
class ModuleFolder:
    """One module of `modules.json`.

    Attributes:
        kind: its class in sentence-transformers, such as `Pooling`.
        name: its name in the model that adaptc builds, such as `1_Pooling`.
        path: its folder, relative to the directory; empty for the directory itself.
        settings: what its configuration says.
    """

    kind: str
    name: str
    path: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class SentenceTransformerFiles:
    """The modules of a SentenceTransformer directory.

    Attributes:
        directory: the directory.
        transformer: the module that reads tokens, a Hugging Face model.
        others: the modules after it, in order.
    """

    directory: Path
    transformer: ModuleFolder
    others: tuple[ModuleFolder, ...]

    @property
    def model(self) -> Path:
        """The directory of the Hugging Face model."""
        return self.directory / self.transformer.path

    @property
    def config(self) -> dict[str, Any]:
        """What overrides the Hugging Face model's own config.json."""
        return dict(self.transformer.settings.get("config_kwargs") or {})

    def tensors(self) -> dict[str, Stored]:
        """The tensors of the modules after the transformer, by their names in the model; no data is read.

        Raises:
            WeightError: a module's file is broken, or its weights are pickled.
        """
        named: dict[str, Stored] = {}
        for module in self.others:
            folder = self.directory / module.path
            if (folder / WEIGHTS).is_file():
                named |= {f"{module.name}.{k}": w for k, w in read_safetensors(folder / WEIGHTS).items()}
            elif (folder / "pytorch_model.bin").is_file():
                raise WeightError(
                    f"{folder} holds only a pickle (pytorch_model.bin), which can run code; expected {WEIGHTS}",
                    "SentenceTransformer(directory).save_pretrained(...) writes it",
                )
        return named


def is_sentence_transformer(directory: Path) -> bool:
    """Whether a directory holds a SentenceTransformer."""
    return (directory / MODULES).is_file()


def module_folders(directory: Path) -> list[str]:
    """The folders that `modules.json` names, relative to the directory; none where there is no such file.

    Raises:
        TraceError: `modules.json` is broken.
    """
    return [module.path for module in _listed(directory)] if is_sentence_transformer(directory) else []


def read_sentence_transformer(directory: Path) -> SentenceTransformerFiles:
    """Read `modules.json` and the modules' configurations.

    Raises:
        TraceError: there is none, it is broken, or its modules are not a transformer of text and modules after it.
    """
    if not is_sentence_transformer(directory):
        raise TraceError(
            f"{directory} holds no {MODULES}; expected a SentenceTransformer directory",
            "task: feature-extraction takes the model without pooling",
        )
    first, *others = _listed(directory)
    if first.kind != TRANSFORMER:
        raise TraceError(f"{directory / MODULES}: its first module is {first.kind}; expected {TRANSFORMER}")
    _check_text(first, directory)
    return SentenceTransformerFiles(directory, first, tuple(others))


def _listed(directory: Path) -> list[ModuleFolder]:
    file = directory / MODULES
    try:
        entries = [(str(entry["type"]), str(entry["path"])) for entry in json.loads(file.read_text("utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{file}: broken, expected a list of modules ({error!r})") from None
    if not entries:
        raise TraceError(f"{file}: lists no module")
    return [_folder(directory, index, kind, path) for index, (kind, path) in enumerate(entries)]


def _folder(directory: Path, index: int, kind: str, path: str) -> ModuleFolder:
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise TraceError(f"{directory / MODULES}: the path {path!r} leads out of the directory")
    short = kind.rpartition(".")[2]
    pattern = SETTINGS if short == TRANSFORMER else "config.json"
    files = sorted((directory / path).glob(pattern)) if path or short == TRANSFORMER else []
    settings = _settings(files[0]) if files else {}
    return ModuleFolder(short if kind.startswith(LIBRARY) else kind, f"{index}_{short}", path, settings)


def _settings(file: Path) -> dict[str, Any]:
    try:
        settings: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TraceError(f"{file}: not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise TraceError(f"{file}: expected a mapping, got {settings!r}")
    return {SHORT_NAMES.get(key, key): value for key, value in cast(dict[str, Any], settings).items()}


def _check_text(transformer: ModuleFolder, directory: Path) -> None:
    """Check that a transformer is called as one that reads text and gives embeddings of tokens.

    Raises:
        TraceError: it is not.
    """
    settings = transformer.settings
    modalities = settings.get("modality_config") or {"text": TEXT}
    stated = {
        "transformer_task": (settings.get("transformer_task", "feature-extraction"), "feature-extraction"),
        "module_output_name": (settings.get("module_output_name", "token_embeddings"), "token_embeddings"),
        "modality_config": (modalities.get("text"), TEXT),
    }
    for key, (value, expected) in stated.items():
        if value != expected:
            raise TraceError(
                f"{directory}: {key} of its transformer is {value!r}; adaptc reads text, so expected {expected!r}"
            )
