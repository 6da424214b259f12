"""The command line: ``terramind-jax COMMAND``. Each command imports what it needs when it runs, so that ``--help`` is instant."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

DEBUG = "TERRAMIND_JAX_DEBUG"  # set to 1: errors of use show their traceback too
LULC_CODES = ("terramesh", "esri", "dynamicworld")
SAMPLERS = ("ddim", "dpmpp", "ddpm")
CLIPS = ("published", "none", "dynamic")
STOPPED = 130  # what the shell reports for Ctrl-C
INTERRUPTED = 143  # what the shell reports for a process ended by SIGTERM


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for bad data found, 2 after an error of use, 130 for Ctrl-C, 143 for SIGTERM."""
    parsed = _parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        return parsed.command(parsed) or 0
    except KeyboardInterrupt:
        return STOPPED
    except Exception as error:
        if not _told(error):
            raise
        return 2


def _told(error: Exception) -> bool:
    """Whether an error was told in one sentence, as those of use are; the others need their traceback."""
    if os.environ.get(DEBUG) == "1" or not _is_users(error):
        return False
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return True


def _is_users(error: Exception) -> bool:
    """Errors that the input caused, told in one sentence; any other is a bug and keeps its traceback."""
    from terramind_jax.data.errors import DataError

    known = ValueError | FileNotFoundError | FileExistsError | NotADirectoryError | PermissionError | ConnectionError | DataError
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return isinstance(error, known) or full or type(error) is ImportError  # an extra that is not installed


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="terramind-jax", description="TerraMind in JAX.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_training(commands)
    _add_tokens(commands)
    _add_generate(commands)
    _add_embed(commands)
    _add_predict(commands)
    _add_plan(commands)
    _add_quickstart(commands)
    _add_convert(commands)
    _add_data(commands)
    _add_evaluate(commands)
    _add_watch(commands)
    _add_serve(commands)
    _add(commands, "info", "versions, devices and models", _info)
    parsed, rest = parser.parse_known_args(arguments)
    if rest and "overrides" not in parsed:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = rest
    return parsed


def _add(commands, name: str, text: str, command) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    parser.set_defaults(command=command)
    return parser


# ---- training ----


def _add_training(commands) -> None:
    for name, text, command, example in (
        ("pretrain", "train the any-to-any transformer", _pretrain, "configs/pretrain/tiny.py"),
        ("train-tokenizer", "train one tokenizer", _train_tokenizer, "configs/tokenizer/dem.py"),
        ("finetune", "train a downstream task on a backbone", _finetune, "configs/finetune/sen1floods11.py"),
    ):
        parser = _add(commands, name, text, command)
        parser.epilog = "Any field of the configuration is overridden with --config.FIELD=VALUE, e.g. --config.data.root=DIR."
        also = "; or TerraTorch's YAML" if name == "finetune" else ""
        parser.add_argument("--config", required=True, metavar="FILE", help=f"a file with get_config(), such as {example}{also}")
        parser.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints and metrics, local or gs://; a run there goes on")
        text = "process 0 of several, with JAX_NUM_PROCESSES and JAX_PROCESS_ID; not needed on TPU pods, GKE, SLURM and Open MPI"
        parser.add_argument("--coordinator", metavar="HOST:PORT", help=text)
        parser.add_argument("--profile", metavar="START:STOP", help="steps whose trace goes to WORKDIR/profile, to be read with XProf")
        parser.set_defaults(overrides=[])


def _pretrain(parsed: argparse.Namespace) -> int:
    from functools import partial

    from terramind_jax import weights
    from terramind_jax.train import pretrain

    return _train(partial(pretrain.train, initial=weights.initial, tokenizer=weights.tokenizer), parsed)


def _train_tokenizer(parsed: argparse.Namespace) -> int:
    from terramind_jax.train import tokenizer

    return _train(tokenizer.train, parsed)


def _finetune(parsed: argparse.Namespace) -> int:
    from terramind_jax.tasks import finetune

    return _train(finetune.train, parsed, _task_config(parsed))


