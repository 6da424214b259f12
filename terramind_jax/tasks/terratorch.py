"""A fine-tuning configuration of TerraTorch, a YAML file, as one of ours, and what of it has no equivalent.

What is read is taken out of the file's tree; what is left at the end, and is not known to be without influence on the result, is told.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from terramind_jax import modalities
from terramind_jax.tasks.config import finetuning
from terramind_jax.tasks.datasets import multitemporal_crop

SUFFIXES = (".yaml", ".yml")
TASKS = {
    "SemanticSegmentationTask": "segmentation",
    "PixelwiseRegressionTask": "regression",
    "ClassificationTask": "classification",
    "MultiLabelClassificationTask": "multilabel",
    "ScalarRegressionTask": "scalar_regression",
}
MULTIMODAL = "GenericMultiModalDataModule"
ONE_MODALITY = ("GenericNonGeoSegmentationDataModule", "GenericNonGeoPixelwiseRegressionDataModule")
CROPS = "MultiTemporalCropClassificationDataModule"
DECODERS = {
    "UNetDecoder": "unet",
    "UperNetDecoder": "upernet",
    "FCNDecoder": "fcn",
    "LinearDecoder": "linear",
    "IdentityDecoder": "identity",
}
POOLINGS = ("mean", "max", "concat", "diff")  # over time
TRANSFORMS = ("ToTensorV2", "FlattenTemporalIntoChannels")  # of layout alone
NECKS = ("SelectIndices", "ReshapeTokensToImage", "LearnedInterpolateToPyramidal")
DTYPES = {"16-mixed": "auto", "bf16-mixed": "auto", "32": "float32", "32-true": "float32"}
METRICS = {"F1_Score": "F1", "Accuracy": "accuracy", "Pixel_Accuracy": "pixel_accuracy", "RMSE": "rmse", "MAE": "mae"}
SPLITS = ("train", "val", "test")
MONITORING, PLATEAU = ("ModelCheckpoint", "EarlyStopping"), "ReduceLROnPlateau"  # what a metric decides: most important first

# Without influence on the result, or with that of what is done here anyway.
SILENT = {
    *("accelerator", "strategy", "devices", "num_nodes", "logger", "log_every_n_steps", "default_root_dir", "enable_checkpointing"),
    *("enable_progress_bar", "num_workers", "pin_memory", "persistent_workers", "rgb_indices", "rgb_modality", "plot_on_val"),
    *("allow_substring_file_names", "model_factory", "remove_cls_token", "task", "modalities", "verbose", "metadata_file_name"),
}
SILENT_CALLBACKS = ("RichProgressBar", "TQDMProgressBar", "LearningRateMonitor", "ModelCheckpoint", "EarlyStopping")
DEFAULTS = {
    **dict.fromkeys(
        ("freeze_decoder", "use_metadata", "expand_temporal_dimension", "temporal_channel_major", "decoder_scale_modules"), False
    ),
    **dict.fromkeys(("rescale", "drop_last", "decoder_align_corners"), True),
    "check_val_every_n_epoch": 1,
}

Fields = dict[str, Any]


def read(path: str | os.PathLike) -> tuple[ConfigDict, list[str]]:
    """Our configuration and, as ``"group.field=value"``, what of the file it does not follow.

    Paths of data stay relative to where the command runs: ``data.root`` is ``.``. Without a crop among the transforms, ``data.crop`` is 0,
    whole images, as there. Raises FileNotFoundError, and ValueError for what is no such file or no task of TerraMind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration {path}.")
    try:
        told = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML file ({' '.join(str(error).split())}).") from None
    if not isinstance(told, dict) or not {"model", "data"} <= told.keys():
        raise ValueError(f"{path} is no configuration of a fine-tuning with TerraTorch: it has no `model` and `data`.")
    config, rest = finetuning(), []
    task = _class(told["model"])
    if task not in TASKS:
        raise ValueError(f"{path} is of {task}; known are {', '.join(TASKS)}.")
    model = told["model"].get("init_args") or {}
    _model(config, model, TASKS[task], rest)
    _data(config, told["data"], TASKS[task], model, rest)
    _trainer(config, told, rest)
    _optimizer(config, told, rest)
    _seed(config, told)
    return config, [*rest, *_left(told)]


