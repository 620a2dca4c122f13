"""Object detection with torchvision's detectors on any data set of images and boxes (paper, Table 10)."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.models import detection
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from ..networks.runner import NetworkRunner
from ..networks.torchvision import Architecture
from ..utils.devices import seed_global
from ..utils.imports import require_modules
from .dataset import BadRows
from .images import ImageTask, load_image_data
from .registry import register_task
from .task import Batch, MeasuredTask, Split, Tensors, batches

# COCO's metric looks at no more detections than this in an image.
MAX_DETECTIONS = 100
MEASURE_BATCH_SIZE = 32


@register_task("object_detection")
@dataclass
class ObjectDetectionTask(ImageTask, MeasuredTask):
    """
    Networks are judged by COCO's AP in percent: the mean of the average precision over the classes and over the IoU
    thresholds 0.50, 0.55, ..., 0.95.

    Args beyond those of [`ImageTask`]:
        model (`str`, *optional*, defaults to `"fasterrcnn_resnet50_fpn"`): A builder of
            `torchvision.models.detection`, with fresh weights; `builder:WEIGHTS` for pretrained ones, such as
            `fasterrcnn_resnet50_fpn:COCO_V1`. Where every class of the data has a name that is one of the weights' own,
            the network keeps all its classes and its last layers; else the layers whose shape follows from the number
            of classes are fresh.
        dataset (`str`): A local folder or the Hub id of a data set with a column of images and a column `objects`,
            which has for each image the lists `bbox`, of left, top, right and bottom in pixels, and `category`, of
            class labels: the format of `detection-datasets/coco`.
        image_size (`int`, *optional*): Side of the square that the network scales images to fit into (SSD has a fixed
            one); the network's own by default.
        model_args (`dict`, *optional*): More arguments of the builder, such as `rpn_post_nms_top_n_test`.

    Raises:
        ImportError: when created, if the packages of the extra `detection` are not installed.
        ValueError: when created, for an unknown model or data set, or one that does not fit object detection.
    """

    model: str = "fasterrcnn_resnet50_fpn"
    dataset: str = "detection-datasets/coco"

    metric, unit = "AP", "%"

    def __post_init__(self) -> None:
        require_modules("object detection", "detection", "torchmetrics", "pycocotools")
        self._check_sizes()
        self._architecture = Architecture.find(self.model, detection, self.model_args)
        if self.image_size is not None and "min_size" in self._architecture.known_args:
            sizes = {"min_size": self.image_size, "max_size": self.image_size}
            self._architecture = Architecture.find(self.model, detection, sizes | self.model_args)
        raw = load_image_data(self.dataset, self.image_column)
        self.class_names = self._find_classes(raw["train"].features)
        columns = {self._choose_image(raw["train"].features): "image", "objects": "objects"}
        self._set_splits(self._take(raw, columns, self._bad_images, bad_objects))
        categories = [None if name is None else name.casefold() for name in self._architecture.categories]
        names = [name.casefold() for name in self.class_names]
        outputs = categories if set(names) <= set(categories) else [None, *names]  # the background is class 0
        if outputs is not categories and len(outputs) == len(categories):
            raise ValueError(
                f"the {len(names)} classes of dataset '{self.dataset}' ({', '.join(names[:12])}, ...) are not those of "
                f"model '{self.model}' ({', '.join(self._architecture.categories[1:13])}, ...), of which there are as "
                "many; take the builder without weights"
            )
        self._num_classes = len(outputs)
        self._labels = torch.tensor([outputs.index(name) for name in names])  # outputs of the data's classes

    def _find_classes(self, features: datasets.Features) -> list[str]:
        objects = features.get("objects")
        parts = objects if isinstance(objects, dict) else {}
        category = getattr(parts.get("category"), "feature", None)
        if "bbox" not in parts or not isinstance(category, datasets.ClassLabel):
            raise ValueError(
                f"dataset '{self.dataset}' does not fit object detection: it needs a column objects with the lists "
                f"bbox and category, of class labels; its columns are {', '.join(features)}"
            )
        return category.names

    def load_base_model(self) -> "Detector":
        """The network. Fresh weights depend on torch's global seed."""
        network, self.new_head = self._architecture.load(self._num_classes)
        return Detector(network)

    def _prepare(self, split: Split) -> "DetectionSplit":
        """Images with their objects."""
        boxes, labels = [], []
        for row in self._raw[split]["objects"]:
            corners = torch.tensor(row["bbox"], dtype=torch.float32).reshape(-1, 4)
            seen = (corners[:, 2:] > corners[:, :2]).all(1)  # COCO has boxes without any area
            boxes.append(corners[seen])
            labels.append(self._labels[torch.tensor(row["category"], dtype=torch.int64)[seen]])
        return DetectionSplit(images=self._images(split), boxes=boxes, labels=labels)

    def fingerprint(self, split: Split) -> str:
        """Follows the examples of the split, the size, and all boxes and classes."""
        examples = self.load_split(split)
        return self._digest(split, ["image"], [*examples.boxes, *examples.labels], str(self.image_size))

    def _augment(self, batch: Batch) -> Batch:
        """Boxes follow their images; those that are cut off go."""
        images, targets = [], []
        for image, target in zip(batch["images"], batch["targets"], strict=True):
            size = image.shape[-2:]
            boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=tuple(size))
            transform = v2.Compose([self._random_transform(size), v2.SanitizeBoundingBoxes(min_size=1)])
            image, target = transform(tv_tensors.Image(image), {"boxes": boxes, "labels": target["labels"]})
            images.append(image.as_subclass(torch.Tensor))
            targets.append({"boxes": target["boxes"].as_subclass(torch.Tensor), "labels": target["labels"]})
        return {"images": images, "targets": targets}

    def loss(self, call: Callable, batch: Batch) -> torch.Tensor:
        """The sum of the detector's own losses."""
        return torch.stack(list(call(batch["images"], batch["targets"]).values())).sum()

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        """
        The best detections in each image, shape `(B, 100, 6)`: left, top, right, bottom, score and class. Rows of zeros
        fill up.
        """
        detections = call(batch["images"])
        packed = []
        for found in detections:
            rows = torch.cat([found["boxes"], found["scores"][:, None], found["labels"][:, None]], 1)[:MAX_DETECTIONS]
            packed.append(nn.functional.pad(rows, (0, 0, 0, MAX_DETECTIONS - len(rows))))
        return torch.stack(packed)

    def measure(self, models: NetworkRunner, split: Split, parameters: torch.Tensor) -> torch.Tensor:
        """The AP of N networks on a split; see [`MeasuredTask`]."""
        # It takes seconds to import, which whoever measures nothing should not wait for.
        from torchmetrics.detection import MeanAveragePrecision

        examples = self.load_split(split)
        device = next(models.model.parameters()).device
        # For each network, the detections in each image: what is packed takes much more memory.
        found: list[list[dict[str, torch.Tensor]]] = [[] for _ in parameters]
        for batch in batches(self, split, MEASURE_BATCH_SIZE, device):
            for rows, packed in models(partial(self.predict, batch=batch), parameters.to(device)):
                for network, images in zip(range(rows.start, rows.stop), packed.cpu(), strict=True):
                    seen = (image[image[:, 4] > 0] for image in images)
                    found[network] += [{"boxes": r[:, :4], "scores": r[:, 4], "labels": r[:, 5].long()} for r in seen]
        targets = [
            {"boxes": boxes, "labels": labels} for boxes, labels in zip(examples.boxes, examples.labels, strict=True)
        ]
        results = []
        for detections in found:
            metric = MeanAveragePrecision(max_detection_thresholds=[1, 10, MAX_DETECTIONS])
            metric.update(detections, targets)
            results.append(100 * metric.compute()["map"].double())
        return torch.stack(results)


