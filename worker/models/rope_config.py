"""Reads rotary embedding settings from config.json, in the spelling of transformers 4 and of transformers 5.

4: `rope_theta` beside `rope_scaling: {"type" or "rope_type": ..., "factor": ...}`; 5: all in
`rope_parameters`.
"""

import math
from collections.abc import Mapping
from typing import Any, get_args

from diptych.errors import ModelLoadError
from diptych.worker.models.config import RopeConfig, RopeKind


def read_rope(config: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    values = _merged(config)
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in get_args(RopeKind):
        raise ModelLoadError(
            f"RoPE type {kind!r} is not supported; supported are {', '.join(get_args(RopeKind))}."
        )
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelLoadError(
            f"partial_rotary_factor is {values['partial_rotary_factor']}; only 1.0 (whole heads) is "
            "supported."
        )
    theta = float(values.get("rope_theta") or 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    original = int(values.get("original_max_position_embeddings") or max_position_embeddings)
    factor = values.get("factor")
    if factor is None and kind == "yarn":
        factor = max_position_embeddings / original
    if factor is None:
        raise ModelLoadError(f"RoPE type {kind!r} needs a 'factor', and config.json gives none.")
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=float(factor),
        original_max_positions=max_position_embeddings if kind == "dynamic" else original,
        low_freq_factor=float(values.get("low_freq_factor") or 1.0),
        high_freq_factor=float(values.get("high_freq_factor") or 4.0),
        beta_fast=float(values.get("beta_fast") or 32.0),
        beta_slow=float(values.get("beta_slow") or 1.0),
        truncate=bool(values.get("truncate", True)),
        attention_factor=_yarn_attention_factor(values, float(factor)) if kind == "yarn" else 1.0,
    )


def _merged(config: Mapping[str, Any]) -> dict[str, Any]:
    """One flat mapping, the nested spelling winning over the top level."""
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in nested.values()):
        raise ModelLoadError("rope_parameters differ between layer types, which is not supported.")
    keys = ("rope_theta", "partial_rotary_factor")
    top = {key: config[key] for key in keys if config.get(key) is not None}
    if config.get("original_max_position_embeddings") is not None:
        # Where both places give it, the top level is the trained length.
        nested = {**nested, "original_max_position_embeddings": config["original_max_position_embeddings"]}
    return {**top, **nested}


def _yarn_attention_factor(values: Mapping[str, Any], factor: float) -> float:
    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])
    mscale, mscale_all_dim = values.get("mscale"), values.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return yarn_mscale(factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """The YaRN paper's attention temperature, as a factor on cos and sin."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
