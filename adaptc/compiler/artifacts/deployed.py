"""One more adapter for a program that is deployed: made from the program's own record, without the base's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import torch

from adaptc.checkpoints.adapter import Checkpoint, directories, read, why_missing
from adaptc.checkpoints.adapter_checks import check_base, load, match, spelled
from adaptc.checkpoints.key_parts import ROOT
from adaptc.checkpoints.lengthened_keys import shortened
from adaptc.checkpoints.peft_config import declared
from adaptc.checkpoints.peft_keys import PeftLayout
from adaptc.emit.genai.files import PROGRAM
from adaptc.emit.onnx.adapter_file import read_adapter, write_adapter
from adaptc.emit.onnx.cached import ENCODER
from adaptc.errors import AdaptcError, Problem, SpecError, WeightError
from adaptc.methods.method import METHODS, Method, WeightMethod
from adaptc.methods.param import Param
from adaptc.methods.site import WeightSite
from adaptc.methods.virtual_tokens import AttentionMethod
from adaptc.rewriter.swap.derive import MethodOnSite, forms_of, no_form
from adaptc.rewriter.swap.form import NoFormError
from adaptc.rewriter.swap.prefix import VIRTUAL_TOKENS
from adaptc.rewriter.swap.record import KEY, SlotRecord
from adaptc.weights import seeded


class DeployedProgram:
    """An ONNX program that takes adapters as inputs, and says which.

    Args:
        path: the program, or a directory of onnxruntime-genai that has it.

    Raises:
        SpecError: there is no such file, or it is no program of adaptc with `adapters: swap`.
    """

    def __init__(self, path: Path):
        self.path = path = path / PROGRAM if path.is_dir() else path
        loader: Any = onnx
        if not path.is_file():
            raise _wrong(f"{path}: no such file; expected an ONNX program with `adapters: swap`")
        try:
            self.model = loader.load(path, format="protobuf", load_external_data=False)
        except Exception as error:
            raise _wrong(f"{path}: no ONNX program: {str(error).splitlines()[0]}") from error
        text = next((item.value for item in self.model.metadata_props if item.key == KEY), None)
        if text is None:
            message = f"{path} takes no adapters"
            raise _wrong(
                message, "emit it with {format: onnx, adapters: swap}, and alternatives under `adapters:`"
            )
        self.record = SlotRecord.from_json(text)

    @cached_property
    def _initializers(self) -> dict[str, Any]:
        """The weights of the program, and of the encoder beside it."""
        beside = [item.value for item in self.model.metadata_props if item.key == ENCODER]
        loader: Any = onnx
        encoders = [
            loader.load(self.path.with_name(name), format="protobuf", load_external_data=False)
            for name in beside
        ]
        return {
            tensor.name: tensor
            for model in (*encoders, self.model)
            for tensor in model.graph.initializer
            if 0 not in tensor.dims  # what the other program reads
        }

    def base(self, name: str) -> torch.Tensor:
        """A weight of the base as the program holds it, in float64.

        Raises:
            NoFormError: the program holds it in another form, such as few bits.
        """
        tensor = self._initializers.get(name)
        if tensor is None or tensor.data_type not in _FLOATS:
            raise NoFormError(
                f"it is computed from {name} of the base, which the program does not hold as floats"
            )
        helper: Any = onnx.numpy_helper
        return torch.as_tensor(helper.to_array(tensor, str(self.path.parent)).astype("float64"))

    def tensors(self, adapter: Path) -> dict[str, torch.Tensor]:
        """The tensors that the program takes for an adapter's checkpoint: name -> tensor.

        Args:
            adapter: a checkpoint of PEFT's or adaptc's, or several with their order.

        Raises:
            WeightError: it was trained on another base, adapts what the program has no place for, or holds a method
                that cannot be swapped.
        """
        absent = why_missing(adapter)
        if absent:
            raise WeightError(absent)
        members: list[MethodOnSite] = []
        values: dict[str, torch.Tensor] = {}
        for folder in directories(adapter):
            checkpoint = shortened(read(folder), frozenset(self.record.modules))
            check_base(checkpoint, self.record.base_sha256)
            for member, tensors in _members(self.record, checkpoint, f"{len(members)}"):
                members.append(member)
                values |= tensors
        try:
            for member in members:
                values |= {n: self._derived(member, p) for n, p in member.tensors.values() if n not in values}
            forms = forms_of(members, lambda name: _widened(values[name]), self.base)
            unplaced = [name for name in forms.whole if name not in self.record.parameters]
            if unplaced:
                raise NoFormError(f"the program has no place for {unplaced[0]}: {self._places()}")
            named = self.record.slots.tensors(forms)
        except NoFormError as error:
            raise WeightError(f"{adapter}: {error}", WAY_OUT) from None
        dtypes = {name: slot.site.dtype for slot in self.record.slots.weights.values() for name in slot.dims}
        dtypes |= {name: parameter.dtype for name, parameter in self.record.parameters.items()}
        if self.record.slots.prefix is not None:
            dtypes[VIRTUAL_TOKENS] = self.record.slots.prefix.dtype
        return {name: tensor.to(dtypes[name]).contiguous() for name, tensor in named.items()}

    def _derived(self, member: MethodOnSite, param: Param) -> torch.Tensor:
        """A tensor that no checkpoint holds, since it follows from the options and the base."""
        init, site = param.init, member.site
        if isinstance(init, str) or not isinstance(site, WeightSite):
            raise NoFormError(f"its {param.key} is in no checkpoint")
        W = site.matrix(self.base(site.parameter))
        return init(W, seeded(0, param.key)).reshape(param.shape)

    def _places(self) -> str:
        return _places(self.record)


WAY_OUT = (
    "compile the program again with this adapter under `adapters:`; or fold it into a program of its own"
)
_FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
)


def make_adapter(program: str | Path, adapter: str | Path, output: str | Path) -> dict[str, list[int]]:
    """Write an `.onnx_adapter` for a program from an adapter's checkpoint.

    Returns:
        Name of each tensor in it -> its shape.

    Raises:
        SpecError: the program takes no adapters, or there is a file that adaptc did not write.
        WeightError: the adapter does not fit the program.
    """
    deployed, adapter, output = DeployedProgram(Path(program)), Path(adapter), Path(output)
    if output.suffix != ".onnx_adapter" or output.is_dir():
        raise _wrong(f"{output}: expected the name of a file that ends in .onnx_adapter")
    tensors = deployed.tensors(adapter)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    try:
        write_adapter(partial, tensors, deployed.record.base_sha256)
        again = read_adapter(partial)
        for name, tensor in tensors.items():
            if not torch.equal(again[name], tensor.float() if tensor.dtype == torch.bfloat16 else tensor):
                raise AdaptcError(f"{output}: {name} was not read back as it was written")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _members(
    record: SlotRecord, checkpoint: Checkpoint, prefix: str
) -> list[tuple[MethodOnSite, dict[str, torch.Tensor]]]:
    """The methods of a checkpoint on the program's sites, each with its tensors by name.

    Raises:
        WeightError: the checkpoint holds what the program has no place for.
    """
    declaration = declared(checkpoint)
    method: Method[Any] = declaration.method(**declaration.options)
    if not isinstance(method, WeightMethod | AttentionMethod):
        raise WeightError(f"{checkpoint.path}: {method.name} cannot be swapped: {no_form(method)}", WAY_OUT)
    adapted: Any = method  # of one of the two kinds, as its sites are
    sites = _sites_of(record, checkpoint, adapted)
    whole = next(c for c in METHODS.values() if c.peft is not None and c.peft.joins == "modules_to_save")()
    saved = [site for site in _sites(record, whole) if site.module in checkpoint.saved_modules]
    groups: list[tuple[Method[Any], Sequence[Any]]] = [(adapted, sites), (whole, saved)]
    expected: dict[str, Param] = {}
    members: list[tuple[MethodOnSite, dict[str, str]]] = []
    for instance, places in groups:
        shared = instance.shared(places) if places else {}
        for site in places:
            at = instance.at(site)
            keys = {a: (_key(record, checkpoint, places, site, p), p) for a, p in at.stored(site).items()}
            keys |= {a: (f"{ROOT}{param.key}", param) for a, param in shared.items()}
            expected |= {key: param for key, param in keys.values() if param.stored}
            tensors = {a: (f"{prefix}.{key}", param) for a, (key, param) in keys.items()}
            members.append(
                (MethodOnSite(at, site, tensors), {f"{prefix}.{key}": key for key, _ in keys.values()})
            )
    _check_places(record, checkpoint, expected)
    match(checkpoint, expected)
    loaded = load(checkpoint, expected)
    return [
        (member, {name: loaded[key] for name, key in names.items() if key in loaded})
        for member, names in members
    ]


def _sites_of(record: SlotRecord, checkpoint: Checkpoint, method: Method[Any]) -> Sequence[Any]:
    """The sites of a program that a checkpoint adapts.

    Raises:
        WeightError: it has virtual tokens, for which the program has no place.
    """
    if not isinstance(method, AttentionMethod):
        return [site for site in _sites(record, method) if _held(record, checkpoint, method, site)]
    if record.slots.prefix is None:
        message = f"{checkpoint.path}: the program has no place for virtual tokens"
        raise WeightError(f"{message}: {_places(record)}", WAY_OUT)
    return record.slots.prefix.sites


def _sites(record: SlotRecord, method: Method[Any]) -> list[WeightSite]:
    """The sites of a program that a method can sit on, slices of them too."""
    if "parameter" in method.kinds:
        return [parameter.site for parameter in record.parameters.values() if method.takes(parameter.site)]
    sites: list[WeightSite] = []
    for slot in record.slots.weights.values():
        if slot.site.kind in method.kinds and method.takes(slot.site):
            pieces = record.pieces.get(slot.site.name, {})
            sites += [
                slot.site,
                *(replace(slot.site, rows=rows, piece=piece) for piece, rows in pieces.items()),
            ]
    return sites


def _held(record: SlotRecord, checkpoint: Checkpoint, method: Method[Any], site: WeightSite) -> bool:
    """Whether a checkpoint holds a tensor of a method on a site."""
    params = method.at(site).stored(site).values()
    return any(_key(record, checkpoint, [site], site, param) in checkpoint.tensors for param in params)


def _key(
    record: SlotRecord, checkpoint: Checkpoint, sites: Sequence[WeightSite], site: WeightSite, param: Param
) -> str:
    """The key of a tensor in a checkpoint."""
    if checkpoint.in_adaptc_format:
        return site.key(param.key)
    order = {name: index for index, name in enumerate(record.order)}
    return PeftLayout(sites, order).key(site, param)


def _check_places(record: SlotRecord, checkpoint: Checkpoint, expected: Mapping[str, Param]) -> None:
    """Check that the program has a place for every tensor of a checkpoint.

    Raises:
        WeightError: it has none; names the first.
    """
    idle = checkpoint.idle
    extra = [key for key in checkpoint.tensors if key not in expected and key not in idle]
    modules = [_module_of(record, key) for key in extra]
    if extra:
        recorded = modules[0] in record.modules
        what = f"{modules[0]}, which it adapts" if recorded else f"its tensor {spelled(extra[0])!r}"
        more = f" (and {len(extra) - 1} tensors more)" if len(extra) > 1 else ""
        why = "" if recorded else ": this base has no such layer, so the adapter was trained on another"
        raise WeightError(
            f"{checkpoint.path}: the program has no place for {what}{more}{why}", _places(record), WAY_OUT
        )


def _module_of(record: SlotRecord, key: str) -> str:
    """The longest name of a module of the base that a key begins with; the key itself without one."""
    parts = key.split(".")
    names = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    return next((name for name in names if name in record.modules), key)


def _places(record: SlotRecord) -> str:
    modules = dict.fromkeys(
        [
            *(slot.site.module for slot in record.slots.weights.values()),
            *record.slots.whole,
            *(site.module for site in (record.slots.prefix.sites if record.slots.prefix else ())),
        ]
    )
    shown = list(modules)[:4]
    return f"it has places on {', '.join(shown)}" + (
        f" and {len(modules) - 4} more" if len(modules) > 4 else ""
    )


def _widened(value: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, where it holds floats."""
    return value.double() if value.dtype.is_floating_point else value


def _wrong(message: str, *notes: str) -> SpecError:
    return SpecError([Problem(message, file="adaptc adapter", notes=notes)])
