"""The settings of the model: sizes of its nets and windows, its priors, its likelihood."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from air.likelihoods import DEFAULT_SD, Likelihood
from air.settings import check_settings, setting

BackgroundModel = Literal["none", "constant", "vae"]
GuideInput = Literal["image", "difference", "glimpse"]


def is_activation(name: str) -> bool:
    """Whether ``torch.nn`` has an activation of that name that needs no arguments."""
    candidate = getattr(nn.modules.activation, name, None)
    try:
        return isinstance(candidate, type) and isinstance(candidate(), nn.Module)
    except TypeError:
        return False


@dataclass(frozen=True)
class ModelSettings:
    """The arguments of `AIR` that are numbers, names and sizes, with their meanings and bounds."""

    num_steps: int = setting(3, "most objects in a scene, T", low=1, key="model_steps", short="-t")
    x_size: int = setting(50, "side of the images in pixels, H", low=1, flag="")  # from the data
    window_size: int = setting(28, "side of the attention window in pixels, W", low=1)
    z_what_size: int = setting(
        50, "dimensions of an object's code z_what, Z", low=1, key="encoder_latent_size"
    )
    rnn_hidden_size: int = setting(256, "size of the LSTMs' states", low=1)
    encoder_net: Sequence[int] = setting(
        (200,), "hidden layers of q(z_what | window)", low=1, metavar="SIZE"
    )
    decoder_net: Sequence[int] = setting(
        (200,), "hidden layers of p(window | z_what)", low=1, metavar="SIZE"
    )
    predict_net: Sequence[int] = setting(
        (200,), "hidden layers of q(z_pres, z_where | h)", low=1, metavar="SIZE"
    )
    embed_channels: Sequence[int] | None = setting(
        None,
        "channels of convolutions between the image and the LSTMs, each of which halves the sides "
        "(default: none)",
        low=1,
        length=(1, None),
        metavar="CHANNELS",
    )
    embed_net: Sequence[int] | None = setting(
        None,
        "linear layers between the image, or the convolutions, and the LSTMs (default: none)",
        low=1,
        length=(1, None),
        metavar="SIZE",
    )
    bl_predict_net: Sequence[int] = setting(
        (200,), "hidden layers from the baseline's LSTM to its value (score)", low=1, metavar="SIZE"
    )
    non_linearity: str = setting(
        "ReLU",
        "activation between layers, a class of torch.nn",
        accepts=is_activation,
        expected="the name of an activation of torch.nn without arguments, such as ReLU,",
        metavar="NAME",
    )
    decoder_output_bias: float | None = setting(-2.0, "added before the decoder's sigmoid")
    decoder_output_use_sigmoid: bool = setting(True, "keep the decoder's output within (0, 1)")
    use_masking: bool = setting(
        True,
        "let finished steps cost nothing; without, their costs count too (score)",
        flag="--masking",
    )
    use_baselines: bool = setting(
        True,
        "reduce the variance of the score-function gradient by data-dependent baselines (score)",
        flag="--baselines",
    )
    baseline_scalar: float | None = setting(
        None, "multiplies the baseline's output (score; default: 1)"
    )
    scale_prior_mean: float = setting(
        3.0, "prior mean of the scale s; 3 shrinks the window threefold", above=0
    )
    scale_prior_sd: float = setting(0.2, "prior standard deviation of s", above=0)
    pos_prior_mean: float = setting(0.0, "prior mean of the window's shift x and y")
    pos_prior_sd: float = setting(1.0, "prior standard deviation of x and y", above=0)
    likelihood: Likelihood = setting(
        "normal",
        "distribution of a pixel: normal around the canvas, or bernoulli, on or off (images are "
        "binarised at 1/2)",
    )
    likelihood_sd: float | Literal["learn"] = setting(
        DEFAULT_SD, "standard deviation of a pixel, or learn for a parameter (normal)", above=0
    )
    guide_input: GuideInput = setting(
        "image",
        "input of the guide's steps: the image (less its background), the difference of the image "
        "and the canvas painted so far (DAIR), or a glimpse of this difference where it is largest",
        key="guide",
    )
    background_model: BackgroundModel = setting(
        "none",
        "what is behind the objects: black (none), one level per channel (constant), or a picture "
        "with a code of its own (vae)",
    )
    z_background_size: int = setting(8, "dimensions of z_background (vae)", low=1)
    background_net: Sequence[int] = setting(
        (200,),
        "hidden layers of q(z_background | image), and in reverse of its decoder (vae)",
        low=1,
        metavar="SIZE",
    )
    channels: int = setting(1, "channels of the images, C", low=1, flag="")  # from the data

    def __post_init__(self) -> None:
        check_settings(self)


NetFactory = Callable[[ModelSettings], Mapping[str, nn.Module]]  # see `AIR`, "Nets of one's own"
