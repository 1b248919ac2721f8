"""From a PEFT adapter to a service: `python examples/adapter_service.py MODEL ADAPTER TASK`.

The task is that of a spec, such as sequence-classification. Then

    curl localhost:8000/predict -d '{"text": "wonderfully acted"}'

The service needs onnxruntime and a tokenizer alone; adaptc is used once, to write the program.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from tokenizers import Tokenizer


class Question(BaseModel):
    """What a client sends."""

    text: str


def program(model: str, adapter: str, task: str, path: Path) -> Path:
    """Fold the adapter into the model, and write one proved ONNX file."""
    import adaptc

    base = {"model": str(Path(model).resolve()), "task": task}
    compiled = adaptc.compile({"base": base, "adapt": [{"adapter": str(Path(adapter).resolve())}]})
    compiled.emit("onnx", path)
    return path


def service(path: Path, model: str) -> FastAPI:
    """An application that answers with the program's first output."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    tokenizer, names = Tokenizer.from_file(f"{model}/tokenizer.json"), {i.name for i in session.get_inputs()}
    app = FastAPI()

    @app.post("/predict")
    def predict(question: Question) -> list[float]:
        encoded = tokenizer.encode(question.text)
        feeds = {
            "input_ids": encoded.ids,
            "attention_mask": encoded.attention_mask,
            "token_type_ids": encoded.type_ids,
        }
        taken = {name: np.array([ids]) for name, ids in feeds.items() if name in names}
        return session.run(None, taken)[0][0].ravel().tolist()

    return app


if __name__ == "__main__":
    directory, checkpoint, task = sys.argv[1:4]
    written = program(directory, checkpoint, task, Path("build/service/model.onnx"))
    uvicorn.run(service(written, directory), port=8000)
