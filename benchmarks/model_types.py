"""The table of model types: what of transformers is compiled right, beside torch's exporter alone.

`python -m benchmarks.model_types` writes docs/model_types.md. Outcomes are kept in build/model_types.jsonl, so that a
run that was cut off goes on where it stopped; with names of types those alone are run, anew. It ends with exit code 1
if adaptc crashes or gives something else than PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
import logging
import math
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

import adaptc
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.errors import AdaptcError
from adaptc.inputs import InputSpec
from adaptc.ir.example_inputs import example_sizes, example_tensors
from adaptc.tracing.export import dynamic_shapes
from adaptc.tracing.huggingface.heads import heads_of
from adaptc.tracing.huggingface.inputs import UnknownInputsError, chosen_inputs
from adaptc.tracing.huggingface.settings import set_for_tracing
from adaptc.tracing.huggingface.tasks import FEATURES, PREFERRED, VAGUE, model_classes, tasks
from benchmarks.model_outcomes import Outcome, write
from benchmarks.table import versions
from benchmarks.tiny import randomise, tiny_configurations

BOUND = 1e-4
"""The largest error of an output that counts as right, over its largest value."""
SECONDS = 90
"""The processor's time that a model type has."""
LATE = f"late: takes more than {SECONDS} s"
LARGEST = 80_000_000
"""The most parameters of a model that is still tiny."""
LINEAR = (torch.nn.Linear, Conv1D)
"""The classes of linear layers."""
LOG = Path(__file__).parents[1] / "build/model_types.jsonl"
SHAPES = ((2, 9, 6), (1, 5, 8), (4, 24, 3))
"""Sizes other than those traced, for dimensions of texts and batches: batch 1 among them."""


class NoModelError(Exception):
    """There is no tiny model of a type, or it does not run on the inputs that were derived."""


def model_types() -> list[str]:
    """Every model type that transformers' AutoModel makes."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return list(MODEL_MAPPING_NAMES)


def telling_task(config: Any) -> str:
    """The task that says most of a model: the first of the preferred ones that has a model of this kind."""
    making = [task for task in tasks() if model_classes(task, config)]
    if not making:
        raise NoModelError(f"no Auto class makes a model of {type(config).__name__}")
    heads = [task for task in PREFERRED if task not in (FEATURES, "causal-lm")]  # encoders have both
    heads.append("causal-lm")
    others = [task for task in making if task not in (*heads, FEATURES, *VAGUE)]
    return next(task for task in (*heads, *others, FEATURES, *VAGUE) if task in making)


def built(name: str) -> tuple[Any, str]:
    """A tiny random model of a type, in evaluation mode, and its task.

    Raises:
        NoModelError: there is none.
        UnknownInputsError: its inputs cannot be derived.
    """
    import transformers

    kind: Any = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name]
    reason = ""
    for config in tiny_configurations(kind):
        config.dtype = torch.float32
        task = telling_task(config)
        auto: Any = getattr(transformers, tasks()[task])
        try:
            with torch.device("meta"):
                size = sum(tensor.numel() for tensor in auto.from_config(copy.deepcopy(config)).parameters())
            if size > LARGEST:
                reason = reason or f"the smallest model that can be made has {size:,} parameters"
                break
            torch.manual_seed(0)
            model = randomise(auto.from_config(config)).eval()
            inputs = chosen_inputs(model, config, (), None).inputs
            with torch.no_grad():
                results = run(model, example_tensors(inputs, example_sizes(inputs)))
            if not any(result.isnan().any() for result in results):
                return model, task
            reason = "its outputs are not a number"
        except (UnknownInputsError, NoModelError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise NoModelError(reason or "no tiny configuration")


def run(model: Any, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of a model of transformers without its cache."""
    without = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return leaves(model(**tensors, **without))


