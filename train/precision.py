"""The scale of the loss for float16, whose small gradients would become zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LARGEST = 2.0**24


@dataclass
class LossScale:
    """Doubled after `patience` good steps, halved after one whose gradients are too large.

    Micikevicius et al. 2018, section 3.2. Fixed at 1 where nothing needs it. All ranks see the
    same gradients, so all have the same scale.
    """

    dynamic: bool
    value: float = 1.0
    good: int = 0
    patience: int = 1000

    @classmethod
    def of(cls, autocast: str) -> LossScale:
        """The scale that a run in this arithmetic begins with."""
        return cls(True, 2.0**16) if autocast == "float16" else cls(False)

    def update(self, finite: bool) -> None:
        """After a step."""
        if not self.dynamic:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good == self.patience:
            self.value, self.good = min(LARGEST, 2 * self.value), 0

    def expected(self) -> bool:
        """Whether a step without finite gradients is the search for a scale, and no fault."""
        return self.dynamic and self.value > 1

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "good": self.good}

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave; without effect on a fixed scale."""
        if self.dynamic:
            self.value, self.good = float(state["value"]), int(state["good"])
