"""Where results that are dear to compute are kept between runs, and the names they are kept under."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def user_cache() -> pathlib.Path:
    """Return minimand's folder in the user's cache (``XDG_CACHE_HOME``, else ``~/.cache``); it may not exist yet."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "minimand"


@contextlib.contextmanager
def arriving(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Write a file or folder under another name first, so that nobody ever finds half of it.

    Args:
        path: Where the result belongs; its folder is made.

    Yields:
        Where to write. On success that moves to ``path``, replacing a file; a folder that another process put there
        meanwhile stays. On failure what was written goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        draft = folder / path.name
        yield draft
        if draft.is_dir() and path.exists():
            return
        os.replace(draft, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Compute a fingerprint of named tensors: their names, dtypes, shapes and every byte of them.

    Args:
        tensors: Such as a module's ``state_dict().items()``; on any device.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        # A tensor of one element may have any stride and still count as contiguous; bytes want a stride of 1.
        flat = torch.cat([tensor.detach().reshape(-1)])
        raw: Any = flat.view(torch.uint8).cpu().numpy() if flat.numel() else b""
        digest.update(raw)
    return digest.hexdigest()
