"""What several commands take: how parsers are made, arguments, and what is read out of their texts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

LULC_CODES = ("terramesh", "esri", "dynamicworld")
SAMPLERS = ("dpmpp", "ddim", "ddpm")
CLIPS = ("published", "none", "dynamic")


def add(commands, name: str, text: str, command) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    parser.set_defaults(command=command)
    return parser


def add_group(commands, name: str, text: str, title: str):
    """A command whose actions are commands of their own: what these are added to."""
    group = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    return group.add_subparsers(title=f"{title}s", required=True, metavar=title.upper())


def accept_grain_workers() -> None:
    """Grain's worker processes insist on parsed absl flags; the flags are not used otherwise."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    text = "a released model, such as terramind_v1_base; not for a work directory"
    parser.add_argument("--model", default=None, metavar="NAME", help=text)
    text = "work directory of a pretrained model; with --model also hub, random, or a file"
    parser.add_argument("--weights", required=True, metavar="W", help=text)


def add_tokenizers(parser: argparse.ArgumentParser) -> None:
    text = "folder with one tokenizer a modality; default: tokenizers, in or beside the weights"
    parser.add_argument("--tokenizers", metavar="DIR", help=text)


def add_diffusion(parser: argparse.ArgumentParser) -> None:
    """How diffusion decoders decode; see `read_diffusion`."""
    text = "steps of a diffusion decoder; default: 12 of dpmpp, which without a clip err no more than the 50 of ddim; 1000 of ddpm"
    parser.add_argument("--timesteps", type=int, help=text)
    text = "of a diffusion decoder: dpmpp; ddim as published, which needs more steps; or ddpm, which draws noise in each; default: dpmpp"
    parser.add_argument("--sampler", choices=SAMPLERS, help=text)
    text = "limit of a diffusion decoder: published keeps outputs within one standard deviation of the mean; default: published"
    parser.add_argument("--clip", choices=CLIPS, help=text)


def read_diffusion(parsed: argparse.Namespace) -> dict[str, int | str]:
    """What was given of `add_diffusion`'s; the functions know the rest."""
    given = {name: getattr(parsed, name) for name in ("timesteps", "sampler", "clip")}
    return {name: value for name, value in given.items() if value is not None}


def read_inputs(pairs: Sequence[str]) -> dict[str, str]:
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


def read_bands(pairs: Sequence[str]) -> dict[str, list[str]]:
    """``["S2L2A=B02,B03"]`` -> ``{"S2L2A": ["B02", "B03"]}``."""
    bands = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name or not names(text):
            raise ValueError(f"--bands takes MODALITY=A,B, such as S2L2A=B02,B03,B04, not {pair!r}.")
        if name in bands:
            raise ValueError(f"--bands names {name} twice.")
        bands[name] = names(text)
    return bands


def task_config(parsed: argparse.Namespace):
    """The configuration of a fine-tuning, ours or TerraTorch's; what has no equivalent is told."""
    from terramind_jax import config
    from terramind_jax.tasks import terratorch

    if Path(parsed.config).suffix not in terratorch.SUFFIXES:
        return config.load(parsed.config, parsed.overrides)
    settings, rest = terratorch.read(parsed.config)
    for line in rest:
        print(f"{parsed.config}: no equivalent: {line}", file=sys.stderr)
    return config.overridden(settings, parsed.overrides)


def read_offsets(pairs: Sequence[str]) -> dict[str, float]:
    """``["S2L2A=-1000"]`` -> ``{"S2L2A": -1000.0}``."""
    offsets = {}
    for pair in pairs:
        name, _, value = pair.rpartition("=")
        try:
            offsets[name] = float(value if name else "")
        except ValueError:
            raise ValueError(f"--offset takes MODALITY=VALUE or MODALITY/NAME=VALUE, such as S2L2A=-1000, not {pair!r}.") from None
    return offsets


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]
