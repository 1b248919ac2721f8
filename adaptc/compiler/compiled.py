"""The result of `adaptc.compile`: the plan, the trainable module, and the artifacts that can be written."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from adaptc.compiler.artifacts.emit import Artifact, emit_all
from adaptc.compiler.artifacts.output_paths import output_paths
from adaptc.compiler.folding import fold, prove_fold
from adaptc.compiler.plan.report import PlanReport
from adaptc.compiler.plan.texts import filled
from adaptc.compiler.program import Program
from adaptc.compiler.proof.proof import Proof
from adaptc.compiler.proof.proofs import check_gradients
from adaptc.compiler.proof.quantization_error import QuantizationErrors
from adaptc.compiler.proof.runners import BatchRunner, module_call
from adaptc.compiler.trainable import module_record
from adaptc.compiler.trunk import Trunk, make_trunk
from adaptc.errors import RefusedError
from adaptc.html_table import html_table
from adaptc.ir.conversion import META
from adaptc.ir.graph import Graph
from adaptc.ir.module import bind
from adaptc.progress.bars import shown
from adaptc.rewriter.catalog import load_passes
from adaptc.rewriter.pipeline import PassRecord, run
from adaptc.spec.spec import Spec, load


class Compiled:
    """A compiled model: what can be made of it.

    To use: `module` (train it), `fold()` and `inference()` (run it), `generate()`, `emit()` (write it),
    `save_adapter()`, `load_adapter()`, `alternatives`. To read: `spec`, `plan`, `proofs`, `quantization_errors()`.
    The graphs behind it: `base`, `graph`, `live_graph()`, `folded_graph()`, `records`, `base_sha256`, `program`.

    Attributes:
        program: the graphs behind it.
        errors: what quantization costs the artifact that `emit` wrote last; None where nothing is quantized.
    """

    def __init__(self, program: Program):
        self.program = program
        self.errors: QuantizationErrors | None = None

    def __repr__(self) -> str:
        adapters = dict.fromkeys(f"{p.insert.method.name} {p.insert.adapter!r}" for p in self.plan.entries)
        what = ", ".join([*adapters, *(f"alternative {name!r}" for name in self.plan.alternatives)])
        budget = self.plan.budget
        return (
            f"<adaptc.Compiled {self.base.source.describe}: {what or 'no adapter'}; "
            f"{budget.trainable:,} of {budget.parameters:,} parameters train>"
        )

    def _repr_html_(self) -> str:
        """The model in a notebook: its plan, and the proofs that held."""
        rows = [(p.name, f"{p.relative:.1e}", f"{p.tolerance:.1e}", ", ".join(p.shapes)) for p in self.proofs]
        proofs = html_table("proofs", ("what is proved", "relative error", "allowed", "on"), rows)
        return html_table(repr(self), (), ()) + self.plan.to_html() + proofs

    @property
    def spec(self) -> Spec:
        """The spec as resolved."""
        return self.program.spec

    @property
    def plan(self) -> PlanReport:
        """The sites, what the plan costs, and the pipeline."""
        return self.program.plan

    @property
    def base(self) -> Graph:
        """The traced graph."""
        return self.program.base

    @property
    def graph(self) -> Graph:
        """The adapted graph; its adapter weights follow `module` once that is made."""
        return self.program.graph

    @property
    def proofs(self) -> list[Proof]:
        """What was proved so far."""
        return self.program.proofs.held

    @property
    def records(self) -> list[PassRecord]:
        """What each pass did."""
        return self.program.records

    @property
    def base_sha256(self) -> str:
        """SHA-256 of the base: of its weight files, or of its tensors where there are none."""
        return self.program.base_sha256

    @property
    def module(self) -> fx.GraphModule:
        """The trainable module: only the adaptation requires grad, and train()/eval() are followed."""
        return self.program.module

    @property
    def alternatives(self) -> dict[str, Compiled]:
        """The model with each of `adapters` beside what is always on, by name: to be trained, folded or saved."""
        return {name: Compiled(program) for name, program in self.program.alternatives.items()}

    def live_graph(self) -> Graph:
        """The factored graph in evaluation mode, with the adapters as they stand."""
        return self.program.live_graph()

    def folded_graph(self) -> Graph:
        """The folded graph with the adapters as they stand, proved against the live one.

        Raises:
            RefusedError: a weight cannot be folded into, or the spec's own passes leave nothing to fold.
            ProofError: the folded graph has other operations than the base, or computes something else.
        """
        graphs = fold(self.program)
        prove_fold(self.program, graphs)
        return graphs.written

    def fold(self) -> fx.GraphModule:
        """A module with the base's operations and names, and no adaptation left.

        Raises:
            RefusedError: a tensor that would be folded into is used elsewhere too.
            ProofError: the folded module computes something else.
        """
        module = bind(self.folded_graph())
        module.meta[META] = module_record(self.base, self.program.base_record)
        return module.eval()

    def inference(self, tokens: int = 1, device: str = "cpu") -> fx.GraphModule:
        """The folded module, with the device's kernels for quantized weights where these are faster.

        Args:
            tokens: rows of a matrix product at a time: one where a model generates for one reader.
            device: where it will run and is proved, such as "cuda".

        Raises:
            RefusedError: it cannot be folded as the spec stands, or torch does not reach the device.
            ProofError: the kernels compute something else.
        """
        passes = load_passes()
        kernels = passes["torch-kernels"](tokens=tokens, device=device)  # type: ignore[call-arg]
        refusals = kernels.requires(self.graph)
        if refusals:
            raise RefusedError(refusals)
        graphs = fold(self.program)
        folded = prove_fold(self.program, graphs)
        graph = run(graphs.written, [passes["plain-integers"](), kernels])
        module = bind(graph).eval().to(device)
        reference = self.program.reference(graphs.written, folded)
        # A GPU's convolutions round float32 to 10 bits unless told otherwise, which no proof allows.
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            candidate = BatchRunner(module_call(module, device)).on(reference.taken)
        self.program.proofs.prove(f"kernels on {device}", graphs.written, reference, candidate)
        return module

    def generate(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int | None = None,
        compile: bool = False,
        **options: Any,
    ) -> Any:
        """Write the tokens that follow a prompt, with the adapters as they stand and a cache for keys and values.

        transformers chooses the tokens, for any decoder: `options` are those of its `generate`, such as
        `attention_mask`, `do_sample`, `num_beams`, `streamer` or `eos_token_id`. A Hugging Face base's own defaults
        hold.

        Args:
            input_ids: the prompts `(batch, tokens)`, int64; shorter ones are padded on the left, which
                `attention_mask` says. Of an encoder-decoder what its encoder takes, padded on the right.
            max_new_tokens: how many tokens to write at most: 50 if neither this nor `max_length` says.
            compile: let torch compile the module, for this call and later ones.
            **options: what else transformers' `generate` takes.

        Returns:
            The prompts and the new tokens `(batch, tokens + new)`, or what `return_dict_in_generate` asks for.

        Raises:
            RefusedError: the model is no decoder, or its tokens meet outside causal attention, so that it can have no
                cache; names the operation.
            AdaptcError: transformers is not installed, an input is missing, or the text could become longer than the
                model's table of positions.
        """
        return self.program.generator(compile).generate(input_ids, max_new_tokens, **options)

    def trunk(self, batches: Iterable[Mapping[str, torch.Tensor]], cache: str | Path) -> Trunk:
        """Compute once what no training changes, up to the first adapted place, and store it.

        A probe, another head, or adapters in the last layers are trained from what is stored: the gradients are those
        of the whole module with its trunk in evaluation mode. What is trained is the adapters of `module`.

        Args:
            batches: the model's inputs by name, in the same order each time. What the model does not take, such as
                labels, is stored along.
            cache: the directory of the files. Called again after an interrupt, it goes on where it was; a broken file
                is told by a warning, and computed again.

        Returns:
            the stored batches; `Trunk.module` takes them.

        Raises:
            RefusedError: nothing trains, or the first layer does, so that there is no trunk.
            InputError: a batch lacks an input.
            AdaptcError: the cache is of another trunk or of other data.
        """
        return make_trunk(self.program, batches, Path(cache))

    def filled(self, rows: Sequence[str | Mapping[str, str]]) -> dict[str, torch.Tensor]:
        """The model's inputs for texts in the template of its head, such as that of a cloze.

        Args:
            rows: a text for the slot `{text}`, or a text for each slot by its name.

        Raises:
            AdaptcError: no head has a template, a slot is missing, or a row is so long that its mask is cut off.
        """
        return filled(self.graph, rows)

    def check_gradients(self) -> None:
        """Check with random inputs and adapters that every trained parameter gets a gradient.

        Raises:
            ProofError: names what does not.
        """
        check_gradients(self.program.trainable_graph())

    def quantization_errors(self, adapters: str = "live") -> QuantizationErrors | None:
        """What quantization costs, against the float model with the same adapters.

        Args:
            adapters: measure the model with `live` adapters, or `folded` by the spec's own passes.

        Returns:
            The errors; None where nothing is quantized.
        """
        requantized = adapters == "folded" and bool(self.plan.closing[1:])
        return self.program.quantization_errors(fold(self.program).quantized if requantized else None)

    def emit(self, format: str, path: str | Path, *, progress: bool = False, **options: Any) -> Artifact:
        """Write one artifact, as an `emit` entry of a spec would: `emit("onnx", path, adapters="folded")`.

        A warning says what another library does not read as it was written.

        Args:
            format: `onnx`, `torch`, `peft`, `hf`, `genai` or `onnx-adapter`.
            path: the file or folder.
            progress: draw what takes long on standard error.
            **options: the other keys of such an entry.

        Returns:
            What was written: its `path`, what quantization costs it (`errors`), and `notes` for whoever uses it.

        Raises:
            SpecError: the format or an option is unknown.
            AdaptcError: it cannot be made, or its proof failed; nothing is left at `path`.
        """
        entry = {"format": format, **options, "path": str(Path(path).absolute())}
        spec = load({"adapters": self.spec.source.data.get("adapters", {}), "emit": [entry]})
        output_paths(spec, spec.emit)
        with shown(progress):
            (artifact,) = emit_all(self.program, spec.emit)
        self.errors = artifact.errors
        for warning in artifact.warnings:
            warnings.warn(warning, stacklevel=2)
        return artifact

    def save_adapter(self, directory: str | Path) -> None:
        """Write the adapters as PEFT checkpoints.

        A warning names the layers that the installed PEFT leaves out when it loads them.
        """
        self.emit("peft", directory)

    def load_adapter(self, directory: str | Path, ignore: Sequence[str] = ()) -> None:
        """Replace the adapters' weights by those of a checkpoint.

        A warning says what was read otherwise than it is written, such as names of an earlier transformers.

        Args:
            directory: the checkpoint.
            ignore: options of its configuration to read it without, as in an entry of a spec.

        Raises:
            WeightError: it does not fit what was inserted.
        """
        for note in self.program.load_adapter(Path(directory), ignore):
            warnings.warn(note, stacklevel=2)
