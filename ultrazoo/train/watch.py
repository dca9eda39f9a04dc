"""Says when a run looks unwell though every number is finite: a spike of the loss, a router that has collapsed."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

SPIKE_WINDOW, SPIKE_HISTORY, SPIKE_FACTOR, SPIKE_FLOOR = 100, 20, 10.0, 0.05
"""A step's loss is a spike above median + max(10 x median absolute deviation, 0.05 nats) of the 100 finite losses
before it, once there are 20. Of a normal distribution 10 deviations are 6.7 standard deviations."""
ROUTER_RECORDS, IDLE_SHARE, CROWDED_SHARE = 10, 0.01, 0.95
"""A router has collapsed if, over 10 records, an expert gets less than 1 % of an equal share of the visits, or more
than 95 % of the tokens visit one expert."""
LOAD = "_load"
"""Ending of the statistics that hold (num_layers, num_experts) shares of visits."""


class LossWatch:
    """Finds spikes among the losses of single steps."""

    def __init__(self) -> None:
        self._history: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._spiking = False

    def look(self, last_step: int, losses: Sequence[float]) -> dict[str, float] | None:
        """Take the losses of the steps up to ``last_step``; return the highest spike, if one has begun among them."""
        found: dict[str, float] | None = None
        for step, loss in enumerate(losses, start=last_step - len(losses) + 1):
            if not math.isfinite(loss):
                continue
            if len(self._history) >= SPIKE_HISTORY:
                median = statistics.median(self._history)
                deviation = statistics.median(abs(value - median) for value in self._history)
                limit = median + max(SPIKE_FACTOR * deviation, SPIKE_FLOOR)
                if loss > limit and (found is None or loss > found["loss"]):
                    found = {"step": step, "loss": loss, "median": median, "limit": limit}
            self._history.append(loss)
        begun = found is not None and not self._spiking
        self._spiking = found is not None
        return found if begun else None

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"history": list(self._history), "spiking": self._spiking}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._history, self._spiking = deque(state["history"], maxlen=SPIKE_WINDOW), state["spiking"]


class RouterWatch:
    """Finds experts that nobody visits, or that everybody visits, layer by layer.

    Args:
        top_k: Experts that each token visits: no expert's share of the visits exceeds 1 / top_k.
    """

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._loads: dict[str, deque[list[list[float]]]] = {}
        self._told: list[str] = []

    def look(self, stats: dict[str, Any]) -> list[str]:
        """Take the statistics of one record; return a line for each collapse that has begun."""
        lines: list[str] = []
        for name, load in stats.items():
            if not (name.endswith(LOAD) and isinstance(load, list) and load and isinstance(load[0], list)):
                continue
            loads = self._loads.setdefault(name, deque(maxlen=ROUTER_RECORDS))
            loads.append(load)
            if len(loads) == ROUTER_RECORDS:
                for layer, records in enumerate(zip(*loads, strict=True)):
                    shares = [math.fsum(column) / len(loads) for column in zip(*records, strict=True)]
                    lines += self._collapses(f"{name} of layer {layer}", shares)
        begun = [line for line in lines if line not in self._told]
        self._told = lines
        return begun

    def _collapses(self, where: str, shares: list[float]) -> list[str]:
        fair = 1 / len(shares)
        idle = [expert for expert, share in enumerate(shares) if share < IDLE_SHARE * fair]
        crowded = [expert for expert, share in enumerate(shares) if share * self._top_k > CROWDED_SHARE]
        lines = []
        if idle:
            lines.append(f"{where}: almost no token visits expert {', '.join(map(str, idle))}")
        if crowded and len(shares) > self._top_k:
            lines.append(f"{where}: almost every token visits expert {', '.join(map(str, crowded))}")
        return lines

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"loads": {name: list(loads) for name, loads in self._loads.items()}, "told": self._told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._loads = {name: deque(loads, maxlen=ROUTER_RECORDS) for name, loads in state["loads"].items()}
        self._told = state["told"]


class Watch:
    """Both watches over the records of a run.

    Args:
        top_k: Experts that each token visits.
    """

    def __init__(self, top_k: int) -> None:
        self._loss, self._router = LossWatch(), RouterWatch(top_k)

    def look(self, step: int, losses: Sequence[float], stats: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Take one record; return a line and an entry for the metrics for each symptom that has begun.

        Args:
            step: The newest step.
            losses: Nats per target of the steps since the record before.
            stats: Statistics of the record, as plain numbers.
        """
        found: list[tuple[str, dict[str, Any]]] = []
        if spike := self._loss.look(step, losses):
            line = (
                f"step {spike['step']}: the loss has a spike of {spike['loss']:.4f}; the median before is "
                f"{spike['median']:.4f}, and up to {spike['limit']:.4f} is usual"
            )
            found.append((line, {"loss_spike": spike}))
        for line in self._router.look(stats):
            found.append((f"step {step}: router collapse: {line}", {"router_collapse": line}))
        return found

    def state_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"loss": self._loss.state_dict(), "router": self._router.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; from one that has no such state, begin anew."""
        if state:
            self._loss.load_state_dict(state["loss"])
            self._router.load_state_dict(state["router"])