def _class(node: Fields) -> str:
    """The last word of its ``class_path``, which is taken out."""
    return str(node.pop("class_path", "")).rpartition(".")[2]


def _pop(node: Fields, **ours: str) -> Iterator[tuple[str, Any]]:
    """``(our name, value)`` of the fields that are there, by their names."""
    return ((name, node.pop(theirs)) for theirs, name in ours.items() if theirs in node)


def _tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


# ---- model ----


def _model(config: ConfigDict, node: Fields, task: str, rest: list[str]) -> None:
    args = node.get("model_args") or {}
    m = config.model
    m.name = args.pop("backbone", m.name)
    if not m.name.startswith("terramind"):
        raise ValueError(f"The backbone is {m.name!r}; only TerraMind's can be fine-tuned here.")
    if args.pop("backbone_pretrained", True) is False:
        m.weights = "random"
    m.weights = args.pop("backbone_ckpt_path", None) or m.weights
    m.modalities = tuple(next(iter(x)) if isinstance(x, Mapping) else x for x in args.pop("backbone_modalities", ()))
    for name in m.modalities:
        if (known := modalities.MODALITIES.get(name)) is not None and not known.is_image:
            raise ValueError(f"backbone_modalities has {name}, which TerraTorch's models read; fine-tuning here reads images alone.")
    names = dict(backbone_merge_method="merge_method", backbone_tim_temps="tim_temperature", backbone_tim_top_p="tim_top_p")
    names |= dict(backbone_tim_top_k="tim_top_k", backbone_tim_decoding_steps="tim_steps", backbone_tim_chained_generations="tim_chained")
    names |= dict(backbone_drop_path_rate="drop_path_rate", backbone_modality_drop_rate="modality_drop_rate", head_dropout="head_dropout")
    names |= dict(decoder_num_convs="num_convs", decoder_upsampling_size="upsampling", head_linear_after_pool="linear_after_pool")
    m.head_dropout = 0.0  # as there
    for name, value in _pop(args, **names):
        m[name] = type(m[name])(value)
    tuples = dict(backbone_tim_modalities="tim_modalities", decoder_channels="channels", decoder_pool_scales="pool_scales")
    for name, value in _pop(args, **tuples):
        m[name] = _tuple(value)
    for name in ("head_channel_list", "head_dim_list"):
        m.head_channels = _tuple(args.pop(name, None) or m.head_channels)
    _necks(config, args)
    decoder = args.pop("decoder", None)
    if decoder is not None:
        m.decoder = DECODERS.get(decoder, m.decoder)
        rest += [] if decoder in DECODERS else [f"model.init_args.model_args.decoder={decoder}"]
        m.channels = _of_linear(args) if decoder == "LinearDecoder" else m.channels
    if m.decoder == "upernet":
        m.channels = m.channels or (256,)  # as there
    _time(config, args)
    if node.pop("freeze_backbone", False):
        config.train.tune = "frozen"
    _adapters(config, args)
    for name, value in _pop(node, loss="loss", class_weights="class_weights"):
        config.train[name] = _tuple(value or ()) if name == "class_weights" else value
    if config.train.loss not in ("ce", "dice", "focal", "bce", "mse", "mae"):
        rest.append(f"model.init_args.loss={config.train.loss}")
        config.train.loss = ""
    if node.get("lr") is not None:
        config.optimizer.learning_rate = float(node.pop("lr"))


