"""The image-generation task: U-Nets of diffusers, DDPM's loss, FID, and the whole job on it."""

import hashlib
import json
import shutil
import sys

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import HfApi
from sklearn.datasets import load_digits
from support.runs import finish
from support.torch_home import put_inception
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

from pdiff_hf import PDiffPipeline
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.context import RunContext
from pdiff_hf.run.folder import RunError
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.selection import select_layout
from pdiff_hf.snapshots import load_snapshots, parameter_matrix
from pdiff_hf.tasks import ImageClassificationTask, ImageGenerationTask, take
from pdiff_hf.tasks.fid import InceptionFeatures, frechet_distance, load_features

UNET = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "mid_block_type": None,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
CPU = torch.device("cpu")


def write_digits(folder, labels: bool = True):
    """scikit-learn's scans as a local data set folder."""
    scans = load_digits()
    images = (scans.images * (255 / 16)).round().astype(np.uint8)
    features, columns = {"scan": datasets.Image()}, {"scan": list(images)}
    if labels:
        features["digit"] = datasets.ClassLabel(num_classes=10)
        columns["digit"] = scans.target
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    (folder / "data").mkdir(parents=True)
    rows.select(range(1000)).to_parquet(folder / "data" / "train-0.parquet")
    rows.select(range(1000, 1797)).to_parquet(folder / "data" / "test-0.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`digits`, a data set; `classifier`, a network of timm with fresh weights."""
    path = tmp_path_factory.mktemp("generation")
    write_digits(path / "digits")
    task = ImageClassificationTask("test_resnet", str(path / "digits"), image_size=16)
    torch.manual_seed(0)
    task.save_base_model(task.load_base_model(), path / "classifier")
    return path


def make_task(folder, **changes) -> ImageGenerationTask:
    settings = {
        "dataset": str(folder / "digits"),
        "image_size": 8,
        "model_args": UNET,
        "max_eval_samples": 100,
        "fid_features": str(folder / "classifier"),
        "num_steps": 5,
    }
    return ImageGenerationTask(**settings | changes)


def make_recipe(folder, output_dir, **changes) -> PDiffConfig:
    settings = {
        "task": "image_generation",
        "model": "unet2d",
        "model_args": UNET,
        "dataset": str(folder / "digits"),
        "task_args": {"fid_features": str(folder / "classifier")},
        "max_eval_samples": 100,
        "output_dir": str(output_dir),
        "stages": ["base", "collect", "autoencoder", "denoiser"],
        "base_epochs": 20,
        "base_learning_rate": 5e-3,
        "checkpointing_steps": 50,
        "select": ["conv_out*"],
        "num_snapshots": 20,
        "collect_batch_size": 32,
        "collect_learning_rate": 1e-3,
        "latent_dim": 8,
        "autoencoder_steps": 40,
        "autoencoder_batch_size": 10,
        "denoiser_steps": 60,
        "denoiser_batch_size": 10,
    }
    return PDiffConfig(**settings | changes)


@pytest.fixture(scope="module")
def finished(folder) -> RunContext:
    return finish(make_recipe(folder, folder / "run"))


# Long enough to be stopped in the middle.
SHORT = {"base_epochs": 2, "checkpointing_steps": 10, "autoencoder_steps": 10, "denoiser_steps": 10}


@pytest.fixture(scope="module")
def short(folder) -> RunContext:
    return finish(make_recipe(folder, folder / "short", **SHORT))


def distances(task, split, *groups) -> list[float]:
    return frechet_distance(task._features, task._real_images(split, CPU), groups).tolist()


def bits(path) -> dict[str, str]:
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_images_and_splits(folder, tmp_path):
    task = make_task(folder, max_eval_samples=None)
    assert [len(task.load_split(name)) for name in ("train", "validation", "test")] == [800, 200, 797]
    batch = take(task.load_split("test"), [0, 5])
    assert batch["pixel_values"].shape == (2, 1, 8, 8)
    scan = torch.from_numpy(load_digits().images[1005]).float()
    torch.testing.assert_close(batch["pixel_values"][1, 0], scan / 8 - 1, atol=0.004, rtol=0)
    classification = ImageClassificationTask("test_resnet", str(folder / "digits"), image_size=8)
    assert torch.equal(classification.load_split("validation").labels, task.load_split("validation").labels)
    assert make_task(folder, image_size=None).image_size == 8  # that of the images
    colour = make_task(folder, model_args=UNET | {"in_channels": 3, "out_channels": 3}, image_size=6)
    assert take(colour.load_split("test"), [0])["pixel_values"].shape == (1, 3, 6, 6)
    write_digits(tmp_path, labels=False)
    bare = make_task(folder, dataset=str(tmp_path))
    assert [len(bare.load_split(name)) for name in ("train", "validation", "test")] == [800, 100, 100]


def test_the_fingerprint_follows_all_that_the_metric_depends_on(folder, tmp_path):
    classifier = AutoModelForImageClassification.from_pretrained(folder / "classifier")
    classifier.timm_model.fc.weight.data[0, 0] += 1
    classifier.save_pretrained(tmp_path)
    tasks = [
        make_task(folder),
        make_task(folder, num_steps=6),
        make_task(folder, image_size=6),
        make_task(folder, max_eval_samples=99),
        make_task(folder, fid_features=str(tmp_path)),
    ]
    assert len({task.fingerprint("test") for task in tasks} | {tasks[0].fingerprint("validation")}) == 6
    assert make_task(folder).fingerprint("test") == tasks[0].fingerprint("test")
    assert tasks[0].metric == "FID (test_resnet)" and not tasks[0].higher_is_better


def test_the_loss_is_that_of_ddpm_in_both_modes(folder):
    task = make_task(folder)
    examples = take(task.load_split("train"), list(range(64)))
    torch.manual_seed(3)
    batch = task.collate(examples)
    another = task.collate(examples)
    assert not torch.equal(batch["noise"], another["noise"])
    assert not torch.equal(batch["timesteps"], another["timesteps"])
    torch.manual_seed(3)
    assert torch.equal(task.collate(examples)["noise"], batch["noise"])
    model = task.load_base_model()
    share = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)[batch["timesteps"]].view(-1, 1, 1, 1)
    noisy = share.sqrt() * batch["pixel_values"] + (1 - share).sqrt() * batch["noise"]
    for mode in (True, False):
        expected = (model.train(mode)(noisy, batch["timesteps"]).sample - batch["noise"]).square().mean()
        torch.testing.assert_close(task.loss(model, batch), expected)
    task.loss(model, batch).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_models_from_folders(folder, tmp_path):
    task = make_task(folder)
    model = task.load_base_model()
    task.save_base_model(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "flat")
    other = DDPMScheduler(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2")
    other.save_pretrained(tmp_path / "flat")
    sources = {"saved": 1000, "saved/unet": 1000, "flat": 20}
    for source, timesteps in sources.items():
        again = make_task(folder, model=str(tmp_path / source), model_args={}, image_size=None)
        assert again.image_size == 8 and again.scheduler.config.num_train_timesteps == timesteps
        state_dict = again.load_base_model().state_dict()
        assert all(torch.equal(tensor, state_dict[name]) for name, tensor in model.state_dict().items())
    task.save_base_model(task.load_saved(tmp_path / "saved"), tmp_path / "again")
    assert bits(tmp_path / "saved") == bits(tmp_path / "again")
    pipe = DDPMPipeline.from_pretrained(tmp_path / "saved")
    assert pipe(2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)


def test_models_from_the_hub(folder, hub, tmp_path):
    """At the top of a repository, as `google/ddpm-cifar10-32` has it, and as pipelines are saved today."""
    task = make_task(folder)
    model = task.load_base_model()
    task.scheduler = DDPMScheduler(num_train_timesteps=20)
    task.save_base_model(model, tmp_path / "pipeline")
    for part in ("unet", "scheduler"):
        shutil.copytree(tmp_path / "pipeline" / part, tmp_path / "flat", dirs_exist_ok=True)
    api = HfApi()
    for name, source in {"pipeline": "pipeline", "flat": "flat", "bare": "pipeline/unet"}.items():
        api.create_repo(f"alice/{name}")
        api.upload_folder(repo_id=f"alice/{name}", folder_path=tmp_path / source)
    for name in ("pipeline", "flat"):
        again = make_task(folder, model=f"alice/{name}", model_args={})
        assert again.scheduler.config.num_train_timesteps == 20
        state_dict = again.load_base_model().state_dict()
        assert all(torch.equal(tensor, state_dict[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="the scheduler_config.json beside the U-Net of 'alice/bare' is needed"):
        make_task(folder, model="alice/bare", model_args={})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere"}, "model_args belong to a fresh model"),
        ({"model": "nowhere", "model_args": {}}, "model 'nowhere' is neither 'unet2d' nor a folder or Hub id"),
        ({"model_args": UNET | {"depth": 3}}, "unexpected keyword argument 'depth'"),
        ({"model_args": UNET | {"norm_num_groups": 5}}, "does not work on images of 8x8: num_channels"),
        ({"image_size": 7}, "does not work on images of 7x7"),
        ({"model_args": UNET | {"num_class_embeds": 3}}, "class_labels should be provided"),
        ({"model_args": UNET | {"out_channels": 2}}, "got in_channels=1 and out_channels=2"),
        ({"num_steps": 1001}, "num_steps must be at most the 1000 steps"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"max_eval_samples": 1}, "the validation split of dataset .* has one image"),
        ({"dataset": "nowhere"}, "dataset 'nowhere' is neither"),
        ({"fid_features": "nowhere"}, "fid_features 'nowhere' is neither 'inception' nor the folder"),
    ],
)
def test_wrong_settings_are_named(changes, message, folder):
    with pytest.raises(ValueError, match=message):
        make_task(folder, **changes)


