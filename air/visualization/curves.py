"""The curves of a run: which panels show which entries of metrics.jsonl, and their points."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from air.data.scenes import Array
from air.evaluation.counting import DISTANCE_BANDS

Record = Mapping[str, Any]  # one line of metrics.jsonl

MAX_POINTS = 1000  # drawn of one curve: more would slow a browser down and not be visible


class Curve(NamedTuple):
    """A line in a panel."""

    key: str  # in a record; "name.i" is element i of a list
    label: str
    colour: tuple[int, int, int]
    style: Literal["line", "points", "dotted"] = "line"  # points: marked and joined by a line


class Panel(NamedTuple):
    """Curves that share their axes; the x axis is the step."""

    name: str
    title: str
    unit: str
    curves: tuple[Curve, ...]
    axis: Literal["top", "zero", "log"] = "zero"

    def y_axis(
        self, curves: Sequence[Array]
    ) -> tuple[Literal["linear", "log"], tuple[float, float] | None]:
        """Chooses the scale and the limits of the y axis; None leaves the limits to the plot.

        "top" leaves out the lowest values, because the first steps would flatten the rest of the
        curve. "zero" begins at zero. "log" is logarithmic if the values span a factor of ten, and
        else like "zero".

        Args:
            curves: The values of each curve; NaN counts as no value.
        """
        known = [values[~np.isnan(values)] for values in curves]
        values = np.concatenate([[], *known])
        if not values.size:
            return "linear", None
        low, high = values.min(), values.max()
        if self.axis == "log" and high > 10 * low > 0:
            return "log", None
        if self.axis != "top":
            return "linear", (min(0.0, 1.1 * low), max(0.0, 1.1 * high) or 1e-3)
        low = np.concatenate([[np.percentile(values, 4)], *(each[-1:] for each in known)]).min()
        return "linear", (1.05 * low - 0.05 * high - 1e-3, 1.05 * high - 0.05 * low + 1e-3)


# From Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, SKY, RED = (0, 114, 178), (86, 180, 233), (213, 94, 0)
ORANGE, GREEN, GREY = (230, 159, 0), (0, 158, 115), (119, 119, 119)
PANELS = (
    Panel(
        "elbo", "ELBO (higher is better)", "nats per image",
        (
            Curve("elbo", "training", SKY),
            Curve("eval_elbo", "held out", RED, "points"),
            Curve("log_likelihood", "likelihood alone", GREEN, "points"),
            Curve("empty_elbo", "empty canvas", GREY, "dotted"),
        ),
        "top",
    ),
    Panel(
        "kl", "KL divergence of the latents (held out)", "nats per image",
        (
            Curve("kl_pres", "z_pres", RED, "points"),
            Curve("kl_where", "z_where", BLUE, "points"),
            Curve("kl_what", "z_what", ORANGE, "points"),
            Curve("kl_background", "z_background", GREEN, "points"),
        ),
    ),
    Panel(
        "accuracy", "Held-out count accuracy", "scenes counted right (%)",
        (
            Curve("accuracy_mode", "most probable count", BLUE, "points"),
            Curve("accuracy_sample", "sampled count", ORANGE, "points"),
        ),
    ),
    Panel(
        "distance", "Held-out count accuracy by distance of centres", "scenes counted right (%)",
        tuple(
            Curve(f"accuracy_by_distance.{i}", band, (RED, ORANGE, BLUE)[i], "points")
            for i, band in enumerate(DISTANCE_BANDS)
        ),
    ),
    Panel(
        "calibration", "Calibration error of the count (held out)", "|accuracy - confidence| (%)",
        (Curve("calibration_error", "q(n)", BLUE, "points"),),
    ),
    Panel(
        "baseline", "Baseline error (root mean square, held out)", "nats per image",
        (Curve("baseline_error", "baseline", RED, "points"),),
        "log",
    ),
    Panel(
        "grad_norm", "Norm of the gradient", "nats per image",
        (Curve("grad_norm", "model and guide", SKY),),
        "log",
    ),
    Panel(
        "rates", "Learning rate and prior", "rate, probability",
        (
            Curve("learning_rate", "learning rate", BLUE),
            Curve("z_pres_prior_p.0", "prior, p(n > 0)", RED),
        ),
        "log",
    ),
    Panel(
        "speed", "Speed", "steps per second",
        (Curve("steps_per_second", "training alone", BLUE),),
    ),
)  # fmt: skip


class History:
    """The points of every curve in the records so far, in ascending order of steps."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = list(records)
        self.latest: dict[str, Any] = {}  # the last value of every entry of any record
        for record in self._records:
            self.latest.update({key: entry for key, entry in record.items() if entry is not None})

    def shown(self, panel: Panel) -> list[Curve]:
        """The curves of the panel that have points."""
        return [curve for curve in panel.curves if len(self.points(curve.key)[0])]

    def points(self, key: str) -> tuple[Array, Array]:
        """Steps and values of a curve; NaN for a value that is not finite, a gap in the curve.

        Accuracies and calibration errors are in percent. Of two records with the same step, the
        later one counts. A curve of more than `MAX_POINTS` points is thinned evenly; its first and
        last point stay.
        """
        name, _, index = key.partition(".")
        found: dict[int, float] = {}
        for record in self._records:
            value = record.get(name)
            if index and value is not None:
                value = dict(enumerate(value)).get(int(index))
            if value is not None:
                found[int(record["step"])] = value
        steps, values = np.array(list(found)), np.array(list(found.values()), float)
        values[~np.isfinite(values)] = np.nan
        if name.startswith(("accuracy", "calibration")):
            values *= 100
        if len(steps) > MAX_POINTS:
            kept = np.linspace(0, len(steps) - 1, MAX_POINTS).round().astype(int)
            steps, values = steps[kept], values[kept]
        return steps, values


def shares(confusion: Sequence[Sequence[int]]) -> Array:
    """The fraction of each true count (rows) with each inferred count; zeros in an empty row."""
    scenes = np.asarray(confusion)
    return scenes / np.maximum(scenes.sum(1, keepdims=True), 1)