def _of_linear(args: Fields) -> tuple[int]:
    """The channels that a linear decoder makes for the head that is put on it."""
    if "decoder_num_classes" not in args:
        raise ValueError("The configuration's LinearDecoder lacks decoder_num_classes, without which TerraTorch does not build it.")
    return (int(args.pop("decoder_num_classes")),)


def _time(config: ConfigDict, args: Fields) -> None:
    """How features of time series are pooled, and how many images those have."""
    own = {name: args.pop(name) for name in [*args] if name.startswith("backbone_temporal_")}
    if not args.pop("backbone_use_temporal", False):
        return
    if own.get("backbone_temporal_pooling", "mean") in POOLINGS:
        config.model.time = own.pop("backbone_temporal_pooling", "mean")
    config.model.times = int(own.pop("backbone_temporal_n_timestamps", None) or 0)
    args.update(own)


def _necks(config: ConfigDict, args: Fields) -> None:
    necks = args.get("necks") or []
    config.model.pyramid = False
    for neck in necks:
        name = neck.get("name")
        if name in NECKS:
            neck.pop("name")
        if name == "SelectIndices":
            config.model.layers = tuple(neck.pop("indices"))
        config.model.pyramid |= name == "LearnedInterpolateToPyramidal"


def _adapters(config: ConfigDict, args: Fields) -> None:
    """LoRA, which here is always of all attention's products."""
    told = args.get("peft_config") or {}
    if told.get("method") != "LORA":
        return
    told.pop("method")
    config.train.tune = "lora"
    own = told.get("peft_config_kwargs") or {}
    for name, value in _pop(own, r="lora_rank", lora_alpha="lora_alpha"):
        config.model[name] = type(config.model[name])(value)


# ---- data ----


def _data(config: ConfigDict, node: Fields, task: str, model: Fields, rest: list[str]) -> None:
    kind, own = _class(node), node.get("init_args") or {}
    config.train.batch_size = int(own.pop("batch_size", 8))
    if kind not in (MULTIMODAL, *ONE_MODALITY, CROPS):
        rest.append(f"data.class_path={kind}: set data.dataset, data.root and data.options")
        node.pop("init_args", None)
        return
    _transforms(config, own, rest)
    args = model.get("model_args") or {}
    names = tuple(own.get("modalities", config.model.modalities)) if kind == MULTIMODAL else config.model.modalities[:1]
    if not names:
        raise ValueError("The configuration does not say which modalities the data are; give model_args.backbone_modalities.")
    config.model.modalities = config.model.modalities or names
    known = args.pop("backbone_bands", None) or {}
    options = _crops(own, names[0], rest) if kind == CROPS else _folders(config, own, names, known, task)
    classes = tuple(map(str, model.pop("class_names", None) or ()))
    count = own.pop("num_classes", None) or args.get("num_classes")
    args.pop("num_classes", None)
    if kind == CROPS and (len(classes) or count or len(options["class_names"])) != len(options["class_names"]):
        told, zero = len(classes) or count, "not " * options["labels"]["zero_is_none"]
        raise ValueError(f"The configuration has {told} classes; {CROPS} has {len(options['class_names'])}, 0, no data, {zero}among them.")
    ignore, replaced = model.pop("ignore_index", None), own.pop("no_label_replace", None)
    options |= dict(task=task, ignore_index=replaced if ignore is None else ignore)
    options |= {"class_names": classes} if classes else {"num_classes": count} if count and "regression" not in task else {}
    has_own = any(image.get("mean") for image in options["images"].values())
    config.data.update(dataset="generic", root=".", statistics="dataset" if has_own else "pretrained")
    config.data.options = ConfigDict(options)


def _crops(own: Fields, modality: str, rest: list[str]) -> Fields:
    """Images, labels and splits of the one data set that this data module reads."""
    fields = dict(_pop(own, data_root="root", bands="bands", reduce_zero_label="zero_is_none", no_data_replace="replace"))
    if not own.pop("expand_temporal_dimension", True):
        rest.append("data.init_args.expand_temporal_dimension=False: series of images here")
    return multitemporal_crop.options(modality=modality, **{name: value for name, value in fields.items() if value is not None})


