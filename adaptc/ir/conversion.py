"""A module that is converted to another dtype, as by `module.to(torch.bfloat16)`: it runs in it, or says what to do.

A traced graph may hold dtypes of its own: a constant, a cast to float32. After a conversion operations would then
meet tensors of two dtypes. So the graph is run on fake tensors of the new dtype first, which computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from adaptc.errors import AdaptcError
from adaptc.inputs import InputSpec
from adaptc.ir.example_inputs import example_sizes, example_tensors

META = "adaptc"
"""The key in a module's `meta` under which adaptc stores what a module must know: its inputs, adapters and base."""
PRODUCTS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "linear",
        "matmul",
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "scaled_dot_product_attention",
    )
)
"""Operations that take operands of one dtype alone."""
Apply = Callable[[torch.Tensor], torch.Tensor]


class OneDtype(TorchDispatchMode):
    """Raises where a product gets operands of two dtypes: on fake tensors torch's own kernels do not look."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        leaves: list[Any] = pytree.tree_leaves((args, kwargs or {}))
        dtypes = {x.dtype for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()}
        if func.overloadpacket in PRODUCTS and len(dtypes) > 1:
            names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise TypeError(f"{func} gets {names}")
        return func(*args, **(kwargs or {}))


class ConvertedModule(fx.GraphModule):
    """A graph module that is not converted to a dtype in which its graph does not run."""

    def _apply(self, fn: Apply, recurse: bool = True) -> Any:
        """Apply a function to every tensor, as torch's `to`, `half` and `cuda` do.

        Raises:
            AdaptcError: it would give tensors of another dtype, in which the graph does not run.
        """
        record: Mapping[str, Any] | None = self.meta.get(META)
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        after = {name: fn(tensor.new_empty(0)).dtype for name, tensor in tensors.items()} if record else {}
        changed = {name: dtype for name, dtype in after.items() if dtype != tensors[name].dtype}
        if record and changed:
            self._check_dtypes({**{name: t.dtype for name, t in tensors.items()}, **changed}, changed, record)
        return cast("Any", super())._apply(fn, recurse)

    def _check_dtypes(
        self, dtypes: Mapping[str, torch.dtype], changed: Mapping[str, torch.dtype], record: Mapping[str, Any]
    ) -> None:
        """Run the graph on fake tensors of these dtypes.

        Raises:
            AdaptcError: it does not run.
        """
        dtype = next(iter(changed.values()))
        specs = [InputSpec.from_json(spec) for spec in record["inputs"]]
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        before = state[next(iter(changed))].dtype
        inputs = example_tensors(specs, example_sizes(specs))
        with FakeTensorMode(), torch.no_grad(), OneDtype():
            fake = {name: torch.empty(tensor.shape, dtype=dtypes[name]) for name, tensor in state.items()}
            given = {
                name: torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype)
                for name, value in inputs.items()
            }
            try:
                torch.func.functional_call(self, fake, (), given)
            except Exception as error:  # whatever an operation raises
                raise _refused(dtype, before, error) from error


def _refused(dtype: torch.dtype, before: torch.dtype, error: Exception) -> AdaptcError:
    name, earlier = (str(each).removeprefix("torch.") for each in (dtype, before))
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return AdaptcError(
        f"the graph of this module was traced in {earlier} and does not run in {name}: {reason}",
        f"compile it in that dtype: adaptc.compile(spec, overrides=['base.dtype={name}'])",
        f"to train in mixed precision keep it in {earlier}, and run it under torch.autocast",
    )
