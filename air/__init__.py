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
    canvas  [B, (C,) H, H]  the scene as painted from the latents

ELBOs are in nats per image; higher is better.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from air.air import AIR
    from air.inference import latents_to_tensor
    from air.spatial_transformer import image_to_window, window_boxes, window_to_image

__all__ = ["AIR", "image_to_window", "latents_to_tensor", "window_boxes", "window_to_image"]
_HOMES = {"AIR": "air.air", "latents_to_tensor": "air.inference"}  # others: spatial_transformer


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Imports a public name when it is asked for.

    Torch and Pyro take seconds to import, and who makes scenes needs neither.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "air.spatial_transformer")), name)
