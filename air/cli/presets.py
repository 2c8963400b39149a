"""Presets: a kind of scenes, and the settings that suit it. Keys are those of config.json."""

import math
from collections.abc import Mapping
from typing import Any

from air.training.training_settings import TrainingSettings

_MANY_OBJECTS_AT_FIRST: dict[str, Any] = {
    "z_pres_prior": 0.99,
    "z_pres_prior_raw": True,
    "anneal_prior": "exp",
    "anneal_prior_to": 1e-4,
    "anneal_prior_duration": 1500,
}
_SMALL_OBJECTS: dict[str, Any] = {
    "x_size": 64,
    "sides": [9, 18],
    "num_scenes": 30_000,
    "num_test_scenes": 5000,
    # Windows begin larger than the objects and nearly black, and the prior at first favours using
    # every step. Otherwise the guide gives windows up before they help.
    "window_size": 18,
    "scale_prior_mean": 3.0,
    "scale_prior_sd": 1.0,
    "pos_prior_sd": 1.5,
    "decoder_output_bias": -3.0,
    **_MANY_OBJECTS_AT_FIRST,
    "anneal_prior_duration": 1000,
    # A glimpse meets an object from the start, and what is learnt there holds at every place.
    "guide": "glimpse",
    "clip_grad_norm": 100.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    # Convolutions can tell two close digits from one; a single linear layer cannot. But with
    # convolutions and the default prior, AIR puts one window over all digits from the start. A
    # prior that at first favours many objects prevents this. Larger digits than the default ones
    # need a lower scale_prior_mean, or two windows share a digit (tests/benchmarks/README.md).
    "close-digits": {
        "embed_channels": [16, 32, 32],
        "embed_net": [256],
        **_MANY_OBJECTS_AT_FIRST,
        "lr_schedule": "cosine",
        "added_scenes": 100.0,
    },
    # With the default prior, one object covers two digits from the start and stays there. The prior
    # begins to fall when the first objects are learnt.
    "background": {
        "num_steps": 5000,
        "background": "gradient",
        "background_model": "vae",
        **_MANY_OBJECTS_AT_FIRST,
        "anneal_prior_begin": TrainingSettings.background_steps,
        "lr_schedule": "cosine",
    },
    # Glimpses meet every object from the start. With the default likelihood_sd, small thin digits
    # explain so few nats that AIR overlooks them. Settings that follow from the scenes are added by
    # `_from_scenes`.
    "many": {
        "num_steps": 3000,
        "counts": [0, 1, 2, 3, 4, 5],
        "x_size": 64,
        "sides": [12, 16],
        "min_gap": 0.0,
        "num_scenes": 30_000,
        "num_test_scenes": 5000,
        "scale_prior_sd": 0.5,
        "likelihood_sd": 0.2,
        **_MANY_OBJECTS_AT_FIRST,
        "anneal_prior_duration": 1000,
        "guide": "glimpse",
        "embed_net": [200],
        "clip_grad_norm": 100.0,
        "lr_schedule": "cosine",
    },
    # With the annealed prior, AIR overlooks the smallest digits; with a learnt prior, it adds blank
    # windows between two digits until the learning rate has fallen.
    "small-digits": {
        **_SMALL_OBJECTS,
        "recipe": "air",
        "num_steps": 3000,
        "binary": True,
        "learn_count_prior_from": 1500,
        "lr_schedule": "cosine",
    },
    # Three bright channels explain so much that with the default likelihood_sd AIR would use
    # several windows for one object. Without the embedding, the LSTM would be slow.
    "dsprites": {
        **_SMALL_OBJECTS,
        "num_steps": 2000,
        "recipe": "dsprites",
        "rotation": 180.0,
        "likelihood_sd": 0.5,
        "embed_net": [200],
    },
}


def preset_settings(name: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a preset by key, where `given` are those on the command line."""
    preset = PRESETS.get(name or "", {})
    return preset | _from_scenes({**preset, **given}) if name == "many" else preset


def _from_scenes(scenes: Mapping[str, Any]) -> dict[str, Any]:
    """Steps, and a window that is a little larger than the largest object.

    One step more than the most objects lets a model show that it counts too many.
    """
    window = 1.15 * max(scenes["sides"])
    scale = scenes.get("scale_prior_mean", max(1.0, scenes["x_size"] / window))
    return {
        "model_steps": max(scenes["counts"]) + 1,
        "window_size": round(min(max(window, 10), 28)),
        "scale_prior_mean": round(scale, 2),
        "pos_prior_sd": round(scale / math.sqrt(3), 2),  # that of places all over the image
    }
