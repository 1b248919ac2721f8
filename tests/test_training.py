"""A compiled module with labels among its inputs goes into transformers' Trainer as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from tests.families import VOCABULARY, Zoo, close, entry

pytest.importorskip("accelerate")
LABELLED = {
    "input_ids": "int64[batch, seq]",
    "attention_mask": "int64[batch, seq]",
    "labels": "int64[batch]",
}


class Rows(torch.utils.data.Dataset):
    """Sequences whose first token says the label."""

    def __init__(self, count: int = 24) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, VOCABULARY, (count, 9), generator=generator)
        self.labels = self.ids[:, 0] % 3

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[index]}


@pytest.mark.slow
def test_trainer_trains_it_and_onnx_has_no_labels(zoo: Zoo, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    compiled = adaptc.compile(
        {
            "base": zoo.base_of("bert"),
            "inputs": LABELLED,
            "adapt": [entry("lora", "bert"), {"method": "full", "target": "classifier"}],
        }
    )
    module = compiled.module
    before = {key: value.clone() for key, value in module.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=8,
        max_steps=12,
        learning_rate=2e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=module, args=arguments, train_dataset=Rows())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3]), losses
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]) != (key in compiled.graph.adapter_names), key
    assert trainer.evaluate(Rows(8))["eval_loss"] > 0

    compiled.save_adapter(tmp_path / "adapter")
    compiled.emit("onnx", tmp_path / "model.onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [value.name for value in session.get_outputs()] == ["logits"]
    ids = torch.randint(3, VOCABULARY, (2, 6))
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (got,) = session.run(None, {key: value.numpy() for key, value in feeds.items()})
    with torch.no_grad():
        want = module.eval()(**feeds, labels=torch.zeros(2, dtype=torch.int64))
    close(torch.from_numpy(got), want["logits"])

    again = zoo.compiled("bert", [{"adapter": str(tmp_path / "adapter")}])
    with torch.no_grad():
        one_kind = {"token_type_ids": torch.zeros_like(ids)}  # what the model takes where it is given none
        close(again.module.eval()(**feeds, **one_kind)["logits"], want["logits"])
