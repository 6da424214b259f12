"""The command line: ``terramind-jax COMMAND``. Each command imports what it needs when it runs, so that ``--help`` is instant."""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from terramind_jax.cli import data, evaluate
from terramind_jax.cli.arguments import (
    LULC_CODES,
    accept_grain_workers,
    add,
    add_diffusion,
    add_model,
    add_tokenizers,
    names,
    read_bands,
    read_diffusion,
    read_inputs,
    task_config,
)

DEBUG = "TERRAMIND_JAX_DEBUG"  # set to 1: errors of use show their traceback too
PROGRAMS = "JAX_COMPILATION_CACHE_DIR"  # JAX's own: where compiled programs are kept
STOPPED = 130  # what the shell reports for Ctrl-C
INTERRUPTED = 143  # what the shell reports for a process ended by SIGTERM


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for bad data found, 2 after an error of use, 130 for Ctrl-C, 143 for SIGTERM."""
    parsed = _parse(sys.argv[1:] if arguments is None else list(arguments))
    _keep_programs()
    usual, warnings.formatwarning = warnings.formatwarning, partial(_sentence, warnings.formatwarning)
    try:
        return parsed.command(parsed) or 0
    except KeyboardInterrupt:
        if "kept" in parsed:
            print(f"\nStopped. {parsed.kept.format(**vars(parsed))}; the same command goes on from there.", file=sys.stderr)
        return STOPPED
    except Exception as error:
        if not _told(error):
            raise
        return 2
    finally:
        warnings.formatwarning = usual


def end(code: int) -> None:
    """Ends this process at once: its threads may be in the midst of compiling or writing, and other processes may wait for it."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also if whoever read them has gone
        os._exit(code)


def _keep_programs() -> None:
    """Has JAX keep what it compiles, unless it was told where, or not to: the next command starts without that minute.

    A machine has a folder of its own, since XLA compiles for the processor at hand and several may share a home. Where none can be
    written, each command compiles.
    """
    from terramind_jax import hub

    if PROGRAMS in os.environ:
        return
    try:
        folder = hub.cache_folder() / "programs" / platform.node()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # read-only, or no home at all
        return
    if os.access(folder, os.W_OK):
        os.environ[PROGRAMS] = str(folder)


