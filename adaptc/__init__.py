"""adaptc: a declarative graph-compiler for adapted models.

Everything public is here, and imported when first used, so that `import adaptc` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptc import passes as passes
    from adaptc.api import load as load
    from adaptc.api import load_adapter as load_adapter
    from adaptc.api import run as run
    from adaptc.api import save_adapter as save_adapter
    from adaptc.api import trace as trace
    from adaptc.compiled import Compiled as Compiled
    from adaptc.compiler import compile as compile
    from adaptc.errors import AdaptcError as AdaptcError
    from adaptc.errors import DefinitionError as DefinitionError
    from adaptc.errors import Fault as Fault
    from adaptc.errors import ProofError as ProofError
    from adaptc.errors import RefusedError as RefusedError
    from adaptc.errors import SpecError as SpecError
    from adaptc.graph import Graph as Graph
    from adaptc.graph import bind as bind
    from adaptc.kinds import ActivationMethod as ActivationMethod
    from adaptc.kinds import AttentionMethod as AttentionMethod
    from adaptc.kinds import InputMethod as InputMethod
    from adaptc.method_contract import WeightMethod as WeightMethod
    from adaptc.method_contract import method as method
    from adaptc.param import Param as Param
    from adaptc.pipeline import Pass as Pass
    from adaptc.pipeline import graph_pass as graph_pass
    from adaptc.scheme_contract import scheme as scheme
    from adaptc.spec import Spec as Spec
    from adaptc.training import TrainingStep as TrainingStep
    from adaptc.training import parameter_groups as parameter_groups

__all__ = [
    "ActivationMethod",
    "AdaptcError",
    "AttentionMethod",
    "Compiled",
    "DefinitionError",
    "Fault",
    "Graph",
    "InputMethod",
    "Param",
    "Pass",
    "ProofError",
    "RefusedError",
    "Spec",
    "SpecError",
    "TrainingStep",
    "WeightMethod",
    "__version__",
    "bind",
    "compile",
    "graph_pass",
    "load",
    "load_adapter",
    "method",
    "parameter_groups",
    "passes",
    "run",
    "save_adapter",
    "scheme",
    "trace",
]
_HOMES = {
    "compile": "adaptc.compiler",
    "Compiled": "adaptc.compiled",
    "Spec": "adaptc.spec",
    "Graph": "adaptc.graph",
    "bind": "adaptc.graph",
    "trace": "adaptc.api",
    "run": "adaptc.api",
    "load": "adaptc.api",
    "save_adapter": "adaptc.api",
    "TrainingStep": "adaptc.training",
    "parameter_groups": "adaptc.training",
    "load_adapter": "adaptc.api",
    "Pass": "adaptc.pipeline",
    "graph_pass": "adaptc.pipeline",
    "Param": "adaptc.param",
    "method": "adaptc.method_contract",
    "scheme": "adaptc.scheme_contract",
    "WeightMethod": "adaptc.method_contract",
    "ActivationMethod": "adaptc.kinds",
    "AttentionMethod": "adaptc.kinds",
    "InputMethod": "adaptc.kinds",
    "AdaptcError": "adaptc.errors",
    "DefinitionError": "adaptc.errors",
    "Fault": "adaptc.errors",
    "SpecError": "adaptc.errors",
    "ProofError": "adaptc.errors",
    "RefusedError": "adaptc.errors",
}


def __getattr__(name: str) -> Any:
    if name == "passes":
        return import_module("adaptc.passes")
    if name == "__version__":
        return version("adaptc")
    if name not in _HOMES:
        raise AttributeError(f"module 'adaptc' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *globals()]
