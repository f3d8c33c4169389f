"""Which number format a model runs fastest in on this machine: tried, not guessed.

A processor that knows bfloat16 may still be slower with it: without matrix units most of the gain is lost in
conversions.
"""

import copy
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)

GAIN = 1.1
"""How much faster bfloat16 must be to be worth its rounding."""

ROUNDS = 4
LIMIT_S = 5.0
"""No new round begins after this: a large model on a small machine is tried once."""


def faster(model: Any, try_out: Callable[[Any], object]) -> Any:
    """The model, given in float32, or a copy of it in bfloat16 if `try_out` shows that to be faster.

    The two take turns and the best round of each counts, so that what else the machine does hits both alike.
    """
    try:
        half = copy.deepcopy(model).to(torch.bfloat16)
        try_out(half)  # the first call pays for lazy initialisation
    except torch.OutOfMemoryError:
        logger.info("no memory for float32 and bfloat16 at once", extra={"action": "dtype", "dtype": "bfloat16"})
        return model.to(torch.bfloat16)
    except RuntimeError:
        logger.warning("bfloat16 does not work here", exc_info=True, extra={"action": "dtype", "dtype": "float32"})
        return model
    try_out(model)
    began = time.monotonic()
    best = {"float32": float("inf"), "bfloat16": float("inf")}
    for _ in range(ROUNDS):
        for name, each in (("float32", model), ("bfloat16", half)):
            started = time.perf_counter()
            try_out(each)
            best[name] = min(best[name], time.perf_counter() - started)
        if time.monotonic() - began > LIMIT_S:
            break
    chosen = "bfloat16" if best["bfloat16"] * GAIN < best["float32"] else "float32"
    times = {f"{name}_s": round(took, 4) for name, took in best.items()}
    logger.info("number format chosen", extra={"action": "dtype", "dtype": chosen, **times})
    return half if chosen == "bfloat16" else model
