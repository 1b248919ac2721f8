"""The report as one page of HTML that needs no network: styles, scripts and data are in it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment
from markupsafe import Markup
from ruamel.yaml import YAML

from adaptc.emit.staging import Staging
from adaptc.errors import AdaptcError
from adaptc.ir.cost import shown_bytes
from adaptc.products.report.build import gathered, manifests_of

ASSETS = files("adaptc.products.report") / "assets"
TITLE = "adaptc report</title>"
"""What tells a page of ours from another, near its beginning."""
SCRIPTS = ("cytoscape.min.js", "cytoscape-dagre.min.js", "chart.umd.min.js", "report.js")
SECTIONS = {
    "graph": "Graph",
    "proofs": "Proofs",
    "sizes": "Sizes",
    "quantization": "Quantization",
    "bench": "Latency",
    "sites": "Sites",
    "passes": "Passes",
    "spec": "Spec",
}
"""The key of what a section shows, where it may be missing, or its name -> its title."""


def report(
    build: str | Path | Sequence[Path], output: str | Path | None = None, *, bench: str | Path | None = None
) -> Path:
    """Write a page on what a build holds: graph, proofs, sizes, errors of quantization, latency and spec.

    Args:
        build: a folder, for all products in it and below; or a product, or several. Manifests alone are read.
        output: the file to write; `report.html` in the folder of all of them if left out.
        bench: a file with what `adaptc bench BUILD --json` printed.

    Returns:
        The path of the page.

    Raises:
        AdaptcError: there is no manifest, one is broken, or the page cannot be written; or something else is there.
    """
    place = Path(build) if isinstance(build, str) else build
    text = page(gathered(place, Path(bench) if bench is not None else None))
    path = Path(output) if output is not None else manifests_of(place)[0] / "report.html"
    if path.exists() and TITLE not in path.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise AdaptcError(f"{path}: is there, and is no report of adaptc", "name another file, as `output`")
    with Staging() as staging:
        staging.path(path).write_text(text, encoding="utf-8")
    return path


def page(told: Mapping[str, Any]) -> str:
    """The page of what `gathered` gives."""
    environment: Any = Environment(autoescape=True)
    environment.filters |= {"error": _error, "bytes": shown_bytes, "milliseconds": _milliseconds}
    absent = {key for key in ("quantization", "bench") if not told[key]}
    sections = [
        ("latency" if key == "bench" else key, title) for key, title in SECTIONS.items() if key not in absent
    ]
    return environment.from_string(_asset("report.html.j2")).render(
        title=str(told["base"]["model"]).split("/")[-1] or "model",
        summary=_summary(told),
        figures=_figures(told),
        sections=sections,
        data=told,
        spec=_yaml(told["spec"]),
        manifests=told["manifests"],
        json=Markup(_json(told)),
        css=Markup(_asset("report.css")),
        scripts=[Markup(_asset(name)) for name in SCRIPTS],
        licences=_asset("LICENSES.txt"),
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _json(told: Mapping[str, Any]) -> str:
    """Data as JSON that can stand in a page: no character of it starts a tag."""
    keys = ("graph", "sites", "quantization", "bars")
    text = json.dumps({key: told[key] for key in keys}, default=str)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _yaml(spec: Mapping[str, Any]) -> str:
    """A spec as YAML, without what is empty."""
    stream = io.StringIO()
    writer: Any = YAML()
    writer.dump(_filled(spec), stream)
    return stream.getvalue()


def _filled(value: Any) -> Any:
    """Plain data without what is empty in it."""
    if isinstance(value, dict):
        items = {key: _filled(item) for key, item in cast("dict[str, Any]", value).items()}
        return {key: item for key, item in items.items() if item not in ({}, [], None, "")}
    return [_filled(item) for item in cast("list[Any]", value)] if isinstance(value, list) else value


def _summary(told: Mapping[str, Any]) -> str:
    """The build in one sentence."""
    methods = sorted({method for site in told["sites"] for method in site["methods"]})
    sites = f"{len(told['sites'])} layers adapted by {', '.join(methods)}" if methods else "no adapter"
    count = len(told["products"])
    return f"{sites}; {count} product{'s' * (count != 1)}; {len(told['proofs'])} proofs held."


def _figures(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures on top: name and value."""
    figures: list[tuple[str, str]] = []
    cost = told["cost"]
    if cost:
        share = cost["trainable"] / max(1, cost["parameters"])
        figures += [
            ("parameters", f"{cost['parameters']:,}"),
            (f"trained ({share:.2%})", f"{cost['trainable']:,}"),
        ]
    worst = max((proof["relative"] / proof["tolerance"] for proof in told["proofs"]), default=None)
    figures += [("adapted layers", str(len(told["sites"]))), ("proofs held", str(len(told["proofs"])))]
    figures += [("largest share of an allowed error", f"{worst:.1%}")] if worst is not None else []
    return figures


def _error(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms" if seconds < 0.1 else f"{seconds:.2f} s"