def bad_objects(rows: datasets.Dataset) -> BadRows:
    """The rows whose objects a detector cannot be trained with."""
    bad: dict[int, tuple[str, str]] = {}
    for i, objects in enumerate(rows["objects"]):
        boxes, categories = (objects or {}).get("bbox"), (objects or {}).get("category")
        if boxes is None or categories is None or len(boxes) != len(categories):
            bad[i] = ("objects", "there is not one box and one category for each object")
            continue
        wrong = [box for box in boxes if len(box) != 4 or None in box or box[2] < box[0] or box[3] < box[1]]
        if wrong:
            bad[i] = (
                "objects",
                f"it has the box {wrong[0]}; boxes are left, top, right and bottom in pixels. If these are left, "
                "top, width and height, convert them",
            )
        elif any(label is None or label < 0 for label in categories):
            bad[i] = ("objects", "the category of an object is empty")
    return bad


class DetectionSplit(Tensors):
    """
    Images with the boxes and classes of their objects.

    Args:
        images (`ImageColumn`): Images of PIL.
        boxes (`list[torch.Tensor]`): For each image, left, top, right and bottom in pixels, shape `(n, 4)`.
        labels (`list[torch.Tensor]`): For each image, the network's own classes, shape `(n,)`.

    `__getitems__(indices)` returns a batch: `images`, a list of float32 of shape `(3, H, W)` between 0 and 1, and
    `targets`, a list of `boxes` and `labels`.
    """

    def __getitem__(self, indices: Any) -> Batch:
        return {
            "images": [pil_to_tensor(image.convert("RGB")) / 255 for image in self.images.read(indices)],
            "targets": [{"boxes": self.boxes[i], "labels": self.labels[i]} for i in indices],
        }


class Detector(nn.Module):
    """
    A detector of torchvision that gives losses whenever it is told what there is to detect. torchvision's own do so in
    training mode only, in which batch norm follows the batches; snapshots are taken of networks whose batch norm does
    not. Parameters have the names that torchvision gives them.

    In evaluation mode, the anchors and proposals that a loss is computed from are drawn in the same way each time, so
    that it follows from the batch alone.

    Args:
        network (`nn.Module`): Of `torchvision.models.detection`.
    """

    network: nn.Module

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)
        # Past nn.Module, to which it would be one more module: its parts are registered already.
        self.__dict__["network"] = network

    def forward(
        self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]] | None = None
    ) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """The losses if there are `targets`, or else the detections: `boxes`, `scores` and `labels` of each image."""
        losses, device = targets is not None, images[0].device
        same_draws, devices = losses and not self.training, [device] if device.type != "cpu" else []
        fork = torch.random.fork_rng(devices, enabled=same_draws, device_type=device.type)
        with self._computing_losses(losses), fork:
            if same_draws:
                seed_global(0, device)
            return self.network(images, targets)

    @contextlib.contextmanager
    def _computing_losses(self, losses: bool) -> Iterator[None]:
        """Sets the mode of the parts of which it decides what they return, and of no others."""
        parts = [self.network, *(child for name, child in self.named_children() if name in ("rpn", "roi_heads"))]
        modes = [part.training for part in parts]
        for part in parts:
            part.training = losses
        try:
            yield
        finally:
            for part, mode in zip(parts, modes, strict=True):
                part.training = mode