def _sentence(
    usual: Callable[..., str], message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """The text of a warning: of this package's own, which are told to users, not where in the code they come from; else the `usual` one."""
    own = category is UserWarning and Path(__file__).parents[1] in Path(filename).parents
    return f"warning: {message}\n" if own else usual(message, category, filename, lineno, line)


def _told(error: Exception) -> bool:
    """Whether an error was told in one sentence, as those of use are; the others need their traceback."""
    if os.environ.get(DEBUG) == "1" or not _is_users(error):
        return False
    told = f"{_paths(error)}: {error.strerror}." if isinstance(error, OSError) and error.filename else str(error)
    print(f"error: {' '.join(told.split())}", file=sys.stderr)
    return True


def _paths(error: OSError) -> str:
    """The file that it is about; of a renaming both."""
    return f"{error.filename} to {error.filename2}" if error.filename2 else str(error.filename)


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
    data.add_commands(commands)
    evaluate.add_commands(commands)
    _add_watch(commands)
    _add_serve(commands)
    add(commands, "info", "versions, devices and models", _info)
    parsed, rest = parser.parse_known_args(arguments)
    if rest and "overrides" not in parsed:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = rest
    return parsed


# ---- training ----


def _add_training(commands) -> None:
    for name, text, command, example in (
        ("pretrain", "train the any-to-any transformer", _pretrain, "configs/pretrain/tiny.py"),
        ("train-tokenizer", "train one tokenizer", _train_tokenizer, "configs/tokenizer/dem.py"),
        ("finetune", "train a downstream task on a backbone", _finetune, "configs/finetune/sen1floods11.py"),
    ):
        parser = add(commands, name, text, command)
        parser.epilog = "Any field of the configuration is overridden with --config.FIELD=VALUE, e.g. --config.data.root=DIR."
        also = "; or TerraTorch's YAML" if name == "finetune" else ""
        parser.add_argument("--config", required=True, metavar="FILE", help=f"a file with get_config(), such as {example}{also}")
        parser.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints and metrics, local or gs://; a run there goes on")
        text = "process 0 of several, with JAX_NUM_PROCESSES and JAX_PROCESS_ID; not needed on TPU pods, GKE, SLURM and Open MPI"
        parser.add_argument("--coordinator", metavar="HOST:PORT", help=text)
        parser.add_argument("--profile", metavar="START:STOP", help="steps whose trace goes to WORKDIR/profile, to be read with XProf")
        parser.set_defaults(overrides=[], kept="The last checkpoint, if there is one yet, stays in {workdir}")


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

    return _train(finetune.train, parsed, task_config(parsed))


def _train(train, parsed: argparse.Namespace, settings=None) -> int:
    from terramind_jax import checkpoint, config, processes

    accept_grain_workers()
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
        end(2 if _is_users(error) else 1)
    print("  ".join(f"{name} {value:.6g}" for name, value in metrics.items() if value == value))  # a modality without targets has no loss
    return 0


def _add_plan(commands) -> None:
    parser = add(commands, "plan", "say what a pretraining run will need and cost, compiled for a TPU slice that need not be there", _plan)
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
    parser = add(commands, "tokenize", "turn shards into token shards", _tokenize)
    parser.add_argument("--data", required=True, metavar="ROOT", help="folder of shards")
    parser.add_argument("--weights", required=True, metavar="DIR", help="folder with one tokenizer a modality; or hub, the released ones")
    parser.add_argument("--out", metavar="DIR", help="folder for the token shards; default: beside the pixels")
    parser.add_argument("--array_record", action="store_true", help="make --out a TFDS data set of tokens, a record a location")
    text = "only this split, such as test; may be repeated; default: train and val, which pretraining reads"
    parser.add_argument("--split", action="append", metavar="NAME", help=text)
    parser.add_argument("--batch_size", type=int, default=16, help="crops encoded at once, on all devices of this machine")
    parser.add_argument("--host", type=int, default=0, metavar="K", help="do this share of the shards, from 0, of")
    parser.add_argument("--hosts", type=int, default=1, metavar="N", help="so many, the others being done by other machines")
    parser.set_defaults(kept="Shards that are done stay")


def _tokenize(parsed: argparse.Namespace) -> None:
    from terramind_jax.tokenize import tokenize

    options = {"batch_size": parsed.batch_size, "array_record": parsed.array_record, "host": parsed.host, "hosts": parsed.hosts}
    tokenize(parsed.data, parsed.weights, parsed.out, splits=parsed.split, **options)


# ---- using a model ----


def _add_generate(commands) -> None:
    parser = add(commands, "generate", "generate modalities from GeoTIFFs", _generate)
    _add_scenes(parser)
    parser.add_argument("--to", required=True, metavar="A,B", help="modalities to generate, in this order; each conditions the next")
    parser.add_argument("--out", required=True, metavar="DIR", help="GeoTIFFs and pictures; none that exists is replaced")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default: 0")
    add_diffusion(parser)
    parser.add_argument("--steps", type=int, default=1, help="steps in which an image's tokens are drawn; default: 1")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the most likely token; default: 1")
    text = "tokens are drawn among the most likely ones that have this probability together, 0: among all; default: 0.8"
    parser.add_argument("--top_p", type=float, default=0.8, help=text)
    text = "beyond 1 what the inputs tell counts more than the model says, which takes a second pass without them; default: 1"
    parser.add_argument("--guidance_scale", type=float, default=1.0, help=text)
    parser.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="draw N times, and write the spread beside the first draw, as MODALITY_std; default: 1",
    )
    _add_windows(parser)
    parser.add_argument("--no-quicklook", dest="quicklook", action="store_false", help="draw no picture")
    parser.epilog = (
        "A scene of any size, from 224 pixels on, is seen through windows of the model's size that overlap; if its sides are no multiples "
        "of 16 pixels, it is mirrored at the right and lower edge. Where no input has data, outputs have none. Ctrl-C or a kill "
        "leaves what is done in DIR/unfinished, from which the same command goes on."
    )


def _add_scenes(parser: argparse.ArgumentParser) -> None:
    """What to read, and with which model."""
    add_model(parser)
    add_tokenizers(parser)
    text = "a GeoTIFF or a folder of them; repeat for more"
    parser.add_argument("--input", action="append", required=True, metavar="MODALITY=PATH", help=text)


def _add_windows(parser: argparse.ArgumentParser) -> None:
    _add_overlap(parser)
    parser.add_argument("--lulc_codes", choices=LULC_CODES, help="codes of a LULC raster among the inputs")
    text = "bands of an input's file, in its order, if it lacks some, which are filled from their neighbours; repeat for more"
    parser.add_argument("--bands", action="append", default=[], metavar="MODALITY=A,B", help=text)


def _add_overlap(parser: argparse.ArgumentParser) -> None:
    text = "pixels that windows share with their neighbours, a multiple of 16; default: half a window"
    parser.add_argument("--overlap", type=int, metavar="PIXELS", help=text)
    parser.add_argument(
        "--batch_size", type=int, default=8, metavar="N", help="windows at once, on all devices of this machine; default: 8"
    )


