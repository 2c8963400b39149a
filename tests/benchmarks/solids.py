"""Compares AIR on single solids with a supervised net and with the fitting of each image by itself.

    python main.py --recipe solids --data-seed 6 --output-dir RUN
    python tests/benchmarks/solids.py RUN --figure solids.png

The supervised net is trained on the kinds and poses of the training scenes of the run, and is about
as large as the guide. It regresses the angle of a cube within a quarter turn, as AIR's paper
describes: where a small turn leads from one end of that range to the other, it answers with the
middle. The fit of an image maximises log p(x, z) by Adam from latents that are drawn from the
prior, with one start or the best of several.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, this is not a package
from air.evaluation.solids import SolidsScores, score_solids
from air.inference import infer
from air.multi_mnist import SceneSettings, load_scenes
from air.solids.model import TURNED, Z_WHAT_SIZE, Solids, SolidsAIR, from_ground
from air.solids.world import KINDS, SYMMETRY
from air.storage.checkpoint import load_air, read_weights
from air.support.fields import from_config
from air.support.handlers import closed
from air.visualization.drawing import enlarge, tile
from air.visualization.snapshots import as_bytes

HIDDEN, EPOCHS, BATCH, RATE = 256, 40, 64, 1e-3  # of the supervised net
FIT_STEPS, FIT_RATE, STARTS = 200, 0.05, 8  # of the fit of each image
SHOWN = 12  # images in the figure


class SupervisedNet(nn.Module):
    """From images, [B, 3, H, H], to scores of kinds, size and place, and angles in turns."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * side**2, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 3 + 3 + len(TURNED)),
        )  # fmt: skip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, pose, angles = self.net(images).split((3, 3, len(TURNED)), 1)
        return scores, pose, angles

    def solids(self, images: Tensor) -> Solids:
        """Its answers."""
        scores, pose, turns = self(images)
        angles = turns * turns.new_tensor([2 * math.pi / (SYMMETRY[k] or 1) for k in TURNED])
        parts = scores.log_softmax(1), pose[:, 0], pose[:, 1:], angles
        return Solids._make(part[:, None] for part in parts)


def train_supervised(images: Tensor, labels: Tensor, poses: Tensor) -> SupervisedNet:
    """Trains on images, [N, 3, H, H], kinds, [N], and poses, [N, 4]."""
    net = SupervisedNet(images.shape[-1])
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    steps = EPOCHS * len(images) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    ranges = torch.tensor([2 * math.pi / (SYMMETRY[kind] or 1) for kind in KINDS])
    slots = torch.tensor([TURNED.index(kind) if kind in TURNED else 0 for kind in KINDS])
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,))
        kinds, pose = labels[rows], poses[rows]
        scores, found, turns = net(images[rows])
        is_turned = torch.tensor([KINDS[kind] in TURNED for kind in kinds.tolist()])
        own = turns.gather(1, slots[kinds][:, None])[:, 0]
        of_angle = (own - pose[:, 3] / ranges[kinds]).square()[is_turned].mean()
        loss = functional.cross_entropy(scores, kinds) + of_angle
        loss = loss + (found - pose[:, :3]).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


def fit(air: SolidsAIR, images: Tensor, starts: int) -> tuple[Tensor, Tensor]:
    """The latents that explain each image best, by Adam from starts that are drawn from the prior.

    Returns:
        z_where, [B, 3], and z_what, [B, Z].
    """
    repeated = images.repeat_interleave(starts, 0)
    prior = air.z_where_loc_prior, air.z_where_scale_prior
    where = (prior[0] + prior[1] * torch.randn(len(repeated), 3)).requires_grad_()
    what = torch.randn(len(repeated), Z_WHAT_SIZE).requires_grad_()
    optimizer = torch.optim.Adam([where, what], FIT_RATE)
    for _ in range(FIT_STEPS + 1):
        (painted,) = air.paint([where], [what])
        log_p = air.likelihood.log_prob(repeated, air.likelihood.add(repeated, painted))
        log_p = log_p - ((where - prior[0]) / prior[1]).square().sum(1) / 2
        log_p = log_p - what.square().sum(1) / 2
        optimizer.zero_grad()
        (-log_p.sum()).backward()
        optimizer.step()
    best = log_p.view(-1, starts).argmax(1)
    rows = torch.arange(len(images)) * starts + best
    return where.detach()[rows], what.detach()[rows]


