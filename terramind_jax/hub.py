"""Published weights: downloaded from the Hugging Face hub, verified, converted once, and read offline afterwards (spec 10.1).

The cache is ``$TERRAMIND_JAX_CACHE``, by default ``~/.cache/terramind_jax``; one folder a repository, one a revision, and in it the
weights as ``.safetensors`` beside a JSON file that says where they are from. The first revision that is downloaded is pinned: it is
what later loads read until ``refresh=True``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from pathlib import Path

import numpy as np

from terramind_jax import zoo
from terramind_jax.convert import files

PIN = "revision"  # file that names the pinned revision


def cache_folder() -> Path:
    return Path(os.environ.get("TERRAMIND_JAX_CACHE") or Path.home() / ".cache" / "terramind_jax")


def weights(entry: zoo.Entry, *, revision: str | None = None, refresh: bool = False) -> dict[str, np.ndarray]:
    """The published state dict of a model, from the cache or else from the hub.

    Args:
      revision: a commit of the repository; None: the pinned one, or the newest if nothing is pinned.
      refresh: look for a newer revision although one is pinned.

    Raises:
      ConnectionError: nothing cached and the hub cannot be reached. ValueError: what came is not what the hub or `zoo.SHA256` states.
      PermissionError: a gated repository. ImportError: the first conversion needs PyTorch.
    """
    folder = _folder(entry.repository)
    wanted = revision or (None if refresh else _pinned(folder))
    cached = _cached(entry, wanted)
    if cached.is_file():
        try:
            return files.read(cached)
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}; delete it, and it is downloaded again.") from None
    path, commit, sha256 = download(entry.repository, entry.file, wanted)
    state = files.read(path)
    _store(folder, commit, entry, state, sha256, pin=revision is None)
    return state


def has_weights(entry: zoo.Entry) -> bool:
    """Whether `weights` needs no network."""
    return _cached(entry, _pinned(_folder(entry.repository))).is_file()


def vocabulary(name: str, *, fetch: bool = True) -> Path | None:
    """The published vocabulary file of ``coords`` or ``caption``, from the cache or else from the hub; None if `fetch` forbids the latter.

    Raises what `weights` raises.
    """
    repository, file = zoo.VOCABULARIES[name]
    folder = _folder(repository)
    pinned = _pinned(folder)
    cached = folder / (pinned or "-") / file
    if cached.is_file() or not fetch:
        return cached if cached.is_file() else None
    path, commit, _ = download(repository, file, pinned)
    try:
        (folder / commit).mkdir(parents=True, exist_ok=True)
        _write_text(folder / commit / file, path.read_text())
        _write_text(folder / PIN, commit)
    except OSError:  # a cache that cannot be written, which `weights` warns of
        return path
    return folder / commit / file


def download(repository: str, file: str, revision: str | None) -> tuple[Path, str, str]:
    """Fetches one file, resuming what an interrupted download left, and verifies it -> (path, commit, SHA-256)."""
    import huggingface_hub
    from huggingface_hub import errors

    where = f"{repository}/{file}"
    try:
        url = huggingface_hub.hf_hub_url(repository, file, revision=revision)
        stated = huggingface_hub.get_hf_file_metadata(url)
        path = Path(huggingface_hub.hf_hub_download(repository, file, revision=stated.commit_hash))
    except errors.GatedRepoError:
        raise PermissionError(f"{where} is gated; ask for access on huggingface.co, then run `hf auth login`.") from None
    except PermissionError as error:
        raise PermissionError(f"The download folder {error.filename} cannot be written; set HF_HOME to one that can.") from None
    except Exception as error:  # every HTTP library has exceptions of its own
        advice = (
            f"without a network, download https://huggingface.co/{repository}/resolve/main/{file} elsewhere and name the file, "
            "with --weights, a tokenizer's folder with --tokenizers; pretrain: --config.train.init, --config.data.tokenizers; "
            "finetune: --config.model.weights, --config.model.tokenizers"
        )
        raise ConnectionError(f"{where} could not be downloaded ({_first_line(error)}); {advice}.") from error
    return path, stated.commit_hash, _verify(path, file, stated.size, stated.etag)


def _verify(path: Path, file: str, size: int | None, etag: str | None) -> str:
    """Checks size and SHA-256; the hub's etag of a large file is its SHA-256."""
    with open(path, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    expected = {zoo.SHA256.get(file), etag if etag and len(etag) == 64 else None} - {None}
    if (size is not None and path.stat().st_size != size) or any(sha256 != value for value in expected):
        os.remove(path.resolve())
        path.unlink(missing_ok=True)
        wanted = f"SHA-256 {sha256}, expected {' and '.join(sorted(expected))}" if expected else f"expected {size} bytes"
        raise ValueError(f"{file} arrived damaged ({wanted}); it was deleted, try again.")
    return sha256


def _folder(repository: str) -> Path:
    return cache_folder() / repository.replace("/", "--")


def _cached(entry: zoo.Entry, revision: str | None) -> Path:
    """Where the converted weights are, if they are there."""
    return _folder(entry.repository) / (revision or "-") / Path(entry.file).with_suffix(files.SAFETENSORS)


def _pinned(folder: Path) -> str | None:
    path = folder / PIN
    return path.read_text().strip() if path.is_file() else None


def _store(folder: Path, commit: str, entry: zoo.Entry, state: dict[str, np.ndarray], sha256: str, *, pin: bool) -> None:
    """Keeps the converted weights; where that is impossible the next load converts again."""
    path = folder / commit / Path(entry.file).with_suffix(files.SAFETENSORS)
    try:
        if not path.is_file():
            with contextlib.suppress(FileExistsError):  # another process was first
                files.write(path, state)
        source = {"repository": entry.repository, "file": entry.file, "revision": commit, "sha256": sha256}
        _write_text(path.with_suffix(".json"), json.dumps(source, indent=1))
        if pin:
            _write_text(folder / PIN, commit)
    except OSError as error:
        warnings.warn(f"The cache {folder} cannot be written ({error.strerror}); the weights are converted again next time.", stacklevel=4)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
