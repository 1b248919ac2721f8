"""The command `adaptc init`: a first spec, which is planned before it is shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from adaptc.cli.starter import factory_spec, starter_spec
from adaptc.errors import AdaptcError, Problem, SpecError

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
"""What names a function that returns a module."""


def first_spec(model: str, adapter: Path | None, inputs: Sequence[str], output: Path | None) -> str:
    """A commented spec for a model, which `adaptc plan` takes as it is.

    Args:
        model: a Hugging Face directory, an id on the hub, or a factory `package.module:function`.
        adapter: a trained adapter's directory, for a Hugging Face model; None for one to be trained.
        inputs: what the module of a factory takes.
        output: the file that it is for; None where it is printed.

    Raises:
        SpecError: there is no such model or adapter, or a plan would refuse the spec.
        AdaptcError: the file exists, or the model cannot be traced.
    """
    if output is not None and output.exists():
        raise AdaptcError(f"{output} exists already; remove it or choose another name")
    folder = output.parent if output else Path.cwd()
    if FACTORY.fullmatch(model):
        if adapter is not None:
            message = "an adapter is read for a Hugging Face model; write `- adapter: DIR` into the spec"
            raise SpecError([Problem(message, file="--adapter")])
        starter = factory_spec(model, inputs)
    elif inputs:
        message = "the inputs of a Hugging Face model are derived; --input is for a factory of one's own"
        raise SpecError([Problem(message, file="--input")])
    else:
        starter = starter_spec(model, adapter, folder)
    if starter.whole:
        _check(starter.text, output or folder / "<the spec of adaptc init>")
    return starter.text


def _check(text: str, path: Path) -> None:
    """Plan a spec that is not written yet.

    Raises:
        AdaptcError: the plan refuses it.
    """
    from adaptc.compiler.driver import plan
    from adaptc.spec.source import Source
    from adaptc.spec.spec import Spec

    plan(Spec.from_source(Source.of(path, text.encode())))
