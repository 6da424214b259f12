"""Fine-tuning of a backbone and a decoder on a downstream data set: one straight run over one pure step, in the loop of pretraining.

What is not trained, such as a frozen backbone, is held beside the state, where the loop keeps buffers. The parameters of the best
validation are kept in ``{workdir}/best``, and what a data set says of itself in ``{workdir}/task.json``: `load` needs nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from ml_collections import ConfigDict

from terramind_jax import build, checkpoint, declarations, files, flops, modalities, sharding, weights, zoo
from terramind_jax import config as configuration
from terramind_jax.data import order
from terramind_jax.modalities import PATCH_SIZE
from terramind_jax.models import SAMPLING, FeatureExtractor, ThinkingInModalities
from terramind_jax.tasks import batches, beside, datasets, feeding, losses, validation
from terramind_jax.tasks import config as fields
from terramind_jax.tasks import model as networks
from terramind_jax.tasks.beside import NOTHING, Beside
from terramind_jax.tasks.datasets import Dataset, Facts
from terramind_jax.tasks.datasets.files import Bands
from terramind_jax.tasks.model import TaskModel
from terramind_jax.tasks.thinking import Thinker
from terramind_jax.tokenizer import TokenizerConfig
from terramind_jax.train import loop, optimizer, state

TASK, BEST = "task.json", "best"
Scale = dict[str, tuple[np.ndarray, np.ndarray]]


def train(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, float]:
    """Trains in `workdir`, continuing what is there, and returns the last metrics.

    Raises ValueError or FileNotFoundError for a configuration or data that cannot work, `checkpoint.Terminated` after a SIGTERM.
    """
    # ---- Data ----
    fields.check(config)
    config = with_architecture(config)
    dataset = open_split(config, "train")
    config = with_sizes(config, dataset)
    held_out = open_split(config, "val")
    loop.agree(config, {f"list of {each.split} samples": "\n".join(each.names).encode() for each in (dataset, held_out)})
    scale, loss_name = scale_of(config, dataset.facts), fields.loss_of(config, dataset.facts)
    for split in (dataset, held_out) if dataset.num_classes else ():
        datasets.class_counts(split)  # checks every label, and warns of classes that never occur
    batch_size, total = config.train.batch_size, total_samples(config, len(dataset))

    # ---- Model, optimizer and state, laid out on the mesh ----
    mesh = sharding.make_mesh(**config.mesh)
    if batch_size % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ValueError(f"train.batch_size={batch_size} must be a multiple of the {mesh.shape['data'] * mesh.shape['fsdp']} devices.")
    extractor = backbone(config, dataset.facts)
    module, aside = task_model(config, dataset.facts, extractor)
    is_begun = checkpoint.is_begun(workdir)
    found = None if is_begun else pretrained(config, extractor)
    aside = aside.with_tokenizers(tokenizers_in(workdir) if is_begun else tokenizers_of(found))
    check_tokenizers(config, extractor, aside)
    tx = optimizer.adamw(config.optimizer, partial(networks.rates, depth=module.backbone.encoder_depth, decay=config.optimizer.layer_decay))
    init = partial(networks.init, module, tune=config.train.tune, rank=config.model.lora_rank, beside=aside)
    given = None if found is None else initial(config, init, found, aside)
    configuration.bind_workdir(config, workdir, write=jax.process_index() == 0)
    write_task(workdir, dataset.facts, scale, aside)
    checkpoints = checkpoint.Checkpoints(workdir, config.run.keep)
    train_state, held, layout, kept = state.start(init, tx, mesh, config.train.seed, checkpoints, initial=given)
    del found, given

    # ---- The compiled steps ----
    loss_fn = partial(loss, module, criterion(config, loss_name), config.model.lora_alpha)
    update = partial(state.apply, tx=tx, config=config.optimizer, batch_size=batch_size, total=total, warmup=config.optimizer.warmup)
    replicated = sharding.replicated(mesh)
    step = partial(train_step, loss_fn, update, config.train.seed)
    step_fn = jax.jit(step, donate_argnums=0, out_shardings=(layout, replicated))
    measured = partial(validation.measure, module, criterion(config, loss_name), dataset.facts)
    joined = partial(networks.join, alpha=config.model.lora_alpha)
    measure_fn = jax.jit(lambda *trees, batch: measured(joined(*trees), batch), out_shardings=replicated)

    # ---- Batches, with what frozen networks make of them ----
    feed = feeding.open_feed(config, dataset, held_out, scale, mesh, feeding.Frozen(module, aside, held), total)

    # ---- Validation, on which the learning rate, the end and the best parameters depend ----
    history = validation.Progress(config, workdir, int(train_state.step))

    def validated(train_state: state.State, held: Any) -> dict[str, float]:
        sums = (measure_fn(train_state.params, held, train_state.batch_stats, batch=batch) for batch in feed.covering())
        found = {f"val/{name}": value for name, value in validation.summarize(dataset.facts, validation.add_up(sums)).items()}
        if history.add(found):
            save_best(workdir, int(train_state.step), train_state.params, held, train_state.batch_stats)
        return found

    def with_rate(data: Iterator[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in data:
            yield {**batch, "rate": jax.device_put(np.float32(history.rate), replicated)}

    # ---- Loop ----
    training = loop.Training(
        title=f"{dataset.facts.title}: {state.size(train_state.params)} parameters of {state.size((train_state.params, held['frozen']))}, "
        f"{len(dataset)} samples",
        total=total,
        work={
            "images": batch_size,
            "samples": batch_size,
            "flops": step_flops(config, module, dataset),
            "peak": flops.peak() * jax.device_count(),
        },
        summed=("bad",),
        step=step_fn,
        batches=lambda consumed: with_rate(feed.training(consumed)),
        validate=validated,
        is_over=lambda: history.is_over,
    )
    return loop.run(training, config, workdir, mesh, checkpoints, train_state, held, kept)


# ---- one step, as a pure function ----


def loss(
    module: TaskModel,
    criterion: losses.Loss,
    alpha: float,
    params: Any,
    held: Any,
    batch_stats: Any,
    batch: Mapping[str, Any],
    key: jax.Array,
) -> tuple[jax.Array, Any]:
    """The loss of a batch, and the running statistics after it; `key` draws what is dropped."""
    variables = networks.join(params, held, batch_stats, alpha)
    outputs, changed = networks.outputs(module, variables, batch, train=True, mutable=["batch_stats"], rngs={"dropout": key})
    return criterion(outputs, batch["target"], batch["valid"]), changed.get("batch_stats") or None


def train_step(loss_fn, update, seed: int, train_state: state.State, held: Any, batch: Mapping[str, Any]):
    """(state, held, batch) -> (state, metrics): one step of AdamW; ``batch["rate"]`` multiplies the learning rate."""
    key = jax.random.fold_in(jax.random.key(seed), train_state.step)
    found = jax.value_and_grad(loss_fn, has_aux=True)(train_state.params, held, train_state.batch_stats, batch, key)
    (value, batch_stats), grads = found
    train_state, told = update(train_state, loss=value, grads=grads, batch_stats=batch_stats, scale=batch["rate"])
    return train_state, {**told, "bad": jnp.zeros((), jnp.int32)}  # a sample that cannot be read is an error here


def criterion(config: ConfigDict, name: str) -> losses.Loss:
    """The loss of a configuration."""
    weights = tuple(config.train.class_weights)
    return partial(losses.cross_entropy, weights=weights) if weights else losses.LOSSES[name]


def step_flops(config: ConfigDict, module: TaskModel, dataset: Dataset) -> float:
    """About the floating-point operations of a step: a forward pass, and two back through what is trained, through LoRA's backbone one.

    A gradient's own products differ by up to a fifth of nano models: the first layer that is trained gives nothing back to its inputs, and
    LoRA needs the second pass through attention's kernels. What makes ids beside it is not counted, nor are features that are kept.
    """
    side, length = config.data.crop, dataset.length()
    lead, grid = (config.train.batch_size, *(length,) * bool(length)), (side // PATCH_SIZE,) * 2
    streams, inputs = {stream.key: stream for stream in module.backbone.streams}, {}
    for name, key in module.streams:
        if (stream := streams[key]).kind == "pixels":
            inputs[name] = jax.ShapeDtypeStruct((*lead, side, side, len(dataset.facts.bands[name])), jnp.float32)
        else:
            places = (stream.max_tokens,) if stream.kind == "sequence" else (*grid, *stream.codes)
            inputs[name] = jax.ShapeDtypeStruct((*lead, *places), jnp.int32)
    variables = jax.eval_shape(lambda key: meta.unbox(module.init(key, method="everything")), jax.random.key(0))
    encode, decode = (partial(module.apply, method=method) for method in ("features", "decode"))
    features = jax.eval_shape(encode, variables, inputs)
    passes = {"full": 3, "lora": 2, "frozen": 0 if feeding.keeps_features(config, dataset) else 1}[config.train.tune]
    return passes * flops.traced(encode, variables, inputs) + 3 * flops.traced(decode, variables, features)


# ---- from a configuration ----


def with_architecture(config: ConfigDict) -> ConfigDict:
    """The configuration with the sizes of the network that the backbone's weights belong to."""
    found = weights.saved_options(config.model.name, config.model.weights)
    if not found.get("sizes"):
        return config
    config = config.copy_and_resolve_references().unlock()
    config.model.sizes, config.model.codebooks = ConfigDict(found["sizes"]), ConfigDict(found["codebooks"])
    config.model.image_size = found["img_size"]
    return config.lock()