def latents(air: SolidsAIR, solids: Solids) -> tuple[Tensor, Tensor]:
    """The latents, [B, 3] and [B, Z], of the first solids of all images, to paint them."""
    solids = Solids._make(part[:, 0] for part in solids)
    where = torch.cat((solids.size[:, None], from_ground(solids.place)), 1)
    turns = (solids.angles - air.decode.azimuth(solids.place)[:, None]) * torch.tensor(
        [SYMMETRY[kind] or 1 for kind in TURNED]
    )
    vectors = torch.stack((turns.cos(), turns.sin()), 2).flatten(1)
    return where, torch.cat((10 * functional.one_hot(solids.log_probs.argmax(1), 3), vectors), 1)


def show(air: SolidsAIR, where: Tensor, what: Tensor) -> Any:  # noqa: ANN401
    """Pictures of single solids, uint8 [B, 3, H, H]."""
    (painted,) = air.paint([where], [what])
    return as_bytes(air.likelihood.show(painted[:, None]))


def main() -> None:
    """Prints a table, and draws the first images with what each method makes of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of main.py --recipe solids")
    parser.add_argument("--figure", type=Path, help="PNG file to write")
    parser.add_argument("--images", type=int, default=64, help="held-out images to fit")
    args = parser.parse_args()
    _, config = read_weights(args.run / "checkpoint.pt")
    air = load_air(args.run / "checkpoint.pt")
    assert isinstance(air, SolidsAIR)
    scenes = load_scenes(from_config(SceneSettings, config))
    torch.manual_seed(0)
    train, test = (
        [torch.from_numpy(part) for part in (s.x, s.labels[:, 0], s.solid_poses[:, 0])]
        for s in scenes[:2]
        if s.labels is not None and s.solid_poses is not None
    )
    images, labels, poses = test[0] / 255, test[1][:, None], test[2][:, None]
    rows: dict[str, tuple[list[SolidsScores], float]] = {}
    shown = [as_bytes(images[:SHOWN])]

    def add(name: str, solids: Solids, seconds: float) -> None:
        n = len(solids.size)
        ones = torch.ones(n, dtype=torch.long)
        by_kind = []
        for kind in (None, *map(KINDS.index, TURNED)):  # all, and those with an angle by kind
            own = ones.bool() if kind is None else labels[:n, 0] == kind
            chosen = Solids._make(part[own] for part in solids)
            by_kind += [score_solids(chosen, ones[own], labels[:n][own], poses[:n][own], ones[own])]
        rows[name] = by_kind, 1e3 * seconds / n
        with torch.no_grad():
            shown.append(show(air, *(part[:SHOWN] for part in latents(air, solids))))

    begin = time.perf_counter()
    found = infer(air, images)
    with torch.no_grad():
        solids = air.solids(found.z_where, found.z_what)
    add("AIR, no labels", solids, time.perf_counter() - begin)
    net = train_supervised(train[0] / 255, *train[1:])
    begin = time.perf_counter()
    with torch.no_grad():
        solids = net.solids(images)
    add("supervised net", solids, time.perf_counter() - begin)
    for starts in (1, STARTS):
        begin = time.perf_counter()
        with closed(air), torch.enable_grad():
            where, what = fit(air, images[: args.images], starts)
        seconds = time.perf_counter() - begin
        with torch.no_grad():
            solids = air.solids(where[:, None], what[:, None])
        add(f"fit of each image, {starts} start{'s' * (starts > 1)}", solids, seconds)
    print(f"| method | kind | place | size | angle of {', of '.join(TURNED)} | ms an image |")
    print("|---|---|---|---|---|---|")
    for name, (scores, ms) in rows.items():
        kind, place, size, _ = scores[0]
        angles = ", ".join(f"{each.angle_error:.1f}°" for each in scores[1:])
        print(f"| {name} | {kind:.1%} | {place:.3f} | {size:.3f} | {angles} | {ms:.1f} |")
    if args.figure:
        pictures = np.concatenate([enlarge(part, 4) for part in shown])
        Image.fromarray(tile(pictures, SHOWN)).save(args.figure)


if __name__ == "__main__":
    main()
