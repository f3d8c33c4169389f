"""What a process knows of the jobs it has sent, or will send, and no worker has begun: their prompts and their age.

Each job is one process's own from its arrival to its answer, so that over all processes nothing is counted twice and
nothing is left out, wherever a job waits. What a process has not begun to send goes with it when it is killed, and what
it has sent nobody waits for then: no worker answers it any more.
"""

import time
from collections.abc import Iterable

from server.core import metrics
from server.core.inbox import Waiter
from server.core.messages import Lane

TELL_EVERY_S = 1.0


def tell(waiting: Iterable[Waiter], models: Iterable[str], lane: Lane) -> None:
    """Set the gauges of a lane by those that wait in it; a model of which nobody waits has zeros."""
    now = time.time()
    tokens, oldest = dict.fromkeys(models, 0), dict.fromkeys(models, now)
    for waiter in waiting:
        model = waiter.job.model
        tokens[model] += waiter.prompt_tokens
        oldest[model] = min(oldest[model], waiter.job.created_at)
    for model, created_at in oldest.items():
        metrics.queue_prompt_tokens.labels(model, lane).set(tokens[model])
        metrics.queue_oldest_age.labels(model, lane).set(now - created_at)
