"""The settings of the model: sizes of its nets and windows, its priors, its likelihood."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from air.support.fields import SettingError, check_settings, model_setting, setting

BackgroundModel = Literal["none", "pca"]
Likelihood = Literal["normal", "bernoulli"]
GuideInput = Literal["image", "difference", "glimpse"]
RendererName = Literal["none", "solids"]


def is_activation(name: str) -> bool:
    """Whether ``torch.nn`` has an activation of that name that needs no arguments."""
    candidate = getattr(nn.modules.activation, name, None)
    try:
        return isinstance(candidate, type) and isinstance(candidate(), nn.Module)
    except TypeError:
        return False


@dataclass(frozen=True)
class ModelSettings:
    """The arguments of `AIR` that are numbers, names and sizes, with their meanings and bounds.

    In a run, `x_size` and `channels` are those of its images.
    """

    num_steps: int = model_setting(
        3,
        "maximum number of objects per scene, T",
        low=1,
        key="model_steps",
        short="-t",
        common=True,
        overrides=["count_prior"],
    )
    x_size: int = setting(50, "side of the images in pixels, H", low=1, flag="")
    window_size: int = model_setting(28, "side of the attention window in pixels, W", low=1)
    z_what_size: int = model_setting(
        50, "dimensions of an object's code z_what, Z", low=1, key="encoder_latent_size"
    )
    rnn_hidden_size: int = model_setting(256, "size of the LSTMs' hidden states", low=1)
    encoder_net: Sequence[int] = model_setting(
        (200,), "hidden layers of q(z_what | window)", low=1, metavar="SIZE"
    )
    decoder_net: Sequence[int] = model_setting(
        (200,), "hidden layers of p(window | z_what)", low=1, metavar="SIZE"
    )
    predict_net: Sequence[int] = model_setting(
        (200,), "hidden layers of q(z_pres, z_where | h)", low=1, metavar="SIZE"
    )
    embed_channels: Sequence[int] | None = model_setting(
        None,
        "channels of the convolutions between the image and the LSTMs; each convolution halves the "
        "image (default: no convolutions)",
        low=1,
        metavar="CHANNELS",
    )
    embed_net: Sequence[int] | None = model_setting(
        None,
        "linear layers between the image, or the convolutions, and the LSTMs (default: none)",
        low=1,
        metavar="SIZE",
    )
    bl_predict_net: Sequence[int] = model_setting(
        (200,),
        "hidden layers between the baseline's LSTM and its output (score estimator only)",
        low=1,
        metavar="SIZE",
    )
    non_linearity: str = model_setting(
        "ReLU",
        "activation between layers, a class of torch.nn",
        accepts=is_activation,
        accepted="the name of an activation of torch.nn without arguments, such as ReLU,",
        metavar="NAME",
    )
    decoder_output_bias: float | None = model_setting(-2.0, "bias before the decoder's sigmoid")
    z_pres_bias: float = model_setting(
        0.0,
        "initial bias before the sigmoid of q(z_pres); below zero, few objects are used at first",
        flag="",
    )
    decoder_output_use_sigmoid: bool = model_setting(
        True,
        "apply a sigmoid to the decoder's output, which keeps it within (0, 1)",
        group="compatibility with Pyro's example",
    )
    use_masking: bool = model_setting(
        True,
        "mask the cost of the steps after the last object, which otherwise counts (score estimator "
        "only)",
        flag="--masking",
    )
    use_baselines: bool = model_setting(
        True,
        "reduce the variance of the score-function gradient by data-dependent baselines (score "
        "estimator only)",
        flag="--baselines",
    )
    baseline_scalar: float | None = model_setting(
        None,
        "factor of the baseline's output (score estimator only; default: 1)",
        group="compatibility with Pyro's example",
    )
    scale_prior_mean: float = model_setting(
        3.0, "prior mean of the scale s; 3 shrinks the window threefold", above=0
    )
    scale_prior_sd: float = model_setting(0.2, "prior standard deviation of s", above=0)
    pos_prior_mean: float = model_setting(0.0, "prior mean of the window's shift x and y")
    pos_prior_sd: float = model_setting(1.0, "prior standard deviation of x and y", above=0)
    likelihood: Likelihood = model_setting(
        "normal",
        "distribution of a pixel: normal with the canvas as its mean, or bernoulli (images are "
        "binarised at 1/2)",
    )
    likelihood_sd: float = model_setting(
        0.3,
        "standard deviation of a pixel (normal likelihood, and model of the background)",
        above=0,
    )
    guide_input: GuideInput = model_setting(
        "image",
        "input of the guide at each step: the image, its difference to the current canvas (DAIR), "
        "or a glimpse, which is a crop around the area that differs most from the background and "
        "that no window covers yet",
        key="guide",
    )
    glimpse_threshold: float | None = model_setting(
        None,
        "difference from the background above which pixels draw a glimpse; without one, all do, by "
        "their difference",
        above=0,
        flag="",
    )
    glimpse_colours: Sequence[float] | None = model_setting(
        None,
        "C x C matrix, row by row, by which colours are multiplied before they are compared with "
        "that threshold, so that those of a textured background draw no glimpse",
        flag="",
    )
    background_model: BackgroundModel = model_setting(
        "none",
        "background of the scenes: black (none), or an image with its own latent code, from which "
        "it is painted by principal components of the training images (pca; a loaded model keeps "
        "its own)",
    )
    z_background_size: int = model_setting(
        32, "greatest number of principal components of backgrounds (pca)", low=1, flag=""
    )
    channels: int = setting(1, "channels of the images, C", low=1, flag="")
    renderer: RendererName = model_setting(
        "none",
        "what draws objects: a decoder that is learnt (none), or the ray caster of `air.solids`",
        flag="",
    )

    def __post_init__(self) -> None:
        for name in ("embed_channels", "embed_net"):  # for no layers, Pyro's example has []
            layers = getattr(self, name)
            object.__setattr__(self, name, None if layers in ([], ()) else layers)
        check_settings(self)
        if self.likelihood == "bernoulli" and not self.decoder_output_use_sigmoid:
            needed = "bernoulli needs decoder_output_use_sigmoid, for intensities in [0, 1]"
            raise SettingError("likelihood", needed)


NetFactory = Callable[[ModelSettings], Mapping[str, nn.Module]]  # see the docstring of `AIR`
