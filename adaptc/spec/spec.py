"""The spec as a whole: its keys, how it is read and written, and its JSON Schema."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from adaptc.errors import AdaptcError, Problem, SpecError, WeightError, got, unknown
from adaptc.inputs import InputSpec
from adaptc.registry.plugins import load_plugin
from adaptc.spec.base import BaseEntry, Inputs
from adaptc.spec.diagnostics import fault, invalid, problems
from adaptc.spec.emit import PROGRAMS, EmitEntries
from adaptc.spec.entries import AdaptEntry, Alternatives, MethodEntry, QuantizeEntries
from adaptc.spec.part import Many, Part, PathText
from adaptc.spec.proof import ProofEntry
from adaptc.spec.source import Source
from adaptc.spec.yaml_text import Loc, is_list, is_mapping

VERSION = 1
NO_ALTERNATIVES = "there are no `adapters:` to choose from; `adapt:` is always on"
"""The version of the spec that this adaptc reads."""


def _pass(entry: object) -> str | dict[str, dict[str, Any]]:
    if isinstance(entry, str) and entry:
        return entry
    if is_mapping(entry) and len(entry) == 1:
        name, options = next(iter(entry.items()))
        if isinstance(name, str) and (options is None or is_mapping(options)):
            return {name: dict(options or {})}
    raise invalid(fault(f"expected a pass's name, or one name with its options, got {got(entry)}"))


PassEntry = Annotated[
    str | dict[str, dict[str, Any]],
    BeforeValidator(_pass, json_schema_input_type=str | dict[str, dict[str, Any] | None]),
]


class QuantizeBudget(Part):
    """The limit on what quantization may cost. The bits of each layer are chosen within it."""

    size: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="of the quantized weights' bytes in float32"
    )
    error: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of the outputs: relative, on the calibration rows or else on random inputs"
    )

    @model_validator(mode="after")
    def _one(self) -> QuantizeBudget:
        if (self.size is None) == (self.error is None):
            raise invalid(fault("expected size or error, such as budget: {error: 0.02}", at_key=True))
        return self


class Spec(Part):
    """A spec, validated: what to compile, with defaults filled in."""

    version: Literal[1] = Field(description="of this language")
    base: BaseEntry | None = Field(
        None,
        description="the model: a directory, a function or a program; left out where Python hands one in",
    )
    inputs: Inputs = Field(
        {}, validate_default=True, description="name -> dtype[dims]; derived for `base.model`"
    )
    adapt: Many[AdaptEntry] = Field((), description="what is adapted, in the order in which it applies")
    adapters: Alternatives = Field(
        {}, description="alternatives on one base, by name: each a list of entries as under `adapt`"
    )
    quantize: Many[QuantizeEntries] = Field((), description="what is stored in few bits, and how")
    budget: QuantizeBudget | None = Field(
        None, description="bits are chosen for each layer that `quantize` names, within this"
    )
    calibration: PathText | None = Field(
        None,
        description="rows that some methods choose by: a .jsonl or .safetensors file of inputs, with labels where "
        "a method needs them",
    )
    proof: ProofEntry | None = Field(
        None, description="the inputs that proofs run on and the error they allow; chosen if left out"
    )
    emit: EmitEntries = Field((), description="what is written, and where")
    passes: Many[PassEntry] | None = Field(
        None, description="the pipeline; `adaptc plan` prints the one in force"
    )
    plugins: Many[PathText] | None = Field(
        None,
        description="modules and .py files with methods, schemes and passes of one's own, which are imported; a "
        "relative path starts at the spec's folder",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of new parameters and example inputs")

    _source: Source | None = PrivateAttr(default=None)
    _places: tuple[Loc, ...] | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, data: Any) -> Any:
        version = data.get("version") if is_mapping(data) else None
        if isinstance(version, int) and version > VERSION:
            message = f"this adaptc reads version {VERSION}, got {version}: upgrade adaptc"
            raise invalid(fault(message, loc=("version",)))
        return data

    @field_validator("inputs", mode="after")
    @classmethod
    def _described(cls, inputs: dict[str, InputSpec], info: ValidationInfo) -> dict[str, InputSpec]:
        base = info.data.get("base")
        if base is not None and base.python is not None and not inputs:
            raise invalid(fault("a 'python' base needs its inputs, such as x: float32[batch, 16]"))
        return inputs

    @field_validator("emit", mode="after")
    @classmethod
    def _possible(cls, emit: EmitEntries, info: ValidationInfo) -> EmitEntries:
        base = info.data.get("base")
        if base is not None and base.model is None:
            kind = "python" if base.python is not None else "program"
            message = f"a Hugging Face checkpoint needs a 'model' base, and this one is a {kind!r}"
            faults = [
                fault(message, loc=(i, "format")) for i, entry in enumerate(emit) if entry.format == "hf"
            ]
            if faults:
                raise invalid(*faults)
        return emit

    @field_validator("emit", mode="after")
    @classmethod
    def _alternatives_named(cls, emit: EmitEntries, info: ValidationInfo) -> EmitEntries:
        names = info.data.get("adapters")
        if names is None:  # wrong itself
            return emit
        faults: list[InitErrorDetails] = []
        for index, entry in enumerate(emit):
            if entry.format == "onnx-adapter" and entry.name not in names:
                message = unknown("adapter", entry.name, names) if names else NO_ALTERNATIVES
                faults.append(fault(message, loc=(index, "name")))
            if isinstance(entry, PROGRAMS) and entry.adapters in ("swap", "rows") and not names:
                faults.append(fault(NO_ALTERNATIVES, loc=(index, "adapters")))
        if faults:
            raise invalid(*faults)
        return emit

    @classmethod
    def from_source(cls, source: Source) -> Spec:
        """Validate a spec, and keep its source for later messages.

        Raises:
            SpecError: holds everything found wrong, in the order of the file.
        """
        _load_plugins(source)
        try:
            spec = cls.model_validate(source.data)
        except ValidationError as error:
            raise SpecError(problems(error, source)) from None
        spec._source = source
        return spec

    @property
    def source(self) -> Source:
        """The data as written, with its lines."""
        return self._source or Source(None, dump(self))

    @property
    def directory(self) -> Path:
        """The folder that paths in the spec are relative to: its file's, or else the working directory."""
        path = self.source.path
        return Path.cwd() if path is None else path.absolute().parent

    def alternative(self, name: str) -> Spec:
        """The spec of one of `adapters`: its entries follow those of `adapt`, and nothing is emitted.

        A method without a name of its own has the alternative's.
        """
        entries = [
            entry.model_copy(update={"name": name})
            if isinstance(entry, MethodEntry) and "name" not in entry.model_fields_set
            else entry
            for entry in self.adapters[name]
        ]
        spec = self.model_copy(update={"adapt": (*self.adapt, *entries), "adapters": {}, "emit": ()})
        always: list[Loc] = [self.place(index) for index in range(len(self.adapt))]
        added: list[Loc] = [("adapters", name, index) for index in range(len(entries))]
        spec._source, spec._places = self.source, (*always, *added)
        return spec

    def alone(self, entry: AdaptEntry, place: Loc) -> Spec:
        """The spec of one entry on the base, which stands at a place of this spec; nothing else is done."""
        nothing: dict[str, Any] = {"adapters": {}, "quantize": (), "budget": None, "emit": (), "passes": None}
        spec = self.model_copy(update={"adapt": (entry,), **nothing})
        spec._source, spec._places = self.source, (place,)
        return spec

    def with_adapter(self, name: str, entries: str | os.PathLike[str] | Sequence[Mapping[str, Any]]) -> Spec:
        """The spec with one more of `adapters`, that emits nothing.

        Args:
            name: its name.
            entries: a checkpoint's folder, or entries as under `adapters`; paths are relative to the working directory.

        Raises:
            SpecError: an entry is wrong.
        """
        if isinstance(entries, str | os.PathLike):
            entries = [{"adapter": os.fspath(entries)}]
        stated: Any = entries
        if is_list(stated):
            stated = [_from_here(entry) if is_mapping(entry) else entry for entry in stated]
        return self._with_adapters({**self._adapters, name: stated}, f"add_adapter({name!r})", name)

    def without_adapter(self, name: str) -> Spec:
        """The spec without one of `adapters`, that emits nothing."""
        left = {other: entries for other, entries in self._adapters.items() if other != name}
        return self._with_adapters(left, f"remove_adapter({name!r})", name)

    @property
    def _adapters(self) -> dict[str, Any]:
        return self.source.data.get("adapters") or {}

    def _with_adapters(self, adapters: Mapping[str, Any], origin: str, name: str) -> Spec:
        data = {key: value for key, value in self.source.data.items() if key != "emit"}
        changed = (*self.source.overrides, (("adapters", name), origin))
        return Spec.from_source(replace(self.source, data=data | {"adapters": adapters}, overrides=changed))

    def place(self, entry: int) -> Loc:
        """The location of an entry of `adapt`; of what `alternative` and `alone` put there, where it was."""
        return ("adapt", entry) if self._places is None else self._places[entry]

    def shown_place(self, entry: int) -> str:
        """The location of an entry in text: `adapt.0`."""
        return ".".join(map(str, self.place(entry)))

    def default_name(self, entry: int) -> str:
        """The name of a trained adapter whose entry states none."""
        place = self.place(entry)
        return "default" if place[0] == "adapt" else str(place[1])

    def error(self, loc: Loc, message: str, *notes: str) -> SpecError:
        """An error at a location in this spec, for what is found wrong after it was read.

        Args:
            loc: the way to the value, such as `("adapt", 0, "target")`.
            message: what is wrong, in one line.
            notes: what was expected, what to do: a line each.
        """
        return SpecError([self.source.problem(loc, message, *notes)])

    def weight_error(self, loc: Loc, error: WeightError) -> WeightError:
        """An error about a file of weights, with the location in this spec that names the file."""
        return WeightError(str(self.source.problem(loc, error.message, *error.notes)))


