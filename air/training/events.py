"""What training tells on its way, for the progress bar, metrics.jsonl and the dashboard."""

from dataclasses import dataclass
from typing import Any

from air.evaluation.metrics import Evaluation


@dataclass(frozen=True)
class Progress:
    """The mean over the optimisation steps since the last one."""

    step: int
    elbo: float  # of the training batches, nats per image; NaN if no step counted
    skipped: int  # of these steps, for a loss or gradient that was not finite
    grad_norm: float  # mean over steps that counted, before clipping, nats per image
    learning_rate: float
    z_pres_prior_p: list[float]  # the prior's probabilities of a further object, step by step
    images_per_second: float
    steps_per_second: float
    seconds: float  # of training, evaluations left out

    def record(self) -> dict[str, Any]:
        """The line for metrics.jsonl."""
        return vars(self)

    def __str__(self) -> str:
        """The figures beside a progress bar."""
        text = f"ELBO {self.elbo:.1f} nats, {self.images_per_second:.0f} images/s"
        return f"{text}, {self.skipped} steps skipped" if self.skipped else text


@dataclass(frozen=True)
class Evaluated:
    """An evaluation on held-out scenes."""

    step: int
    scenes: int
    result: Evaluation
    empty_elbo: float  # that of leaving every canvas empty
    alarm: str | None  # a sign of collapse, from step `alarm_after` on

    def record(self) -> dict[str, Any]:
        """The line for metrics.jsonl."""
        measures = self.result._asdict()
        elbo, elbo_se = measures.pop("elbo"), measures.pop("elbo_se")
        return {
            "step": self.step,
            "eval_elbo": elbo,
            "eval_elbo_se": elbo_se,
            "eval_scenes": self.scenes,
            "empty_elbo": self.empty_elbo,
            **measures,
            "alarm": self.alarm,
        }

    def __str__(self) -> str:
        """The evaluation for reading, with its confusion matrix."""
        result = self.result
        text = (
            f"step {self.step:,}, {self.scenes:,} held-out scenes: "
            f"ELBO {result.elbo:.1f} ± {result.elbo_se:.1f} nats"
        )
        if result.confusion is None:
            return f"{text}, scenes by inferred count {result.count_histogram}"
        lines = [
            f"{text}, count accuracy {result.accuracy_mode:.1%} by mode, "
            f"{result.accuracy_sample:.1%} by sample",
            "  true \\ inferred" + "".join(f"{n:7}" for n in range(len(result.confusion[0]))),
        ]
        for true, row in enumerate(result.confusion):
            lines.append(f"{true:17}" + "".join(f"{n:7}" for n in row))
        return "\n".join(lines)


@dataclass(frozen=True)
class SnapshotDue:
    """The moment for a picture of what the model makes of its scenes."""

    step: int


@dataclass(frozen=True)
class CheckpointDue:
    """The moment to save `Trainer.state_dict`."""

    step: int


Event = Progress | Evaluated | SnapshotDue | CheckpointDue