def with_sizes(config: ConfigDict, dataset: Dataset) -> ConfigDict:
    """The configuration with what follows from the training data: an epoch in steps, the side of whole images, the length of series."""
    config = config.copy_and_resolve_references().unlock()
    steps = max(1, len(dataset) // config.train.batch_size)
    config.run.eval_every = config.run.eval_every or steps
    config.run.checkpoint_every = config.run.checkpoint_every or steps
    if not config.data.crop:
        height, width = dataset.image_size()
        if height != width or height % PATCH_SIZE:
            raise ValueError(f"The images of {dataset.facts.title} are {height}x{width} pixels, which data.crop=0 cannot take; set it.")
        config.data.crop = height
    if config.model.time in networks.SERIES:
        found = _length(config.model.time, config.model.times, dataset)
        config.model.times = found if config.model.time == "concat" else config.model.times
    return config.lock()


def _length(time: str, told: int, dataset: Dataset) -> int:
    """Images of a time series; a ValueError if there is none, or it has other images than `time` takes or than are told."""
    found = dataset.length()
    if not found:
        raise ValueError(f"{dataset.facts.title} has single images; model.time={time!r} is of time series.")
    if time == "diff" and found != 2:
        raise ValueError(f"model.time='diff' is of two images, and the series of {dataset.facts.title} have {found}.")
    if time == "concat" and told not in (0, found):
        raise ValueError(f"model.times={told}, but the series of {dataset.facts.title} have {found} images.")
    return found


def total_samples(config: ConfigDict, samples: int) -> int:
    """Of the whole run."""
    return config.train.steps * config.train.batch_size or config.train.epochs * samples


def open_split(config: ConfigDict, split: str) -> Dataset:
    """The samples of one split with the inputs that are used; of the training split the share ``data.labels``."""
    data, wanted = config.data, config.model.modalities
    dataset = datasets.load(data.dataset, data.root, split, **data.options.to_dict())
    dataset = dataset.only(wanted) if wanted else dataset
    batches.check_crop(dataset, data.crop, dataset.image_size())
    if split != "train" or data.labels == 1:
        return dataset
    return dataset.select(np.sort(_drawn(dataset, data.labels, data.strata, config.train.seed)))


def _drawn(dataset: Dataset, share: float, bins: int, seed: int) -> np.ndarray:
    """Numbers of a share of the samples, at least one; with `bins`, of those of every stratum. A larger share holds the smaller."""
    if not bins:
        return order.permutation(len(dataset), seed, 0)[: max(1, round(share * len(dataset)))]
    rng, of = order.generator("labels", seed), datasets.strata(dataset, bins)
    members = [rng.permutation(np.flatnonzero(of == stratum)) for stratum in range(of.max() + 1)]
    return np.concatenate([each[: max(1, int(share * len(each)))] for each in members])


def scale_of(config: ConfigDict, facts: Facts) -> Scale:
    """Mean and standard deviation ``[C]`` by modality; a ValueError for one that has none."""
    found = {}
    for name, bands in facts.bands.items():
        own = modalities.MODALITIES.get(name)
        is_classes = own is not None and own.kind == "classes"  # which are not standardised
        if is_classes:
            if len(bands) != 1:
                raise ValueError(f"{name} is a map of classes, one band; {facts.title} has {', '.join(bands)}.")
            found[name] = np.zeros(1, np.float32), np.ones(1, np.float32)
        elif config.data.statistics == "dataset" or own is None or any(band not in own.bands for band in bands):
            if name not in facts.mean:
                raise ValueError(f"{facts.title} has no mean and std of {name}; give them, or set data.statistics='pretrained'.")
            found[name] = np.float32(facts.mean[name]), np.float32(facts.std[name])
        else:
            at = [own.bands.index(band) for band in bands]
            found[name] = tuple(np.float32(x)[at] for x in modalities.statistics(name))
    return found


def backbone(config: ConfigDict, facts: Facts) -> FeatureExtractor:
    """The released model of that name for these inputs, with shapes in the place of weights."""
    return build.model(config.model.name, **backbone_options(config, facts))


def backbone_options(config: ConfigDict, facts: Facts) -> dict[str, Any]:
    """Options of the backbone as `weights.load` takes them: a modality that TerraMind lacks is new, some bands of one are taken."""
    m, known = config.model, modalities.MODALITIES
    names = [name if name in known else {name: len(bands)} for name, bands in facts.bands.items()]
    images = {name: bands for name, bands in facts.bands.items() if name in known and known[name].kind != "classes"}
    bands = {name: list(bands) for name, bands in images.items() if tuple(bands) != known[name].bands}
    same = {name: m[name] for name in ("merge_method", "drop_path_rate", "modality_drop_rate", "remat", "unroll")}
    own = thinking_options(config, bands) if zoo.get(m.name).kind == "tim" else {"bands": bands}
    own |= dict(sizes=m.sizes.to_dict(), codebooks=m.codebooks.to_dict(), img_size=m.image_size)
    return dict(modalities=names, dtype=sharding.compute_dtype(m.dtype), **own, **same)


def thinking_options(config: ConfigDict, bands: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Options of Thinking in Modalities; a ValueError for inputs with some bands, of which the generator knows nothing."""
    m = config.model
    if bands:
        name = next(iter(bands))
        raise ValueError(f"{m.name} reads all bands of {name}, and the data set has {', '.join(bands[name])}; choose another model.name.")
    if not m.tim_modalities:
        raise ValueError(f"model.tim_modalities is empty; {m.name} generates one at least, such as LULC.")
    sampling = {f"tim_{theirs}": m[f"tim_{ours}"] for theirs, ours in SAMPLING.items()}
    return dict(tim_modalities=list(m.tim_modalities), tim_chained_generations=m.tim_chained, **sampling)


def task_model(config: ConfigDict, facts: Facts, extractor: FeatureExtractor) -> tuple[TaskModel, Beside]:
    """The whole network, and those beside it, with the released tokenizers; a ValueError for inputs that are no images."""
    sequences = [name for name, stream in extractor.streams.items() if stream.kind == "sequence"]
    if sequences:
        raise ValueError(f"{sequences[0]} is no image, and fine-tuning reads images alone; choose others with model.modalities.")
    own = extractor.module.config
    aside = beside.of(extractor, config.train.seed)
    for name, module in aside.tokenizers:
        if module.config.is_class_map and module.config.channels != modalities.get(name).channels:
            raise ValueError(
                f"{extractor.name} tells {module.config.channels} classes of {name}, and fine-tuning reads maps of the "
                f"{modalities.get(name).channels} of TerraMesh; choose another model.name, or other inputs with model.modalities."
            )
    head = fields.decoder_config(config, facts, own.encoder_depth, own.dtype)
    names = {name: stream.key for name, stream in extractor.streams.items()}
    if aside.thinker is not None:
        if not aside.thinker.targets:
            made = ", ".join(config.model.tim_modalities)
            raise ValueError(f"model.tim_modalities names inputs alone ({made}); {extractor.name} generates one at least that is none.")
        names |= {stream: stream for stream in aside.thinker.targets}
    if config.model.time == "concat" and not config.model.times:
        raise ValueError("model.time='concat' needs model.times, the number of images of a series.")
    return TaskModel(own, head, tuple(names.items()), config.model.time, config.model.times), aside


def pretrained(config: ConfigDict, extractor: FeatureExtractor) -> FeatureExtractor | None:
    """The model that a fresh run begins with, from ``model.weights`` and ``model.tokenizers``; None if all of it is drawn."""
    if config.model.weights == "random" and not config.model.tokenizers:
        return None
    where = dict(seed=config.train.seed, tokenizers=config.model.tokenizers or None)
    found = weights.load(extractor.name, config.model.weights, **where, **extractor.options)
    if found.module != extractor.module:
        raise ValueError(f"{config.model.weights} holds a network of other sizes than {extractor.name}.")
    return found


def where_tokenizers(config: ConfigDict) -> str:
    """Where tokenizers are that the weights do not hold: where ``model.tokenizers`` says, or with the weights."""
    return config.model.tokenizers or config.model.weights


def check_tokenizers(config: ConfigDict, extractor: FeatureExtractor, aside: Beside) -> None:
    """Raises a ValueError if the tokens of an input are not those that the backbone reads."""
    for name, module in aside.tokenizers:
        module.config.check_stream(extractor.streams[name], f"The tokenizer of {name} ({where_tokenizers(config)})")


def tokenizers_of(found: FeatureExtractor | None) -> dict[str, TokenizerConfig]:
    """Sizes of the tokenizers that were found, by input."""
    streams = {} if found is None else found.streams
    return {name: found.tokenizers[stream.modality][0].config for name, stream in streams.items() if stream.kind == "tokens"}


def initial(config: ConfigDict, init: Callable[[jax.Array], Any], found: FeatureExtractor, aside: Beside) -> dict[str, Any]:
    """Variables of a fresh run: the backbone and those beside it as `found`, all else drawn."""
    drawn = state.jit_once(lambda key: meta.unbox(init(key)))(jax.random.key(config.train.seed))
    drawn["buffers"]["buffers"] = {"encoder": found.variables["buffers"]}
    if isinstance(found, ThinkingInModalities):
        drawn["buffers"]["generator"] = found.generator[1]
    if aside.tokenizers:
        drawn["buffers"]["tokenizers"] = {name: found.tokenizers[found.streams[name].modality][1] for name, _ in aside.tokenizers}
    return jax.device_get(networks.with_encoder(drawn, found.variables["params"]))


# ---- what is kept of a run ----


def write_task(workdir: str | os.PathLike, facts: Facts, scale: Scale, aside: Beside = NOTHING) -> None:
    """What inference must know of the data set, and of tokenizers."""
    known = {"facts": dataclasses.asdict(facts), "scale": {m: [x.tolist() for x in both] for m, both in scale.items()}}
    known["modalities"] = declarations.of(facts.bands)
    known["tokenizers"] = {name: dataclasses.asdict(module.config) for name, module in aside.tokenizers}
    if jax.process_index() == 0:
        files.write_text(files.folder(workdir) / TASK, json.dumps(known, indent=1))


def tokenizers_in(workdir: str | os.PathLike) -> dict[str, TokenizerConfig]:
    """Sizes of the tokenizers of a run, by input; of one that tells none they are the released ones."""
    known = json.loads((files.folder(workdir) / TASK).read_text())
    return {name: TokenizerConfig(**told) for name, told in known.get("tokenizers", {}).items()}


def save_best(workdir: str | os.PathLike, step: int, params: Any, held: Any, batch_stats: Any) -> None:
    """The parameters of this step take the place of the best so far."""
    own = {} if batch_stats is None else {"batch_stats": batch_stats}
    with contextlib.closing(checkpoint.Checkpoints(files.folder(workdir) / BEST, 1)) as checkpoints:
        if checkpoints.latest() != step:
            checkpoints.save(step, {"params": params, "buffers": held, **own}, {"step": step})


@dataclasses.dataclass(frozen=True)
class Task:
    """A fine-tuned model: network, variables, and what its data set said of inputs and outputs."""

    module: TaskModel
    variables: Mapping[str, Any]
    facts: Facts
    scale: Scale
    crop: int
    extractor: FeatureExtractor  # the released model that it stands on, with shapes in the place of weights
    beside: Beside = NOTHING
    held: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # its variables

    @property
    def thinker(self) -> Thinker | None:
        return self.beside.thinker

    @property
    def generator(self) -> Mapping[str, Any] | None:
        """Variables of the thinker."""
        return self.held.get("generator")

    def __call__(self, inputs: Mapping[str, np.ndarray], days: np.ndarray | None = None) -> jax.Array:
        """Inputs by modality in the data set's units, ``[B, (T,) H, W, C]``, to logits or values, see `TaskModel`."""
        missing = [name for name in self.facts.bands if name not in inputs]
        if missing:
            raise ValueError(f"The model was trained with {', '.join(self.facts.bands)}; {missing[0]} is missing.")
        scaled = {name: (np.asarray(inputs[name], np.float32) - mean) / std for name, (mean, std) in self.scale.items()}
        for name, x in inputs.items():
            datasets.check_class_map("An input", name, x)
        return _apply(self.variables, {**scaled, **self.beside.ids(self.held, scaled)}, days, module=self.module)


@partial(jax.jit, static_argnames="module")
def _apply(variables: Mapping[str, Any], inputs: Mapping[str, jax.Array], days: jax.Array | None, *, module: TaskModel) -> jax.Array:
    return module.apply(variables, inputs, days=days)


def load(workdir: str | os.PathLike) -> Task:
    """The fine-tuned model of a work directory with the parameters of its best validation; needs no data set and no weights beside it."""
    path = files.folder(workdir) / TASK
    config = configuration.of_workdir(workdir)
    if not path.exists():
        raise FileNotFoundError(f"{workdir} has no {TASK}, so it is not the work directory of a fine-tuning.")
    known = json.loads(path.read_text())
    declarations.declare(known["modalities"], TASK)
    facts = facts_of(known)
    extractor = backbone(config, facts)
    module, aside = task_model(config, facts, extractor)
    aside = aside.with_tokenizers(tokenizers_in(workdir))
    init = partial(networks.init, module, tune=config.train.tune, rank=config.model.lora_rank, beside=aside)
    abstract = meta.unbox(jax.eval_shape(init, jax.random.key(0)))
    best = files.folder(workdir) / BEST
    trees = checkpoint.load_variables(best if best.is_dir() else workdir, abstract)
    variables = networks.join(trees["params"], trees["buffers"], trees.get("batch_stats"), config.model.lora_alpha)
    scale = {m: (np.float32(mean), np.float32(std)) for m, (mean, std) in known["scale"].items()}
    held = {name: trees["buffers"][name] for name in ("tokenizers", "generator") if name in trees["buffers"]}
    return Task(module, variables, facts, scale, config.data.crop, extractor, aside, held)


def facts_of(known: Mapping[str, Any]) -> Facts:
    """What `write_task` has written, from JSON, whose lists are tuples here."""
    told = known["facts"]
    how = {m: Bands(**{name: tuple(x) if isinstance(x, list) else x for name, x in of.items()}) for m, of in told.get("files", {}).items()}
    mappings = {name: {m: tuple(x) for m, x in told[name].items()} for name in ("bands", "mean", "std")}
    return Facts(**{**told, **mappings, "files": how, "class_names": tuple(told["class_names"])})
