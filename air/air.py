"""AIR: the generative model, the inference network (guide) and its baseline, in Pyro.

Eslami, Heess, Weber, Tassa, Szepesvari, Kavukcuoglu, Hinton: "Attend, Infer, Repeat: Fast Scene
Understanding with Generative Models", NIPS 2016, arXiv:1603.08575. Section numbers below are that
paper's. Shapes are those of ``air/__init__.py``. ``air/tutorial`` explains all in sections 2 to 8.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor, nn

from air import arguments
from air.background import Background
from air.distributions import Presence
from air.glimpse import Glimpse
from air.images import as_batch, check_range, to_intensities
from air.likelihoods import Likelihood, make_likelihood
from air.model_settings import BackgroundModel, GuideInput, ModelSettings, NetFactory
from air.priors import DEFAULT_COUNT_RATIO, PresencePrior, geometric_count_prior, probs_of_steps
from air.settings import as_arguments
from air.spatial_transformer import image_to_window, window_to_image
from air.subsampling import subsample_indices
from air.support_handlers import register_parameters
from modules import MLP, Decoder, Encoder, ImageLSTMCell, Predict, Projection, make_embed

Latents = tuple[list[Tensor], list[Tensor]]  # z_where, T times [B, 3]; z_pres, T times [B, 1]

Z_PRES_SIZE, Z_WHERE_SIZE = 1, 3
MODEL_ARGUMENTS = frozenset(ModelSettings.__dataclass_fields__)


class GuideInputs(NamedTuple):
    """The images, less what is on the canvas, their part in both LSTMs' inputs, where to look."""

    images: Tensor  # [B, (C,) H, H]
    rnn: Projection  # for the inference LSTM
    bl_rnn: Projection | None  # for the baseline's LSTM; None without baselines
    where: tuple[Tensor, Tensor]  # mean and sd of z_where to which `predict` relates
    cost_scale: float  # the plate's N / B, which multiplies every cost


class GuideState(NamedTuple):
    """The state of the guide after a step."""

    z_pres: Tensor  # [B, 1]
    z_where: Tensor  # [B, 3]
    z_what: Tensor  # [B, Z]
    rnn: tuple[Tensor, Tensor]  # (h, c), [B, hidden] each
    bl_rnn: tuple[Tensor, Tensor]


