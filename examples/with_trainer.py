"""The Hugging Face Trainer on an adapted model: `python examples/with_trainer.py MODEL [STEPS]`.

The spec's inputs have `labels`, so the loss is in the graph, and the Trainer takes the module as it stands.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer
from transformers import Trainer, TrainingArguments

import adaptc

ROOT = Path(__file__).resolve().parents[1]


def rows(model: str, name: str) -> list[dict[str, list[int] | int]]:
    """Reviews with their labels, as tokens, all of one length."""
    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding(length=32)
    lines = (ROOT / "demo" / f"{name}.tsv").read_text().splitlines()
    pairs = [line.rsplit("\t", 1) for line in lines]
    encoded = tokenizer.encode_batch([text for text, _ in pairs])
    return [
        {"input_ids": e.ids, "attention_mask": e.attention_mask, "labels": int(label)}
        for e, (_, label) in zip(encoded, pairs, strict=True)
    ]


def train(model: str, steps: int, output: Path) -> float:
    """Train, write the adapter and the folded ONNX file, and give the loss on reviews it has not seen."""
    compiled = adaptc.compile(
        ROOT / "specs/sentiment.yaml", overrides=[f"base.model={Path(model).resolve()}"]
    )
    arguments = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        save_strategy="no",
        label_names=["labels"],
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    step = adaptc.TrainingStep(
        compiled.module, steps
    )  # for methods with a rule of their own, such as AdaLoRA
    data, held_out = rows(model, "train"), rows(model, "dev")
    trainer = Trainer(
        compiled.module, arguments, train_dataset=data, eval_dataset=held_out, callbacks=[step.callback()]
    )
    trainer.train()
    compiled.save_adapter(output / "adapter")
    compiled.emit("onnx", output / "model.onnx")
    return float(trainer.evaluate()["eval_loss"])


if __name__ == "__main__":
    wanted = int(sys.argv[2]) if len(sys.argv) > 2 else 60
    print(f"loss on unseen reviews: {train(sys.argv[1], wanted, Path('build/with-trainer')):.3f}")