def _folders(config: ConfigDict, own: Fields, names: tuple[str, ...], known: Mapping[str, Any], task: str) -> Fields:
    """Images, labels and splits as a generic data module tells them; `known` are the bands that the backbone reads, by modality."""

    def of(name: str, field: str, default: Any = None) -> Any:
        """A field of one modality."""
        value = own.get(field)
        return (value.get(name, default) if isinstance(value, Mapping) else value) if value is not None else default

    series = {}
    if config.model.times and own.get("expand_temporal_dimension"):
        own.pop("expand_temporal_dimension")
        series = {"times": config.model.times, "by_band": bool(own.pop("temporal_channel_major", False))}
    images = {name: _image(of, name, known.get(name)) | series for name in names}
    found, pattern = {s: own[f] for s in SPLITS if (f := _label_root(own, s))}, own.pop("label_grep", "*")
    labels = {"folder": found, "pattern": pattern} if task in ("segmentation", "regression") else {"table": found}
    if own.pop("reduce_zero_label", False):
        labels["zero_is_none"] = True
    splits = {"splits": {s: own[f"{s}_split"] for s in SPLITS if own.get(f"{s}_split")}} if own.get("train_split") else {}
    fields = ("means", "stds", "image_grep", "img_grep", "dataset_bands", "output_bands", "constant_scale", "no_data_replace")
    roots = (f"{s}_{what}" for s in SPLITS for what in ("split", "data_root", "label_data_root"))
    for name in (*fields, *roots):
        own.pop(name, None)
    return dict(images=images, labels=labels, **splits)


def _label_root(own: Fields, split: str) -> str | None:
    """The field that says where a split's labels are: beside the images, if there is none of their own."""
    return next((name for name in (f"{split}_label_data_root", f"{split}_data_root") if isinstance(own.get(name), str)), None)


def _image(of: Any, name: str, read: Any) -> Fields:
    """A modality's fields as `datasets.generic` takes them; `read` are the bands that the backbone reads."""
    folders = {split: folder for split in SPLITS if (folder := of(name, f"{split}_data_root"))}
    stored = of(name, "dataset_bands") or read
    fields = {"folder": folders, "pattern": of(name, "image_grep") or of(name, "img_grep", "*"), "bands": stored}
    fields |= {"use": of(name, "output_bands"), "mean": of(name, "means"), "std": of(name, "stds")}
    fields |= {"replace": of(name, "no_data_replace"), "scale": of(name, "constant_scale")}
    return {key: tuple(x) if isinstance(x, list) else x for key, x in fields.items() if x is not None}


def _transforms(config: ConfigDict, own: Fields, rest: list[str]) -> None:
    """Turns and crops of the training; without a crop whole images."""
    config.data.d4, config.data.crop = False, 0
    for transform in own.pop("train_transform", None) or []:
        name, args = _class(transform), transform.get("init_args") or {}
        if name == "D4":
            config.data.d4 = True
        elif name == "RandomCrop" and args.get("height") == args.get("width"):
            config.data.crop = args["height"]
        elif name == "UnflattenTemporalFromChannels":
            config.model.times = config.model.times or int(args.get("n_timesteps", 0))
        elif name not in TRANSFORMS:
            rest.append(f"data.init_args.train_transform={name}")


# ---- training ----


