"""Where a product comes from: what its manifest says of the compile that made it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaptc.compiler.plan.report import site_json
from adaptc.compiler.program import Program
from adaptc.emit.manifest import GRAPH, versions
from adaptc.ir.outline import outline
from adaptc.ir.state import state_notes
from adaptc.spec.entries import AdapterEntry
from adaptc.spec.spec import Spec, dump, resolve_path
from adaptc.weights import sha256_of_files


def provenance(program: Program, folder: Path) -> dict[str, Any]:
    """What is true of every product of a compile.

    Args:
        program: the compiled program.
        folder: the folder of the manifest. Paths that the spec states relative to itself are told relative to that.

    Returns:
        `versions`, `spec` and its folder `spec_folder`, `base`, `adapters`, `sites`, `combined` and `alternatives`
        where there are any, `cost`, `passes`, `proved_on`, `proofs`, and the `graph` as an outline.
    """
    source = program.base.source
    return {
        "versions": versions(),
        "spec": dump(program.spec),
        "spec_folder": _relative(program.spec.directory, folder),
        "base": {
            "model": describe_base(program, folder),
            "sha256": program.base_sha256,
            "inputs": program.plan.inputs,
            "constants": program.plan.constants,
            "left_out": program.plan.left_out,
            "notes": [*source.notes, *source.bound.notes, *state_notes(program.base.nodes)],
        },
        "adapters": _adapters(program, folder),
        "sites": _sites(program),
        **_combined(program),
        **({"alternatives": _alternatives(program, folder)} if program.alternatives else {}),
        "cost": asdict(program.plan.budget),
        "passes": [asdict(record) for record in program.records],
        "proved_on": _proved_on(program, folder),
        "proofs": [asdict(proof) for proof in program.proofs.held],
        GRAPH: outline(program.base, program.graph),
    }


def without_times(common: Mapping[str, Any]) -> dict[str, Any]:
    """A provenance without how long passes took, so that two compiles of one spec write the same bytes."""
    passes = [
        {key: value for key, value in record.items() if key != "seconds"} for record in common["passes"]
    ]
    return {**common, "passes": passes}


def describe_base(program: Program, folder: Path) -> str:
    """The base in one line, its path as in `provenance`."""
    described, entry = program.base.source.describe, program.spec.base
    text = entry and (entry.model or entry.program)
    if not text or not resolve_path(program.spec, text).exists():
        return described  # a module in memory, a factory, or a hub id
    path = resolve_path(program.spec, text)
    return described.replace(str(path), _told(program.spec, text, path, folder), 1)


def _adapters(program: Program, folder: Path) -> list[dict[str, Any]]:
    """The path and the SHA-256 of every checkpoint that the spec names, and the options that it was read without."""
    spec = program.spec
    rows: dict[Path, dict[str, Any]] = {}
    for planned in program.plan.entries:
        if planned.combined is not None:
            for origin in planned.combined.origins:
                path = _told(spec, origin.text, origin.path, folder)
                rows[origin.path] = {"path": path, "sha256": origin.sha256, "weight": origin.weight}
            continue
        entry, checkpoint = spec.adapt[planned.entry], planned.checkpoint
        if checkpoint is not None and isinstance(entry, AdapterEntry):
            path = _told(spec, entry.adapter, checkpoint.path, folder)
            ignored = {key: checkpoint.config[key] for key in checkpoint.ignored}
            told = {"path": path, "sha256": checkpoint.sha256}
            rows.setdefault(checkpoint.path, told | ({"ignored": ignored} if ignored else {}))
    return list(rows.values())


def _combined(program: Program) -> dict[str, Any]:
    """How adapters were combined: of each entry that does so the rule, and the relative error of each layer."""
    entries = {p.entry: p.combined for p in program.plan.entries if p.combined is not None}
    told = [{"how": each.merge.how, "errors": each.errors} for each in entries.values()]
    return {"combined": told} if told else {}


def _alternatives(program: Program, folder: Path) -> dict[str, Any]:
    """What each alternative adds to what is always on: its checkpoints and its sites."""
    added: dict[str, Any] = {}
    for name, other in program.alternatives.items():
        always = {row["path"] for row in _adapters(program, folder)}
        sites = [
            {**site_json(site), "methods": [planned.insert.method.name]}
            for _, planned in program.plan.added(name)
            for site in planned.selection.sites
        ]
        adapters = [row for row in _adapters(other, folder) if row["path"] not in always]
        added[name] = {"adapters": adapters, "sites": sites}
    return added


def _proved_on(program: Program, folder: Path) -> dict[str, Any]:
    """The inputs of the proofs: a person's `own`, the `file` of those that the spec names, and the `random` ones."""
    spec, proofs = program.spec, program.proofs
    told: dict[str, Any] = {"own": list(program.base.examples)}
    if spec.proof is not None and spec.proof.inputs is not None:
        path = resolve_path(spec, spec.proof.inputs)
        told["file"] = {
            "path": _told(spec, spec.proof.inputs, path, folder),
            "sha256": sha256_of_files([path]),
        }
    return told | {"random": {label: asdict(draw) for label, draw in proofs.drawn.items()}}


def _sites(program: Program) -> list[dict[str, Any]]:
    """Every adapted site, with its methods in the order in which they apply."""
    sites: dict[str, dict[str, Any]] = {}
    for planned in program.plan.entries:
        for site in planned.selection.sites:
            told = sites.setdefault(site.parameter or str(site), site_json(site) | {"methods": []})
            told["methods"].append(planned.insert.method.name)
    return list(sites.values())


def _told(spec: Spec, text: str, path: Path, folder: Path) -> str:
    """A path for the manifest: as the spec states it where that is absolute, else relative to the manifest's folder."""
    return str(path) if Path(text).expanduser().is_absolute() else _relative(path, folder)


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path.resolve(), folder.resolve())
