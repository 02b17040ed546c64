"""Randomness as an argument: every choice is drawn from a seed derived from (run seed, purpose, round, client)."""
# SPDX-License-Identifier: Apache-2.0

import hashlib


def derive_seed(seed: int, *path: str | int) -> int:
    """A 63-bit seed for one purpose, the same on every machine and in every process.

    `path` says what the randomness is for, e.g. `derive_seed(0, "batches", round, client_id)`. Two different
    paths give unrelated seeds, so no draw depends on how many draws were made before it.
    """
    text = "\x1f".join([str(int(seed)), *(f"{type(part).__name__}:{part}" for part in path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