def test_wrong_folders_are_named(folder, tmp_path, monkeypatch):
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="is a AutoencoderKL, not a UNet2DModel"):
        make_task(folder, model=str(tmp_path / "vae"), model_args={})
    UNet2DModel(8, **UNET).save_pretrained(tmp_path / "v")
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "v")
    with pytest.raises(ValueError, match="predicts v_prediction"):
        make_task(folder, model=str(tmp_path / "v"), model_args={})
    rows = datasets.Dataset.from_dict({"label": [0, 1] * 9})
    (tmp_path / "words").mkdir()
    rows.to_parquet(tmp_path / "words" / "train.parquet")
    with pytest.raises(ValueError, match="has no image column; its columns are label"):
        make_task(folder, dataset=str(tmp_path / "words"))
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):  # another test may have loaded both
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"FID needs torch_fidelity: pip install 'pdiff_hf\[fid\]'"):
        make_task(folder, fid_features="inception")
    with pytest.raises(RunError, match="latent_dim is 74, but only 73 parameters"):
        prepare(make_recipe(folder, tmp_path / "out", latent_dim=74))


def test_the_distance_is_that_of_the_definition(folder):
    task = make_task(folder)
    real, other = (torch.cat(list(task._real_images(split, CPU))) for split in ("test", "validation"))
    same, shuffled, distance = distances(task, "test", [real], real.flip(0).split(7), [other])
    assert same == pytest.approx(0, abs=1e-9) and shuffled == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        a, b = task._features(real).numpy(), task._features(other).numpy()
    assert a.dtype == np.float64 and a.shape == (100, task._features.num_features)
    covariances = [np.cov(rows.T) for rows in (a, b)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors * values.clip(0) ** 0.5 @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ covariances[1] @ root)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1])
    expected -= 2 * (eigenvalues.clip(0) ** 0.5).sum()
    assert distance == pytest.approx(expected, rel=1e-6) and distance > 1e-4


