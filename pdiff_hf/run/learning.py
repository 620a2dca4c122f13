"""The stages that learn a generator of parameters: an autoencoder, and a denoiser of its latents."""

import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import DDPMScheduler, ModelMixin
from scipy.cluster.vq import kmeans2
from transformers import PreTrainedModel

from ..evaluation.closed_forms import mean_networks, tuned_ridge
from ..evaluation.member_score import MemberScorer
from ..evaluation.opponents import VALIDATION_EXAMPLES
from ..models import (
    DENOISER_PRESETS,
    ConditionEncoder,
    LatentDenoiser,
    ParameterAutoencoder,
    autoencoder_architecture,
    encode_in_batches,
)
from ..models.condition import Fields
from ..models.embedded import EmbeddedField
from ..models.products import AdapterProducts, contracted, smallest_frame
from ..networks.runner import NetworkRunner
from ..pipelines import PDiffPipeline
from ..tasks import ClassificationTask
from ..tasks.data_task import DataTask
from ..tasks.family import MAX_DRAWS
from ..tasks.task import Split, evenly, load_batch
from ..training import (
    Loop,
    gaussian_loss,
    make_sampling_scheduler,
    make_training_scheduler,
    train_autoencoder,
    train_denoiser,
    warn_of_rise,
)
from ..training.autoencoder import OutputLoss
from ..utils.seeds import named_seed
from .config import PDiffConfig
from .context import RunContext, loop_arguments
from .folder import RunError, Stage

logger = logging.getLogger(__name__)

# Gradients of the autoencoder and of the denoiser are clipped to this norm.
MAX_GRAD_NORM = 1.0
# The losses of this many last steps are compared with that of a Gaussian.
LAST_LOSSES = 100
# Training examples that the outputs of networks are compared on in a step.
OUTPUT_EXAMPLES = 64
# Snapshots, and validation examples, that reconstructions are compared on.
COMPARED, COMPARED_EXAMPLES = 32, 500
# Networks of a regression that are made at once.
REGRESSED_AT_ONCE = 256
# Groups of data have so many members on average, or there are fewer groups; steps of k-means.
CLUSTER_SIZE, CLUSTER_STEPS = 50, 40


def learn_autoencoder(context: RunContext, loop: Loop, **kwargs: Any) -> tuple[ParameterAutoencoder, torch.Tensor]:
    """An autoencoder with a run's settings and its losses; see [`train_autoencoder`], which gets `kwargs`."""
    c = context.config
    return train_autoencoder(
        loop,
        context.parameters,
        context.layout,
        loop_arguments(
            c,
            "autoencoder",
            c.autoencoder_steps,
            lr_warmup_steps=c.autoencoder_args.warmup_steps,
            max_grad_norm=MAX_GRAD_NORM,
        ),
        seen=context.seen,
        latent_dim=c.latent_dim,
        architecture=architecture(context),
        normalization=c.autoencoder_args.normalization,
        latent_scaling=c.latent_scaling,
        parameter_noise=c.autoencoder_args.parameter_noise,
        **kwargs,
    )


def fit_autoencoder(context: RunContext, stage: Stage) -> None:
    """The autoencoder that turns snapshots into latents."""
    c, of_outputs = context.config, context.config.autoencoder_args.loss == "outputs"
    with context.loop(stage) as loop:
        autoencoder, losses = learn_autoencoder(
            context,
            loop,
            latent_noise=c.autoencoder_args.latent_noise,
            output_loss=output_loss(context, loop.device) if of_outputs else None,
        )
        device = loop.device
    if not PartialState().is_main_process:
        return
    warn_of_rise("autoencoder", losses, c.autoencoder_learning_rate)
    results: dict[str, Any] = {"losses": losses.tolist()}
    if autoencoder.adapter_geometry is not None:
        results["adapters"] = autoencoder.adapter_geometry
    if of_outputs and not isinstance(context.task, DataTask):  # a report on data has their decibels
        results["outputs"] = compare_outputs(context, autoencoder, device)
    with context.files.replacing(stage) as folder:
        autoencoder.save_pretrained(folder)
    context.finish(stage, results)


