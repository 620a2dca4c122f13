"""
A dry run of experiments at the paper's scale: its own data sets, networks and preprocessing, by the real command.

The Hub on loopback serves data sets with the columns, splits and configurations of the real ones and a few random
images, and the architectures with fresh weights. So every step is taken that the first person with a GPU and a network
will take, with fewer snapshots and steps. Without `--full`, one pair of a network and a data set; with it, all that
the paper has.
"""

import inspect
import io
import json

import datasets
import numpy as np
import pytest
import timm
import torchvision
import yaml
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from reproduce.plan import expand
from reproduce.runner import reproduce
from reproduce.tables import DATASETS, EXPERIMENTS
from safetensors.torch import load_file
from support.hub_server import File, HubServer, Repo
from support.torch_home import put_inception, put_weights
from timm.data import ImageNetInfo
from timm.models import save_for_hf

IMAGE = datasets.Image()
NUM_IMAGES = 40


def classes(count: int) -> datasets.ClassLabel:
    return datasets.ClassLabel(names=[f"class {i}" for i in range(count)])


def imagenet() -> datasets.ClassLabel:
    info = ImageNetInfo()
    names = [info.index_to_description(i) for i in range(1000)]
    names[517] = "crane2"  # names of a ClassLabel differ, and 134 is the bird
    return datasets.ClassLabel(names=names)


def coco() -> datasets.ClassLabel:
    names = torchvision.models.get_model_weights("fcos_resnet50_fpn")["COCO_V1"].meta["categories"]
    return datasets.ClassLabel(names=[name for name in names[1:] if name != "N/A"])


# By id: the configuration that is used, columns (those that take long to make as functions), splits, and the size of
# images.
LAYOUTS: dict[str, tuple[str, dict, tuple[str, ...], tuple[int, int]]] = {
    "uoft-cs/cifar10": ("plain_text", {"img": IMAGE, "label": classes(10)}, ("train", "test"), (32, 32)),
    "uoft-cs/cifar100": (
        "cifar100",
        {"img": IMAGE, "fine_label": classes(100), "coarse_label": classes(20)},
        ("train", "test"),
        (32, 32),
    ),
    "tanganke/stl10": ("default", {"image": IMAGE, "label": classes(10)}, ("train", "test"), (96, 96)),
    "dpdl-benchmark/oxford_flowers102": (
        "default",
        {"image": IMAGE, "label": classes(102)},
        ("train", "validation", "test"),
        (667, 500),
    ),
    "timm/oxford-iiit-pet": (
        "default",
        {"image": IMAGE, "label": classes(37), "image_id": datasets.Value("string"), "label_cat_dog": classes(2)},
        ("train", "test"),
        (300, 200),
    ),
    "ethz/food101": ("default", {"image": IMAGE, "label": classes(101)}, ("train", "validation"), (512, 384)),
    "ILSVRC/imagenet-1k": (
        "default",
        {"image": IMAGE, "label": imagenet},
        ("train", "validation", "test"),
        (500, 375),
    ),
    "ylecun/mnist": ("mnist", {"image": IMAGE, "label": classes(10)}, ("train", "test"), (28, 28)),
    "ufldl-stanford/svhn": (
        "cropped_digits",
        {"image": IMAGE, "label": classes(10)},
        ("train", "test", "extra"),
        (32, 32),
    ),
    "detection-datasets/coco": (
        "default",
        {
            "image_id": datasets.Value("int64"),
            "image": IMAGE,
            "width": datasets.Value("int64"),
            "height": datasets.Value("int64"),
            "objects": lambda: {
                "bbox_id": datasets.List(datasets.Value("int64")),
                "category": datasets.List(coco()),
                "bbox": datasets.List(datasets.List(datasets.Value("float64"), 4)),
                "area": datasets.List(datasets.Value("float64")),
            },
        },
        ("train", "val"),
        (640, 480),
    ),
    "nateraw/pascal-voc-2012": ("default", {"image": IMAGE, "mask": IMAGE}, ("train", "val"), (500, 375)),
}


def picture(random: np.random.Generator, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    return Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))


def column(name: str, feature, dataset: str, split: str, size: tuple[int, int], random: np.random.Generator) -> list:
    numbers = range(NUM_IMAGES)
    if name == "mask":  # in the colours of Pascal VOC: the background, and a square of the class aeroplane
        mask = np.zeros((size[1], size[0], 3), dtype=np.uint8)
        mask[50:150, 50:150] = (128, 0, 0)
        return [Image.fromarray(mask) for _ in numbers]
    if isinstance(feature, datasets.Image):
        return [picture(random, size, "L" if dataset == "ylecun/mnist" else "RGB") for _ in numbers]
    if name == "objects":
        box = {"bbox_id": [1, 2], "category": [3, 5], "bbox": [[10.0, 20.0, 200.0, 220.0], [5.0, 6.0, 90.0, 80.0]]}
        return [box | {"area": [38_000.0, 6_290.0]} for _ in numbers]
    if isinstance(feature, datasets.ClassLabel):
        hidden = (dataset, split) == ("ILSVRC/imagenet-1k", "test")
        return [-1 if hidden else i % min(4, feature.num_classes) for i in numbers]
    return [str(i) if feature.dtype == "string" else i for i in numbers]


