"""A command for images of one's own, from a look at some of them without labels."""

import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from air.cli.flags import Parser
from air.cli.presets import PRESETS
from air.data.hints import BACKGROUND
from air.data.preparation import ImageSettings
from air.data.survey import Survey, sample_images, survey
from air.settings import from_config
from air.storage.run_folder import program

SAMPLE = 500  # images that are looked at
MAX_SIDE = 64  # pixels; smaller images keep their size
OBJECT_SIDE = 12  # pixels that a typical object has in images that are made smaller
LARGEST_SIDE, SIDE_STEP = 128, 8  # pixels, of images that are made smaller
TYPICAL, LARGE = 50, 90  # percentiles of the sides of objects
MARGIN = 1.2  # side of a window divided by that of a large object, so that windows meet objects
WINDOW_SIDES = 10, 28  # least and greatest side of the attention window in pixels
SMALL = 0.25  # side of an object relative to its image, below which windows must search for it
FEW_SPOTS = 3  # in an image, above which the preset for many objects is suggested
FEW = 1000  # images, below which a model begins to learn them by heart

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
        raise ValueError("--suggest: expected --data too, the images to look at")
    path = Path(cli_args["data"])
    settings: ImageSettings = from_config(ImageSettings, {"crop": False, **cli_args})
    images = sample_images(path, settings, SAMPLE)
    found = survey(images)
    advice: Advice = {}
    if found.background > 255 / 2 and "invert" not in cli_args:
        reason = f"the background is light ({found.background:.0f} of 255); AIR paints on black"
        advice["invert"] = "--invert", reason
        found = survey([~image for image in images])
    advice |= _advise_images(found, len(images[0]))
    advice |= _advise_model(found, cli_args)
    added = {key: value for key, value in advice.items() if key not in cli_args}
    flags = [flag for flag, _ in added.values()]
    width = max(map(len, flags), default=0)
    reasons = [f"# {flag:{width}}  {reason}" for flag, reason in added.values()]
    kept = _join([word for word in words if word != "--suggest"])
    command = " ".join([start, kept, *flags])
    return "\n".join([*_describe(found), *reasons, command])


def print_suggestion(
    parser: Parser, cli_args: Mapping[str, Any], argv: Sequence[str] | None
) -> int:
    """Prints what `suggest` says about the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    try:
        suggestion = suggest(cli_args, words, program())
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(suggestion)
    return 0


def _describe(found: Survey) -> list[str]:
    """Lines about the images."""
    narrow, wide, low, high = found.sizes
    size = f"{wide} x {high}" if (narrow, low) == (wide, high) else f"up to {wide} x {high}"
    colour = "in colour" if found.is_coloured else "in grey"
    lines = [
        f"# Looked at {found.images} images of {size} pixels, {colour}. On their background lie "
        f"spots, {100 * found.ink:.0f} % of all pixels.",
        "# Images by number of spots: "
        + ", ".join(f"{n}: {k}" for n, k in enumerate(found.spots) if k),
    ]
    if found.images < min(FEW, SAMPLE):
        lines.append(f"# {found.images} images are few: a model may learn them by heart.")
    return lines


def _advise_images(found: Survey, channels: int) -> Advice:
    """Advice about the size and the channels of the images."""
    advice: Advice = {}
    if not found.is_coloured and channels > 1:
        advice["channels"] = "--channels 1", "all channels are equal"
    narrow, wide, low, high = found.sizes
    if (side := _side(found)) == narrow == wide == low == high:
        return advice
    typical = found.side(TYPICAL) * side
    reason = f"a typical object is then {typical:.0f} pixels long; large images are slow"
    if not narrow == wide == low == high:
        reason = f"all images must be squares of one size; {reason}"
    return advice | {"x_size": (f"--x-size {side}", reason)}


def _advise_model(found: Survey, cli_args: Mapping[str, Any]) -> Advice:
    """Advice about preset, windows and steps."""
    side = cli_args.get("x_size", _side(found))
    typical, large = found.side(TYPICAL), found.side(LARGE)
    advice: Advice = {}
    preset, reason = "", ""
    if found.background > BACKGROUND:
        preset = "background"
        reason = f"the background is not black ({found.background:.0f} of 255)"
    elif found.is_coloured:
        preset, reason = "dsprites", "for objects in colour"
    elif found.most_spots > FEW_SPOTS:
        preset, reason = "many", f"for up to {found.most_spots} objects"
    elif typical < SMALL:
        preset = "small-digits"
        reason = f"for small objects: a typical one has {typical:.0%} of the image's side"
    if preset:
        advice["preset"] = f"--preset {preset}", reason
    window = round(min(max(MARGIN * large * side, WINDOW_SIDES[0]), WINDOW_SIDES[1]))
    advice["window_size"] = (
        f"--window-size {window}",
        f"nine in ten objects are at most {large * side:.0f} pixels long",
    )
    scale = max(1.0, 1 / (MARGIN * large)) if large else 1.0
    reason = f"a window at first covers {side / scale:.0f} of {side} pixels, {MARGIN} such objects"
    advice["scale_prior_mean"] = f"--scale-prior-mean {scale:.1f}", reason
    most = max(1, found.most_spots)
    advice["model_steps"] = (
        f"-t {most}",
        f"more than {most} spots are seen in fewer than 1 of 100 images; raise it if objects "
        "always touch",
    )
    duration = PRESETS.get(cli_args.get("preset", preset), {}).get("anneal_prior_duration", 0)
    steps = cli_args.get("num_steps", math.inf)
    if duration > steps / 2:
        flag = f"--anneal-prior-duration {max(1, steps // 2)}"
        reason = f"half of the steps; the preset takes {duration:,}"
        advice["anneal_prior_duration"] = flag, reason
    return advice


def _side(found: Survey) -> int:
    """The side that images should have in pixels."""
    longest = max(found.sizes)
    if longest <= MAX_SIDE:
        return longest
    typical = found.side(TYPICAL)
    wanted = OBJECT_SIDE / typical if typical else MAX_SIDE
    stepped = SIDE_STEP * math.ceil(wanted / SIDE_STEP)
    return min(max(stepped, MAX_SIDE // 2), LARGEST_SIDE, longest)


def _join(words: Sequence[str]) -> str:
    return shlex.join(words) if os.name == "posix" else subprocess.list2cmdline(words)
