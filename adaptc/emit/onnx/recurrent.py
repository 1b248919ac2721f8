"""ONNX's RNN, for which torch's exporter has no form; LSTM and GRU are the exporter's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnxscript

op: Any = onnxscript.opset18


def rnn(activation: str) -> Callable[..., Any]:
    """The form of `rnn_tanh` or `rnn_relu`: one RNN a layer.

    Args:
        activation: `Tanh` or `Relu`.
    """

    def form(
        x: Any,
        states: Any,
        parameters: Sequence[Any],
        biases: bool,
        layers: int,
        dropout: float,
        training: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        directions, each = 2 if bidirectional else 1, 4 if biases else 2
        first = op.Constant(value_ints=[0])
        steps, last = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x, list[Any]()
        for layer in range(0, layers * directions, directions):
            ways = [parameters[way * each :][:each] for way in range(layer, layer + directions)]
            W, R = (op.Concat(*[op.Unsqueeze(way[i], first) for way in ways], axis=0) for i in (0, 1))
            B = [op.Unsqueeze(op.Concat(*way[2:], axis=0), first) for way in ways] if biases else None
            start = op.Slice(states, [layer], [layer + directions], [0])
            outputs, state = op.RNN(
                steps,
                W,
                R,
                op.Concat(*B, axis=0) if B else None,
                None,
                start,
                activations=[activation] * directions,
                direction="bidirectional" if bidirectional else "forward",
                hidden_size=states.shape[-1],
            )
            # (time, directions, batch, features) to (time, batch, directions * features)
            steps = op.Reshape(op.Transpose(outputs, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
            last.append(state)
        output = op.Transpose(steps, perm=[1, 0, 2]) if batch_first else steps
        return output, op.Concat(*last, axis=0)

    return form
