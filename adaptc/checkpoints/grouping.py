"""Which methods share a checkpoint: a method, and those that PEFT's configuration of it can name beside it."""

from __future__ import annotations

from collections.abc import Sequence

from adaptc.checkpoints.records import AdapterRecord


def group(records: Sequence[AdapterRecord]) -> list[list[AdapterRecord]]:
    """Group records that share a checkpoint: a method, and those that join its configuration.

    A method cannot join one that adapts the same modules, nor pass over one on its way: their order must be kept.

    Args:
        records: in the order they apply.

    Returns:
        The groups in the order they apply; the first record of each is the host.
    """
    groups: dict[int, list[AdapterRecord]] = {}
    for place, record in enumerate(records):
        host = next((other for other in range(len(records)) if _joins(records, place, other)), place)
        members = groups.setdefault(host, [])
        members.insert(0 if host == place else len(members), record)
    return [groups[place] for place in sorted(groups)]


def biases(host: AdapterRecord, record: AdapterRecord) -> list[str]:
    """The modules whose biases a record trains as PEFT's option `bias` of its host says, without a list of modules."""
    which = host.options.get("biases", "none")
    if which == "none" or host.entry != record.entry:
        return []
    return [m for m in record.modules if _only_bias(record, m) and (which == "all" or m in host.modules)]


def _joins(records: Sequence[AdapterRecord], place: int, other: int) -> bool:
    """Whether a record joins the configuration of another; both by their places."""
    record, host = records[place], records[other]
    if record.format is None or not record.format.joins or not _accepts(host, record):
        return False
    between = records[min(place, other) + 1 : max(place, other)]
    return not any({*record.modules} & {*middle.modules, *middle.parameters} for middle in between)


def _accepts(host: AdapterRecord, record: AdapterRecord) -> bool:
    """Whether the configuration of a record can name another beside it."""
    if host.format is None or host.format.type is None or host.adapter != record.adapter:
        return False
    assert record.format is not None
    if record.tied and not (host.format.ties or record.format.tied):
        return False
    heads = all(not host.format.heads.isdisjoint(module.split(".")) for module in record.modules)
    if record.format.joins not in host.format.hosts and not (host.format.heads and heads):
        return False
    if record.format.joined_as:
        return host.entry == record.entry or not set(host.modules) & set(record.modules)
    whole = set(record.modules) - set(biases(host, record))
    return not any(_saved_with(m, t) for m in whole for t in (*host.modules, *host.parameters))


def _saved_with(module: str, target: str) -> bool:
    """Whether PEFT takes a target for part of a module that is saved whole: it goes by the ends of names."""
    parts = target.split(".")
    return any(".".join(parts[:end]).endswith(module) for end in range(1, len(parts) + 1))


def _only_bias(record: AdapterRecord, module: str) -> bool:
    """Whether only a module's bias is trained."""
    leaves = {t.key.rpartition(".")[2] for t in record.stored if t.name.startswith(f"{module}.")}
    return leaves == {"bias"}
