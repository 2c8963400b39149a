"""The curves of a run, and their points from the records of metrics.jsonl."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from air.evaluation.counting import DISTANCE_BANDS

Record = Mapping[str, Any]  # one line of metrics.jsonl
Points = tuple[list[int], list[float | None]]  # steps and values; None is a gap in the curve

MAX_POINTS = 1000  # drawn of one curve: more would slow a browser down and not be visible


class Curve(NamedTuple):
    """A line in a panel, in one of Okabe and Ito's colours, which colour-blind people can tell."""

    key: str  # in a record; "name.i" is element i of a list
    label: str
    colour: str
    style: Literal["line", "points", "dotted"] = "line"  # points: marked and joined by a line
    optional: bool = False  # of some models only, so without points it has no place in the legend


class Panel(NamedTuple):
    """Curves that share their axes; the x axis is the step.

    A figure leaves out a panel without points. The live page shows some panels before they have
    points, so that no pane moves later: `appears` says which. `with_truth` means from the start if
    the true counts of the held-out scenes are known.
    """

    name: str
    title: str
    unit: str
    curves: tuple[Curve, ...]
    axis: Literal["top", "zero", "log"] = "top"
    appears: Literal["from_start", "with_truth", "with_points"] = "from_start"

    def y_axis(
        self, curves: Sequence[Sequence[float | None]]
    ) -> tuple[Literal["linear", "log"], tuple[float, float] | None]:
        """Chooses the scale and the limits of the y axis; None leaves the limits to the plot.

        "top" leaves out the lowest values, because the first steps would flatten the rest of the
        curve. "zero" begins at zero. "log" is logarithmic if the values span a factor of ten, and
        else like "zero".
        """
        finite = [[v for v in values if v is not None] for values in curves]
        values = np.concatenate([[], *finite])
        if not values.size:
            return "linear", None
        low, high = float(values.min()), float(values.max())
        if self.axis == "log" and high > 10 * low > 0:
            return "log", None
        if self.axis != "top":
            return "linear", (min(0.0, 1.1 * low), max(0.0, 1.1 * high) or 1e-3)
        low = min(float(np.percentile(values, 4)), *(ends[-1] for ends in finite if ends))
        return "linear", (1.05 * low - 0.05 * high - 1e-3, 1.05 * high - 0.05 * low + 1e-3)


_BLUE, _SKY, _RED, _ORANGE, _GREEN, _GREY = (
    "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#777777"
)  # fmt: skip
PANELS = (
    Panel(
        "elbo",
        "ELBO (higher is better)",
        "nats per image",
        (
            Curve("elbo", "training", _SKY),
            Curve("eval_elbo", "held out", _RED, "points"),
            Curve("log_likelihood", "likelihood alone", _GREEN, "points"),
            Curve("empty_elbo", "empty canvas", _GREY, "dotted"),
        ),
    ),
    Panel(
        "kl",
        "KL divergence of the latents (held out)",
        "nats per image",
        (
            Curve("kl_pres", "z_pres", _RED, "points"),
            Curve("kl_where", "z_where", _BLUE, "points"),
            Curve("kl_what", "z_what", _ORANGE, "points"),
            Curve("kl_background", "z_background", _GREEN, "points", optional=True),
        ),
        "zero",
    ),
    Panel(
        "accuracy",
        "Held-out count accuracy",
        "scenes counted right (%)",
        (
            Curve("accuracy_mode", "most probable count", _BLUE, "points"),
            Curve("accuracy_sample", "sampled count", _ORANGE, "points"),
        ),
        "zero",
        "with_truth",
    ),
    Panel(
        "distance",
        "Held-out count accuracy by the distance of centres",
        "scenes counted right (%)",
        (
            Curve("accuracy_by_distance.0", DISTANCE_BANDS[0], _RED, "points"),
            Curve("accuracy_by_distance.1", DISTANCE_BANDS[1], _ORANGE, "points"),
            Curve("accuracy_by_distance.2", DISTANCE_BANDS[2], _BLUE, "points"),
        ),
        "zero",
        "with_points",
    ),
    Panel(
        "calibration",
        "Calibration error of the count (held out)",
        "|accuracy - confidence| (%)",
        (Curve("calibration_error", "q(n)", _BLUE, "points"),),
        "zero",
        "with_truth",
    ),
    Panel(
        "baseline",
        "Baseline error (root mean square, held out)",
        "nats per image",
        (Curve("baseline_error", "baseline", _RED, "points"),),
        "log",
        "with_points",
    ),
    Panel(
        "grad_norm",
        "Norm of the gradient",
        "nats per image",
        (Curve("grad_norm", "model and guide", _SKY),),
        "log",
    ),
    Panel(
        "rates",
        "Learning rate and prior",
        "rate, probability",
        (
            Curve("learning_rate", "learning rate", _BLUE),
            Curve("z_pres_prior_p.0", "prior, p(n > 0)", _RED),
        ),
        "log",
    ),
    Panel(
        "speed",
        "Speed",
        "steps per second",
        (Curve("steps_per_second", "training alone", _BLUE),),
        "zero",
    ),
)


def value(record: Record, key: str) -> float | None:
    """The value of a curve in a record, or None; accuracy and calibration error are in percent."""
    name, _, index = key.partition(".")
    found = record.get(name)
    if index and found is not None:
        found = found[int(index)] if int(index) < len(found) else None
    if found is None:
        return None
    return 100.0 * found if name.startswith(("accuracy", "calibration")) else float(found)


class History:
    """The points of every curve up to now."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._values: dict[str, dict[int, float]] = {  # by curve, then by step
            curve.key: {} for panel in PANELS for curve in panel.curves
        }
        self.latest: dict[str, Any] = {}  # the last value of every entry of any record
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Adds the values of a record; its step must not be smaller than the steps before."""
        for key, values in self._values.items():
            found = value(record, key)
            if found is not None:
                values[int(record["step"])] = found
        self.latest.update({key: entry for key, entry in record.items() if entry is not None})

    def copy(self) -> "History":
        """A copy that does not change when records are added to the original."""
        copied = History()
        copied._values = {key: values.copy() for key, values in self._values.items()}
        copied.latest = self.latest.copy()
        return copied

    def has_points(self, panel: Panel) -> bool:
        """Whether a curve of the panel has a point."""
        return any(self._values[curve.key] for curve in panel.curves)

    def points(self, key: str) -> Points:
        """Steps and values of a curve; None for a value that is not finite.

        A curve of more than `MAX_POINTS` points is thinned evenly; its first and last point stay.
        """
        points = list(self._values[key].items())
        if len(points) > MAX_POINTS:
            kept = np.linspace(0, len(points) - 1, MAX_POINTS).round().astype(int)
            points = [points[i] for i in kept]
        steps = [step for step, _ in points]
        return steps, [found if math.isfinite(found) else None for _, found in points]
