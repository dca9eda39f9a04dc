"""The operator calls that a function makes, seen below autograd."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ultrazoo.bench.timing import Case
from ultrazoo.spec import OpSpec, Sample


@dataclass(frozen=True)
class Call:
    """One call of an operator: by schema, with copies of its arguments and of what it returned."""

    operator: Any
    args: tuple[Any, ...]
    result: Any

    @property
    def name(self) -> str:
        """``namespace::operator``, the same for an operator and its twin that always runs the reference."""
        return str(self.operator._schema.name)


class Calls(TorchDispatchMode):
    """Keeps the calls of every operator of some namespaces while it is entered."""

    def __init__(self, *namespaces: str) -> None:
        super().__init__()
        self.namespaces = namespaces
        self.found: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in self.namespaces:
            self.found.append(Call(func, tree_map(_copied, args), tree_map(_copied, result)))
        return result


def calls_of(run: Case, *namespaces: str) -> list[Call]:
    """Run a function once and return the calls of operators that it made, in order."""
    with Calls(*namespaces) as calls:
        run()
    return calls.found


def as_sample(spec: OpSpec, call: Call, name: str) -> Sample:
    """Return an operator's call as a sample of the op's public function, whose arguments have the schema's names."""
    signature = inspect.signature(spec.op)
    bound = signature.bind_partial()
    schema = call.operator._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, call.args, strict=False)}
    bound.arguments.update({key: given[key] for key in signature.parameters if key in given})
    return Sample(name=name, args=bound.args, kwargs=bound.kwargs)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) else value
