"""AIR: the generative model, the inference network (guide) and its baseline, in Pyro.

Eslami, Heess, Weber, Tassa, Szepesvari, Kavukcuoglu, Hinton: "Attend, Infer, Repeat: Fast Scene
Understanding with Generative Models", NIPS 2016, arXiv:1603.08575. Section numbers below are that
paper's. Shapes are those of ``air/__init__.py``. ``air/tutorial`` explains all in sections 2 to 8.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from pkgutil import resolve_name
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor, nn

from air.background import Background
from air.likelihoods import PixelLikelihood, make_likelihood
from air.looks import Look, Place, make_look
from air.modules import MLP, Decoder, Encoder, ImageLSTMCell, Predict, Projection, make_embed
from air.priors import (
    DEFAULT_COUNT_RATIO,
    PresencePrior,
    check_presence_prior,
    geometric_presence,
    presence_probs,
)
from air.spatial_transformer import image_to_window, window_to_image
from air.support import checks
from air.support.distributions import Presence
from air.support.handlers import register_parameters
from air.support.images import as_batch, check_range, to_intensities
from air.support.model_settings import ModelSettings, NetFactory
from air.support.subsampling import subsample_indices

Latents = tuple[list[Tensor], list[Tensor]]  # z_where, T times [B, 3]; z_pres, T times [B, 1]

Z_PRES_SIZE, Z_WHERE_SIZE = 1, 3
CLASSES = {"none": "air.air:AIR", "solids": "air.solids.model:SolidsAIR"}  # by renderer
OWN_NETS = "encode", "decode", "predict", "embed"


class GuideInputs(NamedTuple):
    """The inputs of the guide's steps that are computed once for each look at the images."""

    remainder: Tensor  # what windows are cut out of, [B, (C,) H, H]; see `Look.remainder`
    rnn: Projection  # for the inference LSTM
    bl_rnn: Projection | None  # for the baseline's LSTM; None without baselines
    place: Place  # mean and standard deviation of z_where to which `predict` relates


class GuideState(NamedTuple):
    """The state of the guide after a step."""

    z_pres: Tensor  # [B, 1]
    z_where: Tensor  # [B, 3]
    z_what: Tensor  # [B, Z]
    rnn: tuple[Tensor, Tensor]  # (h, c), [B, hidden] each
    bl_rnn: tuple[Tensor, Tensor]


