"""Attend, Infer, Repeat (Eslami et al., NIPS 2016) in Pyro.

Glossary of shapes, used throughout:

    N       images in a data set
    B       images in a batch
    T       model steps: the most objects a scene can have
    H       side of an image in pixels
    C       channels of an image: with one, images are [B, H, H], with more, [B, C, H, H];
            both are written [B, (C,) H, H]
    W       side of the attention window in pixels
    Z       dimensions of an object's code z_what

    z_pres  [B, 1]  one while there is a further object, then zero
    z_where [B, 3]  scale s and shift (x, y) of the object's window; see spatial_transformer
    z_what  [B, Z]  the object's code
    z_background  [B, any size]  the code of what is behind the objects, if that is not black
    canvas  [B, (C,) H, H]  the scene as painted from the latents

ELBOs are in nats per image; higher is better.

The paper, in the order in which to read it:

    modules.py                  the nets
    air/spatial_transformer.py  the geometry of z_where, both ways
    air/air.py                  the generative model, the guide and its baseline
    air/likelihoods.py          from objects to pixels
    air/priors.py               the prior over the count
    air/marginal.py             the exact expectation over the count
    air/inference.py            the objects in an image; samples of the prior

Then training: air/training/trainer.py, air/training/svi.py, main.py. Beyond the paper:

    air/looks.py                what a step of the guide sees: image, difference or glimpse
    air/background.py           what is behind the objects
    air/scene.py                what a pass of the guide returns
    air/refinement.py           better scenes than those of one pass
    air/solids                  a renderer in the place of the decoder: solids in 3-D
    air/training/phases.py      which objective until which step
    air/training/objectives.py  importance-weighted bounds, wake-sleep, other estimators
    air/training/teacher.py     sums of scenes teach the guide to count
    air/detect.py               the command line of inference

One floor down: `support` (plumbing below the model), `data`, `evaluation`, `storage` (checkpoints,
run folders), `training`, `visualization`, `cli` (flags, errors), `terminal` (signals, streams),
`tutorial`, and `pretrained` (models and their cards). Imports run downwards only.

`main.py`, `modules.py`, `multi_mnist.py` and `viz.py`, which lie beside this folder, are modules of
it too: `from air.modules import Encoder` works where another `modules.py` comes first on the path.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from air.air import AIR
    from air.inference import latents_to_tensor
    from air.spatial_transformer import image_to_window, window_boxes, window_to_image

__all__ = ["AIR", "image_to_window", "latents_to_tensor", "window_boxes", "window_to_image"]
_MODULES = {
    "AIR": "air.air",
    "latents_to_tensor": "air.inference",
    "image_to_window": "air.spatial_transformer",
    "window_boxes": "air.spatial_transformer",
    "window_to_image": "air.spatial_transformer",
}
__path__.append(str(Path(__file__).parents[1]))  # for `air.main`, `air.modules`, ...


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Imports a public name on first use: torch takes seconds, and making scenes needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
