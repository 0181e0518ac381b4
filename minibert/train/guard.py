"""The guard against NaN and infinity: it stands in the backend's door and stops at the op that made the first one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minibert.errors import UserError
from minibert.kernels.op import Array, Op, holds_floats, input_name, output_name, outputs


class NonFiniteError(UserError):
    """Training stopped, with nothing updated, because a number is no longer finite. The message names the op."""

    exit_code = 1


class FirstNonFinite:
    """A watcher that stops at the first op whose output holds NaN or infinity."""

    def __init__(self, to_numpy: Callable[[Array], np.ndarray]) -> None:
        self.to_numpy, self.calls = to_numpy, 0

    def __call__(self, op: Op, arrays: tuple[Array, ...], params: Mapping[str, Any], call: Callable[[], Any]) -> Any:
        self.calls += 1
        bad_inputs = [i for i, array in enumerate(arrays) if self.place(array) is not None]
        result = call()
        for i, output in enumerate(outputs(result)):
            place = self.place(output)
            if place is not None:
                value = self.to_numpy(output)[place]
                inputs = "its inputs were finite"
                if bad_inputs:
                    inputs = f"its input {input_name(op, bad_inputs[0])} was not finite before"
                raise NonFiniteError(
                    f"first in op {op.name} (call {self.calls} of the step): element {list(place)} of output "
                    f"{output_name(op, i)}, of shape {self.to_numpy(output).shape}, is {value}; {inputs}"
                )
        return result

    def place(self, array: Array) -> tuple[int, ...] | None:
        """The index of the first element that is not finite."""
        values = self.to_numpy(array)
        if not holds_floats(values) or np.isfinite(values).all():
            return None
        return tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
