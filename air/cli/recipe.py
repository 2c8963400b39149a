"""The settings that follow from a survey of the training images, without labels.

`unlike_training` compares other images with what was found then.

An object is worth the log likelihood that it explains. It must be worth more than it costs (some
ten nats for its count, more for its place and code), and what a decoder leaves of an object must be
worth less, or a second window is used for it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from air.cli.config import COMPILE_MIN_STEPS
from air.cli.flags import settings_named_by_flag
from air.data.scenes import Array, SceneSplits
from air.data.survey import Survey, brightness_hints, survey
from air.data.synthetic.scene_settings import SOLIDS, SceneSettings, with_own_defaults
from air.data.user_images.preparation import ImageSettings, prepare
from air.data.user_images.sources import sample_images
from air.solids.model import Z_WHAT_SIZE
from air.support.fields import from_config
from air.training.from_spots import LEAST_SIDE, MARGIN
from air.training.training_settings import TrainingSettings

MAX_SIDE = 64  # pixels; smaller square images keep their size
# Sides of images that are made smaller. The least one is taken at which a typical object keeps so
# many pixels, and a threshold finds as many spots as before in this share of the images. Where no
# side shows a threshold as much, it is the middle one, or a larger one if the object needs it.
SIDES = 48, 64, 80, 96
MIDDLE_SIDE = 64
OBJECT_SIDE, SAME_COUNTS = 12, 0.97
LOOK_SIDE, LOOK_IMAGES = 192, 200  # side and number of the images from which the size is chosen
WINDOW_SIDES = 10, 28  # least and greatest side of the attention window in pixels
# Nats that a typical object explains: with glimpses more, since their cover keeps them from using a
# second window for what the decoder leaves of an object.
WORTHS = {"image": 200.0, "glimpse": 500.0}
LIKELIHOOD_SDS = 0.05, 0.6
RELIABLE = 0.4  # agreement of two thresholds from which spots are believed
# Glimpses weigh colours if the least weight is below this one; see `air.data.spots.colour_weights`.
UNEVEN_COLOUR = 0.5
SMALLEST = 10  # percent of the objects that may be far smaller than a typical one
SPOT_STEPS, WHOLE_SPOT_STEPS = 200, 100  # with glimpses, and for each object with whole images
SMALL = 0.2  # side of an object, relative to its image, below which glimpses find it
# Objects up to which the whole image is seen, if they are large and there are so many images: a
# guide that sees glimpses learns the same at every place, the other one learns each place.
FEW, MANY_IMAGES = 3, 20_000
# Values that all steps of training compute together, at most: one for each pixel of a scene, each
# channel, and each object or background.
MAX_VALUES = 1.5e8
# Seconds of a step with sums, at least and for each value, on one core of an AMD EPYC. A compiled
# step takes half as long.
SECONDS, SECONDS_PER_VALUE = 0.15, 1.25e-5
# Users' pictures are trained on for so long, and generated scenes longer.
MAX_SECONDS = 900
STEP_MULTIPLE, LEAST_STEPS = 100, 300
# From these `unlike_training` warns: a share of images with too many spots, and the logarithm of a
# ratio of sizes, at least and in standard deviations of the sizes.
TOO_MANY, OTHER_SIZE, OTHER_SIZE_SDS = 0.05, 0.25, 1.5
RARE = 1e-6  # prior weight of a count that a recipe of solids never has
MAX_STEPS = 24  # of the model; a step of training takes as long as it has steps

Found = dict[str, tuple[Any, str]]  # key of a setting: its value, and the reason
STROKES: Found = {
    "model_steps": (6, "as many strokes as most characters have, or more"),
    "guide": ("glimpse", "strokes are small"),
    "embed_net": ([200], "for glimpses"),
    "clip_grad_norm": (100.0, "for glimpses"),
    "window_size": (14, "pixels, for parts of a character"),
    "encoder_latent_size": (10, "a stroke is simple"),
    "scale_prior_mean": (2.5, "a stroke is less than half as long as the character"),
    "scale_prior_sd": (0.5, "strokes are short and long"),
    "likelihood_sd": (0.25, "a pixel of ink is worth eight nats"),
    "lr_schedule": ("cosine", "the learning rate falls to the end"),
    "num_steps": (1500, "some seven minutes on one core of a CPU"),
}


def is_surveyed(given: Mapping[str, Any]) -> bool:
    """Whether settings follow from the images: those of a model that is there already do not."""
    is_new = not given.keys() & {"resume", "load"} and given.get("num_steps") != 0
    return is_new and given.get("survey", True)


def find_recipe_settings(given: Mapping[str, Any]) -> Found:
    """Settings that a survey could not find, for scenes whose objects are solids or strokes.

    Args:
        given: Settings by flags, which are kept.
    """
    with settings_named_by_flag(SceneSettings):
        scenes = from_config(SceneSettings, with_own_defaults(given))
    found: Found = {}
    if scenes.recipe in SOLIDS:
        found = _solids_settings(scenes.counts, given.get("model_steps"))
    elif scenes.recipe == "strokes":
        found = STROKES
    if given.keys() & {"z_pres_prior", "z_pres_prior_raw"}:  # another prior of the count
        found = {key: value for key, value in found.items() if key != "count_prior"}
    return {key: value for key, value in found.items() if key not in given}


def _solids_settings(counts: Sequence[int], model_steps: int | None) -> Found:
    most = max(*counts, 1)
    of_count = [1.0 if n in counts else RARE for n in range((model_steps or most) + 1)]
    return {
        "renderer": ("solids", "a ray caster draws cubes, spheres and cylinders"),
        "model_steps": (most, "the greatest number of solids"),
        "count_prior": (of_count, "of the scenes"),
        "guide": ("glimpse", "no decoder learns where a solid is"),
        "embed_net": ([200], "for glimpses"),
        "clip_grad_norm": (100.0, "for glimpses"),
        "encoder_latent_size": (Z_WHAT_SIZE, "scores of three kinds, and two angles"),
        "window_size": (20, "pixels, more than a solid has"),
        "scale_prior_mean": (1.0, "the typical size of a solid"),
        "scale_prior_sd": (0.15, "by the spread of the sizes"),
        "likelihood_sd": (0.2, "a solid then explains some 160 to 320 nats"),
        "lr_schedule": ("cosine", "the learning rate falls to the end"),
        "num_steps": (1500, f"some {3 * most} minutes on one core of a CPU"),
    }


def find_image_settings(path: Path, given: Mapping[str, Any]) -> Found:
    """How to prepare users' images: their size and colours, and whether to invert them.

    Args:
        path: The source of the images.
        given: Settings by flags, which are kept.

    Raises:
        DataError: If the images cannot be read.
    """
    settings = from_config(ImageSettings, {**given, "x_size": None})
    images = sample_images(path, settings, LOOK_IMAGES)
    found: Found = {}
    sizes = {image.shape[1:] for image in images}
    longest = max(max(size) for size in sizes)
    # As they will be prepared, if that is known.
    x_size = given.get("x_size", min(longest, LOOK_SIDE))
    prepared = ImageSettings(x_size=x_size, crop="x_size" in given and given.get("crop", False))
    squares = [prepare(image[None], prepared, str(path))[0] for image in images]
    squares = [x if x.ndim == 4 else x[:, None] for x in squares]
    channels = max(x.shape[1] for x in squares)  # a picture can be grey among coloured ones
    pixels = np.concatenate([x.repeat(channels // x.shape[1], 1) for x in squares])
    seen = survey(pixels)
    if not seen.is_coloured and channels == 3:
        found["channels"] = 1, "all channels are equal"
    if seen.is_white:
        found["invert"] = True, f"the background is white ({seen.level:.0f} of 255)"
    is_large = sizes != {(longest, longest)} or longest > MAX_SIDE
    # Without a side that is given, there is none to crop to.
    if is_large and "x_size" not in given and not given.get("crop"):
        side = _training_side(pixels, seen, longest)
        text = f"a typical object is then {seen.side(50) * side:.0f} pixels long"
        found["x_size"] = side, text
    side, _ = found.get("x_size", (given.get("x_size", longest), ""))
    if side < min(longest, LOOK_SIDE) and not given.get("crop") and not _some_are_tiny(seen):
        found["spot_size"] = min(longest, LOOK_SIDE), "a threshold sees more in large images"
    return {key: value for key, value in found.items() if key not in given}


def _some_are_tiny(seen: Survey) -> bool:
    """Whether some objects are far smaller than a typical one.

    They are overlooked where glimpses are drawn by a mask, or windows fit the larger objects as
    tightly as in the originals: what a window leaves uncovered of these then outweighs them.
    """
    return seen.side(SMALLEST) < LEAST_SIDE * seen.side(50)


def _training_side(images: Array, seen: Survey, longest: int) -> int:
    """The side of the images for training; see `SIDES`.

    Args:
        images: uint8 [N, C, H, H].
        seen: Their survey.
        longest: The longest side of the originals.
    """
    sides = [side for side in SIDES if side < longest and side * seen.side(50) >= OBJECT_SIDE]
    for side in sides:
        small, _ = prepare(images, ImageSettings(x_size=side, crop=False), "")
        same = survey(small).counts == seen.counts
        # Where counts depend on the threshold, they depend on the size too.
        if same.mean() >= SAME_COUNTS * seen.finder.agreement:
            return side
    return min([side for side in sides if side >= MIDDLE_SIDE] or [min(SIDES[-1], longest)])


def find_settings(seen: Survey, scenes: SceneSplits, given: Mapping[str, Any]) -> Found:
    """Settings of model and training.

    Args:
        seen: The survey of the training images.
        scenes: The scenes. Of their labels, only the greatest true count is used, if there is one.
        given: Settings by flags, which are kept.
    """
    found: Found = {}
    x_size, counts = scenes.x_size, scenes.train.counts
    if counts is None:
        most, text = seen.most, f"99 % of the images have at most {seen.most} spots, and one more"
    else:
        most, text = int(counts.max()), "one more than the greatest true count"
    found["model_steps"] = min(max(most, 1) + 1, MAX_STEPS), text
    steps = given.get("model_steps", found["model_steps"][0])
    half, large = seen.side(50), seen.side(90)
    if half < SMALL:
        found["guide"] = "glimpse", "objects are small"
    elif steps - 1 > FEW:
        found["guide"] = "glimpse", "objects are many"
    elif len(scenes.train.x) < MANY_IMAGES:
        found["guide"] = "glimpse", f"there are fewer than {MANY_IMAGES:,} training images"
    else:
        found["guide"] = "image", "objects are few and large, and images many"
    glimpses = given.get("guide", found["guide"][0]) == "glimpse"
    if glimpses:
        found["embed_net"] = [200], "for glimpses"
        found["clip_grad_norm"] = 100.0, "for glimpses"
    else:
        found["embed_channels"] = [16, 32, 32], "for whole images"
        found["embed_net"] = [256], "for whole images"
    window = round(min(max(1.05 * MARGIN * large * x_size, WINDOW_SIDES[0]), WINDOW_SIDES[1]))
    text = f"90 % of the objects are at most {large * x_size:.0f} pixels long"
    found["window_size"] = window, text
    scales = 1 / (MARGIN * np.maximum(seen.sides, LEAST_SIDE * half))
    mean = 1 / (MARGIN * half)
    spread = float(np.subtract(*np.percentile(scales, (84, 16)))) / 2 if len(scales) else 0.0
    text = f"a typical object is {half * x_size:.0f} pixels long"
    found["scale_prior_mean"] = round(mean, 2), text
    sd = min(max(spread, 0.1 * mean), 0.3 * mean)
    found["scale_prior_sd"] = round(sd, 2), "by the spread of the sizes"
    shifts = np.square(seen.centres * scales[:, None])
    sd = math.sqrt(max(1.0, shifts.mean())) if len(scales) else 1.0
    found["pos_prior_sd"] = round(sd, 2), "by the spread of the places"
    if len(seen.worths):
        typical = float(np.median(seen.worths))
        sd = math.sqrt(typical / (2 * WORTHS["glimpse" if glimpses else "image"]))
        sd = round(min(max(sd, seen.noise, LIKELIHOOD_SDS[0]), LIKELIHOOD_SDS[1]), 3)
        worth = typical / (2 * sd**2)
        found["likelihood_sd"] = sd, f"a typical object then explains {worth:.0f} nats"
    if not seen.is_black:
        found["background_model"] = "pca", f"the background is not black ({seen.level:.0f} of 255)"
    found["num_steps"] = _num_steps(scenes, steps, "data" in given)
    num_steps = given.get("num_steps", found["num_steps"][0])
    found["lr_schedule"] = "cosine", "the learning rate falls to the end"
    agreement = seen.finder.agreement
    if agreement >= RELIABLE:
        spot_steps = min(SPOT_STEPS if glimpses else WHOLE_SPOT_STEPS * steps, num_steps // 2)
        text = f"two thresholds agree on {agreement:.0%} of the images"
        found["spot_steps"] = spot_steps, text
        found["added_scenes"] = 100.0, "sums of scenes teach counting"
        found["added_scenes_from"] = spot_steps, "when objects are learnt from spots"
        if glimpses:
            found["z_pres_bias"] = -3.0, "a glimpse at an empty place begins as no object"
        if glimpses and not _some_are_tiny(seen):
            threshold, colours = seen.finder.thresholds[0] / 255, seen.finder.colours
            found["glimpse_threshold"] = round(threshold, 3), "it shows where objects are"
            if colours is not None and np.linalg.eigvalsh(colours).min() < UNEVEN_COLOUR:
                text = "the background varies in some colours more than in others"
                found["glimpse_colours"] = colours.round(2).ravel().tolist(), text
    if given.get("estimator") == "score":
        found.pop("added_scenes", None)
    return {key: value for key, value in found.items() if key not in given}


def _num_steps(scenes: SceneSplits, model_steps: int, of_user: bool) -> tuple[int, str]:
    """The number of training steps that are bearable, and the time that they take."""
    values = scenes.x_size**2 * scenes.channels * (model_steps + 1)
    seconds = SECONDS + SECONDS_PER_VALUE * values
    bearable = MAX_SECONDS / seconds if of_user else MAX_VALUES / values
    bearable = int(bearable) // STEP_MULTIPLE * STEP_MULTIPLE
    number = min(max(bearable, LEAST_STEPS), TrainingSettings.num_steps)
    seconds *= 0.5 if number >= COMPILE_MIN_STEPS else 1
    minutes = math.ceil(number * seconds / 60)
    return number, f"some {minutes} minutes on one core of a CPU, {seconds:.2f} s a step"


def describe(seen: Survey | None, found: Found) -> list[str]:
    """Lines for the user: what was seen, and what was set and why."""
    lines = ["Settings of the recipe:"]
    if seen is not None:
        numbers = ", ".join(f"{n}: {k}" for n, k in sorted(Counter(seen.counts.tolist()).items()))
        lines = [
            f"Survey of {seen.images} training images, without labels. Spots that a threshold sees "
            f"(number of spots: number of images): {numbers}"
        ]
    return lines + [f"  {key} = {value}: {reason}" for key, (value, reason) in found.items()]


def unlike_training(images: Array, config: Mapping[str, Any]) -> list[str]:
    """How images differ from those that a model was trained on, one line each with a remedy.

    Args:
        images: Prepared for the model, uint8 [N, (C,) H, H].
        config: The configuration of its run. Only what a survey found there says how the images of
            training were; the flags of a user may say anything.
    """
    if not len(images) or config.get("renderer", "none") != "none" or not config:
        return []
    seen, surveyed = survey(images), config.get("found", ())
    hints: list[str] = []
    on_black = bool(surveyed) and config["background_model"] == "none"
    if on_black and not seen.is_black and not brightness_hints(images):
        hints.append("the background is uneven, and this model was trained on black")
    if seen.finder.agreement < RELIABLE or not len(seen.sides):
        return hints
    if "model_steps" in surveyed:
        most = config["model_steps"] - 1
        share = (seen.counts > most).mean()
        if share > TOO_MANY:
            hints.append(
                f"{share:.0%} of the images show more than {most} spots, and this model was "
                f"trained on up to {most} objects"
            )
    if "scale_prior_mean" in surveyed:
        scale, sd = config["scale_prior_mean"], config["scale_prior_sd"]
        ratio = seen.side(50) * MARGIN * scale
        if abs(math.log(ratio)) > max(OTHER_SIZE, OTHER_SIZE_SDS * sd / scale):
            size = round(seen.side(50) * images.shape[-1])
            remedy = "pad the images" if ratio > 1 else "cut out parts, as --tile and --crop do"
            hints.append(
                f"a typical object is {size} of {images.shape[-1]} pixels long, and was "
                f"{size / ratio:.0f} in training; {remedy}, or train on them"
            )
    return hints
