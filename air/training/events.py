"""Events of training, for the progress bar, metrics.jsonl and the live page."""

import math
from dataclasses import dataclass
from typing import Any

from air.evaluation.boxes import BoxScores
from air.evaluation.counting import DISTANCE_BANDS, CountScores
from air.evaluation.metrics import Evaluation


def with_error(mean: float, error: float) -> str:
    """A mean and its standard error, which one scene does not have."""
    return f"{mean:.1f} ± {error:.1f}" if math.isfinite(error) else f"{mean:.1f}"


@dataclass(frozen=True)
class Progress:
    """Means over the optimisation steps since the last progress event."""

    step: int
    elbo: float  # of the training batches, nats per image; NaN if all steps were skipped
    skipped: int  # steps whose loss or gradients were not finite
    grad_norm: float  # before clipping, nats per image, without the skipped steps
    learning_rate: float
    z_pres_prior_p: list[float]  # the prior's probability of a further object, for each model step
    images_per_second: float
    steps_per_second: float
    seconds: float  # of training so far, without evaluations

    def record(self) -> dict[str, Any]:
        """The line for metrics.jsonl."""
        return vars(self)

    def __str__(self) -> str:
        """The text next to a progress bar."""
        text = f"ELBO {self.elbo:.1f} nats, {self.images_per_second:.0f} images/s"
        return f"{text}, {self.skipped} steps skipped" if self.skipped else text


@dataclass(frozen=True)
class Evaluated:
    """An evaluation on held-out scenes."""

    step: int
    scenes: int
    result: Evaluation
    empty_elbo: float  # see `empty_canvas_elbo`
    alarm: str | None  # from `collapse_alarm`; always None before step `alarm_after`

    def record(self) -> dict[str, Any]:
        """The line for metrics.jsonl; a measure that the scenes do not allow is None."""
        measures = self.result._asdict()
        counts, boxes, solids = (measures.pop(name) for name in ("counts", "boxes", "solids"))
        matched = boxes._asdict() if boxes else dict.fromkeys(BoxScores._fields)
        return {
            "step": self.step,
            "eval_elbo": measures.pop("elbo"),
            "eval_elbo_se": measures.pop("elbo_se"),
            "eval_scenes": self.scenes,
            "empty_elbo": self.empty_elbo,
            **measures,
            **(counts._asdict() if counts else dict.fromkeys(CountScores._fields)),
            **{f"box_{name}": each for name, each in matched.items()},
            **(solids._asdict() if solids else {}),
            "alarm": self.alarm,
        }

    def __str__(self) -> str:
        """The evaluation as text, with confusion matrix and accuracy by distance if known."""
        result, counts = self.result, self.result.counts
        text = (
            f"step {self.step:,}, {self.scenes:,} held-out scenes: "
            f"ELBO {with_error(result.elbo, result.elbo_se)} nats"
        )
        if counts is None:
            return f"{text}, scenes by inferred count {result.count_histogram}"
        lines = [
            f"{text}, count accuracy {counts.accuracy_mode:.1%} by mode, "
            f"{counts.accuracy_sample:.1%} by sample",
            "  true \\ inferred" + "".join(f"{n:7}" for n in range(len(counts.confusion[0]))),
        ]
        for true, row in enumerate(counts.confusion):
            lines.append(f"{true:17}" + "".join(f"{n:7}" for n in row))
            if true < len(row) and any(row):
                lines[-1] += f"  {row[true] / sum(row):6.1%} right"
        if len(counts.confusion) > 3:
            lines.append(f"  count off by at most one: {counts.accuracy_within_one:.1%}")
        bands = zip(DISTANCE_BANDS, counts.accuracy_by_distance or (), strict=False)
        known = [f"{band} {found:.1%}" for band, found in bands if found is not None]
        if known:
            lines.append(f"  count accuracy by distance of centres: {', '.join(known)}")
        if result.solids is not None:
            lines.append(f"  {result.solids}")
        return "\n".join(lines)


@dataclass(frozen=True)
class SnapshotDue:
    """A snapshot of held-out scenes should be taken now."""

    step: int


@dataclass(frozen=True)
class CheckpointDue:
    """`Trainer.state_dict` should be saved now."""

    step: int


Event = Progress | Evaluated | SnapshotDue | CheckpointDue
