"""A sentence encoder with an adapter as one ONNX file: `python examples/sentence_embeddings.py MODEL [ADAPTER]`.

The program takes tokens and gives the normalised embedding: pooling and normalisation are in it.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

import adaptc

SENTENCES = ("A cat sleeps on the sofa.", "A kitten is lying on the couch.", "Interest rates rose again.")


def write(model: str, adapter: str | None, path: Path) -> Path:
    """Write the program; without an adapter it is the base's."""
    base = {"model": str(Path(model).resolve()), "task": "sentence-embedding"}
    adapt = [{"adapter": str(Path(adapter).resolve())}] if adapter else []
    adaptc.compile({"base": base, "adapt": adapt}).emit("onnx", path)
    return path


def embed(path: Path, model: str, sentences: tuple[str, ...]) -> np.ndarray:
    """Embeddings (sentences, dimensions), of length 1."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(sentences))
    feeds = {
        "input_ids": [e.ids for e in encoded],
        "attention_mask": [e.attention_mask for e in encoded],
        "token_type_ids": [e.type_ids for e in encoded],
    }
    taken = {i.name: np.array(feeds[i.name]) for i in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    return session.run(["sentence_embedding"] if "sentence_embedding" in names else None, taken)[0]


if __name__ == "__main__":
    program = write(
        sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None, Path("build/embeddings/model.onnx")
    )
    vectors = embed(program, sys.argv[1], SENTENCES)
    for other, similarity in zip(SENTENCES[1:], vectors[1:] @ vectors[0], strict=True):
        print(f"{similarity:.2f}  {SENTENCES[0]}  {other}")
