"""A training command for users' images, from a survey of some of them without labels."""

import math
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from air.cli.flags import Parser
from air.cli.presets import PRESETS
from air.data.user_images.preparation import ImageSettings
from air.data.user_images.survey import (
    BACKGROUND,
    LIGHT,
    SAMPLE,
    Survey,
    sample_images,
    survey,
)
from air.storage.run_folder import program
from air.support.fields import from_config

MAX_SIDE = 64  # pixels; smaller images keep their size
OBJECT_SIDE = 12  # pixels that a typical object has in images that are made smaller
LARGEST_SIDE, SIDE_STEP = 128, 8  # pixels, of images that are made smaller
TYPICAL, LARGE = 50, 90  # percentiles of the sides of objects
MARGIN = 1.2  # side of a window divided by that of a large object, so that windows meet objects
WINDOW_SIDES = 10, 28  # least and greatest side of the attention window in pixels
SMALL = 0.25  # side of an object relative to its image, below which windows must search for it
FEW_SPOTS = 3  # in an image, above which the preset for many objects is suggested

Advice = dict[str, tuple[str, str]]  # key of a setting -> flag with its values, and the reason


def suggest(cli_args: Mapping[str, Any], words: Sequence[str], start: str) -> str:
    """A command for the images of --data, in a text that a shell can run.

    Args:
        cli_args: The flags on the command line, which the command keeps.
        words: The command line, --suggest included.
        start: The words that start the program.

    Returns:
        A line of reason for each flag that is added, after a '#', and the command as the last line.

    Raises:
        ValueError: If --data is missing, or the images cannot be read.
    """
    if not cli_args.get("data"):
        raise ValueError("--suggest: expected --data, the images to inspect, got no --data")
    settings = from_config(ImageSettings, {"crop": False, **cli_args})
    images = sample_images(Path(cli_args["data"]), settings, SAMPLE)
    found = survey(images)
    advice: Advice = {}
    if found.background > LIGHT and "invert" not in cli_args:
        reason = f"the background is light ({found.background:.0f} of 255); AIR paints on black"
        advice["invert"] = "--invert", reason
        found = found._replace(background=255 - found.background)
    if not found.is_coloured and len(images[0]) > 1:
        advice["channels"] = "--channels 1", "all channels are equal"
    advice |= _advise(found, cli_args)
    added = {key: value for key, value in advice.items() if key not in cli_args}
    flags = [flag for flag, _ in added.values()]
    width = max(map(len, flags), default=0)
    reasons = [f"# {flag:{width}}  {reason}" for flag, reason in added.values()]
    join = shlex.join if os.name == "posix" else subprocess.list2cmdline
    kept = join([word for word in words if word != "--suggest"])
    command = " ".join([start, kept, *flags])
    return "\n".join([*_describe(found), *reasons, command])


def print_suggestion(
    parser: Parser, cli_args: Mapping[str, Any], argv: Sequence[str] | None
) -> int:
    """Prints the suggestion for the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    try:
        suggestion = suggest(cli_args, words, program())
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(suggestion)
    return 0


def _describe(found: Survey) -> list[str]:
    """Lines about the images."""
    number = len(found.sides)
    one_size = found.widths[0] == found.widths[1] and found.heights[0] == found.heights[1]
    size = f"{'' if one_size else 'up to '}{found.widths[1]} x {found.heights[1]}"
    numbers = ", ".join(f"{n}: {k}" for n, k in sorted(Counter(found.counts).items()))
    lines = [
        f"# Inspected {number} images of {size} pixels, in "
        f"{'colour' if found.is_coloured else 'grey'}. Spots cover {found.coverage:.0%} of the "
        "pixels.",
        f"# Number of spots: number of images. {numbers}",
    ]
    return lines + [f"# Only {number} images: the model may overfit."] * (number < SAMPLE)


def _side(found: Survey) -> int:
    """The side that images should have in pixels."""
    longest = max(*found.widths, *found.heights)
    if longest <= MAX_SIDE:
        return longest
    typical = found.side(TYPICAL)
    wanted = OBJECT_SIDE / typical if typical else MAX_SIDE
    stepped = SIDE_STEP * math.ceil(wanted / SIDE_STEP)
    return min(max(stepped, MAX_SIDE // 2), LARGEST_SIDE, longest)


def _advise(found: Survey, cli_args: Mapping[str, Any]) -> Advice:
    """Advice about size, preset, windows and steps."""
    advice: Advice = {}
    side, large, most = _side(found), found.side(LARGE), max(1, found.most)
    sizes = {*found.widths, *found.heights}
    if sizes != {side}:
        typical = f"a typical object is then {found.side(TYPICAL) * side:.0f} pixels long"
        squares = "all images must be squares of one size; " * (len(sizes) > 1)
        advice["x_size"] = f"--x-size {side}", f"{squares}{typical}; large images are slow"
    side = cli_args.get("x_size", side)
    preset, reason = _choose_preset(found)
    if preset:
        advice["preset"] = f"--preset {preset}", reason
    window = round(min(max(MARGIN * large * side, WINDOW_SIDES[0]), WINDOW_SIDES[1]))
    advice["window_size"] = (
        f"--window-size {window}",
        f"90 % of the objects are at most {large * side:.0f} pixels long",
    )
    scale = max(1.0, 1 / (MARGIN * large)) if large else 1.0
    advice["scale_prior_mean"] = (
        f"--scale-prior-mean {scale:.1f}",
        f"a window initially covers {side / scale:.0f} of {side} pixels, {MARGIN} such objects",
    )
    advice["model_steps"] = (
        f"-t {most}",
        f"99 % of the images have at most {most} separate spots; increase this if objects usually "
        "touch",
    )
    duration = PRESETS.get(cli_args.get("preset", preset), {}).get("anneal_prior_duration", 0)
    steps = cli_args.get("num_steps", math.inf)
    if duration > steps / 2:
        advice["anneal_prior_duration"] = (
            f"--anneal-prior-duration {max(1, steps // 2)}",
            f"half of the steps; the preset takes {duration:,}",
        )
    return advice


def _choose_preset(found: Survey) -> tuple[str, str]:
    """The preset that suits the images, "" for none, and the reason."""
    if found.background > BACKGROUND:
        return "background", f"the background is not black ({found.background:.0f} of 255)"
    if found.is_coloured:
        return "dsprites", "for objects in colour"
    if found.most > FEW_SPOTS:
        return "many", f"for up to {found.most} objects"
    typical = found.side(TYPICAL)
    if typical < SMALL:
        reason = f"for small objects: a typical one has {typical:.0%} of the image's side"
        return "small-digits", reason
    return "", ""