@torch.no_grad()
def compare_outputs(context: RunContext, autoencoder: ParameterAutoencoder, device: torch.device) -> dict[str, float]:
    """
    How far reconstructions of some snapshots, held-out ones if there are any, compute the same on validation examples:
    `agreement`, the share of equal predictions in percent, or of networks that are no classifiers the mean `loss` of
    reconstructions and that of `snapshots`.
    """
    heldout = context.heldout if context.heldout.any() else ~context.heldout
    rows = heldout.nonzero().flatten()[:COMPARED]
    networks, run = NetworkRunner(context.base_model.to(device), context.layout), _runs(context, "validation", device)
    examples = evenly(len(context.task.load_split("validation")), COMPARED_EXAMPLES)
    found = []
    for row in rows.split(1):  # of large networks as few as of small ones
        own = context.parameters[row]
        pair = torch.cat([own, autoencoder.decode(autoencoder.encode(own).latents).sample]).to(device)
        found.append(run(networks, pair, row.expand(2), examples))
    context.base_model.to("cpu")
    outputs = torch.stack(found)  # (n, 2, B, C), or losses (n, 2)
    if isinstance(context.task, ClassificationTask):
        said = outputs.argmax(-1)
        result = {"agreement": 100 * (said[:, 0] == said[:, 1]).double().mean().item()}
        logger.info(
            "autoencoder: reconstructions agree with their snapshots in %.1f%% of predictions", *result.values()
        )
    else:
        result = dict(zip(("snapshots", "loss"), outputs.double().mean(0).tolist(), strict=True))
        logger.info("autoencoder: the loss of snapshots is %.4g, and %.4g of reconstructions", *result.values())
    return result


def _runs(context: RunContext, split: Split, device: torch.device) -> Callable[..., torch.Tensor]:
    """
    `run(networks, parameters, rows, examples)` gives the logits of networks `(n, D)`, those of classifiers and in the
    place of the snapshots `rows`, on some examples of a split, `(n, B, C)`; of all others the losses, `(n,)`.
    """
    task, family = context.task, context.family
    table = context.snapshot_conditions if family.fields else torch.zeros(len(context.parameters), 0)
    if table.isnan().any():
        raise RunError("autoencoder_args.loss=outputs needs snapshots whose conditions are all known")

    def run(networks: NetworkRunner, parameters: torch.Tensor, rows: torch.Tensor, examples: torch.Tensor):
        if isinstance(task, ClassificationTask):
            return networks.stack(family.predict, parameters, family.batch(split, table[rows].to(device), examples))
        batch = load_batch(task, split, examples.tolist(), device)
        return networks.stack(task.loss, parameters, batch, shared=True)

    return run


