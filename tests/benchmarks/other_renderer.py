"""Trains AIR with its renderer of solids on pictures that another program has rendered: Mitsuba 3.

    pip install mitsuba
    python tests/benchmarks/other_renderer.py --figure other.png

The solids, their places and the camera are those of ``--recipe table-top``. Rays are traced,
so that there are shadows, light from one solid on another, another ground and noise. AIR's
renderer knows none of these; it only gets the ground, as the median of the training pictures.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, this is not a package
import main as program
from air.cli.config import resolve_config
from air.cli.recipe import find_recipe_settings
from air.data.scenes import Array, Scenes, SceneSplits
from air.data.synthetic.solids import SolidsGenerator
from air.inference import infer
from air.solids.world import CAMERA, COLOURS, FIELD, HALF_HEIGHT, HALF_SIDE, KINDS, LIGHT, LOOKS_AT
from air.training.events import Evaluated
from air.visualization.drawing import draw_boxes, enlarge, tile
from air.visualization.snapshots import as_bytes

GROUND = 0.3  # reflectance of the ground
SKY, SUN = 0.35, 0.65  # light from everywhere, and from one direction
RAYS, BOUNCES = 32, 4  # of a pixel, and of a ray
MOST = 3  # solids in a scene
SHOWN = 16  # scenes in the figure


def linear(colour: Any) -> list[float]:  # noqa: ANN401
    """The reflectance that has this level in sRGB."""
    return [((level + 0.055) / 1.055) ** 2.4 for level in colour]


def matt(reflectance: Any) -> dict[str, Any]:  # noqa: ANN401
    """A matt material."""
    return {"type": "twosided", "inner": {"type": "diffuse", "reflectance": reflectance}}


def halves(mi: Any, shape: tuple[int, int]) -> dict[str, Any]:  # noqa: ANN401
    """The material of the cylinder, whose colour changes along one axis of its texture."""
    pixels = np.array([linear(COLOURS[2]), linear(COLOURS[3])], np.float32).reshape(*shape, 3)
    bitmap = mi.Bitmap(pixels)
    return matt({"type": "bitmap", "bitmap": bitmap, "raw": True, "filter_type": "nearest"})


def describe(mi: Any, solids: list[tuple[int, Array]], side: int) -> dict[str, Any]:  # noqa: ANN401
    """A scene in Mitsuba's terms."""
    move = mi.ScalarTransform4f()
    scene: dict[str, Any] = {
        "type": "scene",
        "integrator": {"type": "path", "max_depth": BOUNCES},
        "sensor": {
            "type": "perspective",
            "fov": float(np.degrees(FIELD)),
            "to_world": move.look_at(CAMERA.position.tolist(), list(LOOKS_AT), [0, 0, 1]),
            "film": {"type": "hdrfilm", "width": side, "height": side, "rfilter": {"type": "box"}},
        },
        "ground": {
            "type": "rectangle",
            "to_world": move.scale([20, 20, 1]),
            "bsdf": matt({"type": "rgb", "value": GROUND}),
        },
        "sky": {"type": "constant", "radiance": {"type": "rgb", "value": SKY}},
        "sun": {
            "type": "directional",
            "direction": [-each for each in LIGHT],
            "irradiance": {"type": "rgb", "value": SUN * np.pi},
        },
    }
    for i, (number, pose) in enumerate(solids):
        kind, (size, x, y, angle) = KINDS[number], map(float, pose)
        half, height = size * HALF_SIDE[kind], 2 * size * HALF_HEIGHT[kind]
        stand = move.translate([x, y, 0]).rotate([0, 0, 1], float(np.degrees(angle)))
        plain = matt({"type": "rgb", "value": linear(COLOURS[min(number, 1)])})
        if kind == "cube":
            place = stand.translate([0, 0, half]).scale([half, half, half])
            scene[f"cube{i}"] = {"type": "cube", "to_world": place, "bsdf": plain}
        elif kind == "sphere":
            place = stand.translate([0, 0, half]).scale([half, half, half])
            scene[f"sphere{i}"] = {"type": "sphere", "to_world": place, "bsdf": plain}
        else:  # the first half of a turn begins at x = 0, where the yellow half begins
            stand = stand.rotate([0, 0, 1], -90)
            place = stand.scale([half, half, height])
            scene[f"side{i}"] = {"type": "cylinder", "to_world": place, "bsdf": halves(mi, (1, 2))}
            place = stand.translate([0, 0, height]).scale([half, half, half])
            scene[f"top{i}"] = {"type": "disk", "to_world": place, "bsdf": halves(mi, (2, 1))}
    return scene


def render(number: int, side: int, seed: int) -> Scenes:
    """Scenes of none to three solids, with the kinds of the solids as labels, and their poses."""
    import mitsuba as mi

    mi.set_variant("scalar_rgb")
    random = np.random.default_rng(seed)
    generator = SolidsGenerator(side, random)
    x = np.zeros((number, 3, side, side), np.uint8)
    counts = random.integers(MOST + 1, size=number)
    labels = np.full((number, MOST), -1)
    poses = np.full((number, MOST, 4), np.nan, np.float32)
    for n, count in enumerate(counts.tolist()):
        solids = generator.draw_solids(count)
        for i, (kind, pose) in enumerate(solids):
            labels[n, i], poses[n, i] = kind, pose
        scene = mi.load_dict(describe(mi, solids, side))
        light = np.clip(np.array(mi.render(scene, seed=n, spp=RAYS)), 0, 1)
        levels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
        x[n] = np.floor(255 * levels + 0.5).transpose(2, 0, 1)
    return Scenes(x, counts, labels=labels, solid_poses=poses)


def main() -> None:
    """Renders, trains and prints the evaluation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=5000, help="pictures to train on")
    parser.add_argument("--figure", type=Path, help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and batches")
    parser.add_argument("-n", "--num-steps", type=int, default=1500)
    args = parser.parse_args()
    flags = {"recipe": "table-top", "seed": args.seed, "num_steps": args.num_steps}
    config = resolve_config(flags, {}, find_recipe_settings(flags))
    assert config.scenes is not None
    side = config.scenes.x_size
    scenes = SceneSplits(
        render(args.number, side, 1), render(max(1, args.number // 10), side, 2), ""
    )
    config = config.with_image_size(side, 3)
    trainer = program.build_trainer(config, scenes, torch.device("cpu"))
    ground: Any = trainer.air.decode.ground
    ground.copy_(torch.from_numpy(np.median(scenes.train.x, 0) / 255))
    for event in trainer.train():
        if isinstance(event, Evaluated):
            print(event, flush=True)
    if args.figure:
        shown = scenes.test.x[:SHOWN]
        found = infer(trainer.air, shown)
        pictures = draw_boxes(shown, found.boxes.numpy(), found.counts.numpy(), 4)
        painted = enlarge(as_bytes(found.reconstructions), 4)
        pictures = np.concatenate((pictures, painted), 1)
        Image.fromarray(tile(pictures, SHOWN // 2)).save(args.figure)


if __name__ == "__main__":
    main()
