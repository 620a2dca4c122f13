"""The object-detection task: data sets of boxes, losses in both modes, AP, and the whole job on it."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import whole_job
from support.torch_home import put_weights
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import get_model_builder, get_model_weights

from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.selection import select_layout
from pdiff_hf.tasks import ObjectDetectionTask

DETECTOR = "fasterrcnn_mobilenet_v3_large_320_fpn"
PROPOSALS = {"rpn_post_nms_top_n_test": 20, "rpn_score_thresh": 0.0}


@pytest.fixture(scope="module")
def task(canvases):
    return ObjectDetectionTask(DETECTOR, canvases, image_size=32, model_args=PROPOSALS, max_train_samples=8)


@pytest.fixture(scope="module")
def detector(task):
    torch.manual_seed(0)
    return task.load_base_model().eval()


def write_boxes(folder, names=("cat", "person"), convert=lambda box: box):
    """A data set of eight images in the format of detection-datasets/coco; the last has no objects."""
    generator = np.random.default_rng(0)
    rows = {"image": [], "objects": []}
    for i in range(8):
        rows["image"].append(Image.fromarray(generator.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)))
        boxes = [] if i == 7 else [[15.0, 16.0, 19.0, 18.0], [5.0, 5.0, 5.0, 9.0]]  # the second has no area
        rows["objects"].append({"bbox": [convert(box) for box in boxes], "category": [1, 0][: len(boxes)]})
    features = datasets.Features(
        image=datasets.Image(),
        objects={
            "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
            "category": datasets.List(datasets.ClassLabel(names=list(names))),
        },
    )
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(folder / "train.parquet")
    data.to_parquet(folder / "val.parquet")
    return str(folder)


@pytest.mark.parametrize("model", [DETECTOR, "fcos_resnet50_fpn"])
def test_losses_in_both_modes(model, canvases):
    torch.manual_seed(0)
    task = ObjectDetectionTask(model, canvases, image_size=32, max_train_samples=2)
    detector = task.load_base_model()
    names = [name for name, _ in detector.named_parameters()]
    assert names == [name for name, _ in get_model_builder(model)(weights_backbone=None).named_parameters()]
    batch = task.collate(task.load_split("train").__getitems__([0, 1]))
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    detector.eval()
    random_state = torch.random.get_rng_state()
    loss = task.loss(detector, batch)
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert torch.equal(task.loss(detector, batch), loss)  # whatever is drawn
    assert not any(module.training for module in detector.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())
    tensors = {name: 1.5 * tensor.detach() for name, tensor in list(detector.named_parameters())[-2:]}
    other = task.loss(lambda *args: functional_call(detector, tensors, args), batch)
    assert not torch.isclose(other, loss)
    loss.backward()
    assert list(detector.parameters())[-1].grad.abs().sum() > 0
    detector.train()
    assert torch.isfinite(task.loss(detector, batch))
    statistics = [name for name in before if name.endswith("running_mean")]
    assert statistics and not any(torch.equal(detector.state_dict()[name], before[name]) for name in statistics)
    assert detector.training and all(module.training for module in detector.modules())


class CountConvolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_many_detectors_share_what_is_frozen(task, detector):
    layout = select_layout(detector, ["roi_heads.box_predictor*"])
    original = layout.flatten(detector.state_dict())
    parameters = torch.stack([original, 1.3 * original, original - 0.02])
    models = NetworkRunner(detector, layout)
    images = task.load_split("test").__getitems__([0, 1, 2])

    def forward(call):
        return task.predict(call, images)

    list(models(forward, parameters[:1]))  # finds out what the network allows
    with CountConvolutions() as one_pass, torch.no_grad():
        forward(detector)
    with CountConvolutions() as three_networks:
        outputs = [rows for _, rows in models(forward, parameters)]
    assert 0 < three_networks.count <= one_pass.count  # fewer where a cropped one is a product of matrices
    for row, output in zip(parameters, torch.cat(outputs), strict=True):
        tensors = layout.unflatten(row)
        with torch.no_grad():
            alone = task.predict(lambda *args, t=tensors: functional_call(detector, t, args), images)
        assert alone.shape == (3, 100, 6) and torch.allclose(output, alone, atol=1e-5)
    assert not torch.allclose(torch.cat(outputs)[0], torch.cat(outputs)[1])


class Oracle(nn.Module):
    """Knows the objects of every image of a split, but moves their boxes to the right, and adds worse detections."""

    def __init__(self, examples):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))
        self.examples = examples

    def forward(self, images):
        known = self.examples.__getitems__(range(len(self.examples)))
        detections = []
        for image in images:
            target = next(t for i, t in zip(known["images"], known["targets"], strict=True) if torch.equal(i, image))
            boxes = target["boxes"] + self.shift * torch.tensor([1.0, 0, 1, 0])
            wrong = boxes + torch.tensor([0, 20.0, 0, 20])
            scores = torch.linspace(0.9, 0.8, len(boxes))
            detections.append(
                {
                    "boxes": torch.cat([boxes, wrong]),
                    "scores": torch.cat([scores, scores / 2]),
                    "labels": target["labels"].repeat(2),
                }
            )
        return detections


def test_average_precision(task):
    oracle = Oracle(task.load_split("test"))
    models = NetworkRunner(oracle, select_layout(oracle, ["shift"]))
    shifts = torch.tensor([[0.0], [1.0], [40.0]])
    ap = task.measure(models, "test", shifts)
    assert ap.dtype == torch.float64 and ap.shape == (3,)
    assert ap[0] == pytest.approx(100) and 0 < ap[1] < 100 and ap[2] == 0
    assert torch.equal(torch.cat([task.measure(models, "test", row[None]) for row in shifts]), ap)


def test_a_data_set_of_boxes(tmp_path):
    task = ObjectDetectionTask(DETECTOR, write_boxes(tmp_path), max_train_samples=4)
    assert task.class_names == ["cat", "person"]
    assert [len(task.load_split(name)) for name in ("train", "validation", "test")] == [4, 2, 8]
    batch = task.load_split("test").__getitems__([1, 7])
    assert [tuple(image.shape) for image in batch["images"]] == [(3, 21, 30), (3, 27, 30)]
    assert [target["boxes"].tolist() for target in batch["targets"]] == [[[15, 16, 19, 18]], []]
    assert batch["targets"][0]["labels"].tolist() == [2]  # the background is class 0
    assert task.fingerprint("test") == task.fingerprint("test") != task.fingerprint("train")
    torch.manual_seed(0)
    detector = task.load_base_model()
    assert torch.isfinite(task.loss(detector, batch)) and task.predict(detector.eval(), batch).shape == (2, 100, 6)


def test_pretrained_weights(tmp_path, monkeypatch):
    """The file that torchvision would download lies in its cache."""
    torch.manual_seed(0)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    name = "ssdlite320_mobilenet_v3_large"
    weights = get_model_weights(name).COCO_V1
    cached = put_weights(tmp_path / "torch", f"{name}:COCO_V1")
    pretrained = torch.load(cached)
    (tmp_path / "own").mkdir()
    task = ObjectDetectionTask(f"{name}:COCO_V1", write_boxes(tmp_path / "own"))
    labels = [int(target["labels"][0]) for target in task.load_split("test").__getitems__([0, 1])["targets"]]
    assert [weights.meta["categories"][label] for label in labels] == ["person", "person"]
    detector = task.load_base_model()
    assert all(torch.equal(tensor, pretrained[key]) for key, tensor in detector.state_dict().items())
    (tmp_path / "others").mkdir()
    task = ObjectDetectionTask(f"{name}:COCO_V1", write_boxes(tmp_path / "others", names=("cat", "unicorn")))
    state_dict = task.load_base_model().state_dict()
    fresh = [key for key, tensor in pretrained.items() if not torch.equal(state_dict[key], tensor)]
    assert fresh and all("classification_head" in key for key in fresh)
    torch.save({key: tensor for key, tensor in pretrained.items() if "backbone" not in key}, cached)
    with pytest.raises(ValueError, match="do not fit ssdlite320_mobilenet_v3_large.*tensors are missing"):
        task.load_base_model()


@pytest.mark.parametrize(
    ("model", "model_args", "message"),
    [
        ("fasterrcnn_resnet50", {}, "'fasterrcnn_resnet50' is not one of torchvision's for detection.*_fpn"),
        ("fcn_resnet50", {}, "'fcn_resnet50' is not one of torchvision's for detection"),
        ("fcos_resnet50_fpn:COCO", {}, "no weights 'COCO' of fcos_resnet50_fpn; it has COCO_V1"),
        ("fcos_resnet50_fpn", {"depth": 3}, "does not take the model_args depth; it takes.*min_size"),
        (DETECTOR, {"weights_backbone": "NONE"}, "cannot be built with the model_args .*weights_backbone"),
    ],
)
def test_wrong_models(model, model_args, message, canvases):
    with pytest.raises(ValueError, match=message):
        ObjectDetectionTask(model, canvases, image_size=32, model_args=model_args)


def test_wrong_data_sets(tmp_path):
    with pytest.raises(ValueError, match="'nowhere' is neither .*a local data set folder nor a Hub id"):
        ObjectDetectionTask(DETECTOR, "nowhere")
    sizes = write_boxes(tmp_path, convert=lambda box: [*box[:2], box[2] - box[0], box[3] - box[1]])
    message = "split train, column objects, row 0: it has the box .*15.*left, top, width and height, convert"
    with pytest.raises(ValueError, match=message):
        ObjectDetectionTask(DETECTOR, sizes)
    with pytest.raises(ValueError, match="too small to hold out 20% of its 1 training examples"):
        ObjectDetectionTask(DETECTOR, sizes, skip_bad_examples=True)  # one of eight images has no boxes
    images = datasets.Dataset.from_dict({"image": [Image.new("L", (8, 8))] * 4, "label": [0, 1] * 2})
    images.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="the files of dataset .* cannot be read: .* column names don't match"):
        ObjectDetectionTask(DETECTOR, str(tmp_path))
    (tmp_path / "val.parquet").unlink()
    with pytest.raises(ValueError, match="needs a column objects with the lists bbox and category"):
        ObjectDetectionTask(DETECTOR, str(tmp_path))


def test_augmentation_moves_boxes_with_their_objects(task, canvases):
    """Every pixel of an object is brighter than the canvas, so a box tells where it is."""
    torch.manual_seed(0)
    changed = ObjectDetectionTask(DETECTOR, canvases, image_size=32, augmentation="flip")
    batch = task.load_split("train").__getitems__(range(8))
    flipped = changed.augment(batch)
    mirrored = 0
    for before, after, old, new in zip(
        batch["images"], flipped["images"], batch["targets"], flipped["targets"], strict=True
    ):
        assert torch.equal(old["labels"], new["labels"]) and type(new["boxes"]) is torch.Tensor
        if torch.equal(after, before.flip(-1)):
            mirrored += 1
            assert torch.equal(
                new["boxes"],
                32 - old["boxes"][:, [2, 1, 0, 3]] * torch.tensor([1, -1, 1, -1]) + torch.tensor([0, -32, 0, -32]),
            )
        else:
            assert torch.equal(after, before) and torch.equal(new["boxes"], old["boxes"])
    assert 0 < mirrored < 8
    cropped = ObjectDetectionTask(DETECTOR, canvases, image_size=32, augmentation="crop_flip").augment(batch)
    for image, target in zip(cropped["images"], cropped["targets"], strict=True):
        assert image.shape == (3, 32, 32) and len(target["boxes"]) == len(target["labels"])
        assert (target["boxes"] >= 0).all() and (target["boxes"] <= 32).all()


def test_the_whole_job(tmp_path, canvases):
    run, parameters = whole_job(
        tmp_path / "out",
        task="object_detection",
        model=DETECTOR,
        dataset=canvases,
        model_args=json.dumps(PROPOSALS),
        max_train_samples=8,
        base_batch_size=4,
        select=["roi_heads.box_predictor.cls_score*"],
        collect_batch_size=4,  # examples come up several times, but their proposals follow from no fixed number
        collect_learning_rate=1e-3,
    )
    ap = run.task.measure(NetworkRunner(run.base_model, run.layout), "validation", parameters)
    assert ap.shape == (8,) and ((ap >= 0) & (ap <= 100)).all()
