"""What a directory of peers holds, and which version that is: found in its files, without torch or a GPU."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

FLASHMLA = "_flashmla_C.abi3.so"
DEEPGEMM = "deep_gemm"
_DEEPGEMM_INIT = f"{DEEPGEMM}/__init__.py"
VERSION = re.compile(r"""^__version__\s*=\s*["']([^"']+)["']""", re.MULTILINE)


def missing(directory: Path) -> list[str]:
    """The peers that are not in `directory`, by what they unpack to."""
    places = {DEEPGEMM: _DEEPGEMM_INIT, FLASHMLA: FLASHMLA}
    return [name for name, place in places.items() if not (directory / place).is_file()]


def require(directory: Path) -> None:
    """Raises ValueError where `directory` holds neither peer; where one alone is missing, its rows say so."""
    if not directory.is_dir():
        found = "it is no directory"
    elif len(missing(directory)) == 2:
        held = sorted(path.name for path in directory.iterdir())
        found = f"it holds {', '.join(held[:8])}{' ...' if len(held) > 8 else ''}" if held else "it is empty"
    else:
        return
    raise ValueError(
        f"no peer in {directory}: {found}. It takes the folder {DEEPGEMM} (DeepGEMM) and the file {FLASHMLA} "
        "(FlashMLA), which vllm's wheel (0.25.0 was used) has as vllm/third_party/deep_gemm and "
        "vllm/_flashmla_C.abi3.so; unpack them and name the directory that they are in"
    )


@functools.cache
def version(directory: Path, kind: str) -> str | None:
    """Which peer knows `kind` and what tells it from others: its version if it says one, and a digest of its binary.

    None where it is not there.
    """
    name = FLASHMLA if kind == "flashmla" else DEEPGEMM
    if name in missing(directory):
        return None
    if name == FLASHMLA:
        return f"FlashMLA {_digest([directory / FLASHMLA])}"
    said = VERSION.search((directory / _DEEPGEMM_INIT).read_text())
    digest = _digest(sorted((directory / DEEPGEMM).glob("*.so")))
    return f"DeepGEMM {f'{said[1]} ' if said else ''}{digest}"


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return f"sha256:{digest.hexdigest()[:12]}"
