"""The configuration of ``finetune``: every field with its default; the files in ``configs/finetune`` set what differs."""

from __future__ import annotations

from ml_collections import ConfigDict

from terramind_jax import config as configuration
from terramind_jax.tasks import decoders, losses
from terramind_jax.tasks.datasets import Facts


def finetuning() -> ConfigDict:
    """Defaults of ``finetune``: base with a U-Net, all of it trained, as the TerraMind repository's configurations have it."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.name = "terramind_v1_base"  # the backbone, a released model; with _tim behind it one that thinks in modalities
    config.model.weights = "hub"  # hub | random | a file, directory of `save`, or work directory of a pretraining
    config.model.sizes = ConfigDict()  # of a network that is not the released one: dim, ...; set from the work directory of a pretraining
    config.model.codebooks = ConfigDict()  # its vocabularies, by modality; set likewise
    config.model.image_size = 224  # of its positions; images of another size interpolate them
    config.model.modalities = ()  # inputs, by name; empty: all that the data set has
    config.model.tokenizers = ""  # of LULC and NDVI among them, and of thoughts: hub | random | a folder; empty: where the weights are
    config.model.merge_method = "mean"  # of their features: mean | max | concat
    config.model.layers = ()  # whose features are used, from 0; empty: 2,5,8,11, of 24 layers 5,11,17,23
    config.model.pyramid = True  # learned interpolation to four resolutions
    config.model.decoder = "unet"  # unet | upernet | upernet_pangaea | fcn | linear | identity, which is for labels of images
    config.model.channels = ()  # of the decoder; empty: 512,256,128,64 of a U-Net, 512 of an UPerNet, 256 of an FCN; linear: no head
    config.model.pool_scales = (1, 2, 3, 6)  # of an UPerNet
    config.model.num_convs = 4  # of an FCN, each of which doubles the resolution
    config.model.upsampling = 16  # of a linear decoder
    config.model.head_channels = ()  # of the layers of the head before its last
    config.model.head_dropout = 0.1
    config.model.linear_after_pool = False  # of labels of images: the head sees the mean over the image, not each token
    config.model.tim_modalities = ("LULC",)  # of NAME_tim: what a frozen generator makes for the backbone to read, inputs left out
    config.model.tim_chained = True  # each conditions those after it; the embeddings, which both networks share, are not trained
    config.model.tim_steps = 1  # in which an image of them is drawn
    config.model.tim_temperature = 1.0  # 0: the most probable token
    config.model.tim_top_p = 0.8
    config.model.tim_top_k = 0
    config.model.time = "mean"  # of the features of time series: mean | max | concat | diff, of the first image to the second | ltae
    config.model.times = 0  # images of a series, which concat must know; 0: as many as the training data have
    config.model.drop_path_rate = 0.0
    config.model.modality_drop_rate = 0.0  # in training each modality is left out with this probability, but never all
    config.model.lora_rank = 16  # of train.tune="lora"
    config.model.lora_alpha = 16.0  # their product is multiplied by this over the rank
    config.model.dtype = "auto"  # of activations and products: auto is bfloat16 on accelerators, float32 on CPU
    config.model.remat = "none"  # none | dots | full: what the backward pass recomputes to save memory
    config.model.unroll = 1  # layers per iteration of the scan over layers

    config.data = ConfigDict()
    config.data.dataset = "generic"  # sen1floods11 | burnscars | mados | pastis | eurosat | ai4smallfarms | generic, your own
    config.data.root = ""  # its folder
    config.data.options = ConfigDict()  # of the data set, such as pastis' times; of generic all that describes it, see tasks.datasets
    config.data.crop = 224  # side of training's random crops and of windows otherwise, a multiple of 16; 0: whole images
    config.data.focus = False  # random crops lie around a labelled pixel, for masks with few
    config.data.d4 = True  # turn and flip training samples in the eight ways that a square has
    config.data.statistics = "pretrained"  # inputs are standardised with those of the pretraining, or those of the data set
    config.data.labels = 1.0  # share of the training samples that is used, drawn under the seed
    config.data.strata = 0  # bins of a class's share of an image: the share is drawn of samples alike in all classes; 0: of all samples

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "plateau"  # constant | cosine | steps, a tenth after 0.6 and 0.9 of the run | plateau
    config.optimizer.min_learning_rate = 0.0  # at the end of the cosine
    config.optimizer.warmup = 0.0  # fraction of the run in which the learning rate rises
    config.optimizer.plateau_factor = 0.5  # of the learning rate after more than
    config.optimizer.plateau_patience = 5  # validations without a better one
    config.optimizer.layer_decay = 1.0  # of the backbone each layer's rate is so many times that of the layer above
    config.optimizer.betas = (0.9, 0.999)
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.01
    config.optimizer.decay_norms = False  # on norms and biases, too, as PyTorch's AdamW has it
    config.optimizer.clip_norm = 0.0  # of the global gradient; 0: no clipping
    config.optimizer.spike_factor = 0.0  # a step whose gradient is so many times its running norm is skipped; 0: none is

    config.train = ConfigDict()
    config.train.tune = "full"  # full | frozen, which trains all but the backbone | lora, which adds products of low rank to it
    config.train.loss = ""  # ce | dice | focal | bce | mse | mae; empty: the first that the task has
    config.train.class_weights = ()  # of ce
    config.train.cache = True  # what frozen networks make is made once a sample where it does not change, see tasks.feeding
    config.train.epochs = 50
    config.train.steps = 0  # length of the run in steps; 0: from epochs
    config.train.batch_size = 8  # samples a step, over all hosts
    config.train.monitor = "val/loss"  # what a validation is judged by: the parameters of the best are used afterwards
    config.train.stop_after = 0  # validations without a better one after which the run ends; 0: never
    config.train.seed = 0

    config.mesh = configuration.mesh_fields()
    config.run = configuration.run_fields()
    config.run.eval_every = 0  # 0: once an epoch
    config.run.checkpoint_every = 0  # 0: once an epoch
    return config.lock()


def check(config: ConfigDict) -> None:
    """A ValueError of one sentence for the first value with which a run would fail or go wrong only after it has begun."""
    check_values(config)
    if not config.data.root:
        raise ValueError("config.data.root is empty; set it to the data set's folder with --config.data.root=DIR.")


def check_values(config: ConfigDict) -> None:
    """As `check`, of a configuration without data."""
    resolved = config.copy_and_resolve_references().unlock()
    resolved.run.checkpoint_every = config.run.checkpoint_every or 1
    configuration.check(resolved, "finetune")
    if config.data.crop < 0 or config.data.crop % 16:
        raise ValueError(f"data.crop={config.data.crop}; expected a multiple of 16, the patch size.")
    if config.data.dataset == "eurosat" and config.data.options.get("rgb"):
        raise ValueError("data.options.rgb is of `evaluate knn`, linear and fewshot alone; a fine-tuning reads EuroSAT's own 13 bands.")
    if config.data.strata < 0:
        raise ValueError(f"data.strata={config.data.strata}; expected a number of bins, or 0 for none.")
    for field, value in (("data.labels", config.data.labels), ("optimizer.layer_decay", config.optimizer.layer_decay)):
        if not 0 < value <= 1:
            raise ValueError(f"{field}={value}; expected a number above 0 and at most 1.")
    if config.model.merge_method not in ("mean", "max", "concat"):
        raise ValueError(f"model.merge_method={config.model.merge_method!r}; a decoder needs one of mean, max, concat.")


def loss_of(config: ConfigDict, facts: Facts) -> str:
    """The name of the loss; a ValueError if the task has no such."""
    known = losses.OF_TASK[facts.task]
    name = config.train.loss or known[0]
    if name not in known:
        raise ValueError(f"train.loss={name!r}; a {facts.task} has one of {', '.join(known)}.")
    weights = len(config.train.class_weights)
    if weights and (name != "ce" or weights != facts.num_classes):
        raise ValueError(
            f"train.class_weights are {weights} numbers for the loss {name}; ce takes one for each of {facts.num_classes} classes."
        )
    return name


def decoder_config(config: ConfigDict, facts: Facts, depth: int, dtype: str) -> decoders.DecoderConfig:
    """What stands on a backbone of so many layers."""
    model, task = config.model, "classification" if facts.task == "multilabel" else facts.task
    layers = tuple(model.layers) or tuple(max(0, depth * (i + 1) // 4 - 1) for i in range(4))
    if max(layers) >= depth:
        raise ValueError(f"model.layers are {', '.join(map(str, layers))}; {model.name} has layers from 0 to {depth - 1}.")
    if (model.decoder in ("linear", "fcn", "identity")) and not model.layers:
        layers = layers[-1:]  # they read the last one alone
    return decoders.DecoderConfig(
        task,
        facts.num_classes or 1,
        layers=layers,
        pyramid=model.pyramid and model.decoder in decoders.PYRAMIDAL,
        decoder=model.decoder,
        channels=tuple(model.channels),
        head_channels=tuple(model.head_channels),
        head_dropout=model.head_dropout,
        pool_scales=tuple(model.pool_scales),
        num_convs=model.num_convs,
        upsampling=model.upsampling,
        linear_after_pool=model.linear_after_pool,
        dtype=dtype,
    )