def _generate(parsed: argparse.Namespace) -> None:
    inputs = read_inputs(parsed.input)
    targets = names(parsed.to)
    from terramind_jax import generate_scenes

    generate_scenes.run(
        weights=parsed.weights,
        inputs=inputs,
        to=targets,
        out=parsed.out,
        tokenizers=parsed.tokenizers,
        model=parsed.model,
        lulc_codes=parsed.lulc_codes,
        bands=read_bands(parsed.bands),
        seed=parsed.seed,
        overlap=parsed.overlap,
        samples=parsed.samples,
        batch_size=parsed.batch_size,
        quicklook=parsed.quicklook,
        steps=parsed.steps,
        temperature=parsed.temperature,
        top_p=parsed.top_p,
        guidance_scale=parsed.guidance_scale,
        **read_diffusion(parsed),
    )


def _add_embed(commands) -> None:
    parser = add(commands, "embed", "turn GeoTIFFs into embedding rasters or tables", _embed)
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
    inputs = read_inputs(parsed.input)
    from terramind_jax import embed_scenes

    same = ("weights", "out", "tokenizers", "model", "layer", "pooling", "format", "lulc_codes", "overlap", "batch_size")
    embed_scenes.run(inputs=inputs, bands=read_bands(parsed.bands), **{name: getattr(parsed, name) for name in same})


def _add_predict(commands) -> None:
    parser = add(commands, "predict", "apply a fine-tuned model to GeoTIFFs", _predict)
    parser.add_argument("--weights", required=True, metavar="WORKDIR", help="work directory of finetune")
    text = "a GeoTIFF or a folder of them, stored as the data set's own; repeat for more"
    parser.add_argument("--input", action="append", required=True, metavar="MODALITY=PATH", help=text)
    text = "NAME.tif of each input, on its grid: classes, or values; labels of whole images go to labels.json; none that exists is replaced"
    parser.add_argument("--out", required=True, metavar="DIR", help=text)
    _add_overlap(parser)
    parser.epilog = (
        "A scene of any size, from the crops of training on, is seen through windows of their size that overlap. Where no input has data, "
        "maps have none. Ctrl-C or a kill leaves what is done in DIR/unfinished, from which the same command goes on."
    )


def _predict(parsed: argparse.Namespace) -> None:
    from terramind_jax.tasks import predict

    predict.run(parsed.weights, read_inputs(parsed.input), parsed.out, overlap=parsed.overlap, batch_size=parsed.batch_size)


def _add_convert(commands) -> None:
    text = "copy weights between PyTorch (.pt), .safetensors and Orbax directories, by suffix; fine-tuned models to TerraTorch and back"
    parser = add(commands, "convert", text, _convert)
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
        exchange.import_model(parsed.source, parsed.target, task_config(parsed))
    elif parsed.overrides:
        raise ValueError(f"{parsed.overrides[0]} needs --config=FILE.")
    elif (Path(parsed.source) / finetune.TASK).exists():
        exchange.export(parsed.source, parsed.target)
    else:
        weights.convert(parsed.source, parsed.target, parsed.model)


def _add_quickstart(commands) -> None:
    parser = add(commands, "quickstart", "train a small model here, on the embedded world or on your tiles, and generate", _quickstart)
    parser.add_argument("--data", default=None, metavar="DIR", help="folder of GeoTIFFs, MODALITY/NAME.tif; default: the embedded world")
    parser.add_argument("--out", default=None, metavar="DIR", help="default: quickstart, or quickstart_NAME for a folder NAME of tiles")
    parser.add_argument("--lulc_codes", default="terramesh", choices=LULC_CODES, help="codes of the LULC rasters in --data")
    parser.add_argument("--minutes", type=float, default=None, help="about how long to train")
    parser.set_defaults(kept="Parts that are done stay")


def _quickstart(parsed: argparse.Namespace) -> None:
    from terramind_jax import quickstart

    accept_grain_workers()
    minutes = {} if parsed.minutes is None else {"minutes": parsed.minutes}
    quickstart.run(data=parsed.data, out=parsed.out, lulc_codes=parsed.lulc_codes, **minutes)


# ---- watch ----


def _add_watch(commands) -> None:
    parser = add(commands, "watch", "show a training run as a live table", _watch)
    parser.add_argument("workdir", metavar="WORKDIR", help="work directory of the run, local or gs://; may not be there yet")
    parser.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="time between looks")
    parser.add_argument("--once", action="store_true", help="print one table and end; exits with 1 if there is no log yet")


def _watch(parsed: argparse.Namespace) -> int:
    from terramind_jax import watch

    return watch.watch(parsed.workdir, every=parsed.every, once=parsed.once)


# ---- serve ----


def _add_serve(commands) -> None:
    parser = add(commands, "serve", "show a page on which modalities are generated", _serve)
    add_model(parser)
    add_tokenizers(parser)
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
