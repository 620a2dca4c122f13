"""Networks on demand: a generator for a family of tasks, against everything simpler that answers to a condition.

python scripts/benchmarks/on_demand.py                                         # scikit-learn's digits
python scripts/benchmarks/on_demand.py --dataset path/to/fashion_mnist --image_size 14
python scripts/benchmarks/on_demand.py --dataset path/to/fashion_mnist --image_size 14 --regime seen
python scripts/benchmarks/on_demand.py --dataset path/to/fashion_mnist --image_size 14 --family grouped
"""

import argparse
import copy
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler

from pdiff_hf.evaluation.conditional import GENERATOR, ConditionalAudit, Cost, plot_field, pool_reports, render_markdown
from pdiff_hf.evaluation.conditional_baselines import BasisNetworks, GenericNetwork
from pdiff_hf.layout import ParameterLayout
from pdiff_hf.models import DENOISER_PRESETS, ConditionEncoder, LatentDenoiser, ParameterAutoencoder
from pdiff_hf.networks.stacked import StackedNetworks
from pdiff_hf.pipelines import PDiffPipeline
from pdiff_hf.snapshots.dataset import condition_table, load_fields, load_snapshots, parameter_matrix
from pdiff_hf.snapshots.zoo import ZooArguments, collect_zoo, train_specialists
from pdiff_hf.tasks import ImageClassificationTask
from pdiff_hf.tasks.families import GroupedFamily, TransformedFamily
from pdiff_hf.training import make_training_scheduler
from pdiff_hf.training.denoiser import LatentGenerator, denoising_loss, train_denoiser
from pdiff_hf.training.loop import LoopArguments
from pdiff_hf.training.tune import GeneratedNetworks, TuneArguments, fresh_tasks, seen_tasks, tune
from pdiff_hf.utils.files import write_json
from pdiff_hf.utils.seeds import derive_seed

