"""Which images each public function accepts, and its errors for all other images."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from helpers import SETTINGS, capture_only, make_svi, small_air
from pyro.infer import SVI as PyroSVI
from pyro.infer import TraceGraph_ELBO
from torch import Tensor

from air import AIR
from air.evaluation import HeldOut, evaluate, importance_weighted_bound, sample_elbo
from air.evaluation.alarms import empty_canvas_elbo
from air.inference import infer, mean_count_probs
from air.marginal import MarginalAIR
from air.support.images import to_tensor
from air.training.trainer import Trainer

BYTES = torch.arange(288).remainder(256).reshape(2, 12, 12).to(torch.uint8)
GOOD = BYTES / 255


def train(air: AIR, images: Tensor, held_out: Tensor = GOOD) -> Trainer:
    return Trainer(air, images, HeldOut(held_out), replace(SETTINGS, num_steps=1))


def with_pyros_svi(air: AIR, images: Tensor, program: Any = None) -> None:  # noqa: ANN401
    program = program or air
    adam = pyro.optim.Adam({"lr": 0.01})
    PyroSVI(program.model, program.guide, adam, TraceGraph_ELBO()).step(images)


IN_A_STEP: list[Callable[[AIR, Tensor], Any]] = [
    lambda air, images: air.to_images(images),
    lambda air, images: air.model(images),
    lambda air, images: air.guide(images),
    lambda air, images: MarginalAIR(air).guide(images),
    with_pyros_svi,
    lambda air, images: with_pyros_svi(air, images, MarginalAIR(air)),
]
DOORS: list[Callable[[AIR, Tensor], Any]] = [
    infer,
    mean_count_probs,
    sample_elbo,
    empty_canvas_elbo,
    lambda air, images: importance_weighted_bound(air, images, 1),
    lambda air, images: evaluate(air, HeldOut(images)),
    train,
    lambda air, images: train(air, GOOD, images),
]


@pytest.mark.parametrize("door", IN_A_STEP + DOORS)
def test_every_door_refuses_other_types(door: Callable[[AIR, Tensor], Any], air: AIR) -> None:
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="got int16; convert "):
        door(air, BYTES.to(torch.int16))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("validation", [True, False])
def test_every_door_refuses_floats_outside_0_to_1(
    door: Callable[[AIR, Tensor], Any], validation: bool, air: AIR
) -> None:
    with (
        pyro.validation_enabled(validation),
        pytest.raises(ValueError, match="from 0 to 255; divide by 255"),
    ):
        door(air, GOOD * 255)


@pytest.mark.parametrize("step", IN_A_STEP)
def test_a_step_checks_the_range_while_pyro_validates(
    step: Callable[[AIR, Tensor], Any], air: AIR
) -> None:
    with pytest.raises(ValueError, match="divide by 255"):
        step(air, GOOD * 255)
    with pyro.validation_enabled(False):
        step(air, GOOD * 255)


def test_the_range_check_breaks_no_capturing() -> None:
    svi: Any = make_svi(small_air(num_steps=1), compiler=capture_only)
    with pyro.validation_enabled(False):
        svi.step(GOOD)
    assert None not in svi._compiled.values()
    with torch.device("meta"):
        small_air().to_images(torch.rand(2, 12, 12))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]
)
def test_floats_of_every_type_are_taken(dtype: torch.dtype, air: AIR) -> None:
    images = GOOD.to(dtype)
    assert torch.equal(air.to_images(images), images.to(torch.float32))
    infer(air, images)
    overshoot = GOOD.float() * 1.015 - 0.0075  # as resampling leaves it
    assert torch.equal(air.to_images(overshoot), overshoot)


def test_bool_is_0_and_1_and_uint8_is_up_to_255(air: AIR) -> None:
    mask = BYTES > 100
    assert torch.equal(air.to_images(mask), mask.float())
    assert torch.equal(air.to_images(BYTES), BYTES.float() / 255)
    assert torch.equal(air.to_images(GOOD.double()[:, None]), GOOD)
    colours = BYTES[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(small_air(channels=3).to_images(colours[:, None]), colours / 255)
    for door in IN_A_STEP + DOORS:
        door(air, mask)
    for first, second in zip(infer(air, mask), infer(air, mask.float()), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    "array",
    [
        GOOD.numpy(),
        BYTES.numpy(),
        BYTES.numpy()[:, ::-1, ::-1],
        BYTES.numpy() > 9,
        GOOD.numpy().astype(">f4"),
        GOOD.numpy().astype(np.float64),
        [row.numpy() for row in GOOD],
    ],
)
def test_arrays_are_taken_as_tensors_are(array: Any, air: AIR) -> None:  # noqa: ANN401
    if isinstance(array, np.ndarray):
        array.flags.writeable = False
        # So a memory-mapped array stays in its file.
        can_share = array.dtype.isnative and array.flags.c_contiguous
        assert (to_tensor(array).data_ptr() == array.ctypes.data) == can_share
    tensor = torch.tensor(np.ascontiguousarray(array).astype(np.float64))
    assert torch.equal(to_tensor(array).double(), tensor)
    found = infer(air, array)
    expected = infer(air, to_tensor(array))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert mean_count_probs(air, array) == mean_count_probs(air, to_tensor(array))
    assert evaluate(air, HeldOut(array)) == evaluate(air, HeldOut(to_tensor(array)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (BYTES.numpy().astype(np.uint16), r"expected uint8 in \[0, 255\], .* got uint16; convert"),
        (BYTES.to(torch.int64), "got int64; convert them to one of these"),
        (BYTES.to(torch.complex64), "got complex64; convert them to one of these"),
        (BYTES.numpy().astype(object), "expected a tensor or an array of numbers, got object"),
        ("a.png", "expected a tensor or an array of numbers, got str"),
        (None, "expected a tensor or an array of numbers, got NoneType"),
        (GOOD[0], r"images must be \['B', 12, 12\], got \[12, 12\]; make a batch of a single"),
        (GOOD[:, :11], r"images must be \['B', 12, 12\], got \[2, 11, 12\]$"),
        (GOOD[:, None, None], r"images must be \['B', 12, 12\], got \[2, 1, 1, 12, 12\]$"),
        ([], r"images must be \['B', 12, 12\], got \[0\]"),
        (torch.tensor(0.5), r"images must be \['B', 12, 12\], got \[\]"),
        (GOOD * 65535, r"images: expected floats in \[0, 1\], got .* 6\.\S+; divide by 65535"),
        (GOOD * 2 - 1, "from -1 to 1; subtract the least value and divide by the range"),
        (GOOD - 0.1, "from -0.1 to 0.9; subtract the least value"),
        (GOOD.where(GOOD > 0, torch.nan), "from nan to nan; replace NaN and infinite values"),
        (GOOD.where(GOOD < 1, torch.inf), "to inf; replace NaN and infinite values"),
        ((GOOD * 255).half(), "divide by 255"),
    ],
)
def test_what_are_no_images_is_refused(images: Any, message: str, air: AIR) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=message):
        infer(air, images)


def test_a_single_image_with_channels_needs_a_batch_axis() -> None:
    with pytest.raises(ValueError, match=r"\['B', 3, 12, 12\], got \[3, 12, 12\]; make a batch"):
        infer(small_air(channels=3), torch.rand(3, 12, 12))


def test_images_go_to_the_device_of_the_model() -> None:
    air = small_air()
    moved: list[str] = []

    class Elsewhere(Tensor):
        """Stands in for a tensor on another device."""

        @classmethod
        def __torch_function__(cls, func: Any, *arguments: Any) -> Any:  # noqa: ANN401
            if func is Tensor.to:
                moved.extend(str(each) for each in arguments[1] if isinstance(each, torch.device))
            return super().__torch_function__(func, *arguments)

    infer(air, GOOD.as_subclass(Elsewhere))
    assert set(moved) == {"cpu"}


@pytest.mark.parametrize("images", [GOOD.numpy(), [GOOD], None])
def test_training_takes_tensors_alone(images: Any, air: AIR) -> None:  # noqa: ANN401
    for door in (AIR.to_images, AIR.model, AIR.guide):
        with pytest.raises(ValueError, match=r"expected .*torch.Tensor, got \w+; use torch.as_"):
            door(air, images)
