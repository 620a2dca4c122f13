"""The semantic-segmentation task: masks, losses in both modes, mIoU, and the whole job on it."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import whole_job
from support.torch_home import put_weights
from torch import nn
from torch.func import functional_call

from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.selection import select_layout
from pdiff_hf.tasks import SemanticSegmentationTask
from pdiff_hf.tasks.semantic_segmentation import mean_iou, read_mask, voc_colours

SMALL = "lraspp_mobilenet_v3_large"


@pytest.fixture(scope="module")
def task(canvases):
    return SemanticSegmentationTask(SMALL, canvases, image_size=32, max_train_samples=8)


@pytest.fixture(scope="module")
def network(task):
    torch.manual_seed(0)
    network = task.load_base_model()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network(task.load_split("train").__getitems__(range(8))["pixel_values"])  # with no statistics its features are 0
    return network.eval()


def write_masks(folder, mask=lambda ids: Image.fromarray(ids), classes=3):
    """Eight images of 20 x 10 pixels, with a mask whose left half is class 0 and whose last row does not count."""
    rows = {"image": [], "annotation": []}
    for i in range(8):
        rows["image"].append(Image.fromarray(np.full((10, 20, 3), 30 * i, dtype=np.uint8)))
        ids = np.full((10, 20), i % classes, dtype=np.uint8)
        ids[:, :10], ids[-1] = 0, 255
        rows["annotation"].append(mask(ids))
    features = datasets.Features(image=datasets.Image(), annotation=datasets.Image())
    data = datasets.Dataset.from_dict(rows, features=features)
    folder.mkdir()
    data.to_parquet(folder / "train.parquet")
    data.to_parquet(folder / "val.parquet")
    return str(folder)


@pytest.mark.parametrize("model", [SMALL, "fcn_resnet50"])
def test_losses_in_both_modes(model, canvases):
    torch.manual_seed(0)
    args = {"aux_loss": True} if model == "fcn_resnet50" else {}
    task = SemanticSegmentationTask(model, canvases, image_size=32, max_train_samples=2, model_args=args)
    network = task.load_base_model()
    batch = task.collate(task.load_split("train").__getitems__([0, 1]))
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["masks"].shape == (2, 32, 32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.eval()
    loss = task.loss(network, batch)
    assert torch.equal(task.loss(network, batch), loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    tensors = {name: 1.5 * tensor.detach() for name, tensor in network.named_parameters()}
    assert not torch.isclose(task.loss(lambda *args: functional_call(network, tensors, args), batch), loss)
    ignored = {**batch, "masks": batch["masks"].clone()}
    ignored["masks"][1] = 255
    first = {name: tensor[:1] for name, tensor in batch.items()}
    assert torch.allclose(task.loss(network, ignored), task.loss(network, first), rtol=1e-4)
    network.train()
    task.loss(network, batch).backward()
    statistics = [name for name in before if name.endswith("running_mean")]
    assert not any(torch.equal(network.state_dict()[name], before[name]) for name in statistics)
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_many_networks_are_measured_as_each_alone(task, network):
    layout = select_layout(network, ["classifier.*_classifier*"])
    original = layout.flatten(network.state_dict())
    parameters = original + 2 * torch.randn(3, len(original), generator=torch.Generator().manual_seed(0))
    miou = task.measure(NetworkRunner(network, layout), "validation", parameters)
    assert miou.dtype == torch.float64 and miou.shape == (3,) and len(miou.unique()) == 3
    batch = task.load_split("validation").__getitems__(range(6))
    for row, expected in zip(parameters, miou, strict=True):
        tensors = layout.unflatten(row)
        with torch.no_grad():
            predicted = functional_call(network, tensors, (batch["pixel_values"],))["out"].argmax(1)
        ious = []
        for c in batch["masks"].unique():
            both = ((predicted == c) & (batch["masks"] == c)).sum()
            ious.append(both / ((predicted == c) | (batch["masks"] == c)).sum())
        assert torch.stack(ious).mean() * 100 == pytest.approx(expected.item(), rel=1e-4)


class Oracle(nn.Module):
    """Knows the mask of every image of a split; the more of its offset, the more pixels it calls background."""

    def __init__(self, examples, num_classes):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1))
        self.known = examples.__getitems__(range(len(examples)))
        self.num_classes = num_classes

    def forward(self, pixel_values):
        masks = []
        for image in pixel_values:
            pairs = zip(self.known["pixel_values"], self.known["masks"], strict=True)
            masks.append(next(mask for other, mask in pairs if torch.equal(other, image)))
        logits = nn.functional.one_hot(torch.stack(masks), self.num_classes).movedim(-1, 1).float()
        background = torch.zeros(self.num_classes)
        background[0] = 1
        return {"out": logits + self.offset * background[:, None, None]}


def test_mean_iou(task):
    oracle = Oracle(task.load_split("test"), 11)
    models = NetworkRunner(oracle, select_layout(oracle, ["offset"]))
    miou = task.measure(models, "test", torch.tensor([[0.0], [2.0]]))
    assert miou[0] == 100
    masks = task.load_split("test").masks
    assert miou[1] == pytest.approx(100 * (masks == 0).double().mean().item() / len(masks.unique()))
    # Class 0: 3 of 5 pixels; class 1: 1 of 4; class 2 has no pixels.
    assert mean_iou(torch.tensor([[[3, 1, 0], [1, 1, 1], [0, 0, 0]]])).item() == pytest.approx((3 / 5 + 1 / 4) / 2)


def test_a_data_set_of_masks(tmp_path):
    task = SemanticSegmentationTask(SMALL, write_masks(tmp_path / "ids"), image_size=16)
    assert [len(task.load_split(name)) for name in ("train", "validation", "test")] == [6, 2, 8]
    batch = task.load_split("test").__getitems__([2])
    mask = batch["masks"][0]  # 20 x 10 pixels became 16 x 8, and the rest of the square does not count
    assert set(mask[:7, :8].unique().tolist()) == {0} and set(mask[:7, 8:].unique().tolist()) == {2}
    assert set(mask[8:].unique().tolist()) == {255}
    assert batch["pixel_values"][0, :, 8:].abs().max() < 0.02  # the mean
    assert task.load_base_model().eval()(batch["pixel_values"])["out"].shape == (1, 3, 16, 16)
    colours = {ids: colour for colour, ids in voc_colours().items()}
    assert colours[1] == (128, 0, 0) and colours[15] == (192, 128, 128) and colours[255] == (224, 224, 192)

    def paint(ids):
        return Image.fromarray(np.array([colours[i] for i in ids.ravel()], dtype=np.uint8).reshape(10, 20, 3))

    painted = SemanticSegmentationTask(SMALL, write_masks(tmp_path / "colours", paint), image_size=16)
    assert torch.equal(painted.load_split("train").masks, task.load_split("train").masks)
    assert task.fingerprint("test") == task.fingerprint("test") != task.fingerprint("train")


def test_pretrained_weights(tmp_path, monkeypatch):
    """The file that torchvision would download lies in its cache."""
    torch.manual_seed(0)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    model = f"{SMALL}:COCO_WITH_VOC_LABELS_V1"
    pretrained = torch.load(put_weights(tmp_path / "torch", model))
    network = SemanticSegmentationTask(model, write_masks(tmp_path / "masks"), image_size=16).load_base_model()
    assert all(torch.equal(tensor, pretrained[key]) for key, tensor in network.state_dict().items())
    task = SemanticSegmentationTask(
        model,
        write_masks(tmp_path / "more", lambda ids: Image.fromarray(np.where(ids < 255, 15 * ids, ids))),
        image_size=16,
    )
    network = task.load_base_model()
    assert "classifier" in task.new_head and "31 classes" in task.new_head
    other = [key for key, tensor in network.state_dict().items() if not torch.equal(tensor, pretrained[key])]
    assert other and all("classifier" in key for key in other)


def test_masks_of_16_bits_are_not_scaled(tmp_path):
    folder = write_masks(tmp_path / "deep", lambda ids: Image.fromarray(ids.astype(np.uint16)))
    masks = SemanticSegmentationTask(SMALL, folder, image_size=16).load_split("test").masks
    assert torch.equal(
        masks, SemanticSegmentationTask(SMALL, write_masks(tmp_path / "ids"), image_size=16).load_split("test").masks
    )


def test_augmentation_moves_masks_with_their_images(task, canvases):
    torch.manual_seed(0)
    batch = task.load_split("train").__getitems__(range(8))
    for augmentation in ("flip", "crop_flip"):
        changed = SemanticSegmentationTask(SMALL, canvases, image_size=32, augmentation=augmentation).augment(batch)
        assert changed["masks"].shape == (8, 32, 32) and changed["masks"].dtype == torch.int64
        assert not torch.equal(changed["masks"], batch["masks"])
        # Objects are brighter than the canvas, wherever they have gone.
        inside = changed["masks"] > 0
        brightness = changed["pixel_values"].mean(1)
        assert brightness[inside].mean() > brightness[~inside].mean() + 0.5


def test_wrong_data_sets(tmp_path, canvases):
    with pytest.raises(ValueError, match="'fasterrcnn_resnet50_fpn' is not one of torchvision's for segmentation"):
        SemanticSegmentationTask("fasterrcnn_resnet50_fpn", canvases, image_size=32)
    with pytest.raises(ValueError, match="does not take the model_args depth; it takes aux_loss, weights_backbone"):
        SemanticSegmentationTask("fcn_resnet50", canvases, image_size=32, model_args={"depth": 1})
    with pytest.raises(ValueError, match=r"split train, column mask, row 0: .* not \(1, 2, 3\)"):
        paint = np.array([1, 2, 3], dtype=np.uint8)
        folder = write_masks(tmp_path / "paint", lambda ids: Image.fromarray(np.tile(paint, (10, 20, 1))))
        SemanticSegmentationTask(SMALL, folder, image_size=16)
    with pytest.raises(ValueError, match="class ids lie between 0 and 255, got 1000"):
        read_mask(Image.fromarray(np.full((4, 4), 1000, dtype=np.int32)))
    with pytest.raises(ValueError, match="no pixel of the split train .* has a class"):
        folder = write_masks(tmp_path / "none", lambda ids: Image.fromarray(np.full((10, 20), 255, dtype=np.uint8)))
        SemanticSegmentationTask(SMALL, folder, image_size=16)
    images = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 8, "label": [0, 1] * 4})
    (tmp_path / "labels").mkdir()
    images.to_parquet(tmp_path / "labels" / "train.parquet")
    with pytest.raises(ValueError, match="needs a column image and one other column of images, the masks"):
        SemanticSegmentationTask(SMALL, str(tmp_path / "labels"), image_size=16)


def test_the_whole_job(tmp_path, canvases):
    run, parameters = whole_job(
        tmp_path / "out",
        task="semantic_segmentation",
        model=SMALL,
        dataset=canvases,
        max_train_samples=16,
        base_batch_size=8,
        collect_batch_size=8,  # examples come up several times: what is frozen is computed once
        collect_learning_rate=1e-2,
    )
    miou = run.task.measure(NetworkRunner(run.base_model, run.layout), "validation", parameters)
    assert miou.shape == (8,) and ((miou >= 0) & (miou <= 100)).all()
