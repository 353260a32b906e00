"""Bits per byte that xz makes of the held-out text once it has seen the training text.

    python experiments/xz_baseline.py        # 40 s on one core

    xz -9   1.9349 bits per byte             # what it printed for the pinned text packages
    xz -9e  1.9354 bits per byte

The score is 8 * (len(xz(train + held_out)) - len(xz(train))) / len(held_out): what the held-out text costs a
compressor whose 64 MiB dictionary holds all of the training text. Nothing is put between documents.
"""

import lzma
import sys

from dsv4.training.corpus import load_corpus, split

PRESETS = {"xz -9": 9, "xz -9e": 9 | lzma.PRESET_EXTREME}


def bits_per_byte(train: bytes, held_out: bytes, preset: int) -> float:
    """Extra bits for each byte of `held_out` when it is compressed after `train`."""
    alone = len(lzma.compress(train, preset=preset))
    both = len(lzma.compress(train + held_out, preset=preset))
    return 8 * (both - alone) / len(held_out)


def main() -> None:
    """Prints one line for each preset."""
    train, held_out = ("".join(documents).encode() for documents in split(load_corpus()))
    print(f"train {len(train):,} bytes, held out {len(held_out):,} bytes", file=sys.stderr)
    for name, preset in PRESETS.items():
        print(f"{name:7s} {bits_per_byte(train, held_out, preset):.4f} bits per byte", flush=True)


if __name__ == "__main__":
    main()
