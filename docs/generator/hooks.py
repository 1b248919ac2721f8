"""What mkdocs calls while it builds the site: pages that are made, pages from outside docs/, and one law.

The law: every public name of adaptc is on the page of the Python API.
"""

from __future__ import annotations

import posixpath
import re
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

import adaptc
from docs.generator import commands, methods, schema

ROOT = Path(__file__).parents[2]
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/results.md",
    "benchmarks/sst2.md",
    "benchmarks/sst2.svg",
)
"""Files of the repository that are pages of the site as they stand; the README is its first page."""
API = "reference/python.md"
LINK = re.compile(r"(\]\(|src=\")(?!https?:|#|mailto:)([^)\s\"#]+)")


@cache
def made() -> dict[str, str]:
    """Path in the site -> text, for the pages that are made from the code."""
    return {
        "reference/spec.md": schema.spec_page(),
        "reference/commands.md": commands.commands_page(),
        **methods.pages(),
    }


def on_config(config: Any) -> Any:
    """Put the pages of methods and schemes where the menu names their folder, and pages it does not name at its end."""
    listed = set()
    for section in config.nav:
        for entry in (entry for entries in section.values() for entry in entries):
            for title, path in entry.items():
                listed.add(path)
                if path.endswith("/"):
                    entry[title] = sorted(name for name in made() if name.startswith(path))
    others = sorted({page.name for page in (ROOT / "docs").glob("*.md")} - listed)
    if others:
        config.nav.append({"More": others})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add what is made, and what lies outside docs/."""
    for path, text in made().items():
        files.append(File.generated(config, path, content=text))
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    missing = set(adaptc.__all__) - set(
        re.findall(r"^::: adaptc\.(\w+)$", (ROOT / "docs" / API).read_text(), re.M)
    )
    if missing - {"passes", "__version__"}:
        raise PluginError(f"docs/{API} lacks public names: {', '.join(sorted(missing))}")
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links between docs/ and the rest of the repository, as they are in the site."""
    source = _source(page.file.src_uri)
    if source is None:
        return markdown
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        return match[1] + posixpath.relpath(_place(target), here or ".")

    return LINK.sub(moved, markdown)


def _source(path: str) -> str | None:
    """The file of the repository that a page is; None for a page that is made."""
    if path == "index.md":
        return "README.md"
    if path in OUTSIDE:
        return path
    return f"docs/{path}" if (ROOT / "docs" / path).is_file() else None


def _place(target: str) -> str:
    """Where a file of the repository is in the site."""
    return "index.md" if target == "README.md" else target.removeprefix("docs/")
