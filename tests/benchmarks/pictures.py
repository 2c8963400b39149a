"""Makes folders of pictures from other people's packages, for `main.py --data FOLDER`.

    python tests/benchmarks/pictures.py SET FOLDER

| SET | needs |
|---|---|
| emoji | Debian's `apt install fonts-noto-color-emoji` |
| pong | `pip install ale-py` |
| nuclei | `pip install --no-deps stardist` |
| omniglot | images_background_small1.zip and images_background_small2.zip, after FOLDER, |
|   | of github.com/brendenlake/omniglot |
| tanks | `pip install --no-deps arcade` |
| paper | Debian's `apt install tuxpaint-stamps-default` |
| gravel | the same, and `pip install --no-deps scikit-image` |

The pictures follow from the package alone. Counts are in counts.csv; training does not use them,
except that the greatest one sets the number of steps.
"""

import argparse
import io
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import files
from itertools import count, cycle, islice, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[2]))

from air.cli.errors import explained_errors
from air.cli.flags import Parser
from air.data.scenes import Array, DataError, Scenes
from air.data.user_images.picture_files import write_pictures

Pictures = Iterator[tuple[Array, int]]  # uint8 [h, w] or [h, w, 3], and the number of objects

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
KINDS = "🐶🐱🐭🐹🐰🦊🐻🐼🐨🐯🦁🐮🐷🐸🐵🐔🐧🐤🦆🦉🍎🍐🍊🍋🍌🍉🍇🍓🍒🍑🥝🍅🥑🥕🌽🍔🍕🍩🍪⚽"
PONG_COLOURS = (92, 186, 92), (213, 130, 74), (236, 236, 236)  # the paddles and the ball
TEST_ALPHABETS = "Balinese", "Sanskrit"
STAMPS = Path("/usr/share/tuxpaint/stamps")
FRUIT = "food/fruit", "food/vegetables"
THINGS = *FRUIT, "animals/birds", "plants/flowers", "animals/fish", "animals/mammals"


def emoji(seed: int, zips: Sequence[Path]) -> Pictures:
    """Forty kinds of emoji on ramps between two colours, 96 x 96, none to four in a picture."""
    del zips
    font, side, sprites = ImageFont.truetype(FONT, 109), 96, []
    for letter in KINDS:
        image = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(image).text((0, 0), letter, font=font, embedded_color=True)
        sprites.append(image.crop(image.getbbox()))
    rng = np.random.default_rng(seed)
    for number in cycle(range(5)):
        ends = rng.integers(40, 200, (2, 3))
        ramp = np.linspace(0, 1, side)[None, :, None] * np.ones((side, 1, 1))
        table = ends[0] + (ends[1] - ends[0]) * np.rot90(ramp, rng.integers(4))
        picture = Image.fromarray(table.astype(np.uint8))
        _paste(rng, picture, lambda: sprites[rng.integers(len(sprites))], number, (20, 29), 0)
        yield np.asarray(picture), number


def pong(seed: int, zips: Sequence[Path]) -> Pictures:
    """The field of Atari's Pong, 160 x 160, in random play: paddles and ball, one to three."""
    import ale_py
    import gymnasium
    from scipy import ndimage

    del zips
    gymnasium.register_envs(ale_py)
    env = gymnasium.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.25)
    env.reset(seed=seed)
    rng, action = np.random.default_rng(seed), 0
    for step in count(1):
        if (step - 1) % 8 == 0:
            action = int(rng.integers(env.action_space.n))
        frame, _, ended, cut, _ = env.step(action)
        if ended or cut:
            env.reset()
        if step > 60 and step % 11 == 0:
            field = frame[34:194]
            yield field, sum(ndimage.label((field == c).all(-1))[1] for c in PONG_COLOURS)