def _task_config(parsed: argparse.Namespace):
    """The configuration of a fine-tuning, ours or TerraTorch's; what has no equivalent is told."""
    from terramind_jax import config
    from terramind_jax.tasks import terratorch

    if Path(parsed.config).suffix not in terratorch.SUFFIXES:
        return config.load(parsed.config, parsed.overrides)
    settings, rest = terratorch.read(parsed.config)
    for line in rest:
        print(f"{parsed.config}: no equivalent: {line}", file=sys.stderr)
    return config.overridden(settings, parsed.overrides)


def _train(train, parsed: argparse.Namespace, settings=None) -> int:
    from terramind_jax import checkpoint, config, processes

    _accept_grain_workers()
    settings = config.load(parsed.config, parsed.overrides) if settings is None else settings
    settings.run.profile = parsed.profile or settings.run.profile
    processes.join(parsed.coordinator, heartbeat_seconds=settings.run.heartbeat_seconds)
    try:
        metrics = train(settings, parsed.workdir)
    except checkpoint.Terminated as stop:
        print(stop, file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not processes.several():
            raise
        if not _told(error):
            traceback.print_exc()
        processes.abandon(2 if _is_users(error) else 1)
    print("  ".join(f"{name} {value:.6g}" for name, value in metrics.items() if value == value))  # a modality without targets has no loss
    return 0


def _accept_grain_workers() -> None:
    """Grain's worker processes insist on parsed absl flags; the flags are not used otherwise."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _add_plan(commands) -> None:
    parser = _add(commands, "plan", "say what a pretraining run will need and cost, compiled for a TPU slice that need not be there", _plan)
    parser.epilog = "Exits with 1 if the step does not fit. Any field of the configuration is overridden with --config.FIELD=VALUE."
    parser.add_argument("--config", required=True, metavar="FILE", help="as for pretrain, such as configs/pretrain/base.py")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="such as v5e:16x16, v5p:4x4x4 or v6e:8x8")
    parser.add_argument("--num_slices", type=int, default=1, metavar="N", help="slices of that shape")
    parser.add_argument("--price", type=float, metavar="P", help="money an hour and chip")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    text = "compile up to N (8) other meshes, batch sizes and remat policies, a minute or two each, and rank them"
    parser.add_argument("--search", type=int, nargs="?", const=8, metavar="N", help=text)
    parser.set_defaults(overrides=[])


def _plan(parsed: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs on a device, whatever this machine has
    from terramind_jax import config, plan

    where = plan.parse(parsed.topology, parsed.num_slices)
    settings = config.load(parsed.config, parsed.overrides)
    if settings.data.online_tokens:
        print("Not counted: the tokenizers of data.online_tokens, their memory and operations; their images are.", file=sys.stderr)
    if parsed.search is None:
        facts = plan.run(settings, where, parsed.price)
        print(json.dumps(facts, indent=2) if parsed.json else plan.report.render(facts))
        return 0 if facts["memory"]["fits"] else 1
    found = plan.ranked(settings, where, parsed.search, parsed.price, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(found, indent=2) if parsed.json else plan.search.table(found))
    return 0 if any(facts["memory"]["fits"] for facts in found) else 1


def _add_tokens(commands) -> None:
    parser = _add(commands, "tokenize", "turn shards into token shards", _tokenize)
    parser.add_argument("--data", required=True, metavar="ROOT", help="folder of shards")
    parser.add_argument("--weights", required=True, metavar="DIR", help="folder with one tokenizer a modality; or hub, the released ones")
    parser.add_argument("--out", metavar="DIR", help="folder for the token shards; default: beside the pixels")
    parser.add_argument("--split", action="append", metavar="NAME", help="only this split; may be repeated")
    parser.add_argument("--batch_size", type=int, default=16, help="crops encoded at once, on all devices of this machine")
    parser.add_argument("--host", type=int, default=0, metavar="K", help="do this share of the shards, from 0, of")
    parser.add_argument("--hosts", type=int, default=1, metavar="N", help="so many, the others being done by other machines")


def _tokenize(parsed: argparse.Namespace) -> None:
    from terramind_jax.tokenize import tokenize

    share = {"host": parsed.host, "hosts": parsed.hosts}
    tokenize(parsed.data, parsed.weights, parsed.out, splits=parsed.split, batch_size=parsed.batch_size, **share)


# ---- using a model ----


def _add_generate(commands) -> None:
    parser = _add(commands, "generate", "generate modalities from GeoTIFFs", _generate)
    _add_scenes(parser)
    parser.add_argument("--to", required=True, metavar="A,B", help="modalities to generate, in this order; each conditions the next")
    parser.add_argument("--out", required=True, metavar="DIR", help="GeoTIFFs and pictures; none that exists is replaced")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default: 0")
    parser.add_argument("--timesteps", type=int, default=10, help="steps of a diffusion decoder; default: 10")
    text = "of a diffusion decoder: dpmpp needs a fraction of the steps of ddim, ddpm draws noise in every one; default: ddim"
    parser.add_argument("--sampler", default="ddim", choices=SAMPLERS, help=text)
    text = "limit of a diffusion decoder: published keeps outputs within one standard deviation of the mean; default: published"
    parser.add_argument("--clip", default="published", choices=CLIPS, help=text)
    parser.add_argument("--steps", type=int, default=1, help="steps in which an image's tokens are drawn; default: 1")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the most likely token; default: 1")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="draw N times, and write the spread: MODALITY_std; default: 1")
    _add_windows(parser)
    parser.add_argument("--no-quicklook", dest="quicklook", action="store_false", help="draw no picture")
    parser.epilog = (
        "A scene of any size, from 224 pixels on, is seen through windows of the model's size that overlap; if its sides are no multiples "
        "of 16 pixels, it is mirrored at the right and lower edge. Where no input has data, outputs have none. Ctrl-C or a kill "
        "leaves what is done in DIR/unfinished, from which the same command goes on."
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    text = "a released model, such as terramind_v1_base; not for a work directory"
    parser.add_argument("--model", default=None, metavar="NAME", help=text)
    text = "work directory of a pretrained model; with --model also hub, random, or a file"
    parser.add_argument("--weights", required=True, metavar="W", help=text)


def _add_tokenizers(parser: argparse.ArgumentParser) -> None:
    text = "folder with one tokenizer a modality; default: tokenizers, in or beside the weights"
    parser.add_argument("--tokenizers", metavar="DIR", help=text)


def _add_scenes(parser: argparse.ArgumentParser) -> None:
    """What to read, and with which model."""
    _add_model(parser)
    _add_tokenizers(parser)
    text = "a GeoTIFF or a folder of them; repeat for more"
    parser.add_argument("--input", action="append", required=True, metavar="MODALITY=PATH", help=text)


def _add_windows(parser: argparse.ArgumentParser) -> None:
    text = "pixels that windows share with their neighbours, a multiple of 16; default: half a window"
    parser.add_argument("--overlap", type=int, metavar="PIXELS", help=text)
    parser.add_argument(
        "--batch_size", type=int, default=8, metavar="N", help="windows at once, on all devices of this machine; default: 8"
    )
    parser.add_argument("--lulc_codes", choices=LULC_CODES, help="codes of a LULC raster among the inputs")


def _generate(parsed: argparse.Namespace) -> None:
    inputs = _inputs(parsed.input)
    targets = _names(parsed.to)
    from terramind_jax import generate_scenes

    generate_scenes.run(
        weights=parsed.weights,
        inputs=inputs,
        to=targets,
        out=parsed.out,
        tokenizers=parsed.tokenizers,
        model=parsed.model,
        lulc_codes=parsed.lulc_codes,
        seed=parsed.seed,
        overlap=parsed.overlap,
        samples=parsed.samples,
        batch_size=parsed.batch_size,
        quicklook=parsed.quicklook,
        timesteps=parsed.timesteps,
        sampler=parsed.sampler,
        clip=parsed.clip,
        steps=parsed.steps,
        temperature=parsed.temperature,
    )


def _add_embed(commands) -> None:
    parser = _add(commands, "embed", "turn GeoTIFFs into embedding rasters or tables", _embed)
    _add_scenes(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="one file a scene; none that exists is replaced")
    parser.add_argument("--layer", type=int, default=-1, metavar="I", help="of the encoder, 0 the first; default: -1, the last")
    text = "none: a vector a patch of 16 pixels; mean or max: one a window (not in rasters); default: none"
    parser.add_argument("--pooling", default="none", choices=("none", "mean", "max"), help=text)
    text = "geoparquet needs pip install 'terramind-jax[geo]'; default: geotiff"
    parser.add_argument("--format", default="geotiff", choices=("geotiff", "geoparquet"), help=text)
    _add_windows(parser)
    parser.epilog = "Windows of pooled embeddings do not overlap unless told to. Ctrl-C or a kill leaves what is done in DIR/unfinished."


def _embed(parsed: argparse.Namespace) -> None:
    inputs = _inputs(parsed.input)
    from terramind_jax import embed_scenes

    same = ("weights", "out", "tokenizers", "model", "layer", "pooling", "format", "lulc_codes", "overlap", "batch_size")
    embed_scenes.run(inputs=inputs, **{name: getattr(parsed, name) for name in same})


def _add_predict(commands) -> None:
    parser = _add(commands, "predict", "apply a fine-tuned model to GeoTIFFs", _predict)
    parser.add_argument("--weights", required=True, metavar="WORKDIR", help="work directory of finetune")
    parser.add_argument(
        "--input", action="append", required=True, metavar="MODALITY=PATH", help="a GeoTIFF or a folder of them; repeat for more"
    )
    text = "NAME.tif of each input, on its grid: classes, or values; labels of whole images go to labels.json; none that exists is replaced"
    parser.add_argument("--out", required=True, metavar="DIR", help=text)


def _predict(parsed: argparse.Namespace) -> None:
    from terramind_jax.tasks import predict

    predict.run(parsed.weights, _inputs(parsed.input), parsed.out)


def _inputs(pairs: Sequence[str]) -> dict[str, str]:
    """``["S2L2A=a.tif"]`` -> ``{"S2L2A": "a.tif"}``."""
    inputs = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not name or not path:
            raise ValueError(f"--input takes MODALITY=PATH, such as S2L2A=tile.tif, not {pair!r}.")
        if name in inputs:
            raise ValueError(f"--input names {name} twice.")
        if not Path(path).exists():
            raise FileNotFoundError(f"--input {name}: there is no file or folder {path}.")
        inputs[name] = path
    return inputs


def _add_convert(commands) -> None:
    text = "copy weights between PyTorch (.pt), .safetensors and Orbax directories, by suffix; fine-tuned models to TerraTorch and back"
    parser = _add(commands, "convert", text, _convert)
    parser.add_argument("source", metavar="IN", help="a file, a directory of weights, or the work directory of a training")
    parser.add_argument("target", metavar="OUT", help="must not exist; without a suffix, a directory")
    parser.add_argument("--model", default=None, metavar="NAME", help="what a file holds, where it does not tell; see `info`")
    text = "of finetune, or TerraTorch's YAML: IN is a model fine-tuned there, such as a .ckpt, OUT becomes a work directory for predict"
    parser.add_argument("--config", default=None, metavar="FILE", help=text)
    parser.set_defaults(overrides=[])


def _convert(parsed: argparse.Namespace) -> None:
    from terramind_jax import weights
    from terramind_jax.tasks import exchange, finetune

    if parsed.config:
        exchange.import_model(parsed.source, parsed.target, _task_config(parsed))
    elif parsed.overrides:
        raise ValueError(f"{parsed.overrides[0]} needs --config=FILE.")
    elif (Path(parsed.source) / finetune.TASK).exists():
        exchange.export(parsed.source, parsed.target)
    else:
        weights.convert(parsed.source, parsed.target, parsed.model)


def _add_quickstart(commands) -> None:
    parser = _add(commands, "quickstart", "train a small model here, on the embedded world or on your tiles, and generate", _quickstart)
    parser.add_argument("--data", default=None, metavar="DIR", help="folder of GeoTIFFs, MODALITY/NAME.tif; default: the embedded world")
    parser.add_argument("--out", default=None, metavar="DIR", help="default: quickstart, or quickstart_NAME for a folder NAME of tiles")
    parser.add_argument("--lulc_codes", default="terramesh", choices=LULC_CODES, help="codes of the LULC rasters in --data")
    parser.add_argument("--minutes", type=float, default=None, help="about how long to train")


def _quickstart(parsed: argparse.Namespace) -> None:
    from terramind_jax import quickstart

    _accept_grain_workers()
    minutes = {} if parsed.minutes is None else {"minutes": parsed.minutes}
    quickstart.run(data=parsed.data, out=parsed.out, lulc_codes=parsed.lulc_codes, **minutes)


# ---- data ----


def _add_data(commands) -> None:
    text = "make, build, index and verify shards"
    data = commands.add_parser("data", help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")
    parser = _add(actions, "synthesize", "write shards of the embedded world", _synthesize)
    parser.add_argument("--out", required=True, metavar="ROOT")
    parser.add_argument("--scenes", type=int, default=512, help="training scenes")
    parser.add_argument("--val_scenes", type=int, default=64, help="validation scenes, from other location blocks")
    parser.add_argument("--seed", type=int, default=0)
    text = "write a tiny copy of a published downstream data set, made of the embedded world, in its own layout"
    parser = _add(actions, "sample", text, _sample)
    parser.add_argument("dataset", metavar="DATASET", help="sen1floods11, burnscars, mados, pastis or eurosat")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--count", type=int, default=4, metavar="N", help="training samples, of EuroSAT a class; default: 4")
    parser.add_argument("--size", type=int, metavar="S", help="side of the images in pixels; default: the original's")
    parser.add_argument("--seed", type=int, default=0)
    parser = _add(actions, "pack", "turn a folder of GeoTIFFs, MODALITY/NAME.tif, of any size and CRS into shards", _pack)
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
    parser = _add(actions, "prepare", text, _prepare)
    parser.add_argument("root", metavar="ROOT", help="folder of shards")
    parser.add_argument("--out", required=True, metavar="DIR", help="for DIR/terramesh; then also a data.root to train on")
    parser.add_argument("--tokens", metavar="DIR", help="folder of token shards; default: beside the pixels")
    text = "make the records with Apache Beam; OPTIONS such as runner=DataflowRunner,project=NAME, default: runner=DirectRunner"
    parser.add_argument("--beam", nargs="?", const="runner=DirectRunner", metavar="OPTIONS", help=text)
    text = "also write arrays that are mapped into memory, of which training reads what its masks choose; not compressed, 4.3 MB a sample"
    parser.add_argument("--mapped", action="store_true", help=text)
    for name, text, command in (
        ("index", "find every sample, also in a gs://, s3://, hf:// or http:// root; exits with 1 for damaged tars", _index),
        ("check", "read every sample and report the bad ones; exits with 1 if there are any", _check),
        ("stats", "mean and spread per band beside the released ones, as a declaration of your own modality takes them", _stats),
    ):
        parser = _add(actions, name, text, command)
        parser.add_argument("root", metavar="ROOT", help="folder of shards")
    parser.add_argument("--modality", action="append", metavar="NAME", help="only this modality; may be repeated")
    parser.add_argument("--split", action="append", metavar="NAME", help="only this split; may be repeated")
    parser.add_argument("--limit", type=int, metavar="N", help="only so many samples of each, spread evenly; default: all")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read; default: all cores")
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

    options = dict(lulc_codes=parsed.lulc_codes, offsets=_offsets(parsed.offset), val_fraction=parsed.val_fraction, seed=parsed.seed)
    info = pack(parsed.source, parsed.out, **options)
    for what, count in info.get("left_out", {}).items():
        print(f"Left out: {count} tiles {what.replace('_', ' ')}.")
    print(check.format_index(check.index(parsed.out)))


def _prepare(parsed: argparse.Namespace) -> None:
    from terramind_jax.data import check, mapped
    from terramind_jax.data.index import open_index
    from terramind_jax.data.terramesh import prepare

    options = None if parsed.beam is None else [f"--{option}" for option in parsed.beam.split(",")]
    prepare(parsed.root, parsed.out, tokens=parsed.tokens, beam_options=options)
    if parsed.mapped:
        for split in check.splits(parsed.root):
            print(f"Mapped into memory of {split}: {', '.join(mapped.write(open_index(parsed.out, split)))}.")


def _offsets(pairs: Sequence[str]) -> dict[str, float]:
    """``["S2L2A=-1000"]`` -> ``{"S2L2A": -1000.0}``."""
    offsets = {}
    for pair in pairs:
        name, _, value = pair.rpartition("=")
        try:
            offsets[name] = float(value)
        except ValueError:
            raise ValueError(f"--offset takes MODALITY=VALUE or MODALITY/NAME=VALUE, such as S2L2A=-1000, not {pair!r}.") from None
    return offsets


def _index(parsed: argparse.Namespace) -> int:
    from terramind_jax.data import check

    reports = check.index(parsed.root)
    print(check.format_index(reports))
    return 1 if any(report.faults for report in reports.values()) else 0


def _check(parsed: argparse.Namespace) -> int:
    from terramind_jax.data import check

    results = [check.check(parsed.root, split) for split in check.splits(parsed.root)]
    print("\n\n".join(map(check.format_check, results)))
    return 0 if all(result.ok for result in results) else 1


def _stats(parsed: argparse.Namespace) -> None:
    from terramind_jax.data import check

    options = (parsed.modality, parsed.limit, parsed.workers)
    found = {split: check.stats(parsed.root, split, *options) for split in parsed.split or check.splits(parsed.root)}
    if parsed.json:
        print(json.dumps({split: check.as_json(result) for split, result in found.items()}, indent=2))
        return
    for split, result in found.items():
        print(f"{split}\n{check.format_stats(result)}")


# ---- evaluation ----


def _add_evaluate(commands) -> None:
    text = "benchmark protocols: what a model generates and what its features say, beside published numbers"
    evaluate = commands.add_parser("evaluate", help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    protocols = evaluate.add_subparsers(title="protocols", required=True, metavar="PROTOCOL")
    parser = _add_protocol(protocols, "generation", "generate modalities that are there, and say how far from them", _evaluate_generation)
    parser.add_argument("--data", required=True, metavar="ROOT", help="folder of shards, or of GeoTIFFs MODALITY/NAME.tif of any size")
    parser.add_argument("--from", required=True, dest="inputs", metavar="A,B", help="modalities to generate from")
    parser.add_argument("--to", required=True, metavar="A,B", help="modalities to generate, each alone")
    _add_generation(parser, "val")
    parser.add_argument("--lulc_codes", choices=LULC_CODES, help="codes of the LULC rasters of a folder")
    parser.add_argument("--timesteps", type=int, default=10, help="steps of a diffusion decoder; default: 10")
    parser.add_argument("--steps", type=int, default=1, help="steps in which an image's tokens are drawn; default: 1")
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="samples in the picture; default: 4")
    parser = _add_protocol(protocols, "knn", "classify the images of a data set by their nearest neighbours' labels", _evaluate_knn)
    _add_features(parser)
    parser.add_argument("--k", default="5,20", metavar="K,...", help="neighbours that vote; default: 5,20")
    parser = _add_protocol(protocols, "linear", "classify the images of a data set by a linear probe", _evaluate_linear)
    _add_features(parser)
    parser = _add_protocol(protocols, "fewshot", "classify the images of a data set by one example of some classes", _evaluate_fewshot)
    _add_features(parser)
    parser.add_argument("--shots", type=int, default=1, metavar="N", help="examples of a class; default: 1")
    parser.add_argument("--ways", type=int, default=5, metavar="N", help="classes of a run; default: 5")
    parser.add_argument("--runs", type=int, default=200, metavar="N", help="default: 200, as published")
    parser = _add_protocol(protocols, "zeroshot", "map the water of Sen1Floods11 by generated land cover", _evaluate_zeroshot)
    parser.add_argument("--data", required=True, metavar="ROOT", help="its folder; a tiny copy: `data sample sen1floods11`")
    parser.add_argument("--from", default="S2L1C", dest="inputs", metavar="A,B", help="S2L1C, S1GRD or both; default: S2L1C")
    _add_generation(parser, "test")
    parser.add_argument("--steps", type=int, default=1, help="steps in which an image's tokens are drawn; default: 1")
    text = "moves a modality's mean, where reflectance has no offset and that of the pretraining has; e.g. S2L1C=-1000"
    parser.add_argument("--offset", action="append", default=[], metavar="MODALITY=VALUE", help=text)
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="chips in the picture; default: 4")
    parser = _add_protocol(protocols, "geolocate", "generate coordinates from images, and say how far they are", _evaluate_geolocate)
    parser.add_argument("--data", required=True, metavar="ROOT", help="folder of shards, or of GeoTIFFs MODALITY/NAME.tif")
    parser.add_argument("--from", required=True, dest="inputs", metavar="A,B", help="modalities to look at")
    _add_generation(parser, "val")
    parser.add_argument("--lulc_codes", choices=LULC_CODES, help="codes of the LULC rasters of a folder")

    parser = _add(protocols, "pangaea", "train an UPerNet on a frozen encoder as PANGAEA does, and test it", _evaluate_pangaea)
    parser.add_argument("--model", default="terramind_v1_base", metavar="NAME", help="default: terramind_v1_base")
    parser.add_argument("--weights", required=True, metavar="W", help="hub, random, or a file, directory or work directory of that model")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="sen1floods11, burnscars, mados or pastis")
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
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N samples of each split, to try it; default: all")


def _add_protocol(protocols, name: str, text: str, command) -> argparse.ArgumentParser:
    """What all protocols are told: the model, and where the results go."""
    parser = _add(protocols, name, text, command)
    _add_model(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="report.md, tables as CSV and pictures; must not exist")
    return parser


def _add_generation(parser: argparse.ArgumentParser, split: str) -> None:
    """With which tokenizers it is generated, how much, and how."""
    _add_tokenizers(parser)
    parser.add_argument("--split", default=split, metavar="NAME", help=f"not of a folder of GeoTIFFs; default: {split}")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N samples; default: all")
    parser.add_argument("--batch_size", type=_positive, default=8, metavar="N", help="images at once; default: 8")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default: 0")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the most likely token; default: 1")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _add_features(parser: argparse.ArgumentParser) -> None:
    """Which images of which data set, and their features."""
    parser.add_argument("--dataset", default="eurosat", metavar="NAME", help="whose images have one label each; default: eurosat")
    parser.add_argument("--data", required=True, metavar="ROOT", help="its folder; a tiny copy: `data sample eurosat`")
    parser.add_argument("--inputs", default="", metavar="A,B", help="modalities; default: all that it has")
    parser.add_argument("--layer", type=int, default=-1, metavar="I", help="of the encoder, 0 the first; default: -1, the last")
    parser.add_argument("--resize", type=int, metavar="S", help="bring images to S x S pixels; default: as they are")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only N samples of a split, drawn under the seed; default: all")
    text = "standardise with those of the pretraining, or of the data set; default: pretrained"
    parser.add_argument("--statistics", default="pretrained", choices=("pretrained", "dataset"), help=text)
    parser.add_argument("--batch_size", type=_positive, default=32, metavar="N", help="images at once; default: 32")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default: 0")


def _features(parsed: argparse.Namespace) -> dict:
    same = ("weights", "model", "dataset", "data", "out", "layer", "resize", "limit", "statistics", "batch_size", "seed")
    return {"inputs": _names(parsed.inputs), **{name: getattr(parsed, name) for name in same}}


def _evaluate_knn(parsed: argparse.Namespace) -> None:
    from terramind_jax.evaluation import classification

    classification.knn(**_features(parsed), k=[int(k) for k in _names(parsed.k)])


def _evaluate_linear(parsed: argparse.Namespace) -> None:
    from terramind_jax.evaluation import classification

    classification.linear(**_features(parsed))


def _evaluate_fewshot(parsed: argparse.Namespace) -> None:
    from terramind_jax.evaluation import fewshot

    fewshot.run(**_features(parsed), shots=parsed.shots, ways=parsed.ways, runs=parsed.runs)


def _evaluate_generation(parsed: argparse.Namespace) -> None:
    from terramind_jax.evaluation import generation

    generation.run(**_generated(parsed, "lulc_codes", "timesteps", "steps", "pictures"), to=_names(parsed.to))


def _evaluate_zeroshot(parsed: argparse.Namespace) -> None:
    from terramind_jax.evaluation import zeroshot

    zeroshot.run(**_generated(parsed, "steps", "pictures"), offset=_offsets(parsed.offset))


def _evaluate_geolocate(parsed: argparse.Namespace) -> None:
    from terramind_jax.evaluation import geolocate

    geolocate.run(**_generated(parsed, "lulc_codes"))


def _evaluate_pangaea(parsed: argparse.Namespace) -> None:
    from terramind_jax.evaluation import pangaea

    _accept_grain_workers()
    same = ("weights", "model", "dataset", "data", "out")
    settings = {name: getattr(parsed, name) for name in ("epochs", "batch_size", "crop", "labels", "limit", "loss", "seed")}
    pangaea.run(**{name: getattr(parsed, name) for name in same}, settings=pangaea.Settings(**settings))


def _generated(parsed: argparse.Namespace, *others: str) -> dict:
    same = ("weights", "model", "tokenizers", "data", "out", "split", "limit", "batch_size", "seed", "temperature", *others)
    return {"inputs": _names(parsed.inputs), **{name: getattr(parsed, name) for name in same}}


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


# ---- watch ----


def _add_watch(commands) -> None:
    parser = _add(commands, "watch", "show a training run as a live table", _watch)
    parser.add_argument("workdir", metavar="WORKDIR", help="work directory of the run, local or gs://; may not be there yet")
    parser.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="time between looks")
    parser.add_argument("--once", action="store_true", help="print one table and end; exits with 1 if there is no log yet")


def _watch(parsed: argparse.Namespace) -> int:
    from terramind_jax import watch

    return watch.watch(parsed.workdir, every=parsed.every, once=parsed.once)


# ---- serve ----


def _add_serve(commands) -> None:
    parser = _add(commands, "serve", "show a page on which modalities are generated", _serve)
    _add_model(parser)
    _add_tokenizers(parser)
    text = "folder of GeoTIFFs, MODALITY/NAME.tif, to choose from; default: those who see the page upload theirs"
    parser.add_argument("--tiles", metavar="DIR", help=text)
    parser.add_argument("--lulc_codes", choices=LULC_CODES, help="codes of LULC rasters; without them LULC is no input")
    text = "address to serve at, 0.0.0.0 for whoever reaches this machine; default: 127.0.0.1, this machine alone"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--max_mb", type=int, default=64, metavar="N", help="largest GeoTIFF, as a file and unpacked; default: 64")
    parser.epilog = "Needs pip install 'terramind-jax[demo]'. What is uploaded and made goes after an hour, and with the server."


def _serve(parsed: argparse.Namespace) -> None:
    from terramind_jax import serve

    same = ("weights", "model", "tokenizers", "tiles", "lulc_codes", "host", "port", "max_mb")
    serve.run(**{name: getattr(parsed, name) for name in same})


# ---- info ----


def _info(parsed: argparse.Namespace) -> None:
    """Prints versions, devices and models."""
    from importlib import metadata

    import jax

    from terramind_jax import zoo

    for name in ("terramind_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        print(f"{name:18s} {_version(metadata, name)}")
    print(f"{'devices':18s} {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()}), process {jax.process_index()}")
    for name, size in zoo.SIZES.items():
        depth = f"{size['encoder_depth']}+{size['decoder_depth']} layers of {size['dim']}"
        print(f"{'terramind_v1_' + name:18s} {depth}, {zoo.PARAMETERS[name] / 1e6:.0f} M parameters")


def _version(metadata, name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
