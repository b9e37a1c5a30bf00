"""What others would say: DeepSpeed's and accelerate's estimates of the memory a model needs to train.

DeepSpeed's formula is that of `estimate_zero2_model_states_mem_needs` for one device without offloading, accelerate's
that of `accelerate estimate-memory`; neither knows of batches, activations or techniques. `python estimators.py` checks
both against the installed libraries, where they are installed.
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