def nuclei(seed: int, zips: Sequence[Path]) -> Pictures:
    """Crops of a micrograph, 96 x 96 (Data Science Bowl 2018, in stardist's package).

    A nucleus counts if at least half of it lies in the crop. The lower third is held out.
    """
    del zips
    found = {Path(str(each)).name: each.locate() for each in files("stardist") or ()}
    image, mask = (np.asarray(Image.open(str(found[f"{k}2d.tif"]))) for k in ("img", "mask"))
    low, high = np.percentile(image, (1, 99.8))
    image = (255 * np.clip((image - low) / (high - low), 0, 1)).astype(np.uint8)
    whole, cut = np.bincount(mask.ravel()), image.shape[0] * 2 // 3
    top, bottom = (cut, image.shape[0]) if seed else (0, cut)
    rng, side = np.random.default_rng(seed), 96
    while True:
        r, c = rng.integers(top, bottom - side + 1), rng.integers(image.shape[1] - side + 1)
        crop, labels = (each[r : r + side, c : c + side] for each in (image, mask))
        turns, flip = rng.integers(4), rng.integers(2)
        crop = np.rot90(crop[:, ::-1] if flip else crop, turns)
        seen = np.bincount(labels.ravel(), minlength=len(whole))
        yield np.ascontiguousarray(crop), int((seen >= 0.5 * whole)[1:][seen[1:] > 0].sum())