def _load_plugins(source: Source) -> None:
    """Import what `plugins` names, before the entries that need it are read; another value than names is told later.

    Raises:
        SpecError: one cannot be imported.
    """
    names: object = source.data.get("plugins")
    folder = Path.cwd() if source.path is None else source.path.absolute().parent
    for index, name in enumerate(names if is_list(names) else ()):
        if not isinstance(name, str | os.PathLike) or not str(cast(object, name)):
            continue
        try:
            load_plugin(str(cast(object, name)), folder)
        except AdaptcError as error:
            raise SpecError([source.problem(("plugins", index), error.message, *error.notes)]) from error


def load(spec: str | os.PathLike[str] | Mapping[str, object] | Spec, overrides: Sequence[str] = ()) -> Spec:
    """Read and validate a spec.

    Args:
        spec: a file; a mapping with the same keys, whose `version` may be left out; or a spec.
        overrides: `--set` settings such as `adapt.0.r=16`, applied in order.

    Raises:
        SpecError: holds everything found wrong, in the order of the file.
    """
    if isinstance(spec, Spec) and not overrides:
        return spec
    source = _source_of(spec)
    for setting in overrides:
        source = source.override(setting)
    return Spec.from_source(source)


def _source_of(spec: object) -> Source:
    if isinstance(spec, Spec):
        return spec.source
    if is_mapping(spec):
        return Source(None, {"version": VERSION, **spec})
    if isinstance(spec, str | os.PathLike):
        return Source.read(Path(cast("str | os.PathLike[str]", spec)))
    raise SpecError([Problem(f"expected a file, a mapping or a Spec, got {got(spec)}")])


