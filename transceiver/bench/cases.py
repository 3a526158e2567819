"""What `trtllm-serve kv-bench` measures: shapes of models, layouts of owners and readers, and sizes."""

from dataclasses import dataclass, replace

import msgspec

from diptych.errors import ConfigError
from diptych.kv_layout import KvLayout

SHAPES = {
    "8b": KvLayout(num_layers=32, num_kv_heads=8, head_dim=128, tokens_per_block=32, model="8b"),
    "135m": KvLayout(num_layers=30, num_kv_heads=3, head_dim=64, tokens_per_block=32, model="135m"),
}
TOKENS = (128, 256, 512, 2048, 8192, 32768)
_SPARE = 1.25  # pools are larger than what is copied, so that its blocks lie scattered
_PROGRAMS = (8, 16, 64, 128)
_DEFAULT_PROGRAMS = 32


@dataclass(frozen=True, slots=True)
class Case:
    """`owner` and `reader` name entries of a `Plan`'s layouts."""

    name: str
    transport: str
    owner: str
    reader: str
    tokens: int
    digest: bool = True
    programs: int = _DEFAULT_PROGRAMS


@dataclass(frozen=True, slots=True)
class Suite:
    cases: tuple[Case, ...]
    layouts: dict[str, list[KvLayout]]  # of all ranks

    def num_blocks(self, layout: KvLayout) -> int:
        num_tokens = max(case.tokens for case in self.cases if layout in self._layouts_of(case))
        return -(-int(num_tokens * _SPARE) // layout.tokens_per_block)

    def _layouts_of(self, case: Case) -> list[KvLayout]:
        return self.layouts[case.owner] + self.layouts[case.reader]


def suite(
    shape: str,
    tokens: tuple[int, ...],
    transports: tuple[str, ...],
    *,
    on_gpu: bool,
    per_layer: bool = False,
) -> Suite:
    """`per_layer`: also a pool that keeps each layer of a block elsewhere, as most engines do."""
    whole = SHAPES.get(shape)
    if whole is None:
        raise ConfigError(f"--shape is {shape!r}, allowed are {', '.join(SHAPES)}")
    layer = msgspec.structs.replace(whole, num_layers=1)
    layouts = {
        "TP1": [whole],
        "layers": [layer],
        "16 tokens": [msgspec.structs.replace(whole, tokens_per_block=16)],
    }
    if whole.num_kv_heads % 2 == 0:
        layouts["TP2"] = [_half(whole, rank) for rank in range(2)]
    cases: list[Case] = []
    for transport in transports:
        for count in tokens:
            case = Case("scrambled", transport, "TP1", "TP1", count)
            cases += [case, replace(case, name="scrambled, no digest", digest=False)]
            if per_layer:  # the same bytes; a token of a layer is a token of this pool
                pieces = count * whole.num_layers
                cases.append(
                    replace(case, name="layer by layer", owner="layers", reader="layers", tokens=pieces)
                )
            if on_gpu and transport == "cuda_ipc":
                cases += _of_gpus(case, with_halves="TP2" in layouts)
    used = {case.owner for case in cases} | {case.reader for case in cases}
    return Suite(tuple(cases), {name: ranks for name, ranks in layouts.items() if name in used})


def _of_gpus(case: Case, *, with_halves: bool) -> list[Case]:
    cases = [replace(case, name="32 to 16 tokens a block", reader="16 tokens")]
    if with_halves:
        cases.append(replace(case, name="TP2 to TP1", owner="TP2"))
        cases.append(replace(case, name="TP1 to TP2, one rank", reader="TP2"))
    if case.tokens in (2048, 8192):
        cases += [replace(case, name=f"{count} programs", programs=count) for count in _PROGRAMS]
    return cases


def _half(whole: KvLayout, rank: int) -> KvLayout:
    heads = whole.num_kv_heads // 2
    return msgspec.structs.replace(
        whole, num_kv_heads=heads, total_kv_heads=2 * heads, tp_rank=rank, tp_size=2
    )
