"""The curves of a run: which there are, and their points, from the records of metrics.jsonl."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Record = Mapping[str, Any]  # one line of metrics.jsonl
Points = tuple[list[int], list[float | None]]  # steps and values; None is a gap in the curve

MAX_POINTS = 1000  # of one curve: more cost a browser its ease, and none of them is seen


class Curve(NamedTuple):
    """A line in a panel. Its colour is one of Okabe and Ito's, which the colour-blind can tell."""

    key: str  # in a record
    label: str
    colour: str
    style: Literal["line", "points", "dotted"] = "line"  # points: few, marked and joined


class Panel(NamedTuple):
    """Curves that share their axes; against the step."""

    name: str
    title: str
    unit: str
    curves: tuple[Curve, ...]
    axis: Literal["top", "zero", "log"] = "top"

    def y_axis(
        self, curves: Sequence[Sequence[float | None]]
    ) -> tuple[Literal["linear", "log"], tuple[float, float] | None]:
        """Scale and limits of the axis for these values; None for any limits.

        "top" shows the upper end, for the first steps, far below, shall not flatten the rest;
        "zero" begins at zero, as "log" does where the values do not span a factor of ten.
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
        "What the latents cost (KL, held out)",
        "nats per image",
        (
            Curve("kl_pres", "z_pres", _RED, "points"),
            Curve("kl_where", "z_where", _BLUE, "points"),
            Curve("kl_what", "z_what", _ORANGE, "points"),
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
    ),
    Panel(
        "baseline",
        "Baseline error (root mean square, held out)",
        "nats per image",
        (Curve("baseline_error", "baseline", _RED, "points"),),
        "log",
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
            Curve("p_any", "prior, p(n > 0)", _RED),
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
    """A curve's value in a record, None where it has none; an accuracy in percent."""
    if key == "p_any":
        return record["z_pres_prior_p"][0] if record.get("z_pres_prior_p") else None
    found = record.get(key)
    if found is None:
        return None
    return 100.0 * found if key.startswith("accuracy") else float(found)


class History:
    """The points of every curve up to now, evenly thinned: at most `MAX_POINTS` and the last."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._series = {curve.key: _Series() for panel in PANELS for curve in panel.curves}
        self.latest: dict[str, Any] = {}  # the last value of every entry of any record
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Takes up a record; its step must not be smaller than those before."""
        for key, series in self._series.items():
            found = value(record, key)
            if found is not None:
                series.add(int(record["step"]), found)
        self.latest.update({key: entry for key, entry in record.items() if entry is not None})

    def points(self, key: str) -> Points:
        """Steps and values of a curve; None for a value that is not finite."""
        steps, values = self._series[key].points()
        return steps, [found if math.isfinite(found) else None for found in values]


class _Series:
    """Every `stride`-th of the points it is given, so that there are never too many."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []
        self.stride, self.seen = 1, 0
        self.last: tuple[int, float] | None = None

    def add(self, step: int, found: float) -> None:
        again = self.last is not None and self.last[0] == step
        self.last = step, found
        if again:  # of a run taken up after its last step
            self.values[-1:] = [found] if self.steps[-1] == step else self.values[-1:]
            return
        if self.seen % self.stride == 0:
            self.steps.append(step)
            self.values.append(found)
        self.seen += 1
        if len(self.steps) > MAX_POINTS:
            self.stride *= 2
            self.steps, self.values = self.steps[::2], self.values[::2]

    def points(self) -> tuple[list[int], list[float]]:
        if self.last is None or self.steps[-1] == self.last[0]:
            return list(self.steps), list(self.values)
        return [*self.steps, self.last[0]], [*self.values, self.last[1]]
