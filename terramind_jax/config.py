"""Configurations: files with ``get_config()``, command-line overrides, what a work directory was started with.

`pretraining` and `tokenizer_training` list every field with its default; the files in ``configs/`` set what differs. Group ``run``
and the fields in `FREE` may differ when a run is continued; every other field may not.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from terramind_jax import files

# What a continued run may change. `data.root` and `data.tokens` say where the shards lie; the order of samples depends on their keys alone.
# The batch size too, if the run is so many tokens or samples long: `train.steps` counts batches.
FREE = (
    *("run", "mesh", "data.root", "data.tokens", "data.tokenizers", "data.val_split", "optimizer.spike_factor"),
    *("train.accumulate", "model.attention", "model.dtype", "model.remat", "model.unroll"),
)


# Groups whose names are free.
OPEN = ("model.codebooks", "data.subset_weights", "optimizer.rates", "data.options")


def pretraining() -> ConfigDict:
    """Defaults of ``pretrain``: the released tiny model."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.dim = 192  # width; heads have 64 channels
    config.model.encoder_depth = 12
    config.model.decoder_depth = 4
    config.model.num_heads = 3
    config.model.mlp_ratio = 4.0
    config.model.gated_mlp = False  # SwiGLU in base and large, GELU in tiny and small
    config.model.use_bias = True  # of attention and MLP; off in base and large
    config.model.image_size = 224
    # Of activations and products, hence of kernels' gradients while devices sum them: auto is bfloat16 on accelerators, float32 on CPU.
    config.model.dtype = "auto"
    config.model.attention = "xla"  # xla | cudnn: the kernel of attention; cudnn needs an NVIDIA GPU and a 16-bit dtype
    config.model.remat = "none"  # none | dots | full: what the backward pass recomputes to save memory
    config.model.unroll = 1  # layers per iteration of the scan over layers
    # {"DEM": 512, "NDVI": (8, 128)}: vocabulary per modality, or vocabulary and how many codebooks of it a patch has; of a modality that is
    # not named as written beside the tokens, else as released.
    config.model.codebooks = ConfigDict()

    config.modalities = ConfigDict()  # declarations of modalities of your own; those in {data.root}/modalities.json are added

    config.data = ConfigDict()
    config.data.root = ""  # folder of shards, {root}/{split}/{modality}/*.tar, or one that `data prepare` wrote
    config.data.tokens = ""  # folder of token shards; empty: beside the pixels
    # Tokens are made in the training step, by the encoders of `tokenizers`, instead of being read: no token shards, the same loss, but
    # whole crops travel to the devices (1.9 MB a sample at 224 pixels) and wait in memory with their views, and a released encoder takes
    # 0.35 GiB of each device. `plan` counts the crops alone, `mfu` neither.
    config.data.online_tokens = False
    config.data.tokenizers = ""  # for that: folder with one tokenizer a modality, or hub, the released ones
    config.data.train_split = "train"
    config.data.val_split = "val"
    config.data.subset_weights = ConfigDict()  # {"majortom": 4, "ssl4eos12": 1}: turns of the subsets; empty: each sample once an epoch
    config.data.inputs = (
        "S2L2A",
        "S2L1C",
        "S2RGB",
        "S1GRD",
        "S1RTC",
        "DEM",
        "LULC",
        "NDVI",
        "coords",
    )  # enter the encoder, as pixels and tokens
    config.data.targets = ("S2L2A", "S1GRD", "S1RTC", "DEM", "LULC", "NDVI", "coords")  # are predicted, as tokens
    config.data.views_per_sample = 4  # masks drawn for a sample once it is read; its views go to different batches
    config.data.view_window = 1024  # samples between the views of one; at least a batch, and a multiple of batch times workers
    config.data.shuffle_window = 0  # samples that lie together and are shuffled together, for stores that like neighbours; 0: all
    config.data.patch_group = 4  # samples that share one buffer of selected patches; batch = a multiple of this times the devices
    config.data.capacity_sigmas = 3.0  # room in that buffer, in standard deviations above the mean; what does not fit is counted

    config.mask = ConfigDict()
    config.mask.input_tokens = 128  # budget of input tokens a sample
    config.mask.target_tokens = 128  # budget of target tokens a sample
    config.mask.input_alphas = (0.5,)  # Dirichlet concentration of the inputs, one entry a mixture: a number, or {stream: number}
    config.mask.target_alphas = (0.5,)  # the same for the targets
    config.mask.mixture_weights = (1.0,)  # how often each mixture is drawn
    config.mask.sequence_keep = "random"  # share of a sequence its input keeps: random | all | binary

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2e-4  # peak
    config.optimizer.min_learning_rate = 0.0  # at the end of the cosine
    config.optimizer.warmup_tokens = 10e9  # input and target tokens until the peak; at most a tenth of the run
    config.optimizer.betas = (0.9, 0.95)
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.05  # not on norms and biases
    config.optimizer.clip_norm = 0.0  # of the global gradient; 0: no clipping
    config.optimizer.spike_factor = 0.0  # a step whose gradient is so many times its running norm is skipped; 0: none is

    # Factors of the learning rate: {"encoder": 0.1} of a part (embeddings, encoder, decoder, other) or, before that, of a modality's own
    # embeddings; 0 freezes.
    config.optimizer.rates = ConfigDict()

    config.train = ConfigDict()
    config.train.init = ""  # a released model, such as terramind_v1_base, or a path to weights to start from; empty: fresh ones
    config.train.total_tokens = 500e9  # input and target tokens of the whole run
    config.train.steps = 0  # length of the run in steps; 0: from total_tokens
    config.train.batch_size = 32  # samples a step, over all hosts
    config.train.accumulate = 1  # parts into which a step cuts its batch, one after the other, to save memory; the result is the same
    config.train.loss = "mod"  # mod: mean over modalities; token: weighted by targets and vocabulary
    config.train.seed = 0

    config.mesh = mesh_fields()
    config.run = run_fields()
    return config.lock()