def _trainer(config: ConfigDict, told: Fields, rest: list[str]) -> None:
    node = told.get("trainer") or {}
    for name, value in _pop(node, max_epochs="epochs"):
        config.train[name] = value
    if (precision := str(node.get("precision"))) in DTYPES:
        node.pop("precision")
        config.model.dtype = DTYPES[precision]
        rest += ["trainer.precision=16-mixed: bfloat16 here, on accelerators"] if precision == "16-mixed" else []
    config.optimizer.clip_norm = float(node.pop("gradient_clip_val", None) or 0)
    callbacks = node.pop("callbacks", None)
    monitors = {}
    for callback in callbacks if isinstance(callbacks, list) else []:
        name, own = _class(callback), callback.get("init_args") or {}
        if name in MONITORING:
            monitors[name] = own.pop("monitor", None)
        if name == "EarlyStopping":
            config.train.stop_after = int(own.pop("patience", 3))
            own.pop("mode", None)
            rest += _left(own, "trainer.callbacks.EarlyStopping")
        elif name not in SILENT_CALLBACKS:
            rest.append(f"trainer.callbacks={name}")
    schedule = told.get("lr_scheduler") or {}
    if str(schedule.get("class_path", "")).endswith(PLATEAU):
        monitors[PLATEAU] = (schedule.get("init_args") or {}).pop("monitor", "val/loss")
    _monitor(config, {who: monitors[who] for who in (*MONITORING, PLATEAU) if monitors.get(who)}, rest)


def _monitor(config: ConfigDict, monitors: Mapping[str, str], rest: list[str]) -> None:
    """One metric decides here on the best parameters, the end and the rate: that of the first of them which names a known one."""
    known = {}
    for who, name in monitors.items():
        group, _, metric = name.partition("/")
        if group == "val" and METRICS.get(metric, metric) in ("loss", "mIoU", *METRICS.values()):
            known[who] = f"val/{METRICS.get(metric, metric)}"
        else:
            rest.append(f"{who}.monitor={name}")
    config.train.monitor = next(iter(known.values()), config.train.monitor)
    rest += [f"{who}.monitor={name}: {config.train.monitor} here" for who, name in known.items() if name != config.train.monitor]


def _optimizer(config: ConfigDict, told: Fields, rest: list[str]) -> None:
    node, o = told.get("optimizer") or {}, config.optimizer
    kind, own = _class(node), node.get("init_args") or {}
    if kind not in ("", "AdamW"):
        rest.append(f"optimizer.class_path={kind}: AdamW here")
    for name, value in _pop(own, lr="learning_rate", weight_decay="weight_decay", eps="eps"):
        o[name] = float(value)
    if "betas" in own:
        o.betas = tuple(map(float, own.pop("betas")))
    o.decay_norms = True  # as PyTorch has it
    node = told.get("lr_scheduler") or {}
    kind, own = _class(node), node.get("init_args") or {}
    o.schedule = {PLATEAU: "plateau", "CosineAnnealingLR": "cosine"}.get(kind, "constant")
    if o.schedule == "plateau":
        o.plateau_factor, o.plateau_patience = float(own.pop("factor", 0.1)), int(own.pop("patience", 10))
    elif o.schedule == "cosine":
        o.min_learning_rate = float(own.pop("eta_min", 0.0))
        if (epochs := own.pop("T_max", config.train.epochs)) != config.train.epochs:
            rest.append(f"lr_scheduler.T_max={epochs}: the whole run, {config.train.epochs} epochs, here")
    elif kind:
        rest.append(f"lr_scheduler.class_path={kind}: constant here")
        node.pop("init_args", None)


def _seed(config: ConfigDict, told: Fields) -> None:
    seed = told.pop("seed_everything", None)
    config.train.seed = seed if isinstance(seed, int) and not isinstance(seed, bool) else 0


# ---- what is left ----


def _left(node: Any, where: str = "") -> list[str]:
    """Leaves that nothing has read and that matter."""
    if isinstance(node, Mapping):
        parts = ((name, f"{where}.{name}" if where else str(name)) for name in node if name not in SILENT)
        return [text for name, path in parts if name not in DEFAULTS or node[name] != DEFAULTS[name] for text in _left(node[name], path)]
    if isinstance(node, list) and all(isinstance(x, Mapping) for x in node):
        return [text for x in node for text in _left(x, where)]
    return [] if node is None else [f"{where}={node}"]