def omniglot(seed: int, zips: Sequence[Path]) -> Pictures:
    """Black characters on white, 50 x 50, none to two; the alphabets of test/ are its own."""
    if not zips:
        raise DataError("omniglot: expected the paths of Omniglot's zip files, got none")
    inks, side = {}, 50
    for path in zips:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(each for each in archive.namelist() if each.endswith(".png")):
                image = Image.open(io.BytesIO(archive.read(name))).convert("L")
                inks[name.split("/", 1)[1]] = 255 - np.asarray(image)
    characters = []
    for name, ink in sorted(inks.items()):
        rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
        if (name.split("/")[0] in TEST_ALPHABETS) == bool(seed):
            characters.append(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    rng = np.random.default_rng(seed)
    for number in cycle(range(3)):
        x, boxes = np.zeros((side, side), np.uint8), []
        while len(boxes) < number:
            ink = characters[rng.integers(len(characters))]
            k = rng.integers(16, 23) / max(ink.shape)
            h, w = (max(2, round(s * k)) for s in ink.shape)
            small = np.asarray(Image.fromarray(ink).resize((w, h), Image.Resampling.BOX))
            small = np.minimum(255, small * (255 / max(1, small.max()))).astype(np.uint8)
            box = _place(rng, side, (w, h), boxes, 1)
            if box:
                x[box[1] : box[3], box[0] : box[2]] = small
                boxes.append(box)
        yield 255 - x, number


def tanks(seed: int, zips: Sequence[Path]) -> Pictures:
    """Tanks and trees of the arcade package on its grass or sand, 128 x 128, none to five."""
    del zips
    found = [each for each in files("arcade") or () if each.parent.name == "topdown_tanks"]
    images = {each.stem: Image.open(str(each.locate())).convert("RGBA") for each in found}
    sprites = [images[name] for name in sorted(images) if re.match(r"tank_|tree", name)]
    rng, side = np.random.default_rng(seed), 128
    for number in cycle(range(6)):
        picture, ground = Image.new("RGB", (side, side)), ("Grass", "Sand")[rng.integers(2)]
        for x, y in product(range(0, side, 64), repeat=2):
            picture.paste(images[f"tile{ground}{rng.integers(1, 3)}"], (x, y))

        def draw() -> Image.Image:
            sprite = sprites[rng.integers(len(sprites))]
            return sprite.rotate(90 * rng.integers(4), expand=True)

        _paste(rng, picture, draw, number, (24, 35), 2)
        yield np.asarray(picture), number


def paper(seed: int, zips: Sequence[Path]) -> Pictures:
    """Photographs of fruit, animals and flowers on light paper, 96 x 96, none to four.

    Every fifth photograph is in test/ only, and no other is there.
    """
    del zips
    sprites, rng = _stamps(THINGS, seed), np.random.default_rng(seed)
    for number in cycle(range(5)):
        colour = rng.integers(215, 246) + rng.integers(-6, 7, 3)
        grain = rng.normal(0, 3, (96, 96, 1))
        picture = Image.fromarray((colour + grain).clip(0, 255).astype(np.uint8))
        _paste(rng, picture, lambda: sprites[rng.integers(len(sprites))], number, (22, 33), 1)
        yield np.asarray(picture), number


def gravel(seed: int, zips: Sequence[Path]) -> Pictures:
    """Photographs of fruit on a photograph of gravel, 96 x 96, none to four; see `paper`."""
    import skimage

    del zips
    with Image.open(Path(skimage.__file__).parent / "data" / "gravel.png") as image:
        stones = np.asarray(image.convert("L").resize((256, 256), Image.Resampling.LANCZOS))
    sprites, rng = _stamps(FRUIT, seed), np.random.default_rng(seed)
    for number in cycle(range(5)):
        top, left = rng.integers(0, 160, 2)
        part = np.rot90(stones[top : top + 96, left : left + 96], rng.integers(4))
        picture = Image.fromarray(np.stack([part] * 3, -1))
        _paste(rng, picture, lambda: sprites[rng.integers(len(sprites))], number, (22, 33), 1)
        yield np.asarray(picture), number


def _stamps(folders: Sequence[str], seed: int) -> list[Image.Image]:
    """The photographs of Tux Paint, without their margins: every fifth one, or the others."""
    found = []
    for path in (each for folder in folders for each in sorted((STAMPS / folder).glob("*.png"))):
        image = Image.open(path).convert("RGBA")
        found.append(image.crop(image.getchannel("A").getbbox()))
    if not found:
        raise DataError(f"{STAMPS}: expected the pictures of Debian's tuxpaint-stamps-default")
    return [image for k, image in enumerate(found) if (k % 5 == 0) == bool(seed)]


def _paste(
    rng: np.random.Generator,
    picture: Image.Image,
    draw: Callable[[], Image.Image],
    number: int,
    sides: tuple[int, int],
    gap: int,
) -> None:
    """Pastes so many sprites, whose longer side is in a range, at places that are free."""
    boxes: list[tuple[int, ...]] = []
    while len(boxes) < number:
        sprite = draw()
        k = rng.integers(*sides) / max(sprite.size)
        size = round(sprite.width * k), round(sprite.height * k)
        box = _place(rng, picture.width, size, boxes, gap)
        if box:
            small = sprite.resize(size, Image.Resampling.LANCZOS)
            picture.paste(small, box[:2], small)
            boxes.append(box)


def _place(
    rng: np.random.Generator,
    side: int,
    size: tuple[int, int],
    boxes: Sequence[tuple[int, ...]],
    gap: int,
) -> tuple[int, int, int, int] | None:
    """A random box of that size, or None if it is closer than `gap` to one of the others."""
    (w, h), (x, y) = size, (int(rng.integers(side - each + 1)) for each in size)
    free = (
        x >= u + gap or y >= v + gap or x + w + gap <= s or y + h + gap <= t for s, t, u, v in boxes
    )
    return (x, y, x + w, y + h) if all(free) else None


# Each set, and the number of its pictures to train on; a tenth of it is held out.
SETS: dict[str, tuple[Callable[[int, Sequence[Path]], Pictures], int]] = {
    "emoji": (emoji, 5000),
    "pong": (pong, 4000),
    "nuclei": (nuclei, 4000),
    "omniglot": (omniglot, 6000),
    "tanks": (tanks, 5000),
    "paper": (paper, 4000),
    "gravel": (gravel, 4000),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the pictures; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("zips", type=Path, nargs="*", help="Omniglot's files")
    parser.add_argument("--number", type=int, help="pictures to train on")
    args = parser.parse_args(argv)
    make, number = SETS[args.set]
    number = args.number or number
    with explained_errors(parser):
        if args.folder.exists():
            raise DataError(f"{args.folder}: expected a new folder, got one that exists")
        parts = {}
        for seed, (part, size) in enumerate((("", number), ("test", number // 10))):
            x, counts = zip(*islice(make(seed, args.zips), size), strict=True)
            stack = np.stack(x)
            stack = stack if stack.ndim == 3 else stack.transpose(0, 3, 1, 2)
            parts[part] = Scenes(stack, np.array(counts))
        write_pictures(args.folder, parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