def leaves(result: Any) -> list[torch.Tensor]:
    """The tensors of a result."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def batches(inputs: Sequence[InputSpec]) -> list[dict[str, torch.Tensor]]:
    """Random inputs at other sizes than those traced."""
    traced = example_sizes(inputs)
    names = list(traced)
    made: list[dict[str, torch.Tensor]] = []
    for number, (batch, seq, decoder) in enumerate(SHAPES):
        usual = {"batch": batch, "seq": seq, "decoder_seq": decoder}
        sizes = example_sizes(inputs, [usual.get(name, traced[name] + 8 * number + 8) for name in names])
        made.append(example_tensors(inputs, sizes, seed=number, pad=True))
    return made


def largest_error(want: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    """The largest difference over the largest value of the output it is in.

    It is infinite where outputs differ in shape, or in where they are finite.
    """
    if len(want) != len(got):
        return math.inf
    worst = 0.0
    for right, other in zip(want, got, strict=True):
        right, other = right.detach().double(), other.detach().double()
        if right.shape != other.shape or not torch.equal(right.isfinite(), other.isfinite()):
            return math.inf
        right, other = right[right.isfinite()], other[other.isfinite()]
        if right.numel():
            worst = max(worst, float((right - other).abs().max() / right.abs().max().clamp_min(1e-12)))
    return worst


def with_adaptc(model: Any, task: str, work: Path) -> tuple[str, tuple[str, ...]]:
    """How adaptc compiles a model with an adapter on every linear layer, and the inputs that it derives."""
    inputs: tuple[str, ...] = ()
    heads = heads_of(model)
    linear = any(isinstance(part, LINEAR) for name, part in model.named_modules() if name not in heads)
    target = "all-linear" if linear else "*"  # convolutions
    spec = {
        "base": {"model": str(work / "base"), "task": task},
        "adapt": [{"method": "lora", "target": target, "r": 1, "alpha": 2}],
    }
    try:
        made = adaptc.compile(spec)
        inputs = tuple(spec.name for spec in made.base.inputs)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in made.module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        made.save_adapter(work / "adapter")
        made.emit("onnx", work / "model.onnx")
        program = onnx_runner(work / "model.onnx")
        runs: dict[str, Callable[[Any], Any]] = {
            "module": lambda tensors: leaves(made.module.eval()(**tensors)),
            "fold": lambda tensors: leaves(folded(**tensors)),
            "onnx": lambda tensors: program(tensors),
        }
        folded = made.fold()
        reference = adapted(model, work / "adapter", folded.state_dict())
        return compared(reference, made.base.inputs, runs), inputs
    except AdaptcError as error:
        return f"refused: {error}".replace(str(work) + "/", ""), inputs
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}", inputs


def adapted(model: Any, adapter: Path, weights: Mapping[str, torch.Tensor]) -> Any:
    """The eager model with an adapter that PEFT merges; with the folded weights where PEFT adapts no such parameters.

    Merged, since some models read a layer's weight themselves (WavLM's attention), past the layer that PEFT put there.
    """
    from peft import PeftModel

    set_for_tracing(model.config)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*adapter keys")
            theirs: Any = PeftModel.from_pretrained(copy.deepcopy(model), str(adapter))
            return theirs.merge_and_unload().eval()
    except (KeyError, ValueError, UserWarning):  # experts, routers; or PEFT takes names of layers for experts
        model.load_state_dict(weights, strict=False)
        return model.eval()


def compared(reference: Any, inputs: Sequence[InputSpec], runs: Mapping[str, Callable[[Any], Any]]) -> str:
    """How what was made compares with the adapted eager model."""
    compared_at = 0
    with torch.no_grad():
        for tensors in batches(inputs):
            try:
                want = run(reference, tensors)
            except Exception:  # the model's own limit
                continue
            compared_at += 1
            for name, runner in runs.items():
                try:
                    error = largest_error(want, runner(tensors))
                except Exception as failure:
                    shapes = {key: list(value.shape) for key, value in tensors.items()}
                    return f"wrong: {name} at {shapes}: {type(failure).__name__}: {failure}"
                if not error <= BOUND:
                    return f"wrong: {name} by {error:.0e}"
    return "right" if compared_at else "wrong: the model runs at no other sizes than traced"


def with_torch(model: Any) -> tuple[str, str]:
    """How torch.export alone takes a model, and how torch.onnx.export does."""
    model = copy.deepcopy(model)
    set_for_tracing(model.config)
    inputs = chosen_inputs(model, model.config, (), None).inputs
    examples = example_tensors(inputs, example_sizes(inputs))
    shapes = dynamic_shapes(inputs)
    try:
        program = torch.export.export(model, (), examples, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        return f"refused: {type(error).__name__}: {str(error).strip()[:300]}", "refused: torch.export refuses"
    try:
        torch.onnx.export(program, dynamo=True, verbose=False)
    except Exception as error:
        return "right", f"refused: {type(error).__name__}"
    return "right", "right"


def _in_child(name: str, beside: bool, queue: Any) -> None:
    """Put the outcome of a type, and before it what it is until a step ends."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    used = math.ceil(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + SECONDS))
    outcome = Outcome(name)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        tempfile.TemporaryDirectory(prefix="adaptc-models-") as folder,
    ):
        try:
            model, task = built(name)
        except UnknownInputsError as error:
            queue.put(replace(outcome, adaptc=f"refused: {error}"))
            return
        except Exception as error:
            words = str(error) if isinstance(error, NoModelError) else f"{type(error).__name__}: {error}"
            queue.put(replace(outcome, unusable=" ".join(words.split())))
            return
        outcome = replace(outcome, task=task)
        queue.put(replace(outcome, adaptc="crash: the process ended"))
        model.save_pretrained(Path(folder) / "base")
        stored = (
            type(model).from_pretrained(Path(folder) / "base").eval()
        )  # tables that are not saved are made anew
        ours, inputs = with_adaptc(stored, task, Path(folder))
        outcome = replace(outcome, adaptc=ours, inputs=inputs)
        queue.put(outcome)
        if beside or ours != "right":
            export, exporter = with_torch(model)
            queue.put(replace(outcome, export=export, exporter=exporter))


