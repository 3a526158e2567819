"""FP8 checkpoints in every published layout, made of plain ones; the plain one of the same numbers beside each."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from diptych.worker.models.fp8_weights import FP8, FP8_MAX
from diptych.worker.precision import with_precision
from diptych.worker.settings import EngineSettings

CPU = torch.device("cpu")
BLOCK = (48, 32)  # divides neither the inputs nor the outputs of all projections
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed(strategy, activations, **weights):
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**FLOAT8, "strategy": strategy, "dynamic": False, **weights},
                "input_activations": {**FLOAT8, **activations},
            }
        },
    }


MODELOPT = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
# What config.json says (None: hf_quant_config.json does), what has a scale, the scale's shape for one of all
# outputs, and its name.
LAYOUTS = {
    "modelopt": (None, "tensor", (), "weight_scale"),
    "modelopt_inside": ({"quant_method": "modelopt", **MODELOPT}, "tensor", (1,), "weight_scale"),
    "modelopt_rows": (
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        "row",
        (-1,),
        "weight_scale",
    ),
    "fp8_static": ({"quant_method": "fp8", "activation_scheme": "static"}, "tensor", (), "weight_scale"),
    "fp8_dynamic": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "tensor", (1,), "weight_scale"),
    "fp8_blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)},
        "block",
        None,
        "weight_scale_inv",
    ),
    "compressed_tensor": (
        compressed("tensor", {"strategy": "tensor", "dynamic": False}),
        "tensor",
        (1,),
        "weight_scale",
    ),
    "compressed_channel": (
        compressed("channel", {"strategy": "token", "dynamic": True}),
        "row",
        (-1, 1),
        "weight_scale",
    ),
    "compressed_block": (
        compressed("block", {"strategy": "group", "dynamic": True}, block_structure=list(BLOCK)),
        "block",
        None,
        "weight_scale",
    ),
}


def scales_of(weight, kind):
    """The scale of every element, and the scales alone."""
    size = {"tensor": weight.shape, "row": (1, weight.shape[1]), "block": BLOCK}[kind]
    counts = [-(-whole // part) for whole, part in zip(weight.shape, size, strict=True)]
    spread = torch.empty_like(weight, dtype=torch.float32)
    scales = torch.empty(counts)
    for row in range(counts[0]):
        for column in range(counts[1]):
            here = (
                slice(row * size[0], (row + 1) * size[0]),
                slice(column * size[1], (column + 1) * size[1]),
            )
            scales[row, column] = spread[here] = weight[here].float().abs().max() / FP8_MAX
    return spread, scales


def quantize(path, layout, *, skip="layers.1.mlp"):
    """Turns a plain checkpoint into an FP8 one, and gives back a plain one with the same numbers.

    The projections of `skip` stay as they are, as an exception list would have it; of the second layer's merged
    projections only one is quantized.
    """
    config, kind, shape, name = LAYOUTS[layout]
    tensors = load_file(path / "model.safetensors")
    plain, narrow = dict(tensors), {}
    for key, weight in tensors.items():
        if "_proj.weight" not in key or skip in key or "layers.2.self_attn.k" in key:
            continue
        spread, scales = scales_of(weight, kind)
        narrow[key] = (weight.float() / spread).to(FP8)
        plain[key] = (narrow[key].float() * spread).to(weight.dtype)
        stem = key.removesuffix("weight")
        narrow[stem + name] = scales if shape is None else scales.reshape(shape)
        narrow[stem + "input_scale"] = torch.tensor(0.01)
    other = path.parent / "plain"
    shutil.copytree(path, other)
    save_file(plain, other / "model.safetensors")
    save_file({**tensors, **narrow}, path / "model.safetensors")
    describe(path, config)
    return other


def describe(path, config, **modelopt):
    if config is None:
        text = json.dumps({"producer": {"name": "modelopt"}, "quantization": {**MODELOPT, **modelopt}})
        (path / "hf_quant_config.json").write_text(text)
    else:
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))


def add_kv_scales(path, names, *scales):
    tensors = load_file(path / "model.safetensors")
    for layer in range(3):
        for name, scale in zip(names, scales, strict=True):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor(scale * (layer + 1))
    save_file(tensors, path / "model.safetensors")


def settled(config, kv="auto", **settings):
    settings = EngineSettings(model_path="m", incarnation="me", kv_dtype=kv, **settings)
    return with_precision(config, settings, CPU)
