"""``terramind-jax evaluate PROTOCOL``: benchmark protocols."""

from __future__ import annotations

import argparse

from terramind_jax.cli.arguments import (
    LULC_CODES,
    accept_grain_workers,
    add,
    add_diffusion,
    add_group,
    add_model,
    add_tokenizers,
    names,
    positive,
    read_diffusion,
    read_offsets,
    task_config,
)


def add_commands(commands) -> None:
    text = "benchmark protocols: what a model generates and what its features say, beside published numbers"
    protocols = add_group(commands, "evaluate", text, "protocol")
    parser = _add_protocol(protocols, "generation", "generate modalities that are there, and say how far from them", _generation)
    parser.add_argument("--data", required=True, metavar="ROOT", help="folder of shards, or of GeoTIFFs MODALITY/NAME.tif of any size")
    parser.add_argument("--from", required=True, dest="inputs", metavar="A,B", help="modalities to generate from")
    parser.add_argument("--to", required=True, metavar="A,B", help="modalities to generate, each alone")
    _add_generation(parser, "val")
    parser.add_argument("--lulc_codes", choices=LULC_CODES, help="codes of the LULC rasters of a folder")
    parser.add_argument("--clear", action="store_true", help="of shards: only pixels that the cloud mask calls clear count")
    text = "TerraTorch generates the same with the same weights (extra parity), and the sampler is ddim; needs --model"
    parser.add_argument("--reference", action="store_true", help=text)
    add_diffusion(parser)
    parser.add_argument("--steps", type=int, default=1, help="steps in which an image's tokens are drawn; default: 1")
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="samples in the picture; default: 4")
    parser = _add_protocol(protocols, "knn", "classify the images of a data set by their nearest neighbours' labels", _knn)
    _add_features(parser)
    parser.add_argument("--k", default="5,20", metavar="K,...", help="neighbours that vote; default: 5,20")
    parser = _add_protocol(protocols, "linear", "classify the images of a data set by a linear probe", _linear)
    _add_features(parser)
    parser = _add_protocol(protocols, "fewshot", "classify the images of a data set by one example of some classes", _fewshot)
    _add_features(parser)
    parser.add_argument("--shots", type=int, default=1, metavar="N", help="examples of a class; default: 1")
    parser.add_argument("--ways", type=int, default=5, metavar="N", help="classes of a run; default: 5")
    parser.add_argument("--runs", type=int, default=200, metavar="N", help="default: 200, as published")
    parser = _add_protocol(protocols, "zeroshot", "map the water of Sen1Floods11 by generated land cover", _zeroshot)
    parser.add_argument("--data", required=True, metavar="ROOT", help="its folder; a tiny copy: `data sample sen1floods11`")
    parser.add_argument("--from", default="S2L1C", dest="inputs", metavar="A,B", help="S2L1C, S1GRD or both; default: S2L1C")
    _add_generation(parser, "test")
    parser.add_argument("--steps", type=int, default=1, help="steps in which an image's tokens are drawn; default: 1")
    text = "moves a modality's mean, where reflectance has no offset and that of the pretraining has; e.g. S2L1C=-1000"
    parser.add_argument("--offset", action="append", default=[], metavar="MODALITY=VALUE", help=text)
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="chips in the picture; default: 4")
    parser = _add_protocol(protocols, "geolocate", "generate coordinates from images, and say how far they are", _geolocate)
    parser.add_argument("--data", required=True, metavar="ROOT", help="folder of shards, or of GeoTIFFs MODALITY/NAME.tif")
    parser.add_argument("--from", required=True, dest="inputs", metavar="A,B", help="modalities to look at")
    _add_generation(parser, "val")
    parser.add_argument("--lulc_codes", choices=LULC_CODES, help="codes of the LULC rasters of a folder")

    parser = add(protocols, "pangaea", "train an UPerNet on a frozen encoder as PANGAEA does, and test it", _pangaea)
    parser.add_argument("--model", default="terramind_v1_base", metavar="NAME", help="default: terramind_v1_base")
    parser.add_argument("--weights", required=True, metavar="W", help="hub, random, or a file, directory or work directory of that model")
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="NAME",
        help="sen1floods11, burnscars, mados, pastis, croptypemapping, dynamicearthnet, spacenet7, ai4smallfarms or fivebillionpixels",
    )
    parser.add_argument("--data", required=True, metavar="ROOT", help="its folder; a tiny copy: `data sample NAME`")
    parser.add_argument("--out", required=True, metavar="DIR", help="report.md and scores.csv; DIR/training, where a stopped one goes on")
    parser.add_argument("--labels", type=float, default=1.0, metavar="SHARE", help="of the training samples; PANGAEA's are 1, 0.5 and 0.1")
    parser.add_argument("--loss", default="ce", choices=("ce", "dice"), help="default: ce")
    for name, value, text in (
        ("epochs", 80, "of training"),
        ("batch_size", 8, "samples a step"),
        ("crop", 224, "side of crops and windows, a multiple of 32"),
        ("seed", 234, "of order, crops and parameters"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{text}; default: {value}, PANGAEA's")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N samples of each split, to try it; default: all")
    parser.set_defaults(kept="The training so far stays in {out}")

    parser = add(protocols, "finetuned", "score a fine-tuned run on a split of its data set, such as test", _finetuned)
    parser.add_argument("--weights", required=True, metavar="WORKDIR", help="work directory of finetune")
    parser.add_argument("--split", default="test", metavar="NAME", help="of its data set; default: test")
    parser.add_argument("--data", metavar="ROOT", help="the data set's folder, where it is not that of the training")
    parser.add_argument("--out", required=True, metavar="DIR", help="report.md and scores.csv; must not exist")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N samples; default: all")
    parser.add_argument(
        "--batch_size",
        type=positive,
        metavar="N",
        help="windows at once, rounded up to a multiple of the devices; default: that of the training",
    )


def _add_protocol(protocols, name: str, text: str, command) -> argparse.ArgumentParser:
    """What all protocols are told: the model, and where the results go."""
    parser = add(protocols, name, text, command)
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="report.md, tables as CSV and pictures; must not exist")
    return parser


def _add_generation(parser: argparse.ArgumentParser, split: str) -> None:
    """With which tokenizers it is generated, how much, and how."""
    add_tokenizers(parser)
    parser.add_argument("--split", default=split, metavar="NAME", help=f"not of a folder of GeoTIFFs; default: {split}")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N samples; default: all")
    parser.add_argument("--batch_size", type=positive, default=8, metavar="N", help="images at once; default: 8")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default: 0")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the most likely token; default: 1")