class AIR(nn.Module):
    """Attend, Infer, Repeat: `model` and `guide` for ``pyro.infer.SVI``.

    Pixels have intensities in [0, 1]. With Pyro's losses, `model` and `guide` mean:

    - ``TraceGraph_ELBO()``: the paper's, a score function for z_pres with a learnt baseline.
    - ``Trace_ELBO()``: the same expected gradient, without the baseline: far noisier.
    - ``RenyiELBO(num_particles=K)``: the importance-weighted bound, with weights for each image,
      but again without a baseline, and only for all images at once: with ``batch_size`` each
      particle draws a batch of its own, and with ``num_images`` every log weight is multiplied by
      the number of batches. Particles cannot be vectorised. `air.training.objectives` has this
      bound with the count summed out, for batches too.
    - ``TraceEnum_ELBO()``: as ``Trace_ELBO()``, since no site of AIR is marked for enumeration.
    - ``ReweightedWakeSleep()``: weighs whole batches instead of images; take `objectives.rws`.

    Args:
        *args: As `ModelSettings`, which explains each argument and has the defaults.
        use_cuda: Whether to move the model to the GPU, as ``AIR(...).cuda()`` does.
        encode: Your own net for q(z_what | window): windows, [B, C * W * W], to mean and standard
            deviation > 0, [B, Z] each.
        decode: Your own net for p(window | z_what): codes, [B, Z], to intensities, [B, C * W * W];
            with a model of the background, colours times opacity and then opacity,
            [B, (C + 1) * W * W].
        predict: Your own net for q(z_pres, z_where | h): hidden states, [B, rnn_hidden_size], to
            the probability of z_pres, [B, 1], and mean and standard deviation > 0 of z_where
            relative to its prior, or to the glimpse, [B, 3] each.
        embed: Your own net from images, [B, C * H * H], to the LSTM's input, [B, any size]; the
            baseline has a copy of it. With glimpses, from [B, (C + 1) * G * G], without a copy; G
            is ``Glimpse(settings).side``.
        **kwargs: As `ModelSettings`, by name: ``num_steps=3, x_size=50, window_size=28, ...``.

    Raises:
        ValueError: If an argument has a value it cannot have, or a net has outputs of other shapes.
    """

    z_where_loc_prior: Tensor
    z_where_scale_prior: Tensor
    renderer = "none"  # the setting of that name, for which this is the class
    likelihood: PixelLikelihood
    decode: nn.Module
    look: Look
    # For help(AIR), notebooks and editors: the arguments of `ModelSettings` by name.
    __signature__ = signature(ModelSettings).replace(
        parameters=[
            *signature(ModelSettings).parameters.values(),
            *(
                Parameter(name, Parameter.KEYWORD_ONLY, default=None)
                for name in ("use_cuda", *OWN_NETS)
            ),
        ]
    )

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        use_cuda: bool = False,
        encode: nn.Module | None = None,
        decode: nn.Module | None = None,
        predict: nn.Module | None = None,
        embed: nn.Module | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__()
        s = ModelSettings(*args, **kwargs)
        if s.renderer != self.renderer:
            raise ValueError(f"renderer: expected {self.renderer}, got {s.renderer}")
        self.num_steps, self.z_what_size = s.num_steps, s.z_what_size
        self.x_size, self.window_size, self.channels = s.x_size, s.window_size, s.channels
        self.use_masking, self.use_baselines = s.use_masking, s.use_baselines
        self.baseline_scalar = 1.0 if s.baseline_scalar is None else s.baseline_scalar
        self.default_presence = geometric_presence(DEFAULT_COUNT_RATIO, s.num_steps)

        covers = s.background_model != "none"
        window_pixels, opacity_pixels = s.channels * s.window_size**2, covers * s.window_size**2
        hidden, nl = s.rnn_hidden_size, getattr(nn, s.non_linearity)
        latent_size = Z_WHERE_SIZE + s.z_what_size + Z_PRES_SIZE

        # The generative model. Its constants are kept with the weights, as Pyro's example does.
        where_loc = s.scale_prior_mean, s.pos_prior_mean, s.pos_prior_mean
        where_scale = s.scale_prior_sd, s.pos_prior_sd, s.pos_prior_sd
        self.register_buffer("z_where_loc_prior", torch.tensor([*map(float, where_loc)]))
        self.register_buffer("z_where_scale_prior", torch.tensor([*map(float, where_scale)]))
        self.make_painter(s)
        self.background = Background(s) if covers else None
        # The inference network.
        embed_layers = s.embed_channels or (), s.embed_net or (), nl
        channels, side = self.look.channels, self.look.side
        self.embed = make_embed(channels, side, *embed_layers) if embed is None else embed
        (embedded_size,) = checks.output_sizes("embed", self.embed, channels * side**2)
        self.rnn = ImageLSTMCell(embedded_size, latent_size, hidden)
        self.predict: nn.Module = Predict(
            hidden, s.predict_net, Z_PRES_SIZE, Z_WHERE_SIZE, nl, s.z_pres_bias
        )
        self.encode: nn.Module = Encoder(window_pixels, s.encoder_net, s.z_what_size, nl)
        self.h_init = nn.Parameter(torch.zeros(1, hidden))
        self.c_init = nn.Parameter(torch.zeros(1, hidden))
        self.z_where_init = nn.Parameter(torch.zeros(1, Z_WHERE_SIZE))
        self.z_what_init = nn.Parameter(torch.zeros(1, s.z_what_size))
        # The baseline.
        self.bl_embed = make_embed(s.channels, s.x_size, *embed_layers)
        if embed is not None and (channels, side) == (s.channels, s.x_size):
            self.bl_embed = checks.copied("embed", embed, "the baseline has a net of its own")
        (bl_size,) = checks.output_sizes("embed", self.bl_embed, s.channels * s.x_size**2)
        self.bl_rnn = ImageLSTMCell(bl_size, latent_size, hidden)
        self.bl_predict = MLP(hidden, [*s.bl_predict_net, 1], nl)
        self.bl_h_init = nn.Parameter(torch.zeros(1, hidden))
        self.bl_c_init = nn.Parameter(torch.zeros(1, hidden))
        # User-defined nets replace those above, which were made all the same, so that the others
        # have the same initial weights with and without them.
        for name, net, in_size, out_sizes in (
            ("encode", encode, window_pixels, [s.z_what_size, s.z_what_size]),
            ("decode", decode, s.z_what_size, [window_pixels + opacity_pixels]),
            ("predict", predict, hidden, [Z_PRES_SIZE, Z_WHERE_SIZE, Z_WHERE_SIZE]),
        ):
            if net is not None:
                checks.output_sizes(name, net, in_size, out_sizes)
                setattr(self, name, net)
        if use_cuda:
            self.cuda()

    def make_painter(self, s: ModelSettings) -> None:
        """Sets what paints objects and finds them: `decode`, `likelihood` and `look`.

        A subclass with another decoder overrides this, `paint` and `window`; see `air.solids`.

        Raises:
            ValueError: If the settings do not suit these.
        """
        covers, bounded = s.background_model != "none", s.decoder_output_use_sigmoid
        window_pixels, opacity_pixels = s.channels * s.window_size**2, covers * s.window_size**2
        self.likelihood = make_likelihood(s.likelihood, s.likelihood_sd, covers)
        self.decode = Decoder(
            window_pixels, s.decoder_net, s.z_what_size, s.decoder_output_bias, bounded,
            getattr(nn, s.non_linearity), opacity_pixels,
        )  # fmt: skip
        self.look = make_look(s)

    def __getstate__(self) -> Any:  # noqa: ANN401
        """The state for `pickle`, without the weak references that Pyro leaves on parameters."""
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
        return vars(self).copy()

    @classmethod
    def from_settings(cls, settings: ModelSettings, nets: NetFactory | None = None) -> "AIR":
        """An AIR with these settings, and with the nets that `nets` makes for them."""
        if settings.renderer != cls.renderer:
            cls = resolve_name(CLASSES[settings.renderer])
        own_nets: Any = nets(settings) if nets else {}
        if not isinstance(own_nets, Mapping) or not own_nets.keys() <= {*OWN_NETS}:
            got = list(own_nets) if isinstance(own_nets, Mapping) else repr(own_nets)
            raise ValueError(f"nets: expected a dict of {', '.join(OWN_NETS)}, got {got}")
        return cls(**vars(settings), **own_nets)

    @contextmanager
    def images_of(
        self,
        data: Tensor,
        batch_size: int | None = None,
        z_pres_prior_p: PresencePrior | None = None,
        num_images: int | None = None,
        *,
        draw: bool = False,
    ) -> Iterator[Tensor]:
        """The plate "data" with the images of a batch: how every model and guide begins.

        The arguments are those of `guide`. With `draw` the batch is drawn, as a guide does; a model
        gets the batch of its guide. Yields the images as `to_images` returns them.
        """
        checks.check_call(data, batch_size, num_images)
        check_presence_prior(z_pres_prior_p)
        register_parameters(self)
        indices = subsample_indices(data, batch_size if draw else None, num_images)
        size = num_images or len(data)
        with pyro.plate("data", size, subsample=indices, device=str(data.device)) as ix:
            yield self.to_images(data[ix])

    # The generative model, section 2.

    def model(
        self,
        data: Tensor,
        batch_size: int | None = None,
        z_pres_prior_p: PresencePrior | None = None,
        num_images: int | None = None,
    ) -> None:
        """p(x, z) = p(z) p(x | z). See `guide` for the arguments."""
        with self.images_of(data, batch_size, z_pres_prior_p, num_images) as images:
            _, canvas = self.prior(len(images), z_pres_prior_p)
            pixels = self.likelihood.distribution(canvas)
            pyro.sample("obs", pixels, obs=images.flatten(1))

    def prior(self, n: int, z_pres_prior_p: PresencePrior | None = None) -> tuple[Latents, Tensor]:
        """p(z): draws n scenes, and paints them.

        Where Normal intensities overlap on black, they add up, so that a canvas can exceed one.

        Returns:
            The latents (z_where, z_pres), lists over steps; and the canvases, [n, (C,) H, H].

        Raises:
            ValueError: If `n` is negative, or the prior is no function from steps to probabilities.
        """
        checks.check_whole("n", n, 0)
        checks.refuse_outer_plates(batch=n)
        presence = self.presence(z_pres_prior_p)
        background = None if self.background is None else self.background.model(self.h_init, n)
        z_pres = self.h_init.new_ones(n, Z_PRES_SIZE)
        all_pres, all_where, all_what = [], [], []
        for t in range(self.num_steps):
            pres = Presence(presence[t] * z_pres)
            z_pres = pyro.sample(f"z_pres_{t}", self._masked(pres, z_pres))
            z_where, z_what = self.sample_object(t, z_pres)
            all_pres.append(z_pres)
            all_where.append(z_where)
            all_what.append(z_what)
        painted = self.paint(all_where, all_what)
        canvas = self.likelihood.compose(painted, torch.cat(all_pres, 1).t(), background)
        return (all_where, all_pres), canvas

    def window(self, z_where: Tensor) -> Tensor:
        """(s, x, y) of the attention window for latents z_where, [..., 3] each."""
        return z_where

    def describe(self, z_where: Tensor, z_what: Tensor) -> dict[str, Any]:
        """What latents, [3] and [Z], say of an object beyond its window, for JSON.

        If nets paint it, this is nothing.
        """
        return {}

    def presence(self, z_pres_prior_p: PresencePrior | None) -> Sequence[float | Tensor]:
        """The prior probability of a further object at each step."""
        if z_pres_prior_p is None:
            return self.default_presence
        return presence_probs(z_pres_prior_p, self.num_steps)

    def sample_object(self, t: int, z_pres: Tensor) -> tuple[Tensor, Tensor]:
        """p(z_where_t) p(z_what_t): the t-th object's place, [n, 3], and code, [n, Z]."""
        n = len(z_pres)
        where = dist.Normal(self.z_where_loc_prior, self.z_where_scale_prior).expand([n, 3])
        z_where = pyro.sample(f"z_where_{t}", self._masked(where, z_pres))
        zeros = self.h_init.new_zeros(n, self.z_what_size)
        code = dist.Normal(zeros, zeros.new_ones(()))  # 1.0 would be copied from the host
        return z_where, pyro.sample(f"z_what_{t}", self._masked(code, z_pres))

    def paint(self, z_where: Sequence[Tensor], z_what: Sequence[Tensor]) -> Tensor:
        """Each object on a black image of its own, [T, B, (C,) H, H]; in one pass, to be fast.

        With a model of the background [T, B, C + 1, H, H], see `likelihoods.PixelLikelihood`.
        """
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
            batch_size: Size of the batch that the plate "data" draws; None for all of `data`.
            z_pres_prior_p: Step t -> p(z_pres_t = 1 | z_pres_{t-1} = 1); None for
                `default_presence`.
            num_images: Size of the whole data set if `data` is one batch of it; None for len(data).

        Returns:
            (z_where, z_pres): lists over steps of [B, 3] and [B, 1].

        Raises:
            ValueError: If an argument cannot be used, or a plate vectorises the call (particles).
        """
        with self.images_of(data, batch_size, z_pres_prior_p, num_images, draw=True) as images:
            cost_scale = (num_images or len(data)) / len(images)
            background = None if self.background is None else self.background.guide(images)
            canvas, states = background, [start := self._initial_state(len(images))]
            for t in range(self.num_steps):
                previous = states[-1]
                if t > 0 and self.look.follows_canvas:
                    painted = self.paint([previous.z_where], [previous.z_what])
                    present = self._detach_presence(previous.z_pres).t()
                    canvas = self.likelihood.compose(painted, present, canvas)
                if self.look.looks_again:
                    previous = start._replace(z_pres=previous.z_pres)
                if t == 0 or self.look.looks_again:
                    windows = [self.window(s.z_where) for s in states[1:]]
                    inputs = self._look(self.look.remainder(images, background, canvas), windows)
                states.append(self._guide_step(t, previous, inputs, cost_scale))
            return [s.z_where for s in states[1:]], [s.z_pres for s in states[1:]]

    def _initial_state(self, n: int) -> GuideState:
        return GuideState(
            self.h_init.new_ones(n, Z_PRES_SIZE),
            self.z_where_init.expand(n, -1),
            self.z_what_init.expand(n, -1),
            (self.h_init.expand(n, -1), self.c_init.expand(n, -1)),
            (self.bl_h_init.expand(n, -1), self.bl_c_init.expand(n, -1)),
        )

    def _look(self, remainder: Tensor, windows: Sequence[Tensor]) -> GuideInputs:
        """Multiplies the input images by the LSTMs' weights, once for all steps that see them."""
        # Detached: the baseline's regression must not train the inference network.
        flat = remainder.flatten(1).detach()
        bl_rnn = self.bl_rnn.project(self.bl_embed(flat)) if self.use_baselines else None
        prior = self.z_where_loc_prior, self.z_where_scale_prior
        seen, place = self.look(remainder, windows, prior)
        return GuideInputs(remainder, self.rnn.project(self.embed(seen)), bl_rnn, place)

    def _guide_step(
        self, t: int, prev: GuideState, inputs: GuideInputs, cost_scale: float
    ) -> GuideState:
        """q(z_pres_t, z_where_t, z_what_t | x, z_<t), and the baseline of z_pres_t."""
        latents = (prev.z_where, prev.z_what, self._detach_presence(prev.z_pres))
        rnn = self.rnn(inputs.rnn, latents, prev.rnn)
        pres_p, loc, scale = self.predict(rnn[0])
        baseline, bl_rnn = self._baseline_step(latents, prev, inputs, cost_scale)
        pres = Presence(pres_p * prev.z_pres)
        z_pres = pyro.sample(f"z_pres_{t}", self._masked(pres, prev.z_pres), infer=baseline)
        where = dist.Normal(self.look.mean_where(inputs.place[0], loc), inputs.place[1] * scale)
        z_where = pyro.sample(f"z_where_{t}", self._masked(where, z_pres))
        place = self.window(z_where)
        window = image_to_window(place, self.window_size, self.x_size, inputs.remainder)
        code = dist.Normal(*self.encode(window))
        z_what = pyro.sample(f"z_what_{t}", self._masked(code, z_pres))
        return GuideState(z_pres, z_where, z_what, rnn, bl_rnn)

    def _baseline_step(
        self, latents: tuple[Tensor, ...], prev: GuideState, inputs: GuideInputs, cost_scale: float
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """The expected cost of z_pres_t and all later choices, given the guide's past.

        Subtracting it leaves the score-function gradient unbiased and lowers its variance
        (Mnih and Gregor 2014, arXiv:1402.0030).
        """
        if inputs.bl_rnn is None:
            return {}, prev.bl_rnn
        state = self.bl_rnn(inputs.bl_rnn, [z.detach() for z in latents], prev.bl_rnn)
        value = self.bl_predict(state[0])
        if self.use_masking:  # nothing is left to predict once an image is finished
            value = value * latents[-1]
        # The plate multiplies each cost by N / B. With its output multiplied by N / B too, the net
        # predicts nats per image, and one learning rate suits every size of data set and batch.
        value = value * (cost_scale * self.baseline_scalar)
        # Pyro expects a baseline of shape [] in a plate of one image.
        value = value.squeeze(-1) if len(value) > 1 else value.squeeze()
        return {"baseline": {"baseline_value": value}}, state

    def _detach_presence(self, z_pres: Tensor) -> Tensor:
        """z_pres as input of the nets, without provenance.

        With masking, the masks already tell TraceGraph_ELBO which costs depend on z_pres. Tracking
        it through every operation besides would take several times as long.
        """
        return detach_provenance(z_pres) if self.use_masking else z_pres

    def _masked(self, distribution: dist.TorchDistribution, present: Tensor) -> Any:  # noqa: ANN401
        """One draw for each image, at no cost for images whose `present` is zero."""
        masked = distribution.mask(present > 0) if self.use_masking else distribution
        return masked.to_event(1)

    def baseline_parameters(self) -> list[nn.Parameter]:
        """The parameters of the baseline, which have a learning rate of their own."""
        return [p for name, p in self.named_parameters() if name.startswith("bl_")]

    def to_images(self, batch: Tensor) -> Tensor:
        """Images, [B, (C,) H, H], as floats in [0, 1], as the likelihood takes them.

        Args:
            batch: uint8 in [0, 255], bool, or floats in [0, 1], on any device. The range of floats
                is checked while Pyro's validation is enabled, as it is by default.

        Raises:
            ValueError: If the images have another shape, type or range.
        """
        images = as_batch(batch, self.channels, self.x_size).to(self.h_init.device)
        return self.likelihood.prepare(to_intensities(images, self.h_init.dtype))

    def check_images(self, images: Tensor) -> None:
        """Checks the shape, type and range of images, [N, (C,) H, H]; reads from the device.

        Raises:
            ValueError: If `to_images` cannot take them.
        """
        check_range(as_batch(images, self.channels, self.x_size))