def test_features_of_a_transformers_classifier_are_what_its_head_gets(tmp_path):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"fid_features '{tmp_path}' is neither"):
        load_features(str(tmp_path))  # without its image processor
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    features = load_features(str(tmp_path))
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = (images / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = model.vit(pixels.expand(-1, 3, -1, -1)).last_hidden_state[:, 0]
        torch.testing.assert_close(features(images).float(), expected, atol=1e-4, rtol=1e-4)
    assert features.num_features == 16 and features.title == "vit"
    assert frechet_distance(features, [images], [[images]]).item() == pytest.approx(0, abs=1e-6)
    assert {parameter.dtype for parameter in features.parameters()} == {torch.float32}


def test_inception_v3(tmp_path, monkeypatch):
    put_inception(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    features = load_features("inception")
    assert isinstance(features, InceptionFeatures)
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = features(images)
        torch.testing.assert_close(features(images.expand(-1, 3, -1, -1)), output)
    assert output.shape == (4, 2048) and output.dtype == torch.float64 and len(output.unique(dim=0)) == 4


def test_measuring_many_networks_is_measuring_each_alone(folder):
    task = make_task(folder)
    torch.manual_seed(0)
    model = task.load_base_model()
    layout = select_layout(model, ["conv_out*", "conv_norm_out*"], [])
    rows = layout.flatten(model.state_dict()) + 0.3 * torch.randn(4, layout.num_parameters)
    together = task.measure(NetworkRunner(model, layout), "test", rows)
    alone = [task.measure(NetworkRunner(model, layout), "test", row[None]) for row in rows]
    assert together.dtype == torch.float64 and together.shape == (4,) and len(together.unique()) == 4
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-9)
    # As whole networks, from the same noise, without what networks have in common.
    for row, distance in zip(rows, together.tolist(), strict=True):
        model.load_state_dict(layout.unflatten(row), strict=False)
        noise = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            images = task.generate(model.eval(), noise)
        images = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        assert distances(task, "test", [images]) == pytest.approx([distance], rel=1e-3)


def test_the_whole_job(finished, folder):
    losses = json.loads((finished.folder / "stages" / "base.json").read_text())["results"]["losses"]
    assert np.mean(losses[-50:]) < 0.5 * np.mean(losses[:10])
    pipe = PDiffPipeline.from_pretrained(finished.folder / "pipeline")
    assert isinstance(pipe.base_model, UNet2DModel)
    assert str(folder).encode() not in (finished.folder / "pipeline" / "base_model" / "config.json").read_bytes()
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(0)}
    networks = pipe(2, output_type="model", **arguments).parameters
    arguments["generator"].manual_seed(0)
    rows = pipe(2, output_type="pt", **arguments).parameters
    assert all(isinstance(network, UNet2DModel) for network in networks)
    torch.testing.assert_close(torch.stack([finished.layout.flatten(n.state_dict()) for n in networks]), rows)
    assert networks[0].conv_in.weight is networks[1].conv_in.weight
    # What is generated generates: as the snapshots do, and better than they do with noise.
    snapshots = parameter_matrix(*load_snapshots(finished.folder / "snapshots"))
    noise = torch.randn(snapshots[-2:].shape, generator=torch.Generator().manual_seed(0))
    broken = snapshots[-2:] + 0.5 * snapshots.std() * noise
    models = NetworkRunner(finished.base_model, finished.layout)
    scores = finished.task.measure(models, "validation", torch.cat([snapshots[-2:], rows, broken]))
    assert scores[2:4].max() < 1.5 * scores[:2].max() and scores[4:].min() > 1.5 * scores[:2].max()


def test_snapshots_do_not_depend_on_what_the_process_did_before(short, folder, tmp_path):
    torch.manual_seed(99)
    execute(prepare(make_recipe(folder, tmp_path, **SHORT | {"stages": ["base"]})))
    torch.manual_seed(100)
    execute(prepare(make_recipe(folder, tmp_path, **SHORT)))
    for name in ("base_model", "pipeline"):
        assert bits(tmp_path / name) == bits(short.folder / name)