def put(hub: HubServer, kind: str, name: str, files: dict[str, bytes]) -> None:
    """What someone else has pushed to a public repository."""
    repo = Repo(name, kind, private=False)
    stored = {path: File(content, large=path.endswith((".parquet", ".safetensors"))) for path, content in files.items()}
    hub.objects |= {file.sha256: file.content for file in stored.values() if file.large}
    repo.commit("main", stored, "first")
    hub.repos[kind, name] = repo


def put_dataset(hub: HubServer, name: str) -> None:
    config, columns, splits, size = LAYOUTS[name]
    columns = {key: feature() if inspect.isroutine(feature) else feature for key, feature in columns.items()}
    random, files, data_files = np.random.default_rng(0), {}, []
    for split in splits:
        values = {key: column(key, feature, name, split, size, random) for key, feature in columns.items()}
        buffer = io.BytesIO()
        datasets.Dataset.from_dict(values, features=datasets.Features(columns)).to_parquet(buffer)
        path = f"{config}/{split}-00000-of-00001.parquet"
        files[path] = buffer.getvalue()
        data_files.append({"split": split, "path": f"{config}/{split}-*"})
    configs = [{"config_name": config, "data_files": data_files, "default": config != "cropped_digits"}]
    files["README.md"] = f"---\n{yaml.safe_dump({'configs': configs})}---\n".encode()
    put(hub, "datasets", name, files)


def put_network(hub: HubServer, name: str, folder) -> None:
    """An architecture with fresh weights where a run looks for trained ones."""
    if name.startswith("timm/"):
        architecture = name.removeprefix("timm/")
        save_for_hf(timm.create_model(architecture), folder, model_config=None, safe_serialization=True)
    else:
        unet = UNet2DModel(32, block_out_channels=(32, 64, 64, 64), norm_num_groups=8, layers_per_block=1)
        unet.save_pretrained(folder)
        DDPMScheduler().save_pretrained(folder)
    put(hub, "models", name, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})


def pairs() -> dict[tuple[str, str], tuple[str, str]]:
    """By network and data set: the first experiment and row that has them."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for name, experiment in EXPERIMENTS.items():
        if not experiment.measures_memory:
            for row in experiment.rows:
                found.setdefault((row.architecture, row.dataset), (name, row.run))
    return found


USUAL = {("cnn3_mini", "svhn")}  # which takes seconds, and others minutes
SMALLER = {
    "base_batch_size": 8,
    "collect_batch_size": 8,
    "num_snapshots": 6,
    "latent_dim": 4,
    "autoencoder_steps": 2,
    "autoencoder_batch_size": 4,
    "denoiser_steps": 2,
    "denoiser_batch_size": 4,
    "num_models": 2,
    "num_inference_steps": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize(("network", "dataset"), pairs())
def test_dry_run(network, dataset, hub, full, tmp_path, monkeypatch):
    if not full and (network, dataset) not in USUAL:
        pytest.skip("all pairs of a network and a data set run with --full alone")
    name, row = pairs()[network, dataset]
    ((_, (recipe,)),) = expand(name, tmp_path / "plan", scale="paper", patterns=[row])
    put_dataset(hub, DATASETS[dataset].id.partition(":")[0])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    if recipe.task == "image_generation":
        put_inception(tmp_path / "torch")
    if "/" in recipe.model:
        put_network(hub, recipe.model, tmp_path / "network")
    elif ":" in recipe.model:
        put_weights(tmp_path / "torch", recipe.model)
    varied = set(EXPERIMENTS[name].rows[0].varies)
    changes = {key: value for key, value in SMALLER.items() if key not in varied}
    if recipe.task == "image_classification":
        changes["base_epochs"] = min(1, recipe.base_epochs)
    else:
        changes |= {"max_train_samples": 8, "max_eval_samples": 4}
    folder = reproduce(name, tmp_path / "out", scale="paper", patterns=[row], changes=changes)
    assert row in (folder / "table.csv").read_text()
    (run,) = (tmp_path / "out" / "runs").iterdir()
    report = json.loads((run / "evaluation" / "report.json").read_text())
    assert {group["name"]: group["n"] for group in report["groups"]}["generated"] == 2
    weights = load_file(run / "pipeline" / "denoiser" / "diffusion_pytorch_model.safetensors")
    assert all(values.isfinite().all() for values in weights.values())
