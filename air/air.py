"""AIR: the generative model, the inference network (guide) and its baseline, in Pyro.

Eslami, Heess, Weber, Tassa, Szepesvari, Kavukcuoglu, Hinton: "Attend, Infer, Repeat: Fast Scene
Understanding with Generative Models", NIPS 2016, arXiv:1603.08575. Section numbers below are that
paper's. Shapes are those of the glossary in ``air/__init__.py``.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor, nn

from air.likelihoods import Likelihood, make_likelihood, to_intensities
from air.param_store import register_parameters
from air.priors import DEFAULT_COUNT_RATIO, PresencePrior, geometric_count_prior
from air.spatial_transformer import image_to_window, window_to_image
from air.subsampling import subsample_indices
from modules import MLP, Decoder, Encoder, ImageLSTMCell, Predict, Projection

GuideInput = Literal["image", "difference"]
Latents = tuple[list[Tensor], list[Tensor]]  # z_where, T times [B, 3]; z_pres, T times [B, 1]

Z_PRES_SIZE, Z_WHERE_SIZE = 1, 3


class GuideInputs(NamedTuple):
    """What a step of the guide sees of the images."""

    images: Tensor  # [B, (C,) H, H]
    rnn: Projection  # the images as the inference LSTM takes them
    bl_rnn: Projection | None  # the same for the baseline's; None without baselines
    cost_scale: float  # the plate's N / B, which multiplies every cost


class GuideState(NamedTuple):
    """What one step of the guide hands to the next."""

    z_pres: Tensor  # [B, 1]
    z_where: Tensor  # [B, 3]
    z_what: Tensor  # [B, Z]
    rnn: tuple[Tensor, Tensor]  # (h, c), [B, hidden] each
    bl_rnn: tuple[Tensor, Tensor]


class AIR(nn.Module):
    """Attend, Infer, Repeat: `model` and `guide` for ``pyro.infer.SVI``.

    Args:
        num_steps: The most objects a scene can have, T.
        x_size: Side of the images in pixels, H.
        window_size: Side of the attention window in pixels, W.
        z_what_size: Dimensions of an object's code, Z.
        rnn_hidden_size: Size of both LSTMs' states.
        encoder_net: Hidden layer sizes of q(z_what | window).
        decoder_net: Hidden layer sizes of p(window | z_what).
        predict_net: Hidden layer sizes of q(z_pres, z_where | h).
        embed_net: Layer sizes of a net between the image and the LSTMs; None for no net.
        bl_predict_net: Hidden layer sizes between the baseline's LSTM and its value.
        non_linearity: Name of the ``torch.nn`` class used throughout.
        decoder_output_bias: Added to the decoder's output before its sigmoid; None for zero.
        decoder_output_use_sigmoid: Keep the decoder's intensities within (0, 1).
        use_masking: Let finished steps cost nothing.
        use_baselines: Reduce the variance of the score-function gradient by a baseline.
        baseline_scalar: Multiplies the baseline; None for one.
        scale_prior_mean, scale_prior_sd: The prior of s in z_where; 3 shrinks threefold.
        pos_prior_mean, pos_prior_sd: The prior of x and of y in z_where.
        likelihood: "normal", or "bernoulli" for pixels that are on or off; see `likelihoods`.
        likelihood_sd: Standard deviation of a pixel around the canvas (normal).
        guide_input: "image": every step of the guide sees the image and remembers the steps before.
            "difference" (DAIR): it sees the image minus what those have painted, and nothing else.
        channels: Of the images, C.
        use_cuda: Start on the GPU, as ``AIR(...).cuda()``.
    """

    z_where_loc_prior: Tensor
    z_where_scale_prior: Tensor

    def __init__(
        self,
        num_steps: int = 3,
        x_size: int = 50,
        window_size: int = 28,
        z_what_size: int = 50,
        rnn_hidden_size: int = 256,
        encoder_net: Sequence[int] = (200,),
        decoder_net: Sequence[int] = (200,),
        predict_net: Sequence[int] = (200,),
        embed_net: Sequence[int] | None = None,
        bl_predict_net: Sequence[int] = (200,),
        non_linearity: str = "ReLU",
        decoder_output_bias: float | None = -2.0,
        decoder_output_use_sigmoid: bool = True,
        use_masking: bool = True,
        use_baselines: bool = True,
        baseline_scalar: float | None = None,
        scale_prior_mean: float = 3.0,
        scale_prior_sd: float = 0.2,
        pos_prior_mean: float = 0.0,
        pos_prior_sd: float = 1.0,
        likelihood: Likelihood = "normal",
        likelihood_sd: float = 0.3,
        guide_input: GuideInput = "image",
        channels: int = 1,
        use_cuda: bool = False,
    ) -> None:
        super().__init__()
        self.num_steps, self.z_what_size = num_steps, z_what_size
        self.x_size, self.window_size = x_size, window_size
        self.use_masking, self.use_baselines = use_masking, use_baselines
        self.baseline_scalar = 1.0 if baseline_scalar is None else baseline_scalar
        self.guide_input, self.channels = guide_input, channels
        self.likelihood = make_likelihood(likelihood, likelihood_sd, decoder_output_use_sigmoid)
        if guide_input not in get_args(GuideInput):
            raise ValueError(f"guide_input must be image or difference, got {guide_input!r}")
        self.default_presence = geometric_count_prior(DEFAULT_COUNT_RATIO, num_steps)

        # Constants of the model, kept with the weights as Pyro's example does.
        where_loc = torch.tensor([scale_prior_mean, pos_prior_mean, pos_prior_mean])
        where_scale = torch.tensor([scale_prior_sd, pos_prior_sd, pos_prior_sd])
        self.register_buffer("z_where_loc_prior", where_loc)
        self.register_buffer("z_where_scale_prior", where_scale)
        nl: type[nn.Module] = getattr(nn, non_linearity)
        pixels, image_pixels = channels * window_size**2, channels * x_size**2
        embed_sizes = embed_net or ()
        embedded_size = [image_pixels, *embed_sizes][-1]
        latent_size = Z_WHERE_SIZE + z_what_size + Z_PRES_SIZE

        # The generative model.
        self.decode = Decoder(
            pixels, decoder_net, z_what_size, decoder_output_bias, decoder_output_use_sigmoid, nl
        )
        # The inference network.
        self.embed = MLP(image_pixels, embed_sizes, nl, output_non_linearity=True)
        self.rnn = ImageLSTMCell(embedded_size, latent_size, rnn_hidden_size)
        self.predict = Predict(rnn_hidden_size, predict_net, Z_PRES_SIZE, Z_WHERE_SIZE, nl)
        self.encode = Encoder(pixels, encoder_net, z_what_size, nl)
        self.h_init = nn.Parameter(torch.zeros(1, rnn_hidden_size))
        self.c_init = nn.Parameter(torch.zeros(1, rnn_hidden_size))
        self.z_where_init = nn.Parameter(torch.zeros(1, Z_WHERE_SIZE))
        self.z_what_init = nn.Parameter(torch.zeros(1, z_what_size))
        # The baseline.
        self.bl_embed = MLP(image_pixels, embed_sizes, nl, output_non_linearity=True)
        self.bl_rnn = ImageLSTMCell(embedded_size, latent_size, rnn_hidden_size)
        self.bl_predict = MLP(rnn_hidden_size, [*bl_predict_net, 1], nl)
        self.bl_h_init = nn.Parameter(torch.zeros(1, rnn_hidden_size))
        self.bl_c_init = nn.Parameter(torch.zeros(1, rnn_hidden_size))
        if use_cuda:
            self.cuda()

    # The generative model, section 2.

    def model(
        self,
        data: Tensor,
        batch_size: int | None = None,
        z_pres_prior_p: PresencePrior | None = None,
        num_images: int | None = None,
    ) -> None:
        """p(x, z). See `guide` for the arguments."""
        register_parameters(self)
        with pyro.plate("data", num_images or len(data), device=str(data.device)) as ix:
            images = self.to_images(data[ix])
            _, canvas = self.prior(len(images), z_pres_prior_p)
            pixels = self.likelihood.distribution(canvas.flatten(1))
            pyro.sample("obs", pixels.to_event(1), obs=images.flatten(1))

    def prior(self, n: int, z_pres_prior_p: PresencePrior | None = None) -> tuple[Latents, Tensor]:
        """Draws n scenes: the latents (z_where, z_pres) and the canvases, [n, (C,) H, H].

        With Normal pixels intensities add where objects overlap, so that a canvas can exceed one.
        """
        presence_p = z_pres_prior_p or self.default_presence.__getitem__
        z_pres = self.h_init.new_ones(n, Z_PRES_SIZE)
        objects, all_pres = [], []
        for t in range(self.num_steps):
            pres = dist.Bernoulli(presence_p(t) * z_pres)
            z_pres = pyro.sample(f"z_pres_{t}", self._masked(pres, z_pres))
            objects.append(self.sample_object(t, z_pres))
            all_pres.append(z_pres)
        all_where, all_what = map(list, zip(*objects, strict=True))
        painted = self.paint(all_where, all_what)
        return (all_where, all_pres), self.likelihood.compose(painted, torch.cat(all_pres, 1).t())

    def sample_object(self, t: int, z_pres: Tensor) -> tuple[Tensor, Tensor]:
        """p(z_where_t) p(z_what_t): the t-th object's place, [n, 3], and code, [n, Z]."""
        n = len(z_pres)
        where = dist.Normal(self.z_where_loc_prior, self.z_where_scale_prior).expand([n, 3])
        z_where = pyro.sample(f"z_where_{t}", self._masked(where, z_pres))
        code = dist.Normal(self.h_init.new_zeros(n, self.z_what_size), 1.0)
        return z_where, pyro.sample(f"z_what_{t}", self._masked(code, z_pres))

    def paint(self, z_where: Sequence[Tensor], z_what: Sequence[Tensor]) -> Tensor:
        """Each object on a black image of its own, [T, B, (C,) H, H]; in one pass, to be fast."""
        where, windows = torch.cat(tuple(z_where)), self.decode(torch.cat(tuple(z_what)))
        painted = window_to_image(where, self.window_size, self.x_size, windows)
        return painted.view(len(z_where), len(z_where[0]), *painted.shape[1:])

    # The inference network, section 2.1.

    def guide(
        self,
        data: Tensor,
        batch_size: int | None = None,
        z_pres_prior_p: PresencePrior | None = None,
        num_images: int | None = None,
    ) -> Latents:
        """q(z | x), one object after another.

        Args:
            data: Images, [N, (C,) H, H]: floats in [0, 1], or uint8 in [0, 255].
            batch_size: Use this many of them, drawn anew for the plate "data"; None for all.
            z_pres_prior_p: Step t -> p(z_pres_t = 1 | z_pres_{t-1} = 1); None: `default_presence`.
            num_images: How many there are, where `data` is but a batch of them; None for len(data).

        Returns:
            (z_where, z_pres): lists over steps of [B, 3] and [B, 1].
        """
        register_parameters(self)
        size, chosen = num_images or len(data), subsample_indices(data, batch_size, num_images)
        with pyro.plate("data", size, subsample=chosen, device=str(data.device)) as ix:
            images = self.to_images(data[ix])
            n, canvas = len(images), torch.zeros_like(images)
            inputs = self._embed_images(images, size / n)
            state = first = GuideState(
                self.h_init.new_ones(n, Z_PRES_SIZE),
                self.z_where_init.expand(n, -1),
                self.z_what_init.expand(n, -1),
                (self.h_init.expand(n, -1), self.c_init.expand(n, -1)),
                (self.bl_h_init.expand(n, -1), self.bl_c_init.expand(n, -1)),
            )
            states = []
            for t in range(self.num_steps):
                if t > 0 and self.guide_input == "difference":
                    painted = self.paint([state.z_where], [state.z_what])
                    present = self._detach_presence(state.z_pres).t()
                    canvas = self.likelihood.add(canvas, self.likelihood.compose(painted, present))
                    inputs = self._embed_images(images - canvas, size / n)
                    state = first._replace(z_pres=state.z_pres)
                state = self._guide_step(t, state, inputs)
                states.append(state)
            return [state.z_where for state in states], [state.z_pres for state in states]

    def _embed_images(self, images: Tensor, cost_scale: float) -> GuideInputs:
        """Takes in what a step of the guide is to see, [B, (C,) H, H]."""
        flat = images.flatten(1)
        # Detached: the baseline's regression must not train the inference network.
        bl_rnn = self.bl_rnn.project(self.bl_embed(flat.detach())) if self.use_baselines else None
        return GuideInputs(images, self.rnn.project(self.embed(flat)), bl_rnn, cost_scale)

    def _guide_step(self, t: int, prev: GuideState, inputs: GuideInputs) -> GuideState:
        """q(z_pres_t, z_where_t, z_what_t | x, z_<t), and the baseline of z_pres_t."""
        latents = (prev.z_where, prev.z_what, self._detach_presence(prev.z_pres))
        rnn = self.rnn(inputs.rnn, latents, prev.rnn)
        pres_p, loc, scale = self.predict(rnn[0])
        infer, bl_rnn = self._baseline_step(latents, prev, inputs)
        pres = dist.Bernoulli(pres_p * prev.z_pres)
        z_pres = pyro.sample(f"z_pres_{t}", self._masked(pres, prev.z_pres), infer=infer)
        where = dist.Normal(loc + self.z_where_loc_prior, scale * self.z_where_scale_prior)
        z_where = pyro.sample(f"z_where_{t}", self._masked(where, z_pres))
        window = image_to_window(z_where, self.window_size, self.x_size, inputs.images)
        code = dist.Normal(*self.encode(window))
        z_what = pyro.sample(f"z_what_{t}", self._masked(code, z_pres))
        return GuideState(z_pres, z_where, z_what, rnn, bl_rnn)

    def _baseline_step(
        self, latents: tuple[Tensor, ...], prev: GuideState, inputs: GuideInputs
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """The expected cost of z_pres_t and all after it, given what the guide has seen so far.

        Subtracting it leaves the score-function gradient unbiased and lowers its variance
        (Mnih and Gregor 2014, arXiv:1402.0030).
        """
        if inputs.bl_rnn is None:
            return {}, prev.bl_rnn
        state = self.bl_rnn(inputs.bl_rnn, [z.detach() for z in latents], prev.bl_rnn)
        value = self.bl_predict(state[0])
        if self.use_masking:  # nothing is left to predict once an image is finished
            value = value * latents[-1]
        # The plate multiplies each cost by N / B. Scaling the output alike lets the net predict
        # nats per image, so that one learning rate suits every size of data set and batch.
        value = value * (inputs.cost_scale * self.baseline_scalar)
        return {"baseline": {"baseline_value": value.squeeze(-1)}}, state

    def _detach_presence(self, z_pres: Tensor) -> Tensor:
        """What the nets see of z_pres: a copy, where the masks show which costs depend on it."""
        # TraceGraph_ELBO would follow it through every operation, at several times its price.
        return detach_provenance(z_pres) if self.use_masking else z_pres

    def _masked(self, distribution: dist.TorchDistribution, present: Tensor) -> Any:  # noqa: ANN401
        """One choice for each image, at no cost in those where `present` is zero."""
        masked = distribution.mask(present > 0) if self.use_masking else distribution
        return masked.to_event(1)

    def to_images(self, batch: Tensor) -> Tensor:
        """Bytes or floats, [B, (C,) H, H], to floats in [0, 1], as the likelihood takes them."""
        return self.likelihood.prepare(
            to_intensities(batch, self.channels, self.x_size, self.h_init)
        )