NUM_SAMPLES = 4  # networks of the generator for each unseen task
CURVE = 24  # angles of the figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--family", default="transformed", choices=["transformed", "grouped"])
    parser.add_argument("--dataset", default="digits", help="As of ImageClassificationTask.")
    parser.add_argument("--image_size", type=int, default=8)
    parser.add_argument("--model", default="perceptron_mini", help="timm architecture for one channel.")
    parser.add_argument("--hidden_size", type=int, default=24, help="Of perceptron_mini.")
    parser.add_argument("--regime", default="fresh", choices=["fresh", "seen"], help="Which tasks tuning may use.")
    parser.add_argument("--num_seen", type=int, default=192)
    parser.add_argument("--num_validation", type=int, default=32)
    parser.add_argument("--num_unseen", type=int, default=48)
    parser.add_argument("--base_steps", type=int, default=1500)
    parser.add_argument("--zoo_steps", type=int, default=400)
    parser.add_argument("--zoo_learning_rate", type=float, default=0.01)
    parser.add_argument("--latent_dim", type=int, default=160)
    parser.add_argument("--denoiser_preset", default="mlp", choices=DENOISER_PRESETS)
    parser.add_argument("--denoiser_steps", type=int, default=2000)
    parser.add_argument("--tune_steps", type=int, default=1800)
    parser.add_argument("--tune_learning_rate", type=float, default=1e-3)
    parser.add_argument("--frozen_decoder", action="store_true", help="Tune the denoiser only.")
    parser.add_argument("--weight_loss", type=float, default=0.0, help="Weight of the denoiser's own loss in tuning.")
    parser.add_argument("--condition_noise", type=float, default=0.0, help="Of the seen conditions, in tuning.")
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--skip", nargs="*", default=[], help="oracle5, hypernetwork, generic, basis")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output_dir", default="outputs/on_demand")
    args = parser.parse_args()
    folder = Path(args.output_dir)
    reports = []
    for seed in args.seeds:
        clock = Clock()
        with tempfile.TemporaryDirectory() as checkpoints:
            report = run(args, seed, folder / f"seed{seed}", clock, checkpoints)
        report["settings"] |= {"seed": seed, "cpu_seconds": clock.seconds}
        report["settings"]["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        write_json(folder / f"seed{seed}" / "report.json", report)
        if "angles" in report["conditions"]:
            shown = [GENERATOR, "trained on the task", "nearest seen task", "generic network"]
            shown = [name for name in shown if name in report["rows"]]
            plot_field(report, "angle", "angles", shown, folder / f"seed{seed}" / "angles.png")
        reports.append(report)
        print(render_markdown(report), json.dumps(clock.seconds), sep="\n", flush=True)
    report = pool_reports(reports)
    write_json(folder / "report.json", report)
    (folder / "report.md").write_text(render_markdown(report))
    print(render_markdown(report))


class Clock:
    """CPU seconds of the stages."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.process_time()

    def __call__(self, what: str) -> None:
        now = time.process_time()
        self.seconds[what] = round(now - self.last, 1)
        self.last = now
        print(f"{what}: {self.seconds[what]} s", flush=True)


def run(args, seed: int, folder: Path, clock: Clock, checkpoints: str) -> dict:
    accelerator, device = Accelerator(cpu=True), torch.device("cpu")
    model_args = {"img_size": args.image_size, "in_chans": 1} if args.model == "perceptron_mini" else {}
    model_args |= {"hidden_size": args.hidden_size} if args.model == "perceptron_mini" else {}
    base = ImageClassificationTask(
        model=args.model, dataset=args.dataset, image_size=args.image_size, model_args=model_args
    )
    family = TransformedFamily(base) if args.family == "transformed" else GroupedFamily(base)
    sizes = {"train": args.num_seen, "validation": args.num_validation, "test": args.num_unseen}
    conditions = family.split(sizes, derive_seed(seed, 0))
    tables = {name: family.fields.table(rows) for name, rows in conditions.items()}
    unseen = {family.key(condition) for name in ("validation", "test") for condition in conditions[name]}
    test_sets = {"test": tables["test"]}
    if args.family == "transformed":
        other = {"blur": 0.5, "invert": "no", "occlude": "none"}
        curve = [other | {"angle": 360 * i / CURVE} for i in range(CURVE)]
        test_sets["angles"] = family.fields.table(curve)
        unseen |= {family.key(condition) for condition in curve}
    torch.manual_seed(derive_seed(seed, 1))
    model = family.load_base_model()
    layout = ParameterLayout.from_state_dict(model.state_dict(), [name for name, _ in model.named_parameters()])
    networks = StackedNetworks(model, layout)
    for split in ("train", "validation", "test"):
        family.pixels(split)
    clock("data")

    tune_args = TuneArguments(num_steps=args.tune_steps, learning_rate=args.tune_learning_rate)
    per_step = tune_args.num_tasks * tune_args.num_examples
    audit = ConditionalAudit(family, networks, test_sets)

    def batches(arguments: TuneArguments):
        if args.regime == "fresh":
            return fresh_tasks(family, arguments, unseen, device)
        return seen_tasks(family, arguments, tables["train"], device, condition_noise=args.condition_noise)

    def tuned(module, arguments: TuneArguments, what: str, extra_loss=None) -> dict:
        def validate() -> float:
            return audit.score_module(tables["validation"], module, "validation", 500)[1].mean().item()

        history = tune(
            accelerator,
            module,
            batches(arguments),
            args.num_seen,
            arguments,
            validate=validate,
            extra_loss=extra_loss,
            seed=derive_seed(seed, 2),
            checkpoint_dir=checkpoints,
            description=what,
        )
        clock(what)
        return history

    # The base model: one network for all tasks, from which all others start.
    generic = GenericNetwork(networks, family.predict, networks.base_parameters())
    tuned(generic, TuneArguments(num_steps=args.base_steps, learning_rate=0.01, num_examples=32), "base model")
    start = generic.values.detach().clone()
    base_passes = args.base_steps * 32 * 32

    # The zoo: a specialist for each seen task.
    zoo_args = ZooArguments(num_steps=args.zoo_steps, learning_rate=args.zoo_learning_rate)

    def specialists(table: torch.Tensor, arguments: ZooArguments, seed: int) -> torch.Tensor:
        return train_specialists(
            accelerator, family, networks, table, arguments, seed=seed, checkpoint_dir=checkpoints, start=start
        )

    shutil.rmtree(folder / "zoo", ignore_errors=True)
    collect_zoo(
        accelerator,
        family,
        networks,
        conditions["train"],
        folder / "zoo",
        zoo_args,
        seed=derive_seed(seed, 3),
        checkpoint_dir=checkpoints,
        start=start,
    )
    # From here on it is any folder of networks with conditions.
    dataset, layout = load_snapshots(folder / "zoo")
    snapshots, table = parameter_matrix(dataset, layout), condition_table(dataset, load_fields(folder / "zoo"))
    zoo_passes = base_passes + args.num_seen * args.zoo_steps * zoo_args.batch_size
    clock("zoo")

    # The generator by weights: principal components, and a denoiser of them.
    autoencoder = ParameterAutoencoder(
        layout.to_dict(), latent_dim=min(args.latent_dim, len(snapshots) - 1), block_out_channels=()
    ).eval()
    autoencoder.fit_parameter_statistics(snapshots)
    autoencoder.fit_latent_statistics(autoencoder.tokenize(snapshots))
    latents = autoencoder.encode(snapshots).latents
    clock("autoencoder")
    encoder = ConditionEncoder(family.fields.to_dict())
    encoder.remember(tables["train"])
    scheduler = make_training_scheduler(prediction_type="v_prediction")
    denoiser, _ = train_denoiser(
        accelerator,
        latents,
        LoopArguments(args.denoiser_steps, 64, 1e-3, ema_decay=0.999, max_grad_norm=1.0),
        scheduler=scheduler,
        encoder=encoder,
        table=table,
        seed=derive_seed(seed, 4),
        checkpoint_dir=checkpoints,
        **DENOISER_PRESETS[args.denoiser_preset],
    )
    clock("denoiser")
    sampler = DPMSolverMultistepScheduler.from_config(
        scheduler.config, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )

    if not args.frozen_decoder:
        autoencoder.add_tuned_map()

    def make(latent_generator, sampling, decoder=autoencoder) -> GeneratedNetworks:
        return GeneratedNetworks(
            latent_generator, decoder, sampling, args.num_inference_steps, networks, family.predict
        )

    generated = make(LatentGenerator(denoiser, encoder), sampler)

    @torch.no_grad()
    def sample(_, rows: torch.Tensor) -> torch.Tensor:
        noise = torch.Generator().manual_seed(derive_seed(seed, 5))
        parameters = generated.sample_parameters(rows.repeat_interleave(NUM_SAMPLES, 0), noise)
        return parameters.unflatten(0, (len(rows), NUM_SAMPLES))

    audit.add("generator by weights", "generator", sample, Cost(zoo_passes))
    extra = None
    if args.weight_loss:

        def extra(noise: torch.Generator) -> torch.Tensor:
            rows = torch.randint(len(latents), (64,), generator=noise)
            return args.weight_loss * denoising_loss(generated.generator, scheduler, latents[rows], noise, table[rows])

    history = tuned(generated, tune_args, "tuning", extra)
    for name, part in {"autoencoder": autoencoder, "denoiser": denoiser, "condition_encoder": encoder}.items():
        part.save_pretrained(folder / name)
    PDiffPipeline(autoencoder, denoiser, sampler, condition_encoder=encoder).save_pretrained(folder / "pipeline")
    tune_passes = len(history["losses"]) * per_step
    audit.add(GENERATOR, "generator", sample, Cost(zoo_passes + tune_passes))
    audit.add("generator, shuffled conditions", "control", lambda name, t: sample(name, t.roll(1, 0)), Cost())
    write_json(folder / "tuning.json", history)

    audit.add_closed_form(snapshots, table, tables["validation"], Cost(zoo_passes))
    clock("closed form")
    add_oracles(args, seed, audit, specialists, zoo_args, base_passes)
    clock("oracles")

    # Opponents that are trained in the same regime, for as many steps, or as many passes as zoo and tuning together.
    opponent = TuneArguments(num_steps=args.tune_steps + zoo_passes // per_step, learning_rate=0.01, validate_every=200)
    if "generic" not in args.skip:
        for name, fields in (("generic network", None), ("generic network with condition", family.fields)):
            module = GenericNetwork(networks, family.predict, start, fields, family.pixels("train")[0].shape[1:])
            tuned(module, opponent, name)
            audit.add_module(name, "trained", module, Cost(base_passes + opponent.num_steps * per_step))
    if "basis" not in args.skip:
        torch.manual_seed(derive_seed(seed, 6))
        basis = BasisNetworks(networks, family.predict, start, family.fields)
        tuned(basis, opponent, "basis networks")
        audit.add_module("basis networks", "trained", basis, Cost(base_passes + opponent.num_steps * per_step))
    if "hypernetwork" not in args.skip:
        add_hypernetwork(
            args, seed, audit, make, autoencoder, latents, table, encoder, tuned, tune_args, zoo_passes, clock
        )
    return audit.report({name: value for name, value in vars(args).items() if name not in ("output_dir", "seeds")})


def add_oracles(
    args, seed: int, audit: ConditionalAudit, specialists, zoo_args: ZooArguments, base_passes: int
) -> None:
    """Networks that are trained on the unseen tasks themselves, as long as the zoo and five times longer."""
    for name, factor in (("trained on the task", 1), ("trained on the task, 5 times longer", 5)):
        if factor > 1 and "oracle5" in args.skip:
            continue
        arguments = ZooArguments(
            num_steps=factor * args.zoo_steps, num_snapshots=1, learning_rate=args.zoo_learning_rate
        )

        def train(_, table: torch.Tensor, arguments=arguments) -> torch.Tensor:
            return specialists(table, arguments, derive_seed(seed, 7))[-1]

        audit.add(name, "oracle", train, Cost(base_passes, arguments.num_steps * zoo_args.batch_size))


def add_hypernetwork(
    args, seed: int, audit, make, autoencoder, latents, table, encoder, tuned, tune_args, zoo_passes, clock
) -> None:
    """The same network as the denoiser, without noise: by weight loss, then by task loss."""
    torch.manual_seed(derive_seed(seed, 8))
    own = ConditionEncoder(encoder.config.fields)
    own.remember(encoder.seen)
    network = LatentDenoiser(
        latents.shape[1], condition_dim=own.config.embedding_dim, **DENOISER_PRESETS[args.denoiser_preset]
    )
    decoder = copy.deepcopy(autoencoder)
    if not args.frozen_decoder:
        decoder.add_tuned_map()
    module = make(LatentGenerator(network, own), None, decoder)
    optimizer = torch.optim.AdamW(module.generator.parameters(), lr=1e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.denoiser_steps)
    noise = torch.Generator().manual_seed(derive_seed(seed, 9))
    for _ in range(args.denoiser_steps):
        rows = torch.randint(len(latents), (64,), generator=noise)
        loss = (module.sample_latents(table[rows], noise) - latents[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    clock("hypernetwork by weights")
    audit.add_module("hypernetwork by weights", "trained", module, Cost(zoo_passes))
    history = tuned(module, tune_args, "hypernetwork")
    passes = zoo_passes + len(history["losses"]) * tune_args.num_tasks * tune_args.num_examples
    audit.add_module("hypernetwork", "trained", module, Cost(passes))


if __name__ == "__main__":
    main()