def tokenizer_training() -> ConfigDict:
    """Defaults of ``train-tokenizer``: networks and optimiser of the released tokenizers, with a ViT as decoder and fixed crops."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.modality = "S2L2A"
    config.model.levels = (8, 8, 8, 6, 5)  # of the FSQ codebook; their product is its size
    config.model.num_codebooks = 1  # tokens a patch
    config.model.dim = 768
    config.model.depth = 12  # of the encoder and of the decoder
    config.model.num_heads = 12
    config.model.mlp_ratio = 4.0
    config.model.decoder = "vit"  # vit: one pass; unet: diffusion, as all released ones but LULC's
    config.model.decoder_patch_size = 4  # this and the next three are the U-Net's
    config.model.model_channels = 256  # width at its finest level
    config.model.channel_mult = (1, 2, 2, 2)  # width of each level, in model_channels
    config.model.num_res_blocks = 3  # a level
    config.model.image_size = 256  # grid of the stored positions
    config.model.dtype = "auto"  # auto is bfloat16 on accelerators, float32 on CPU
    config.model.unroll = 1  # layers per iteration of the scan over layers

    config.modalities = ConfigDict()  # declarations of modalities of your own; those in {data.root}/modalities.json are added

    config.data = ConfigDict()
    config.data.root = ""  # folder of shards, {root}/{split}/{modality}/*.tar
    config.data.train_split = "train"
    config.data.val_split = "val"
    config.data.image_size = 224  # side of the fixed crops, in pixels; of those of the evaluations in any case
    config.data.sizes = ()  # sides of images made of random crops, one a step, instead of training on fixed crops: 224,256
    config.data.tile_size = 0  # side of the tiles of which random crops are taken; 0: of the first tile
    config.data.min_crop_scale = 0.8  # least area of a random crop, as part of its tile

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1.41421e-4  # peak
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.warmup_samples = 9e6  # one epoch of TerraMesh; at most a tenth of the run
    config.optimizer.betas = (0.9, 0.99)
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0
    config.optimizer.spike_factor = 0.0  # a step whose gradient is so many times its running norm is skipped; 0: none is

    config.train = ConfigDict()
    config.train.total_samples = 180e6  # samples of the whole run: 20 epochs of TerraMesh
    config.train.steps = 0  # length of the run in steps; 0: from total_samples
    config.train.batch_size = 2048  # samples a step, over all hosts
    config.train.data_init = True  # spread embeddings and latents over a first batch, so that tokens use many codes from the start
    config.train.zero_output = False  # begin a ViT decoder's last layer at zero: pixels of a patch begin alike, and flat ones stay so
    config.train.ema_decay = 0.9999  # of the averaged weights, which are the ones used afterwards
    config.train.seed = 0

    config.mesh = mesh_fields()
    config.run = run_fields()
    config.run.timesteps = 50  # of diffusion, in the evaluations
    config.run.pictures_every = 1  # evaluations between pictures of reconstructions in {workdir}/pictures; 0: none
    return config.lock()


def mesh_fields() -> ConfigDict:
    """Of every training."""
    mesh = ConfigDict()
    mesh.data = -1  # devices that split the batch; -1: those that remain
    mesh.fsdp = 1  # devices that split the batch and the parameters; at least 96 of model.dim a device, or it moves more than it saves
    mesh.tensor = 1  # devices that split heads, MLPs and vocabularies
    return mesh


def run_fields() -> ConfigDict:
    """Of every training."""
    run = ConfigDict()
    run.log_every = 10  # steps between lines of metrics.jsonl
    run.eval_every = 1000  # steps between evaluations on the validation split; 0: only at the end
    run.eval_batches = 8  # batches an evaluation takes, with fixed masks and crops
    run.probe_scenes = 256  # whole held-out scenes on which an evaluation measures generation and k-nearest neighbours; 0: none
    run.checkpoint_every = 1000  # steps between checkpoints; one is also written at the end and at SIGTERM
    run.keep = 3  # newest checkpoints kept
    run.workers = 0  # processes that read data; 0: this one
    run.threads = 2  # of each of them, so many reads at once; about 32 where the shards lie in a store that takes 20 ms to answer
    run.max_bad_fraction = 0.1  # of the samples of about the last 100 steps that cannot be read; past it the run stops
    run.patience = 100  # steps skipped in a row, after which the run goes back to its last checkpoint, with other data
    run.rewinds = 3  # how often it does so, without a checkpoint in between, before it stops
    run.stall_seconds = 300.0  # a step that takes longer is reported, with the process that it waits for; 0: never
    run.heartbeat_seconds = 100  # a process of several that is silent for so long counts as dead, and all others end
    run.profile = ""  # START:STOP, steps whose trace goes to {workdir}/profile, to be read with XProf
    run.tensorboard = True  # write event files beside metrics.jsonl
    run.wandb = False  # send the metrics to Weights & Biases, which must be installed
    run.progress = True  # show a progress bar
    return run


def read(path: str | os.PathLike) -> ConfigDict:
    """The result of ``get_config()`` in the Python file `path`, locked against new fields."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No configuration file {path}.")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{error.filename or path} is no Python that can be read: {error.msg} in line {error.lineno}.") from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} does not define get_config().")
    config = module.get_config()
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config() of {path} returns a {type(config).__name__}; expected a ConfigDict.")
    return config.lock()


