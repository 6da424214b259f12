"""What the reader of pretraining takes and gives, on 48 scenes of the embedded world in TerraMesh's layout, 264 pixels a side.

    python benchmarks/loader.py --out benchmarks/results/loader.md     # about ten minutes
    python benchmarks/loader.py --only rates --root DIR                # the train split of shards that are there

Five tables (`--only` makes one, and `--out` replaces it alone):

``rates``   samples a second and core, as published: eight modalities, batches of 8; the best of three passes of one thread, the page
            cache warm, of two codecs. ``index`` reads pixels by what the index knows, ``zipfile`` the same samples through the zip and
            its metadata, ``decoding alone`` is Blosc on chunks in memory, and ``published`` TerraMesh's own ``terramesh.py`` where that
            can be imported (it needs torch, webdataset, zarr 2, xarray).
``bytes``   read from storage and sent to the device for a training token, counted as they pass.
``ways``    the same in shards, in records of ``data prepare``, and mapped into memory by its ``--mapped``.
``memory``  of a process that has read so many batches.
``store``   samples a second from a local object store that is slow, fails or stalls, by turns.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numcodecs
import numpy as np
import process
import reader
from etils import epath
from ml_collections import ConfigDict

from terramind_jax import config as configuration
from terramind_jax import files, modalities
from terramind_jax.data import mapped, pipeline, records, shards, views, zips
from terramind_jax.data.groups import ViewGroups
from terramind_jax.data.index import Index, open_index
from terramind_jax.data.prepare import prepare
from terramind_jax.data.scan import open_table
from terramind_jax.data.shards import read_sample
from terramind_jax.data.synthesize import synthesize
from terramind_jax.train import pretrain

SCENES, BATCH, PASSES = 48, 8, 3
LZ4 = numcodecs.Blosc("lz4", clevel=5, shuffle=numcodecs.Blosc.SHUFFLE)
VIEWS = (1, 4, 8)
MARKS = (1_000, 5_000, 10_000)
THREADS, ROUNDS, SETTLE, SLICE = (64,), 9, 1.0, 4.0  # seconds

# TerraMind's own are not published; it follows 4M, whose default is 0.5. 4M's mixture joins sharper and flatter draws and one of nothing
# but its RGB, here S2L2A; the two that lean on captions are left out.
ALPHAS = {
    "0.5": ((0.5,), (0.5,)),
    "4M's mixture": ((0.01, 0.1, 1.0, 10.0, {"untok_sen2l2a@224": 1000.0}), (0.01, 0.1, 1.0, 10.0, 0.5)),
}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ---- samples a second and core ----------------------------------------------------------------------------------------------


def batches(index: Index, names: Sequence[str], read: Callable[[int, str], np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Whole tiles ``[B, C, y, x]``, as the published loader gives them, in batches of `BATCH`; what a sample lacks is left out."""
    for first in range(0, len(index), BATCH):
        rows = range(first, min(first + BATCH, len(index)))
        there = {m: [i for i in rows if index.available[i, index.modalities.index(m)]] for m in names}
        yield {m: whole(having, m, read) for m, having in there.items() if having}


def whole(samples: Sequence[int], modality: str, read: Callable[..., np.ndarray]) -> np.ndarray:
    """One modality of some samples, decoded into the batch where `read` can do that."""
    first = np.moveaxis(read(samples[0], modality), -1, 0)
    batch = np.empty((len(samples), *first.shape), first.dtype)
    batch[0] = first
    for place, i in zip(batch[1:], samples[1:], strict=True):
        tile = np.moveaxis(read(i, modality, place), -1, 0)
        if not np.may_share_memory(tile, place):
            place[...] = tile
    return batch


def published(root: str, names: Sequence[str]) -> Iterator[dict]:
    """All batches of TerraMesh's loader, whose own list of shards is that of the whole of TerraMesh."""
    build = importlib.import_module("terramesh").build_terramesh_dataset
    importlib.import_module("torch").set_num_threads(1)  # others would wait in a loop, which counts as processor time
    urls = []
    for subset, lacks in (("majortom", "S1GRD"), ("ssl4eos12", "S1RTC")):
        having = [name for name in names if name != lacks]
        shards = sorted(path.name for path in (epath.Path(root) / "train" / having[0]).glob(f"{subset}*.tar"))
        folder = having[0] if len(names) == 1 else f"[{','.join(having)}]"
        urls.append(os.path.join(root, "train", folder, shards[0] if len(shards) == 1 else f"{{{','.join(shards)}}}"))  # one a subset
    return iter(build(modalities=list(names), urls="::".join(urls), split="train", batch_size=BATCH, shuffle=False, partial=True))


