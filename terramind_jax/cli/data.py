"""``terramind-jax data ACTION``: shards are made, built, indexed and verified."""

from __future__ import annotations

import argparse
import json

from terramind_jax.cli.arguments import LULC_CODES, add, add_group, positive, read_offsets


def add_commands(commands) -> None:
    actions = add_group(commands, "data", "make, build, index and verify shards", "action")
    parser = add(actions, "synthesize", "write shards of the embedded world", _synthesize)
    parser.add_argument("--out", required=True, metavar="ROOT")
    parser.add_argument("--scenes", type=int, default=512, help="training scenes")
    parser.add_argument("--val_scenes", type=int, default=64, help="validation scenes, from other location blocks")
    parser.add_argument("--seed", type=int, default=0)
    text = "write a tiny copy of a published downstream data set, made of the embedded world, in its own layout"
    parser = add(actions, "sample", text, _sample)
    text = "sen1floods11, burnscars, mados, pastis, eurosat, multitemporal_crop, croptypemapping, dynamicearthnet, spacenet7, "
    text += "ai4smallfarms, fivebillionpixels, xview2 or biomassters"
    parser.add_argument("dataset", metavar="DATASET", help=text)
    parser.add_argument("--out", required=True, metavar="DIR")
    text = "training samples, of EuroSAT a class, of SpaceNet-7 mosaics; default: 4"
    parser.add_argument("--count", type=int, default=4, metavar="N", help=text)
    parser.add_argument("--size", type=int, metavar="S", help="side of the images in pixels; default: the original's")
    parser.add_argument("--seed", type=int, default=0)
    parser = add(actions, "pack", "turn a folder of GeoTIFFs, MODALITY/NAME.tif, of any size and CRS into shards", _pack)
    text = "folder of GeoTIFFs, MODALITY/NAME.tif; modalities of your own are declared in modalities.json in it"
    parser.add_argument("source", metavar="SRC", help=text)
    parser.add_argument("out", metavar="OUT", help="folder for the shards")
    parser.add_argument("--lulc_codes", choices=LULC_CODES, help="codes of the LULC rasters; needed if there are any")
    text = "what is added to the values of a modality, or of one file, MODALITY/NAME; repeat for more, e.g. S2L2A=-1000"
    parser.add_argument("--offset", action="append", default=[], metavar="MODALITY=VALUE", help=text)
    text = "share of the places that goes to the validation split; tiles next to them are left out of both"
    parser.add_argument("--val_fraction", type=float, default=0.1, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of which places those are; default: 0")
    text = "join shards and token shards in a TFDS data set of ArrayRecord files"
    parser = add(actions, "prepare", text, _prepare)
    parser.add_argument("root", metavar="ROOT", help="folder of shards")
    parser.add_argument("--out", required=True, metavar="DIR", help="for DIR/terramesh; then also a data.root to train on")
    parser.add_argument("--tokens", metavar="DIR", help="folder of token shards; default: beside the pixels")
    text = "make the records with Apache Beam; OPTIONS such as runner=DataflowRunner,project=NAME, default: runner=DirectRunner"
    parser.add_argument("--beam", nargs="?", const="runner=DirectRunner", metavar="OPTIONS", help=text)
    text = "also write arrays that are mapped into memory, of which training reads what its masks choose; not compressed, 4.3 MB a sample"
    parser.add_argument("--mapped", action="store_true", help=text)
    parser.set_defaults(kept="Files that are done stay")
    for name, text, command in (
        ("index", "find every sample, also in a gs://, s3://, hf:// or http:// root; exits with 1 for damaged tars", _index),
        ("check", "read every sample and its tokens, and report bad ones, missing shards and odd statistics; exits with 1 for any", _check),
        ("stats", "mean and spread per band beside the released ones, as a declaration of your own modality takes them", _stats),
    ):
        parser = add(actions, name, text, command)
        parser.add_argument("root", metavar="ROOT", help="folder of shards")
        if command is not _index:
            parser.add_argument("--workers", type=positive, metavar="N", help="processes that read; default: all cores")
    parser.add_argument("--modality", action="append", metavar="NAME", help="only this modality; may be repeated")
    parser.add_argument("--split", action="append", metavar="NAME", help="only this split; may be repeated")
    parser.add_argument("--limit", type=positive, metavar="N", help="only so many samples of each, spread evenly; default: all")
    parser.add_argument("--json", action="store_true", help="print them in full as JSON, {split: {modality: {mean, std}}}")


def _synthesize(parsed: argparse.Namespace) -> None:
    from terramind_jax.data.synthesize import synthesize

    synthesize(parsed.out, scenes=parsed.scenes, val_scenes=parsed.val_scenes, seed=parsed.seed)


def _sample(parsed: argparse.Namespace) -> None:
    from terramind_jax.tasks import samples

    samples.sample(parsed.dataset, parsed.out, count=parsed.count, size=parsed.size, seed=parsed.seed)


def _pack(parsed: argparse.Namespace) -> None:
    from terramind_jax.data import check
    from terramind_jax.data.pack import pack

    options = dict(lulc_codes=parsed.lulc_codes, offsets=read_offsets(parsed.offset), val_fraction=parsed.val_fraction, seed=parsed.seed)
    info = pack(parsed.source, parsed.out, **options)
    for what, count in info.get("left_out", {}).items():
        print(f"Left out: {count} tiles {what.replace('_', ' ')}.")
    print(check.format_index(check.index(parsed.out)))


def _prepare(parsed: argparse.Namespace) -> None:
    from terramind_jax.data import check, mapped
    from terramind_jax.data.index import open_index
    from terramind_jax.data.prepare import prepare

    options = None if parsed.beam is None else [f"--{option}" for option in parsed.beam.split(",")]
    prepare(parsed.root, parsed.out, tokens=parsed.tokens, beam_options=options)
    if parsed.mapped:
        for split in check.splits(parsed.root):
            print(f"Mapped into memory of {split}: {', '.join(mapped.write(open_index(parsed.out, split)))}.")


def _index(parsed: argparse.Namespace) -> int:
    from terramind_jax.data import check

    reports = check.index(parsed.root)
    print(check.format_index(reports))
    return 1 if any(report.faults for report in reports.values()) else 0


def _check(parsed: argparse.Namespace) -> int:
    from terramind_jax.data import check

    results = [check.check(parsed.root, split, workers=parsed.workers) for split in check.splits(parsed.root)]
    print("\n\n".join(map(check.format_check, results)))
    return 0 if all(result.ok for result in results) else 1


def _stats(parsed: argparse.Namespace) -> None:
    from terramind_jax.data import check, stats

    options = (parsed.modality, parsed.limit, parsed.workers)
    found = {split: stats.stats(parsed.root, split, *options) for split in parsed.split or check.splits(parsed.root)}
    if parsed.json:
        print(json.dumps({split: stats.as_json(result) for split, result in found.items()}, indent=2))
        return
    for split, result in found.items():
        print(f"{split}\n{stats.format_stats(result)}")
