"""Attend, Infer, Repeat (Eslami et al., NIPS 2016) in Pyro.

Glossary of shapes, used throughout:

    N       images in a data set
    B       images in a batch
    T       model steps: the most objects a scene can have
    H       side of an image in pixels
    W       side of the attention window in pixels
    Z       dimensions of an object's code z_what

    z_pres  [B, 1]  one while there is a further object, then zero
    z_where [B, 3]  scale s and shift (x, y) of the object's window; see spatial_transformer
    z_what  [B, Z]  the object's code
    canvas  [B, H, H]  the scene as painted from the latents

ELBOs are in nats per image; higher is better.
"""

from air.air import AIR, latents_to_tensor
from air.spatial_transformer import image_to_window, window_boxes, window_to_image

__all__ = ["AIR", "image_to_window", "latents_to_tensor", "window_boxes", "window_to_image"]
