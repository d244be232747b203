"""Names of GPUs: what was typed, told among the names that clouds use, and the names that are known at all."""

from __future__ import annotations

import re

VRAM_SLACK = 0.97
"""Of a memory asked for: what is sold as 80 GB is called 80, 79.6 or 81559 MiB."""
_WORD = re.compile(r"[a-z]+[0-9]*[a-z]*|[0-9]+[a-z]*")
_MEMORY = re.compile(r"([0-9]+)g(?:b|ib)?")
NAMES = (
    *("A10", "A16", "A30", "A40", "A100 PCIE", "A100 SXM4", "A100X", "A800 PCIE"),
    *("B200", "B300", "GB200", "GH200 SXM", "H100 NVL", "H100 PCIE", "H100 SXM", "H200", "H200 NVL"),
    *("L4", "L40", "L40S", "Tesla P4", "Tesla P40", "Tesla P100", "Tesla T4", "Tesla V100"),
    *("GTX 1060", "GTX 1070", "GTX 1070 Ti", "GTX 1080", "GTX 1080 Ti", "GTX 1650", "GTX 1660", "GTX 1660 Ti"),
    *("RTX 2060", "RTX 2060S", "RTX 2070", "RTX 2070S", "RTX 2080", "RTX 2080S", "RTX 2080 Ti", "Titan V", "Titan Xp"),
    *("RTX 3050", "RTX 3060", "RTX 3060 Ti", "RTX 3070", "RTX 3070 Ti", "RTX 3080", "RTX 3080 Ti", "RTX 3090"),
    *("RTX 3090 Ti", "RTX 4060", "RTX 4060 Ti", "RTX 4070", "RTX 4070 Ti", "RTX 4070S", "RTX 4070S Ti", "RTX 4080"),
    *("RTX 4080S", "RTX 4090", "RTX 4090D", "RTX 5060", "RTX 5060 Ti", "RTX 5070", "RTX 5070 Ti", "RTX 5080"),
    *("RTX 5090", "RTX A2000", "RTX A4000", "RTX A4500", "RTX A5000", "RTX A6000", "RTX 2000Ada", "RTX 4000Ada"),
    *("RTX 4500Ada", "RTX 5000Ada", "RTX 5880Ada", "RTX 6000Ada", "Q RTX 4000", "Q RTX 6000", "Q RTX 8000"),
    *("RTX PRO 4000", "RTX PRO 4500", "RTX PRO 5000", "RTX PRO 6000 S", "RTX PRO 6000 WS"),
)
"""As Vast.ai's market spells them, seen there in 2025 and 2026. It lists only what is free, so that a name which stands
in no offer may be a typo or may be rented out; this tells which. A name that is missing here costs a search more."""

_PEAKS = {
    2250.0: ("B200", "B300", "GB200"),
    989.0: ("H100 SXM", "H200", "GH200"),
    835.0: ("H100 NVL",),
    756.0: ("H100 PCIE",),
    504.0: ("RTX PRO 6000",),
    364.0: ("RTX 6000ADA",),
    362.0: ("L40S",),
    312.0: ("A100", "A800"),
    210.0: ("RTX 5090",),
    181.0: ("L40",),
    165.0: ("A30", "RTX 4090"),
    155.0: ("RTX A6000",),
    150.0: ("A40",),
    125.0: ("A10",),
    121.0: ("L4",),
    111.0: ("RTX A5000",),
    71.0: ("RTX 3090",),
}
"""Dense bfloat16 TFLOP/s with sums in float32, by NVIDIA's data sheets; of cards without bfloat16 none."""


def peak_flops(name: str) -> float | None:
    """A GPU's matrix products a second by its data sheet; None where that is not known."""
    known = [(entry, peak) for peak, entries in _PEAKS.items() for entry in entries if is_called(name, None, entry)]
    return max(known, key=lambda each: len(each[0]))[1] * 1e12 if known else None


def words(text: str) -> list[str]:
    """A GPU's name as compared: `RTX_4090`, `rtx 4090` and `RTX4090` are the same."""
    return _WORD.findall(text.lower())


def split(asked: str) -> tuple[str, int | None]:
    """What was typed without the memory in it, and that in GB: `A100 80GB` is the name `A100` and 80."""
    parts = re.split(r"[\s_/-]+", asked)
    memory = [int(found[1]) for part in parts if (found := _MEMORY.fullmatch(part.lower()))]
    return " ".join(part for part in parts if not _MEMORY.fullmatch(part.lower())), memory[0] if memory else None


def is_called(name: str, vram_gb: float | None, asked: str) -> bool:
    """Whether a GPU is the one that was typed; a memory in what was typed counts too."""
    rest, memory = split(asked)
    if memory is not None and (vram_gb is None or abs(vram_gb - memory) > memory * (1 - VRAM_SLACK)):
        return False
    want = words(rest)
    if not want:  # `--gpu "$GPU"` of a variable that is not set means no machine, not any
        return memory is not None
    have = words(name)
    runs = {"".join(have[start:end]) for start in range(len(have)) for end in range(start + 1, len(have) + 1)}
    return "".join(want) in runs or all(any(_is_word(word, other) for other in have) for word in want)


def _is_word(word: str, other: str) -> bool:
    """Whether a word is meant by another: all of it, or all but its number (`sxm` for `sxm5`)."""
    return word == other or (word.isalpha() and other.rstrip("0123456789") == word)


def named(asked: str) -> list[str]:
    """The known names that may be meant by what was typed, whatever memory it names; none for a memory alone."""
    rest, _ = split(asked)
    return [name for name in NAMES if words(rest) and is_called(name, None, rest)]
