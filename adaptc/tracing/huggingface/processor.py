"""What the tokenizer or processor of a Hugging Face directory gives a model, read by transformers' own classes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from adaptc.optional import optional

READERS = ("AutoProcessor", "AutoTokenizer", "AutoFeatureExtractor", "AutoImageProcessor")
"""The classes of transformers that read one, in the order in which they are tried."""
FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
"""The files of which a directory with a tokenizer or processor has one at least."""


def given_inputs(model: str, trust: bool) -> tuple[frozenset[str] | None, list[str]]:
    """What the tokenizer or processor of a model gives.

    Args:
        model: a directory, or a hub id.
        trust: whether code that comes with it may be run.

    Returns:
        Its `model_input_names`, None where there is none or it cannot be read; and a note for the person in the second
        case.
    """
    cached_file = optional("transformers.utils").cached_file
    silent = {
        f"_raise_exceptions_for_{kind}": False
        for kind in ("missing_entries", "connection_errors", "gated_repo")
    }
    if not any(cached_file(model, name, **silent) for name in FILES):
        return None, []
    reasons: list[str] = []
    for reader in READERS:
        try:
            with _quiet():
                read: Any = getattr(optional("transformers"), reader).from_pretrained(
                    model, trust_remote_code=trust
                )
            return _names(read), []
        except Exception as error:  # whatever its files make transformers raise; the next class may read them
            reasons.append(str(error).strip().splitlines()[0])
    return None, [f"its tokenizer cannot be read, so the configuration says the inputs: {reasons[0]}"]


def _names(read: Any) -> frozenset[str]:
    """Its `model_input_names`; a mask that a feature extractor is set to leave out is none of them."""
    names = set(read.model_input_names)
    if getattr(read, "return_attention_mask", None) is False:
        names -= {"attention_mask"}
    return frozenset(names)


@contextmanager
def _quiet() -> Generator[None]:
    """Silence transformers within a `with` block."""
    logging = optional("transformers").logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