def load(path: str | os.PathLike, overrides: Sequence[str] = ()) -> ConfigDict:
    """A configuration file with overrides as on the command line: ``--config.model.dim=192``."""
    return overridden(read(path), overrides)


def overridden(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """The configuration, changed."""
    for field, text in _pairs(overrides):
        override(config, field, text)
    return config


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """``["--config.a=1", "--config.b", "2"]`` -> ``[("a", "1"), ("b", "2")]``."""
    pairs, rest = [], list(arguments)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        if not name.startswith("--config."):
            raise ValueError(f"Unknown argument {name!r}; fields of the configuration are set with --config.FIELD=VALUE.")
        if not equals:
            if not rest:
                raise ValueError(f"{name} has no value; write {name}=VALUE.")
            text = rest.pop(0)
        pairs.append((name.removeprefix("--config."), text))
    return pairs


def override(config: ConfigDict, field: str, text: str) -> None:
    """Sets `field` (``"model.dim"``) from text, read as the type that it has. It exists, or is a number in one of the groups `OPEN`."""
    *groups, name = field.split(".")
    node = config
    for depth, group in enumerate(groups):
        node = _child(node, group, groups[:depth])
        if not isinstance(node, ConfigDict):
            raise ValueError(f"Config field {'.'.join(groups[: depth + 1])!r} is a value, not a group of fields.")
    is_new = ".".join(groups) in OPEN and name not in node
    value = _number(field, text) if is_new else parse(field, text, _child(node, name, groups))
    with node.unlocked():
        node[name] = ConfigDict(value) if isinstance(value, dict) else value


def _child(node: ConfigDict, name: str, groups: Sequence[str]) -> Any:
    if name in node:
        return node[name]
    close = difflib.get_close_matches(name, list(node), n=1, cutoff=0.5)
    hint = f"did you mean {'.'.join([*groups, close[0]])!r}?" if close else f"fields there: {', '.join(node)}."
    raise ValueError(f"Config field {'.'.join([*groups, name])!r} does not exist; {hint}")


_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse(field: str, text: str, like: Any) -> Any:
    """`text` as a value of the type of `like`: bool, int (``1e3`` too), float, str, tuple (``1,2`` or ``(1, 2)``) or dict."""
    try:
        if isinstance(like, bool):
            return _BOOLEANS[text.lower()]
        if isinstance(like, int):
            return _integer(text)
        if isinstance(like, float):
            return float(text)
        if isinstance(like, tuple):
            names = field.endswith("modalities")  # of what an empty tuple may hold, it says nothing
            return _tuple(text, like or ("",) if names else like)
        if isinstance(like, ConfigDict):
            return _dict(text)
    except (KeyError, ValueError, SyntaxError, TypeError):
        kind = "dict" if isinstance(like, ConfigDict) else type(like).__name__
        raise ValueError(f"Config field {field!r} takes a value of type {kind} such as {_example(like)}, not {text!r}.") from None
    return text


def _example(like: Any) -> str:
    return repr({"NAME": 1} if isinstance(like, ConfigDict) else like)


def _number(field: str, text: str) -> int | float:
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ValueError(f"Config field {field!r} takes a number, not {text!r}.") from None


def _integer(text: str) -> int:
    value = float(text)
    if value != int(value):
        raise ValueError
    return int(text) if text.lstrip("+-").isdigit() else int(value)


def _tuple(text: str, like: tuple) -> tuple:
    if text[:1] in "([":
        value = tuple(ast.literal_eval(text))
    elif like and isinstance(like[0], str):
        value = tuple(part.strip() for part in text.split(",") if part.strip())
    else:
        value = tuple(ast.literal_eval(f"({text.rstrip(', ')},)"))
    words = bool(like) and isinstance(like[0], str)
    if like and any(isinstance(item, str) != words for item in value):
        raise ValueError
    return value


def _dict(text: str) -> dict:
    value = ast.literal_eval(text)
    if not isinstance(value, dict):
        raise TypeError
    return value


def to_json(config: ConfigDict) -> str:
    """The configuration as JSON; `from_json` reads it back, lists as tuples."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    return ConfigDict(_tuples(json.loads(text))).lock()


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


_AT_LEAST = {
    **dict.fromkeys(("model.dim", "model.num_heads", "model.encoder_depth", "model.decoder_depth", "model.unroll"), 1),
    **dict.fromkeys(
        ("train.batch_size", "train.accumulate", "train.total_tokens", "train.total_samples", "train.epochs", "model.lora_rank"), 1
    ),
    **dict.fromkeys(
        ("run.log_every", "run.checkpoint_every", "run.keep", "run.eval_batches", "run.patience", "run.heartbeat_seconds", "run.threads"), 1
    ),
    **dict.fromkeys(("model.depth", "model.times", "train.steps", "run.eval_every", "run.workers", "run.rewinds", "run.probe_scenes"), 0),
    **dict.fromkeys(("optimizer.spike_factor", "run.max_bad_fraction", "run.stall_seconds", "run.pictures_every", "data.tile_size"), 0),
    **dict.fromkeys(
        ("model.num_convs", "model.upsampling", "run.timesteps", "model.num_codebooks", "model.model_channels", "model.num_res_blocks"), 1
    ),
}
_ONE_OF = {
    "model.dtype": ("auto", "float32", "bfloat16"),  # float16 would need its loss scaled
    "model.attention": ("xla", "cudnn"),
    "model.remat": ("none", "dots", "full"),
    "model.decoder": ("vit", "unet"),
    "train.loss": ("mod", "token"),
    "train.tune": ("full", "frozen", "lora"),
    "optimizer.schedule": ("constant", "cosine", "steps", "plateau"),
    "data.statistics": ("pretrained", "dataset"),
    "model.time": ("mean", "max", "concat", "diff", "ltae"),
}


def command_of(config: ConfigDict) -> str:
    """The command that takes a configuration: ``pretrain``, ``train-tokenizer`` or ``finetune``."""
    if "dataset" in config.data:
        return "finetune"
    return "train-tokenizer" if "modality" in config.model else "pretrain"


def defaults(command: str) -> ConfigDict:
    """Every field of the configurations that a command takes, see `command_of`."""
    if command == "finetune":
        from terramind_jax.tasks.config import finetuning  # which is made of this module's groups

        return finetuning()
    return tokenizer_training() if command == "train-tokenizer" else pretraining()


def check(config: ConfigDict, command: str) -> None:
    """A ValueError of one sentence for the first value with which a run would fail or go wrong only after it has begun.

    `command` is the one that takes it, see `command_of`.
    """
    own = command_of(config)
    if own != command:
        raise ValueError(f"This configuration is one of {own}; {command} takes those in configs/{command.removeprefix('train-')}.")
    values = _flat(config)
    for field, least in _AT_LEAST.items():
        if field in values and values[field] < least:
            raise ValueError(f"{field}={values[field]}; expected at least {least}.")
    for field, known in _ONE_OF.items():
        if command == "finetune" and field in ("train.loss", "model.decoder"):
            continue  # of another kind there
        if field in values and values[field] not in known:
            raise ValueError(f"{field}={values[field]!r}; expected one of {', '.join(known)}.")
    for field in ("data.inputs", "data.targets"):
        if twice := [name for name in values.get(field, ()) if values[field].count(name) > 1]:
            raise ValueError(f"{field} names {twice[0]} twice; name each modality once.")
    for name, weight in config.data.get("subset_weights", {}).items():
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ValueError(f"data.subset_weights.{name}={weight!r}; expected a number above 0, or no entry at all.")
    for name, value in config.model.get("codebooks", {}).items():
        given = value if isinstance(value, tuple) and len(value) == 2 else (value,)
        if not all(isinstance(number, int) and number > 0 for number in given):
            raise ValueError(f"model.codebooks.{name}={value!r}; expected a vocabulary such as 512, or with it codebooks, (8, 128).")
    interval(config.run.profile)
    if command == "finetune":
        return
    dim, heads = config.model.dim, config.model.num_heads
    if dim % heads or dim % 4:
        raise ValueError(f"model.dim={dim} must be a multiple of 4, for the positions, and of model.num_heads={heads}.")


def interval(profile: str) -> tuple[int, int] | None:
    """``"10:15"`` -> ``(10, 15)``, the steps of `run.profile`; None if it is empty."""
    start, colon, stop = profile.partition(":")
    if profile and not (colon and start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise ValueError(f"run.profile={profile!r}; expected START:STOP, two steps such as 10:15.")
    return (int(start), int(stop)) if profile else None


def of_workdir(workdir: str | os.PathLike) -> ConfigDict:
    """The configuration that `workdir` was trained with; a field that is newer has its default."""
    path = files.folder(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{workdir} has no config.json, so it is not the work directory of a training run.")
    config = from_json(path.read_text()).unlock()
    for group, fields in defaults(command_of(config)).items():
        config[group] = ConfigDict({**fields, **config.get(group, {})})
    return config.lock()


def bind_workdir(config: ConfigDict, workdir: str | os.PathLike, *, write: bool = True) -> None:
    """Ties `workdir` to `config`: writes config.json at the first start, afterwards refuses another configuration.

    Only the fields in `FREE` may differ; one that is newer than the file had its default. `write` is False on all processes but the first.
    """
    path = files.folder(workdir) / "config.json"
    free = FREE if config.train.steps else (*FREE, "train.batch_size")
    if path.exists():
        there, command = of_workdir(workdir), command_of(config)
        if command_of(there) != command:
            raise ValueError(f"{workdir} is the work directory of {command_of(there)}, not of {command}; choose another --workdir.")
        old, new, usual = _flat(there), _flat(from_json(to_json(config))), _flat(defaults(command))
        for field in sorted(old.keys() | new.keys()):
            before = old.get(field, usual.get(field))
            if before != new.get(field) and not any(field == one or field.startswith(f"{one}.") for one in free):
                raise ValueError(
                    f"{workdir} holds a run with {field}={before!r}, not {new.get(field)!r}; "
                    "continue it with the same value or choose another --workdir."
                )
    if write:
        files.write_text(path, to_json(config))


def _flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """``{"model.dim": 192, ...}``"""
    flat = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {f"{prefix}{name}": value}
    return flat
