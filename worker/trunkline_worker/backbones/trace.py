"""Networks to graphs: by symbolic tracing (torch.fx), or through torch.export where the code decides on its inputs.

Every node of the graph knows which modules it is the output of and inside which one it was computed, so that points of
the graph can be named by module path.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn import functional
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.backbones.quiet import quiet
from trunkline_worker.backbones.values import Value, measure

ENDS = "trunkline_ends"
"""Key of a node's ``meta``: paths of the modules whose output it is, the innermost first."""

SCOPE = "trunkline_scope"
"""Key of a node's ``meta``: path of the innermost module that it was computed in."""

# What changes a tensor in place, and what gives the same values without.
_OUT_OF_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


@dataclass(frozen=True)
class Traced:
    """A network as a graph.

    Attributes:
        module: Runs the graph. Shares the network's weights.
        by_export: Whether torch.export made it: such a graph is bound to the input size it was traced at.
        values: What every node gives at that size.
    """

    module: fx.GraphModule
    by_export: bool
    values: Mapping[str, Value]


def trace(
    network: nn.Module,
    size: int,
    *,
    fixed: bool = False,
    leaves: Iterable[type[nn.Module]] = (),
    functions: Iterable[Callable[..., Any]] = (),
) -> Traced:
    """Trace a network in evaluation mode.

    Args:
        network: Takes (B, 3, size, size), float32.
        size: Of its input, in pixels.
        fixed: Whether it takes this size only.
        leaves: Classes of modules that are not looked into.
        functions: Functions that are not looked into.

    Raises:
        WireError: UNSUPPORTED where it does not take such an input, or where neither way of tracing gets through it:
            the module that stops it is named.
    """
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # a part must not change the tensor it is given
    _check_input(network, size)
    tracer = _PathTracer(tuple(leaves), tuple(functions))
    try:
        module = _by_symbols(network, tracer)
        return Traced(module, by_export=False, values=measure(module, size, fixed=fixed))
    except Exception as symbolic:  # whatever the network's own code raises on a value that is not there yet
        try:
            module = _by_export(network, size)
            return Traced(module, by_export=True, values=measure(module, size, fixed=True))
        except Exception as exported:
            raise WireError(
                ErrorCode.UNSUPPORTED, _untraceable(network, tracer.reached, symbolic, exported)
            ) from exported


def _check_input(network: nn.Module, size: int) -> None:
    """Run the network itself once, with tensors that hold no data."""
    try:
        with (
            quiet("torch._subclasses.fake_tensor"),
            torch.no_grad(),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            network(torch.empty(2, 3, size, size))
    except Exception as error:
        # Code that looks at values fails here, too: that is for tracing to say.
        if not isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
            raise WireError(
                ErrorCode.UNSUPPORTED,
                f"the network does not take pictures of {size} pixels as (rows, 3, {size}, {size}): "
                f"{type(error).__name__}: {_first_line(error)}",
            ) from error


def _by_symbols(network: nn.Module, tracer: _PathTracer) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tracer.trace(network, concrete_args=_defaults(network))
    _remove_other_inputs(graph)
    module = fx.GraphModule(network, graph, type(network).__name__)
    _make_pure(module)
    return module


def _defaults(network: nn.Module) -> dict[str, Any]:
    """Return the arguments of ``forward`` after the first that have defaults: the graph is traced with these."""
    arguments = list(inspect.signature(network.forward).parameters.values())[1:]
    return {one.name: one.default for one in arguments if one.default is not inspect.Parameter.empty}


def _remove_other_inputs(graph: fx.Graph) -> None:
    """Remove what fx leaves of arguments that were given: an input of its own each, and a check of its value."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders[1:]:
        doomed = [node]
        for one in doomed:
            doomed.extend(user for user in one.users if user not in doomed)
        for one in reversed(doomed):
            graph.erase_node(one)


class _PathTracer(fx.Tracer):
    """Notes module paths while it traces."""

    def __init__(self, leaves: tuple[type[nn.Module], ...], functions: tuple[Callable[..., Any], ...]) -> None:
        super().__init__(autowrap_functions=functions)
        self._leaves = leaves
        self._stack: list[str] = []
        self.reached = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        self._stack.append(path)
        self.reached = path
        output = super().call_module(m, forward, args, kwargs)
        self._stack.pop()
        self.reached = self._stack[-1] if self._stack else ""
        # Of several outputs the first is the features; what comes beside them are sizes and the like.
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(first, fx.Proxy):
            first.node.meta.setdefault(ENDS, []).append(path)
        return output

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[SCOPE] = self._stack[-1] if self._stack else ""
        return node


def _by_export(network: nn.Module, size: int) -> fx.GraphModule:
    rows = torch.export.Dim("rows", min=1, max=65536)
    with (
        quiet("torch.export", "torch._subclasses.fake_tensor", "torch.fx.experimental"),
        contextlib.redirect_stderr(io.StringIO()),  # where it prints the graph it could not finish
        torch.no_grad(),
    ):
        program = torch.export.export(
            network, (torch.zeros(2, 3, size, size),), dynamic_shapes=({0: rows},), strict=False
        )
        module = program.run_decompositions({}).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.nodes:
        stack = _module_stack(node)
        node.meta[SCOPE] = stack[-1] if stack else ""
        left = {path for user in node.users for path in stack if path not in _module_stack(user)}
        node.meta[ENDS] = [path for path in reversed(stack) if path in left]
    # A plain one: the exporter's own cannot be put into evaluation mode.
    return fx.GraphModule(module, module.graph, type(network).__name__)


def _module_stack(node: fx.Node) -> list[str]:
    """Return the paths of the modules that a node of torch.export was computed in, the outermost first."""
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return [path.split("@")[0] for path in paths if path]  # a module's second call is path@1


def _make_pure(module: fx.GraphModule) -> None:
    """Replace operations that change a tensor in place: whoever hands features to a part keeps them unchanged."""
    for node in module.graph.nodes:
        if node.op == "call_function":
            plain = str(getattr(node.target, "__name__", "")).removesuffix("_")
            if plain and node.target in (getattr(torch, f"{plain}_", None), getattr(functional, f"{plain}_", None)):
                node.target = getattr(torch, plain, None) or getattr(functional, plain)
            node.target = _OUT_OF_PLACE.get(node.target, node.target)
        elif node.op == "call_method" and not node.target.endswith("__"):
            plain = node.target.removesuffix("_")
            node.target = plain if hasattr(torch.Tensor, plain) else node.target
        if node.kwargs.get("inplace") is True:
            node.kwargs = {**node.kwargs, "inplace": False}
    module.recompile()


def _untraceable(network: nn.Module, path: str, symbolic: Exception, exported: Exception) -> str:
    kind = type(network.get_submodule(path)).__name__ if path else type(network).__name__
    where = f"its module {path!r} ({kind})" if path else f"its own forward ({kind})"
    return (
        f"the network cannot be traced: {where} does something that depends on the values or sizes it is given "
        f"({_first_line(symbolic)}), and torch.export says: {_first_line(exported)}. Decide such things when the "
        "module is built, not in forward; or wrap the function with torch.fx.wrap"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