def outcomes(names: Iterable[str], workers: int = 1, beside: bool = False) -> Iterator[Outcome]:
    """Run model types in processes of their own, which may crash or hang.

    Args:
        names: the types.
        workers: the number of processes at a time.
        beside: run torch's exporter alone too where adaptc is right.
    """
    context: Any = multiprocessing.get_context("fork")
    running: list[tuple[Any, Any, Outcome, float]] = []

    def ended(limit: int) -> Iterator[Outcome]:
        while len(running) > limit:
            for child in list(running):
                process, queue, outcome, start = child
                if not queue.empty():
                    running[running.index(child)] = (process, queue, queue.get(), start)
                elif not process.is_alive() and queue.empty():
                    running.remove(child)
                    if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
                        outcome = replace(outcome, adaptc=outcome.adaptc and LATE)
                    yield replace(outcome, seconds=round(time.monotonic() - start, 1))
            time.sleep(0.02)

    for name in names:
        yield from ended(workers - 1)
        queue = context.SimpleQueue()
        process = context.Process(target=_in_child, args=(name, beside, queue))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads: they are torch's, and idle
            process.start()
        running.append((process, queue, Outcome(name, unusable="it ends the process"), time.monotonic()))
    yield from ended(0)


def read(lines: Iterable[str]) -> dict[str, Outcome]:
    """The outcomes of a log by their types; of several the last."""
    values = [json.loads(line) for line in lines]
    return {value["name"]: Outcome(**{**value, "inputs": tuple(value["inputs"])}) for value in values}


def main(names: Sequence[str]) -> int:
    """Run the types of these names, or all that have not been run, and write the page of all."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model, task = built("bert")
        model.save_pretrained(Path(folder) / "base")
        with_adaptc(model, task, Path(folder))  # so that no process imports everything again
    LOG.parent.mkdir(exist_ok=True)
    results = read(LOG.read_text().splitlines() if LOG.exists() else [])
    with LOG.open("a") as log:
        for outcome in outcomes(names or [name for name in model_types() if name not in results]):
            results[outcome.name] = outcome
            print(json.dumps(asdict(outcome)), file=log, flush=True)
            print(outcome.name, (outcome.adaptc or outcome.unusable).split("\n")[0][:150], flush=True)
    if not names:
        write(list(results.values()), len(model_types()), BOUND, versions())
    return 0 if all(results[name].holds for name in names or results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
