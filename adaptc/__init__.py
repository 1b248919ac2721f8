"""adaptc: a declarative graph-compiler for adapted models.

The public names. Each is imported when it is first used, so that `import adaptc` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from adaptc import losses as losses
    from adaptc import passes as passes
    from adaptc.compiler.adapter_arithmetic import combine as combine
    from adaptc.compiler.adapter_arithmetic import convert as convert
    from adaptc.compiler.adapter_arithmetic import extract as extract
    from adaptc.compiler.api import load as load
    from adaptc.compiler.api import load_adapter as load_adapter
    from adaptc.compiler.api import run as run
    from adaptc.compiler.api import save_adapter as save_adapter
    from adaptc.compiler.api import trace as trace
    from adaptc.compiler.compiled import Compiled as Compiled
    from adaptc.compiler.driver import compile as compile
    from adaptc.errors import AdaptcError as AdaptcError
    from adaptc.errors import DefinitionError as DefinitionError
    from adaptc.errors import Fault as Fault
    from adaptc.errors import ProofError as ProofError
    from adaptc.errors import RefusedError as RefusedError
    from adaptc.errors import SpecError as SpecError
    from adaptc.ir.graph import Graph as Graph
    from adaptc.ir.module import bind as bind
    from adaptc.methods.activation import ActivationMethod as ActivationMethod
    from adaptc.methods.head import HeadMethod as HeadMethod
    from adaptc.methods.method import WeightMethod as WeightMethod
    from adaptc.methods.method import method as method
    from adaptc.methods.param import Param as Param
    from adaptc.methods.virtual_tokens import AttentionMethod as AttentionMethod
    from adaptc.methods.virtual_tokens import InputMethod as InputMethod
    from adaptc.products.bench import Bench as Bench
    from adaptc.products.bench import bench as bench
    from adaptc.products.prediction import Prediction as Prediction
    from adaptc.products.predictor import Predictor as Predictor
    from adaptc.products.predictor import predict as predict
    from adaptc.products.report.page import report as report
    from adaptc.quantization.scheme import scheme as scheme
    from adaptc.rewriter.pipeline import Pass as Pass
    from adaptc.rewriter.pipeline import graph_pass as graph_pass
    from adaptc.spec.spec import Spec as Spec
    from adaptc.training import TrainingStep as TrainingStep
    from adaptc.training import parameter_groups as parameter_groups

__all__ = [
    "ActivationMethod",
    "AdaptcError",
    "AttentionMethod",
    "Bench",
    "Compiled",
    "DefinitionError",
    "Fault",
    "Graph",
    "HeadMethod",
    "InputMethod",
    "Param",
    "Pass",
    "Prediction",
    "Predictor",
    "ProofError",
    "RefusedError",
    "Spec",
    "SpecError",
    "TrainingStep",
    "WeightMethod",
    "__version__",
    "bench",
    "bind",
    "combine",
    "compile",
    "convert",
    "extract",
    "graph_pass",
    "load",
    "load_adapter",
    "losses",
    "method",
    "parameter_groups",
    "passes",
    "predict",
    "report",
    "run",
    "save_adapter",
    "scheme",
    "trace",
]
_HOMES = {
    "combine": "adaptc.compiler.adapter_arithmetic",
    "convert": "adaptc.compiler.adapter_arithmetic",
    "extract": "adaptc.compiler.adapter_arithmetic",
    "compile": "adaptc.compiler.driver",
    "Compiled": "adaptc.compiler.compiled",
    "Spec": "adaptc.spec.spec",
    "Graph": "adaptc.ir.graph",
    "bind": "adaptc.ir.module",
    "trace": "adaptc.compiler.api",
    "run": "adaptc.compiler.api",
    "load": "adaptc.compiler.api",
    "save_adapter": "adaptc.compiler.api",
    "TrainingStep": "adaptc.training",
    "parameter_groups": "adaptc.training",
    "load_adapter": "adaptc.compiler.api",
    "Bench": "adaptc.products.bench",
    "bench": "adaptc.products.bench",
    "Prediction": "adaptc.products.prediction",
    "Predictor": "adaptc.products.predictor",
    "predict": "adaptc.products.predictor",
    "report": "adaptc.products.report.page",
    "Pass": "adaptc.rewriter.pipeline",
    "graph_pass": "adaptc.rewriter.pipeline",
    "Param": "adaptc.methods.param",
    "method": "adaptc.methods.method",
    "scheme": "adaptc.quantization.scheme",
    "WeightMethod": "adaptc.methods.method",
    "ActivationMethod": "adaptc.methods.activation",
    "AttentionMethod": "adaptc.methods.virtual_tokens",
    "HeadMethod": "adaptc.methods.head",
    "InputMethod": "adaptc.methods.virtual_tokens",
    "AdaptcError": "adaptc.errors",
    "DefinitionError": "adaptc.errors",
    "Fault": "adaptc.errors",
    "SpecError": "adaptc.errors",
    "ProofError": "adaptc.errors",
    "RefusedError": "adaptc.errors",
}


def __getattr__(name: str) -> Any:
    if name in ("losses", "passes"):
        return import_module(f"adaptc.{name}")
    if name == "__version__":
        return import_module("importlib.metadata").version("adaptc")
    if name not in _HOMES:
        raise AttributeError(f"module 'adaptc' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *globals()]
