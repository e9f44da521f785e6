"""What is done about a run that collapses: say so, stop, or go back and begin differently. No label is asked."""

import logging

from deepcluster import dist, health
from deepcluster.health import Symptom
from deepcluster.store import Store
from deepcluster.trainer import Report

logger = logging.getLogger("deepcluster")
PATIENCE = 3  # epochs in a row with a symptom; the last of a stage is enough
EARLY = 0.2  # share of a stage in which a network may still be finding its way
CHANGES = {"lr": "a tenth of the learning rate", "seed": "another seed"}
RESCUES = 3  # of a stage


class Collapse(RuntimeError):
    """Training goes on in vain; ``symptom`` says why and what to do."""

    def __init__(self, symptom: Symptom, where: str):
        super().__init__(f"collapsed {where}: {symptom.what}; {symptom.advice}, or go on with --on-collapse warn")
        self.symptom = symptom


class Sentinel:
    """Hook: tells a collapse from a bad epoch, and warns of it once a stage, or raises.

    Args:
        policy: warn, stop or rescue; the last two raise, and ``stages.run`` rescues.
    """

    def __init__(self, policy: str = "warn"):
        self.policy = policy
        self.warned: set[tuple[int, str]] = set()

    def images(self, store: Store, k: int) -> None:
        """Look at the images before any training; raises as a call does."""
        if wrong := health.of_images(store, k):
            self._say(wrong, "before it began", (-1, ""))

    def __call__(self, report: Report) -> None:
        """Look at an epoch.

        Raises:
            Collapse: it is certain, and the policy is not to warn only.
        """
        clock, state = report.clock, report.state
        wrong = health.symptom(report.health, report.loss, report.recipe.heads[0], state.predicted.shape[1], clock)
        done = (clock.epoch + 1) / clock.epochs
        if wrong and (done == 1 or (state.unhealthy >= PATIENCE and done >= EARLY)):
            where = f"in epoch {clock.epoch + 1} of {clock.epochs} of stage {state.stage + 1}"
            self._say(wrong, where, (state.stage, wrong.change or ""))

    def _say(self, wrong: Symptom, where: str, once: tuple[int, str]) -> None:
        if self.policy != "warn":
            raise Collapse(wrong, where)
        if once not in self.warned and dist.is_main():
            logger.warning("collapsed %s: %s; %s", where, wrong.what, wrong.advice)
        self.warned.add(once)


def change(error: Collapse | FloatingPointError, made: list[str]) -> str | None:
    """The change that may help after those ``made`` already; None if no change helps, or no more may be made."""
    wanted = error.symptom.change if isinstance(error, Collapse) else "lr"
    return wanted if len(made) < RESCUES else None
