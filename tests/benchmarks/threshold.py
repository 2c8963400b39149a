"""Count accuracy of a threshold, as a user would try it before AIR; it needs no training.

    python tests/benchmarks/threshold.py                        the default scenes
    python tests/benchmarks/threshold.py --data pictures        your own images
    python tests/benchmarks/threshold.py --recipe dsprites      scenes by the flags of main.py

The threshold is chosen on the training images without labels (`air.data.spots`), which is better
than one that is the same for all images, and is applied to the held-out images.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from air.cli.config import resolve_config
from air.cli.errors import explained_errors
from air.cli.flags import build_parser
from air.data.spots import fit_finder
from main import load_scenes, survey_source


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the accuracy; returns the exit code."""
    parser = build_parser(__doc__ or "")
    cli_args = vars(parser.parse_args(argv))
    with explained_errors(parser):
        config = resolve_config(cli_args, {}, survey_source(cli_args))
        if config.images.spot_size:  # it need not make them as small as training does
            size = config.images.spot_size
            config = replace(config, images=replace(config.images, x_size=size, spot_size=None))
        scenes = load_scenes(config)
        if scenes.test.counts is None:
            raise ValueError("--data: expected images with true counts, got none")
        finder = fit_finder(scenes.train.x)
        found = np.array([len(spots) for spots in finder(scenes.test.x)])
    wrong = np.abs(found - scenes.test.counts)
    print(
        f"A threshold counts {(wrong == 0).mean():.1%} of {len(wrong):,} held-out images "
        f"correctly, and {(wrong <= 1).mean():.1%} to within one. On training images, two "
        f"thresholds agree on {finder.agreement:.0%}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