def _add_features(parser: argparse.ArgumentParser) -> None:
    """Which images of which data set, and their features."""
    parser.add_argument("--dataset", metavar="NAME", help="whose images have one label each; default: eurosat")
    parser.add_argument("--spatial", action="store_true", help="EuroSAT's splits by longitude, as published of linear")
    text = "your own data: a configuration of finetune, or TerraTorch's YAML, of which data.dataset, data.options and data.root are taken"
    parser.add_argument("--config", metavar="FILE", help=text)
    parser.set_defaults(overrides=[])
    parser.add_argument("--data", metavar="ROOT", help="its folder, needed if no --config tells it; a tiny copy: `data sample eurosat`")
    text = "modalities; default: all that it has; of EuroSAT also S2RGB, made of S2L1C"
    parser.add_argument("--inputs", default="", metavar="A,B", help=text)
    parser.add_argument("--layer", type=int, default=-1, metavar="I", help="of the encoder, 0 the first; default: -1, the last")
    parser.add_argument("--resize", type=int, metavar="S", help="bring images to S x S pixels; default: as they are")
    parser.add_argument("--limit", type=positive, metavar="N", help="only N samples of a split, drawn under the seed; default: all")
    text = "standardise with those of the pretraining, or of the data set; default: pretrained"
    parser.add_argument("--statistics", default="pretrained", choices=("pretrained", "dataset"), help=text)
    parser.add_argument("--batch_size", type=positive, default=32, metavar="N", help="images at once; default: 32")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default: 0")