def output_loss(context: RunContext, device: torch.device) -> OutputLoss:
    """
    How far the outputs of decoded networks are from those of snapshots: from the data, if each is a datum; of
    classifiers the divergence of predictions on training examples; and of all others their own loss there.
    """
    task = context.task
    networks = NetworkRunner(context.base_model.to(device), context.layout)
    if isinstance(task, DataTask):
        points, size = task.coordinates().to(device), context.config.collect_batch_size
        if context.config.collects:
            signals = torch.cat([task.signals(split) for split in ("train", "test")])[context.data]
        else:
            signals = task.render_all(networks, context.parameters)

        def error(parameters: torch.Tensor, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            some = torch.randperm(len(points), generator=generator, device=device)[:size]
            outputs = networks.stack(task.predict, parameters, {"coordinates": points[some]}, shared=True)
            return task.error(outputs, signals[rows.unsqueeze(1), some.cpu()].to(device)).mean()

        return error
    run, total = _runs(context, "train", device), len(task.load_split("train"))  # type: ignore[arg-type]  # map-style

    def loss(parameters: torch.Tensor, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(total, (OUTPUT_EXAMPLES,), generator=generator, device=device).cpu()
        found = run(networks, parameters, rows, chosen)
        if not isinstance(task, ClassificationTask):
            return found.mean()
        with torch.no_grad():
            wanted = run(networks, context.parameters[rows].to(device), rows, chosen).log_softmax(-1)
        found = found.log_softmax(-1)
        return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean()

    return loss


def architecture(context: RunContext) -> dict[str, Any]:
    """Of the autoencoder, apart from the length of a latent."""
    c, args, num_seen = context.config, context.config.autoencoder_args, len(context.seen)
    if not c.adapter_products:
        length = context.layout.num_parameters
        return autoencoder_architecture(c.autoencoder_preset, length, args.token_size, num_seen)
    # K adapters of rank r span no more than K r rows and columns.
    most = num_seen * max(AdapterProducts(context.layout).ranks.values())
    frame_size = min(args.adapter_frame_size, most) or None
    if args.adapter_energy and frame_size:
        frame_size = smallest_frame(context.layout, context.parameters, context.seen, args.adapter_energy, frame_size)
    products = AdapterProducts(context.layout, frame_size)
    length = products.layout.num_parameters
    settings = autoencoder_architecture(c.autoencoder_preset, length, args.token_size, num_seen, products.has_frames)
    return settings | {"adapter_products": True, "adapter_frame_size": frame_size}


def fit_denoiser(context: RunContext, stage: Stage) -> None:
    """The denoiser, and with it the whole pipeline."""
    c = context.config
    latents = context.latents[context.seen]
    encoder, table = seen_encoder(context, latents)
    if c.num_regressed and table is not None:  # of families, which have conditions
        regressed, conditions = regressed_latents(context)
        latents = torch.cat([latents, regressed])
        table = torch.cat([table, conditions.unsqueeze(1).expand(-1, table.shape[1], -1)])
    with context.loop(stage) as loop:
        denoiser, scheduler, losses = learn_denoiser(loop, latents, c, encoder, table)
    if not PartialState().is_main_process:
        return
    own, gaussian = losses[-LAST_LOSSES:].mean().item(), gaussian_loss(latents, scheduler)
    if own >= gaussian:
        logger.warning(
            "the denoiser's loss of %.3g is no better than the %.3g of a Gaussian with the latents' covariance: "
            "networks will be no better than those of that Gaussian. What helps, in this order: "
            "autoencoder_args.latent_scaling=together, a shorter latent_dim, more denoiser_steps at a larger "
            "denoiser_batch_size",
            own,
            gaussian,
        )
    # A network of no library that can save it does not go with its generator.
    base_model = context.base_model if isinstance(context.base_model, PreTrainedModel | ModelMixin) else None
    sampler = make_sampling_scheduler(scheduler)
    pipeline = PDiffPipeline(
        context.autoencoder,
        denoiser,
        sampler,
        base_model=base_model,
        condition_encoder=encoder,
        processor=context.task.processor,
        recomputed_statistics=c.recomputes_statistics,
        **c.sampling,
    )
    with context.files.replacing(stage) as folder:
        pipeline.save_pretrained(folder)
    context.finish(stage, {"losses": losses.tolist(), "gaussian_loss": gaussian})


def seen_encoder(context: RunContext, latents: torch.Tensor) -> tuple[ConditionEncoder | None, torch.Tensor | None]:
    """
    An untrained encoder of the snapshots' conditions that knows the seen ones, and their table, of shape
    `(N, K, width)`. Of data without conditions, clusters of their latents, `(N, L)`, stand for them: a distribution
    is easier to learn as a mixture (Hu et al. 2023, arXiv 2210.06462). Nothing if there are neither.
    """
    config, fields = context.config, context.fields
    count = min(config.denoiser_args.clusters, len(latents) // CLUSTER_SIZE) if config.has_clusters else 0
    if not fields and count > 1:
        fields = Fields({"cluster": {"type": "category", "values": list(map(str, range(count)))}})
    if not fields:
        return None, None
    torch.manual_seed(named_seed(config.seed, "condition encoder"))
    encoder = ConditionEncoder(fields.to_list())
    if not context.fields:
        table = clustered(latents, count, config.seed)[:, None, None].float()
        encoder.remember(table.flatten(0, 1))
        return encoder, table
    table = context.seen_alternatives
    seen = table.flatten(0, 1)
    if not isinstance(context.task, DataTask):  # data are drawn as often as they are there
        seen = seen.nan_to_num(torch.inf).unique(dim=0).nan_to_num(posinf=torch.nan)
    embedded = [name for name, field in fields.items() if isinstance(field, EmbeddedField)]
    encoder.remember(seen, {name: [row[name] for row in context.seen_columns] for name in embedded})
    return encoder, table


def clustered(latents: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Which of `count` clusters, by k-means, each of the latents `(N, L)`, on the CPU, is in: shape `(N,)`."""
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(named_seed(seed, "clusters")))
    _, nearest = kmeans2(latents.numpy(), latents[order[:count]].numpy(), CLUSTER_STEPS, minit="matrix")
    return torch.from_numpy(nearest)


def learn_denoiser(
    loop: Loop, latents: torch.Tensor, c: PDiffConfig, encoder: ConditionEncoder | None, table: torch.Tensor | None
) -> tuple[LatentDenoiser, DDPMScheduler, torch.Tensor]:
    """The denoiser of latents `(N, L)`, what it was trained with, and its losses."""
    scheduler = make_training_scheduler(c.denoiser_args.num_train_timesteps, c.prediction_type)
    ema_decay = c.denoiser_args.ema_decay
    denoiser, losses = train_denoiser(
        loop,
        latents,
        loop_arguments(c, "denoiser", c.denoiser_steps, max_grad_norm=MAX_GRAD_NORM, ema_decay=ema_decay),
        scheduler=scheduler,
        encoder=encoder,
        table=table,
        condition_dropout=c.denoiser_args.condition_dropout if encoder is not None else 0.0,
        **DENOISER_PRESETS[c.denoiser_preset],
    )
    return denoiser, scheduler, losses


def regressed_latents(context: RunContext) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Latents, shape `(N, L)`, and conditions, `(N, width)`, of the networks that kernel ridge regression gives
    for conditions that are in no set of unseen tasks; for descriptions, between those of two seen tasks. Where seen
    tasks are few, a denoiser that learns them too says between the seen tasks what the regression says, and tuning on
    seen tasks goes on from there.
    """
    c, family, autoencoder = context.config, context.family, context.autoencoder
    networks = NetworkRunner(context.base_model, context.layout)
    products = autoencoder.products
    seen, _, means = mean_networks(*context.known_snapshots(), products)
    scorer = MemberScorer(family, networks, context.conditions["validation"], VALIDATION_EXAMPLES)
    ridge = tuned_ridge(scorer, seen, means, products)
    unseen, generator = context.unseen_tasks, torch.Generator().manual_seed(named_seed(c.seed, "regressed"))
    if any(isinstance(field, EmbeddedField) for field in family.fields.values()):
        table = between_descriptions(family.fields, context.seen_alternatives, c.num_regressed, generator)
    else:
        draws = (family.draw(generator) for _ in range(MAX_DRAWS * c.num_regressed))
        allowed = (c for c in draws if family.region(c) is None and family.key(c) not in unseen)
        table = family.fields.table(list(itertools.islice(allowed, c.num_regressed)))
    latents = [
        encode_in_batches(autoencoder, contracted(ridge(rows), products)) for rows in table.split(REGRESSED_AT_ONCE)
    ]
    return torch.cat(latents), table


def between_descriptions(fields: Fields, ways: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """
    Conditions, shape `(count, width)`, each like a seen one, with embeddings between its own and those of another.

    Args:
        ways (`torch.Tensor`): All ways to say the seen ones, shape `(N, K, width)`.
    """
    flat = ways.flatten(0, 1)
    flat = flat[~flat.isnan().any(1)]
    rows, others = flat[torch.randint(len(flat), (2, count), generator=generator)]
    share = torch.rand(count, 1, generator=generator)
    for name, field in fields.items():
        if isinstance(field, EmbeddedField):
            part = fields.columns[name]
            rows[:, part] = F.normalize(rows[:, part].lerp(others[:, part], share), dim=1)
    return rows