def rate(make: Callable[[], Iterator], samples: int) -> float:
    """Samples a second of processor time, over all batches."""
    best = float("inf")
    for _ in range(PASSES):
        start = time.process_time()
        for _ in make():
            pass
        best = min(best, time.process_time() - start)
    return samples / best


def as_lz4(root: str, folder: str) -> str:
    """The same samples as xarray writes them by default."""
    for path in sorted(Path(root).glob("train/*/*.tar")):
        if path.parent.name not in modalities.MODALITIES:
            continue  # tokens
        subset, number = path.stem.split("_shard_")
        with tarfile.open(path) as tar, shards.ShardWriter(folder, "train", path.parent.name, subset, int(number)) as shard:
            for member in tar:
                payload = tar.extractfile(member).read()
                key = member.name.removesuffix(shards.SAMPLE_SUFFIX)
                shard.add(key, shards.write_sample(read_sample(payload), attrs=shards.read_attributes(payload), codec=LZ4))
    return folder


def rates(root: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        codecs = {"as stored": root}
        if len(open_index(root, "train")) <= SCENES:
            codecs = {"Blosc Zstandard": root, "Blosc LZ4": as_lz4(root, folder)}
        rows = [[*of[:1], codec, *of[1:]] for codec, at in codecs.items() for of in rates_of(at)]
    head = ["modalities", "codec", "MB a sample", "index", "zipfile", "decoding alone", "published", "index / published"]
    return f"Samples a second and core. TerraMesh's codec is not known here; LZ4 is what xarray writes by default.\n\n{table(head, rows)}"


def rates_of(root: str) -> list[list[str]]:
    index, rows = open_index(root, "train"), []

    def through_zip(i: int, modality: str, out: np.ndarray | None = None) -> np.ndarray:
        return np.moveaxis(read_sample(index._pixels.whole(i, modality), ("bands",))["bands"][0], 0, -1)

    for names in (index.modalities, ("S2L2A",)):
        found = [rate(lambda r=read, m=names: batches(index, m, r), len(index)) for read in (index.read, through_zip)]
        try:
            theirs = rate(lambda m=names: published(root, m), len(index))
            compared = [f"{theirs:.0f}", f"{found[0] / theirs:.1f}"]
        except ImportError as error:
            compared = [f"not measured: {error}", ""]
        size = open_index(root, "train", names).stored_bytes() / len(index) / 1e6
        values = (*found, decoding(index, names))
        rows.append([", ".join(names), f"{size:.2f}", *(f"{value:.0f}" for value in values), *compared])
    return rows


def decoding(index: Index, names: Sequence[str]) -> float:
    """Samples a second of Blosc alone, on chunks in memory: what no reader of these files exceeds."""
    chunks, samples = [], range(min(len(index), SCENES))
    for i, name in itertools.product(samples, names):
        if index.available[i, index.modalities.index(name)]:
            payload = index._pixels.whole(i, name)
            column = index._pixels[name]
            layout = index._layouts[column.layout[column.row(i)]]
            chunks.append((layout, {member: zips.split(payload)[member] for member, _ in layout.members()}))
    return rate(lambda: (layout.assemble(pieces) for layout, pieces in chunks), len(samples))


# ---- bytes a training token -------------------------------------------------------------------------------------------------


class Counting:
    """A store that counts the bytes that are read."""

    def __init__(self, store):
        self.store, self.bytes = store, 0

    def read(self, path: str, offset: int, size: int, block: int = 0) -> bytes:
        self.bytes += size
        return self.store.read(path, offset, size, block)


def settings(root: str, alphas: str = "0.5", **data: int) -> ConfigDict:
    """The configuration of the base model for these shards."""
    config = configuration.load(str(reader.CONFIG), [f"--config.data.root={root}"])
    config.data.update(data)
    config.mask.input_alphas, config.mask.target_alphas = ALPHAS[alphas]
    config.mask.mixture_weights = ()
    return config


def masked_first(root: str, alphas: str, k: int, epochs: int = 4) -> tuple[float, float]:
    """Bytes read and bytes sent for a token of the budgets, over some epochs."""
    config = settings(root, alphas, views_per_sample=k, view_window=SCENES)
    index = pretrain.open_tokenized(config, "train")
    groups = ViewGroups(index, *pretrain.data_settings(config), seed=0, train=True)
    read = index._pixels, index._tokens.columns
    for columns in read:
        columns.store = Counting(columns.store)
    sent, size = 0, config.data.patch_group
    for position in range(0, epochs * len(index) * k, size):
        sent += sum(x.nbytes for x in jax.tree.leaves(pretrain.on_device(groups(position))))
    tokens = epochs * len(index) * k * (config.mask.input_tokens + config.mask.target_tokens)
    return sum(columns.store.bytes for columns in read) / tokens, sent / tokens


def everything(root: str, k: int) -> tuple[float, float]:
    """The same for a loader that reads each sample whole and sends its whole crop with every view, by the sizes of what there is."""
    config = settings(root)
    index = pretrain.open_tokenized(config, "train")
    encoder, decoder, data, mask = pretrain.data_settings(config)
    crop = 0.0
    for stream in {s.key: s for s in (*encoder, *decoder) if s.kind != "sequence" and s.modality in index.modalities}.values():
        there = (index.available if stream.kind == "pixels" else index.has_tokens)[:, index.modalities.index(stream.modality)].mean()
        pixels = data.image_size**2 * stream.channels * views.stored_dtype(stream.modality).itemsize
        crop += there * (pixels if stream.kind == "pixels" else 2 * stream.max_tokens)
    budget = mask.input_tokens + mask.target_tokens
    return index.stored_bytes() / len(index) / (k * budget), crop / budget


def bytes_a_token(root: str) -> str:
    rows = []
    for k in VIEWS:
        for alphas in ALPHAS:
            (read, sent), (whole_read, whole_sent) = masked_first(root, alphas, k), everything(root, k)
            numbers = (read, whole_read, whole_read / read, sent, whole_sent, whole_sent / sent)
            rows.append([k, alphas, *(f"{n:,.1f}" if i in (2, 5) else f"{n:,.0f}" for i, n in enumerate(numbers))])
    head = ["views a sample", "alphas", "read", "read, everything", "ratio", "sent", "sent, everything", "ratio"]
    return (
        "Bytes for each of the 128 + 128 tokens of a view. Masks are drawn first, and only what they select is read and sent: counted over "
        "four epochs. *Everything*: each sample read whole, its whole crop of 224 pixels sent with every view; not a switch of the reader, "
        "but reckoned from the sizes.\n\n" + table(head, rows)
    )


# ---- shards, records, and arrays in memory ----------------------------------------------------------------------------------


PAGE = 4096


class Pages:
    """Stands for `mapped.Mapped` and counts the pages that are touched, as if none was in memory."""

    def __init__(self, found: mapped.Mapped):
        self.found, self.bytes = found, 0

    def row(self, name: str, record: int) -> np.ndarray | None:
        row = self.found.row(name, record)
        self.bytes += 0 if row is None else -(-row.nbytes // PAGE) * PAGE
        return row

    def patches(self, modality: str, record: int, variant: int, image_size: int, positions: np.ndarray) -> np.ndarray | None:
        row = self.found.row(modality, record)
        if row is not None:
            numbers = np.arange(row.nbytes // row.itemsize, dtype=np.int64).reshape(row.shape)
            places = mapped.select_patches(numbers, variant, image_size, positions)
            self.bytes += len(np.unique(places * row.itemsize // PAGE)) * PAGE
        return self.found.patches(modality, record, variant, image_size, positions)


def ways(root: str) -> str:
    """A view of each sample, read in three ways."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "prepared")
        prepare(root, out)
        found = [("shards", *_views(root)), ("records", *_views(out))]
        mapped.write(open_index(out, "train"))
        found.append(("mapped", *_views(out)))
        written = sum(path.stat().st_size for path in Path(out, "train").glob("*.mapped.npy")) / len(open_index(out, "train"))
        stored = [open_index(root, "train").stored_bytes(), open_index(out, "train").stored_bytes()]
    n = len(open_index(root, "train"))
    stored = [stored[0] / n, stored[1] / n, written]
    rows = [
        [name, f"{size / 1e6:.2f}", f"{read / 1e3:,.0f}", f"{rate:.0f}"] for (name, read, rate), size in zip(found, stored, strict=True)
    ]
    head = ["pixels and tokens in", "MB a sample", "KB read a view", "views/s and core"]
    return (
        "One view of 128 + 128 tokens of each sample, alphas 0.5; *read* are whole records, and of arrays that are mapped into memory the "
        "pages of 4 KB that a view touches. Rates are with the data in memory: decoding and copying.\n\n" + table(head, rows)
    )


def _views(root: str, epochs: int = 2) -> tuple[float, float]:
    """Bytes read for a view, and views a second of processor time."""
    config = settings(root, views_per_sample=1, patch_group=1)
    index = pretrain.open_tokenized(config, "train")
    groups = ViewGroups(index, *pretrain.data_settings(config), seed=0, train=True)
    groups(0)
    speed = rate(lambda: map(groups, range(epochs * len(index))), epochs * len(index))
    if not isinstance(index, records.Records):
        return masked_first(root, "0.5", 1)[0] * (config.mask.input_tokens + config.mask.target_tokens), speed
    whole, opened, record = index.stored_bytes() / len(index), 0, index._record
    index._mapped = pages = Pages(index._mapped)

    def count(i: int) -> Any:
        nonlocal opened
        opened += index._last.__dict__.get("number") != i
        return record(i)

    index._record = count
    for position in range(epochs * len(index)):
        groups(position)
    return (pages.bytes + opened * whole) / (epochs * len(index)), speed


# ---- memory -----------------------------------------------------------------------------------------------------------------


def resident() -> float:
    """MB that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory(root: str) -> dict[int, float]:
    """MB after so many batches of 2 views."""
    config = settings(root, views_per_sample=4, view_window=32, patch_group=2)
    data = pipeline.batches(pretrain.open_tokenized(config, "train"), *pretrain.data_settings(config), batch_size=2)
    found = {}
    for number in range(1, MARKS[-1] + 1):
        next(data)
        if number in MARKS:
            found[number] = resident()
    return found


def memory_table(root: str) -> str:
    found = process.measure(__file__, "--only", "memory", "--root", root, "--json")
    rows = [[f"{int(n):,}", f"{size:.0f}"] for n, size in found.items()]
    return "Resident memory of a process that reads batches of 2 views, 4 a sample, in 2 threads.\n\n" + table(["batches", "MB"], rows)


# ---- a store that is slow or fails ------------------------------------------------------------------------------------------


def serve(root: str, pipe) -> None:
    """An object store in a process of its own: sends its address, then takes its faults."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import object_store

    with object_store.serve(Path(root)) as (address, faults):
        pipe.send(address)
        for wanted in iter(pipe.recv, None):
            for name, value in wanted.items():
                setattr(faults, name, value)
            pipe.send("done")


CASES: dict[str, dict[str, float]] = {
    "none": {},
    "20 ms": {"latency": 0.02},
    "5 % errors": {"errors": 0.05},
    "20 ms and 5 % errors": {"latency": 0.02, "errors": 0.05},
    "0.1 % stalls of a second": {"stalls": 0.001, "stall": 1.0},
}


class Reading:
    """Threads that read a view of one sample after the other, epoch after epoch, until they are stopped."""

    def __init__(self, groups: ViewGroups, threads: int):
        self.groups, self.positions, self.done, self.on = groups, itertools.count(), {}, True
        self.threads = [threading.Thread(target=self.work) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def work(self) -> None:
        while self.on:
            position = next(self.positions)
            group = self.groups(position)
            self.done[position] = -1 if group["bad"][0] else int(group["sample"][0])

    def speed(self) -> float:
        """Samples a second, once what the server does has been so for a while."""
        time.sleep(SETTLE)
        before, start = len(self.done), time.perf_counter()
        time.sleep(SLICE)
        return (len(self.done) - before) / (time.perf_counter() - start)

    def stop(self) -> None:
        """Raises RuntimeError if a sample was bad, lost or repeated in any whole epoch."""
        self.on = False
        for thread in self.threads:
            thread.join()
        n = len(self.groups.samples)
        seen = [self.done[p] for p in range(len(self.done) // n * n)]
        if (np.sort(np.reshape(seen, (-1, n))) != np.sort(self.groups.samples)).any():
            raise RuntimeError("A sample was bad, lost or repeated.")


def store(root: str) -> str:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(root, theirs), daemon=True)
    server.start()
    address, rows, epochs = ours.recv(), [], 0
    config = settings(address, views_per_sample=1, patch_group=1)
    open_table(address, "train", rebuild=True)
    index = pretrain.open_tokenized(config, "train")
    for threads in THREADS:
        reading = Reading(ViewGroups(index, *pretrain.data_settings(config), seed=0, train=True), threads)
        speeds = {name: [] for name in CASES}
        for _, name in itertools.product(range(ROUNDS), CASES):
            ours.send({"latency": 0.0, "errors": 0.0, "stalls": 0.0, **CASES[name]})
            ours.recv()
            speeds[name].append(reading.speed())
        reading.stop()
        epochs += len(reading.done) // len(index)
        for name, found in speeds.items():
            share = statistics.median(a / b for a, b in zip(found, speeds["none"], strict=True))
            median, span = f"{statistics.median(found):.0f}", f"{min(found):.0f} to {max(found):.0f}"
            rows.append([threads, name, median, span, f"{100 * share:.0f} %"])
    ours.send(None)
    server.join()
    return (
        f"A view of each of {len(index)} samples, epoch after epoch, from a server on the same machine whose faults change every "
        f"{SETTLE + SLICE:.0f} seconds: medians of {ROUNDS} rounds, and of the share of no faults in the same round. All {epochs} epochs "
        f"were every sample once, none of them bad. Load of the machine over the last five minutes: {os.getloadavg()[1]:.0f}.\n\n"
        + table(["threads", "faults", "samples/s", "range", "share of no faults"], rows)
    )


# ---- all --------------------------------------------------------------------------------------------------------------------

TABLES: Mapping[str, Callable[[str], str]] = {"rates": rates, "bytes": bytes_a_token, "ways": ways, "memory": memory_table, "store": store}


def with_tokens(root: str) -> None:
    """Scenes of the embedded world, and random tokens: reading them costs the same."""
    synthesize(root, scenes=SCENES, val_scenes=0)
    index = open_index(root, "train")
    for name in index.modalities:
        if modalities.get(name).tokens:
            reader.write_tokens(Path(root), index, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", metavar="DIR", help="folder of shards; default: the embedded world")
    parser.add_argument("--only", choices=TABLES, help="one table")
    parser.add_argument("--out", metavar="FILE", help="write the tables there, too")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)  # what a measurement in a process of its own gives
    parsed = parser.parse_args()
    if parsed.json:
        return print(json.dumps(memory(parsed.root)))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TERRAMIND_JAX_CACHE"] = os.path.join(folder, "cache")  # the index of the object store
        root = parsed.root or os.path.join(folder, "shards")
        if not parsed.root:
            with_tokens(root)
        made = {name: TABLES[name](root) for name in ([parsed.only] if parsed.only else TABLES)}
    print("\n".join(made.values()))
    if parsed.out:
        write(files.folder(parsed.out), made)


def write(path: epath.Path, made: Mapping[str, str]) -> None:
    """A file with a section for each table; those that were not made now stay as they are."""
    old = dict(part.split("\n\n", 1) for part in path.read_text().split("## ")[1:]) if path.exists() else {}
    new = old | {name: f"{text}\n\nOn {process.where()}: `python benchmarks/loader.py --only {name}`.\n\n" for name, text in made.items()}
    text = "".join(f"## {name}\n\n{new[name]}" for name in TABLES if name in new)
    files.write_text(path, f"# The reader\n\n{text.rstrip()}\n")


if __name__ == "__main__":
    main()