class AIR(nn.Module):
    """Attend, Infer, Repeat: `model` and `guide` for ``pyro.infer.SVI``.

    The arguments up to `channels` are explained in `ModelSettings`, ``use_cuda=True`` is
    ``AIR(...).cuda()``. Pixels have intensities in [0, 1].

    Nets of one's own. Any ``nn.Module`` with the right inputs and outputs can stand in for a net:

        encode   q(z_what | window): windows, [B, C * W * W], to mean and sd > 0, [B, Z] each
        decode   p(window | z_what): codes, [B, Z], to intensities, [B, C * W * W]; with a model of
                 the background, colours times opacity and then opacity, [B, (C + 1) * W * W]
        predict  q(z_pres, z_where | h): hidden states, [B, rnn_hidden_size], to the probability of
                 z_pres, [B, 1], and mean and sd > 0 of z_where relative to its prior, or to the
                 glimpse, [B, 3] each
        embed    images, [B, C * H * H], to the LSTM's input, [B, any size]; the baseline takes a
                 copy of it. With glimpses [B, C * G * G], no copy; G is `Glimpse(settings).side`

    Raises:
        ValueError: If an argument has a value it cannot have, or a net has outputs of other shapes.
    """

    z_where_loc_prior: Tensor
    z_where_scale_prior: Tensor

    def __init__(
        self,
        num_steps: int = ModelSettings.num_steps,
        x_size: int = ModelSettings.x_size,
        window_size: int = ModelSettings.window_size,
        z_what_size: int = ModelSettings.z_what_size,
        rnn_hidden_size: int = ModelSettings.rnn_hidden_size,
        encoder_net: Sequence[int] = ModelSettings.encoder_net,
        decoder_net: Sequence[int] = ModelSettings.decoder_net,
        predict_net: Sequence[int] = ModelSettings.predict_net,
        embed_net: Sequence[int] | None = ModelSettings.embed_net,
        bl_predict_net: Sequence[int] = ModelSettings.bl_predict_net,
        non_linearity: str = ModelSettings.non_linearity,
        decoder_output_bias: float | None = ModelSettings.decoder_output_bias,
        decoder_output_use_sigmoid: bool = ModelSettings.decoder_output_use_sigmoid,
        use_masking: bool = ModelSettings.use_masking,
        use_baselines: bool = ModelSettings.use_baselines,
        baseline_scalar: float | None = ModelSettings.baseline_scalar,
        scale_prior_mean: float = ModelSettings.scale_prior_mean,
        scale_prior_sd: float = ModelSettings.scale_prior_sd,
        pos_prior_mean: float = ModelSettings.pos_prior_mean,
        pos_prior_sd: float = ModelSettings.pos_prior_sd,
        likelihood: Likelihood = ModelSettings.likelihood,
        likelihood_sd: float | Literal["learn"] = ModelSettings.likelihood_sd,
        guide_input: GuideInput = ModelSettings.guide_input,
        background_model: BackgroundModel = ModelSettings.background_model,
        z_background_size: int = ModelSettings.z_background_size,
        background_net: Sequence[int] = ModelSettings.background_net,
        channels: int = ModelSettings.channels,
        use_cuda: bool = False,
        *,
        embed_channels: Sequence[int] | None = ModelSettings.embed_channels,
        encode: nn.Module | None = None,
        decode: nn.Module | None = None,
        predict: nn.Module | None = None,
        embed: nn.Module | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in MODEL_ARGUMENTS}
        # Pyro's example says by an empty list that there are no such layers.
        layers = {"embed_net": embed_net or None, "embed_channels": embed_channels or None}
        s = ModelSettings(**{**given, **layers})
        super().__init__()
        self.num_steps = s.num_steps
        self.z_what_size = z_what_size = s.z_what_size
        self.x_size = s.x_size
        self.window_size = s.window_size
        self.channels = s.channels
        self.use_masking = s.use_masking
        self.use_baselines = s.use_baselines
        self.baseline_scalar = 1.0 if s.baseline_scalar is None else s.baseline_scalar
        self.guide_input = s.guide_input
        covers, bounded = s.background_model != "none", s.decoder_output_use_sigmoid
        self.likelihood = make_likelihood(s.likelihood, s.likelihood_sd, bounded, covers)
        self.default_continue_probs = geometric_count_prior(DEFAULT_COUNT_RATIO, s.num_steps)

        # Constants of the model, kept with the weights as Pyro's example does.
        where_loc = (s.scale_prior_mean, s.pos_prior_mean, s.pos_prior_mean)
        where_scale = (s.scale_prior_sd, s.pos_prior_sd, s.pos_prior_sd)
        self.register_buffer("z_where_loc_prior", torch.tensor([*map(float, where_loc)]))
        self.register_buffer("z_where_scale_prior", torch.tensor([*map(float, where_scale)]))
        nl: type[nn.Module] = getattr(nn, s.non_linearity)
        window_pixels, image_pixels = s.channels * s.window_size**2, s.channels * s.x_size**2
        hidden = s.rnn_hidden_size
        embed_layers = s.embed_channels or (), s.embed_net or (), nl
        latent_size = Z_WHERE_SIZE + z_what_size + Z_PRES_SIZE

        # The generative model.
        opacity_pixels = s.window_size**2 if covers else 0
        output = s.decoder_output_bias, s.decoder_output_use_sigmoid, nl, opacity_pixels
        self.decode: nn.Module = Decoder(window_pixels, s.decoder_net, z_what_size, *output)
        self.background = Background(s, nl) if covers else None
        # The inference network.
        self.glimpse = Glimpse(s) if s.guide_input == "glimpse" else None
        seen = s.x_size if self.glimpse is None else self.glimpse.side
        self.embed = make_embed(s.channels, seen, *embed_layers) if embed is None else embed
        embedded_size = arguments.embedding_size(self.embed, s.channels * seen**2)
        self.rnn = ImageLSTMCell(embedded_size, latent_size, hidden)
        self.predict: nn.Module = Predict(hidden, s.predict_net, Z_PRES_SIZE, Z_WHERE_SIZE, nl)
        self.encode: nn.Module = Encoder(window_pixels, s.encoder_net, z_what_size, nl)
        self.h_init = nn.Parameter(torch.zeros(1, hidden))
        self.c_init = nn.Parameter(torch.zeros(1, hidden))
        self.z_where_init = nn.Parameter(torch.zeros(1, Z_WHERE_SIZE))
        self.z_what_init = nn.Parameter(torch.zeros(1, z_what_size))
        # The baseline.
        self.bl_embed = make_embed(s.channels, s.x_size, *embed_layers)
        if embed is not None and self.glimpse is None:
            self.bl_embed = copy.deepcopy(embed)
        bl_size = arguments.embedding_size(self.bl_embed, image_pixels)
        self.bl_rnn = ImageLSTMCell(bl_size, latent_size, hidden)
        self.bl_predict = MLP(hidden, [*s.bl_predict_net, 1], nl)
        self.bl_h_init = nn.Parameter(torch.zeros(1, hidden))
        self.bl_c_init = nn.Parameter(torch.zeros(1, hidden))
        # Nets of one's own, which take the places of those above.
        for name, net, in_size, out_sizes in (
            ("encode", encode, window_pixels, [z_what_size, z_what_size]),
            ("decode", decode, z_what_size, [window_pixels + opacity_pixels]),
            ("predict", predict, hidden, [Z_PRES_SIZE, Z_WHERE_SIZE, Z_WHERE_SIZE]),
        ):
            if net is not None:
                arguments.check_net(name, net, in_size, out_sizes)
                setattr(self, name, net)
        if use_cuda:
            self.cuda()

    @classmethod
    def from_settings(cls, settings: ModelSettings, nets: NetFactory | None = None) -> "AIR":
        """An AIR with these settings, and with the nets that `nets` makes for them."""
        own_nets: dict[str, Any] = dict(nets(settings)) if nets else {}
        return cls(**as_arguments(settings), **own_nets)

    # The generative model, section 2.

    def model(
        self,
        data: Tensor,
        batch_size: int | None = None,
        z_pres_prior_p: PresencePrior | None = None,
        num_images: int | None = None,
    ) -> None:
        """p(x, z). See `guide` for the arguments."""
        arguments.check_call(data, batch_size, z_pres_prior_p, num_images)
        register_parameters(self)
        with pyro.plate("data", num_images or len(data), device=str(data.device)) as ix:
            images = self.to_images(data[ix])
            _, canvas = self._draw_scenes(len(images), z_pres_prior_p)
            pixel_dist = self.likelihood.distribution(canvas.flatten(1))
            pyro.sample("obs", pixel_dist.to_event(1), obs=images.flatten(1))

    def prior(self, n: int, z_pres_prior_p: PresencePrior | None = None) -> tuple[Latents, Tensor]:
        """Draws n scenes: the latents (z_where, z_pres) and the canvases, [n, (C,) H, H].

        On black, Normal intensities add where objects overlap, so that a canvas can exceed one.

        Raises:
            ValueError: If `n` is negative, or the prior is no function from steps to probabilities.
        """
        arguments.check_whole("n", n, 0)
        arguments.refuse_outer_plates(batch=n)
        register_parameters(self)
        return self._draw_scenes(n, z_pres_prior_p)

    def _draw_scenes(self, n: int, z_pres_prior_p: PresencePrior | None) -> tuple[Latents, Tensor]:
        continue_p = self.continue_probs(z_pres_prior_p)
        behind = self.sample_background(n)
        z_pres = self.h_init.new_ones(n, Z_PRES_SIZE)
        objects, all_pres = [], []
        for t in range(self.num_steps):
            pres = Presence(continue_p[t] * z_pres)
            z_pres = pyro.sample(f"z_pres_{t}", self._masked(pres, z_pres))
            objects.append(self.sample_object(t, z_pres))
            all_pres.append(z_pres)
        all_where, all_what = map(list, zip(*objects, strict=True))
        painted = self.paint(all_where, all_what)
        canvas = self.likelihood.compose(painted, torch.cat(all_pres, 1).t(), behind)
        return (all_where, all_pres), canvas

    def continue_probs(self, z_pres_prior_p: PresencePrior | None) -> Sequence[float | Tensor]:
        """The prior probability of a further object at each step."""
        if z_pres_prior_p is None:
            return self.default_continue_probs
        return probs_of_steps(z_pres_prior_p, self.num_steps)

    def sample_background(self, n: int) -> Tensor | None:
        """p(z_background): n backgrounds, [n, (C,) H, H]; None for a black one, without a site."""
        return None if self.background is None else self.background.model(self.h_init, n)

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
        arguments.check_as_many(z_where=z_where, z_what=z_what)
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
                `default_continue_probs`.
            num_images: Size of the whole data set if `data` is one batch of it; None for len(data).

        Returns:
            (z_where, z_pres): lists over steps of [B, 3] and [B, 1].

        Raises:
            ValueError: If an argument cannot be used, or a plate vectorises the call (particles).
        """
        arguments.check_call(data, batch_size, z_pres_prior_p, num_images)
        register_parameters(self)
        size = num_images or len(data)
        indices = subsample_indices(data, batch_size, num_images)
        with pyro.plate("data", size, subsample=indices, device=str(data.device)) as ix:
            images = self.to_images(data[ix])
            n = len(images)
            canvas = None if self.background is None else self.background.guide(images)
            inputs = self._embed_images(images, canvas, size / n)
            initial_state = GuideState(
                self.h_init.new_ones(n, Z_PRES_SIZE),
                self.z_where_init.expand(n, -1),
                self.z_what_init.expand(n, -1),
                (self.h_init.expand(n, -1), self.c_init.expand(n, -1)),
                (self.bl_h_init.expand(n, -1), self.bl_c_init.expand(n, -1)),
            )
            state = initial_state
            states = []
            for t in range(self.num_steps):
                if t > 0 and self.guide_input != "image":
                    painted = self.paint([state.z_where], [state.z_what])
                    present = self._detach_presence(state.z_pres).t()
                    canvas = self.likelihood.compose(painted, present, canvas)
                    inputs = self._embed_images(images, canvas, size / n)
                    state = initial_state._replace(z_pres=state.z_pres)
                state = self._guide_step(t, state, inputs)
                states.append(state)
            return [state.z_where for state in states], [state.z_pres for state in states]

    def _embed_images(self, images: Tensor, canvas: Tensor | None, scale: float) -> GuideInputs:
        """Multiplies images, less the canvas (None: black), by the LSTMs' weights, once a pass."""
        images = images if canvas is None else images - canvas
        flat, where = images.flatten(1), (self.z_where_loc_prior, self.z_where_scale_prior)
        # Detached: the baseline's regression must not train the inference network.
        bl_rnn = self.bl_rnn.project(self.bl_embed(flat.detach())) if self.use_baselines else None
        if self.glimpse is not None:
            flat, where = self.glimpse(images)
        return GuideInputs(images, self.rnn.project(self.embed(flat)), bl_rnn, where, scale)

    def _guide_step(self, t: int, prev: GuideState, inputs: GuideInputs) -> GuideState:
        """q(z_pres_t, z_where_t, z_what_t | x, z_<t), and the baseline of z_pres_t."""
        latents = (prev.z_where, prev.z_what, self._detach_presence(prev.z_pres))
        rnn = self.rnn(inputs.rnn, latents, prev.rnn)
        pres_p, loc, scale = self.predict(rnn[0])
        infer, bl_rnn = self._baseline_step(latents, prev, inputs)
        pres = Presence(pres_p * prev.z_pres)
        z_pres = pyro.sample(f"z_pres_{t}", self._masked(pres, prev.z_pres), infer=infer)
        where = dist.Normal(inputs.where[0] + loc, inputs.where[1] * scale)
        z_where = pyro.sample(f"z_where_{t}", self._masked(where, z_pres))
        window = image_to_window(z_where, self.window_size, self.x_size, inputs.images)
        code = dist.Normal(*self.encode(window))
        z_what = pyro.sample(f"z_what_{t}", self._masked(code, z_pres))
        return GuideState(z_pres, z_where, z_what, rnn, bl_rnn)

    def _baseline_step(
        self, latents: tuple[Tensor, ...], prev: GuideState, inputs: GuideInputs
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
        value = value * (inputs.cost_scale * self.baseline_scalar)
        return {"baseline": {"baseline_value": value.squeeze(-1)}}, state

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
            batch: uint8 in [0, 255], bool, or floats in [0, 1]. The range of floats is checked
                while Pyro's validation is enabled, as it is by default.

        Raises:
            ValueError: If the images have another shape, type or range.
        """
        images = as_batch(batch, self.channels, self.x_size)
        return self.likelihood.prepare(to_intensities(images, self.h_init.dtype))

    def check_images(self, images: Tensor) -> None:
        """Checks the shape, type and range of images, [N, (C,) H, H]; reads from the device.

        Raises:
            ValueError: If `to_images` cannot take them.
        """
        check_range(as_batch(images, self.channels, self.x_size))