def _features(parsed: argparse.Namespace) -> dict:
    same = ("weights", "model", "out", "layer", "resize", "limit", "statistics", "batch_size", "seed")
    return {"inputs": names(parsed.inputs), **_labelled(parsed), **{name: getattr(parsed, name) for name in same}}


def _labelled(parsed: argparse.Namespace) -> dict:
    """Which data set, in which folder, with which options: a configuration's, or one by name."""
    if parsed.config:
        found = _configured(parsed)
    elif parsed.overrides:
        raise ValueError(f"{parsed.overrides[0]} needs --config=FILE.")
    else:
        name = parsed.dataset or "eurosat"
        if parsed.spatial and name != "eurosat":
            raise ValueError(f"--spatial is a split of EuroSAT; {name} has none such.")
        options = {"spatial": parsed.spatial, "rgb": names(parsed.inputs) == ["S2RGB"]} if name == "eurosat" else {}
        found = {"dataset": name, "data": parsed.data, "options": options}
    if not found["data"]:
        raise ValueError("--data=ROOT is missing, the folder of the data set.")
    return found


def _configured(parsed: argparse.Namespace) -> dict:
    from terramind_jax import config

    if parsed.dataset or parsed.spatial:
        raise ValueError(f"{parsed.config} tells the data set and its options; leave out --dataset and --spatial.")
    settings = task_config(parsed)
    if config.command_of(settings) != "finetune":
        raise ValueError(f"{parsed.config} is of {config.command_of(settings)}; expected a configuration of finetune.")
    told = settings.data
    return {"dataset": told.dataset, "data": parsed.data or told.root, "options": told.options.to_dict()}


def _knn(parsed: argparse.Namespace) -> None:
    from terramind_jax.evaluation import classification

    classification.knn(**_features(parsed), k=[int(k) for k in names(parsed.k)])


def _linear(parsed: argparse.Namespace) -> None:
    from terramind_jax.evaluation import classification

    classification.linear(**_features(parsed))


def _fewshot(parsed: argparse.Namespace) -> None:
    from terramind_jax.evaluation import fewshot

    fewshot.run(**_features(parsed), shots=parsed.shots, ways=parsed.ways, runs=parsed.runs)


def _generation(parsed: argparse.Namespace) -> None:
    from terramind_jax.evaluation import generation

    given = _generated(parsed, "lulc_codes", "steps", "clear", "reference", "pictures") | read_diffusion(parsed)
    generation.run(**given, to=names(parsed.to))


def _zeroshot(parsed: argparse.Namespace) -> None:
    from terramind_jax.evaluation import zeroshot

    zeroshot.run(**_generated(parsed, "steps", "pictures"), offset=read_offsets(parsed.offset))


def _geolocate(parsed: argparse.Namespace) -> None:
    from terramind_jax.evaluation import geolocate

    geolocate.run(**_generated(parsed, "lulc_codes"))


def _pangaea(parsed: argparse.Namespace) -> None:
    from terramind_jax.evaluation import pangaea

    accept_grain_workers()
    same = ("weights", "model", "dataset", "data", "out")
    settings = {name: getattr(parsed, name) for name in ("epochs", "batch_size", "crop", "labels", "limit", "loss", "seed")}
    pangaea.run(**{name: getattr(parsed, name) for name in same}, settings=pangaea.Settings(**settings))


def _finetuned(parsed: argparse.Namespace) -> None:
    from terramind_jax.evaluation import finetuned

    finetuned.run(**{name: getattr(parsed, name) for name in ("weights", "split", "data", "out", "limit", "batch_size")})


def _generated(parsed: argparse.Namespace, *others: str) -> dict:
    same = ("weights", "model", "tokenizers", "data", "out", "split", "limit", "batch_size", "seed", "temperature", *others)
    return {"inputs": names(parsed.inputs), **{name: getattr(parsed, name) for name in same}}
