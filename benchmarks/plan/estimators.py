"""What others would say: DeepSpeed's and accelerate's estimates of the memory a model needs to train.

DeepSpeed's formula is that of `estimate_zero2_model_states_mem_needs` (0.19.6) for one device without offloading: 2 and
18 bytes a parameter. accelerate's is that of `accelerate estimate-memory` (1.15): the largest of model, gradients,
optimizer and step, for Adam. Neither knows of batches, activations or techniques.
"""

from __future__ import annotations

from typing import Any

from grid import Case

BYTES = {"float32": 4, "bfloat16": 2}


def estimators(case: Case, parameters: int) -> dict[str, Any]:
    """Bytes by each."""
    item = BYTES[case["dtype"]]
    whole = parameters * item
    return {"deepspeed": 2 * parameters + 18 * parameters, "accelerate": 4 * whole if item == 4 else 8 * parameters}