def _from_here(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry whose checkpoint is found from the working directory, wherever the spec is."""
    path = entry.get("adapter")
    if not isinstance(path, str | os.PathLike):
        return dict(entry)
    return {**entry, "adapter": str(Path(cast("str", path)).expanduser().absolute())}


def dump(spec: Spec) -> dict[str, Any]:
    """The spec as plain data with defaults filled in. `load` reads it back."""
    return spec.model_dump(mode="json", exclude_none=True, fallback=repr)


def require_base(spec: Spec) -> BaseEntry:
    """The entry `base`, which a spec needs where no model is given from Python.

    Raises:
        SpecError: the spec has none.
    """
    if spec.base is None:
        raise spec.error(("base",), "required, but missing", "such as base: {model: ./all-MiniLM-L6-v2}")
    return spec.base


def resolve_path(spec: Spec, text: str) -> Path:
    """The path that a text in the spec means. A relative one starts at `spec.directory`."""
    return spec.directory / Path(text).expanduser()


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a spec, with the options of every registered method and scheme."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:adaptc:spec:{VERSION}",
        **Spec.model_json_schema(),
        "title": f"adaptc spec, version {VERSION}",
    }


def schema_text() -> str:
    """The JSON Schema as it is written in `specs/schema.json`, for editors."""
    return json.dumps(schema(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
