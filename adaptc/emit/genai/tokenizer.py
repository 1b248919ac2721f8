"""The tokenizer's files beside a program, as onnxruntime-genai reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adaptc.emit.genai.files import TOKENIZER
from adaptc.emit.huggingface import carry_over, files_of
from adaptc.ir.base import Pretrained
from adaptc.optional import optional

STATED = "tokenizer_config.json"
"""The file of which transformers makes a tokenizer."""


def copy_tokenizer(pretrained: Pretrained | None, directory: Path) -> bool:
    """Copy all files of a base but its weights: the tokenizer's, the chat template, the licence.

    A tokenizer without a tokenizer.json is written anew by transformers.

    Returns:
        Whether there is a tokenizer.

    Raises:
        AdaptcError: the files of a hub id cannot be downloaded.
    """
    if pretrained is None:
        return False
    source = files_of(pretrained) / pretrained.folders[""]
    carry_over(source, directory)
    if not (directory / TOKENIZER).exists() and (source / STATED).exists():
        cls: Any = optional("transformers").AutoTokenizer
        tokenizer = cls.from_pretrained(source, trust_remote_code=pretrained.trust_remote_code)
        tokenizer.save_pretrained(directory)
    return (directory / TOKENIZER).exists()
