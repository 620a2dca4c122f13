"""Object detection with torchvision's detectors on any data set of images and boxes (paper, Table 10)."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import datasets
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import Dataset
from torchvision.models import detection
from torchvision.transforms.functional import pil_to_tensor

from ..networks.batched import BatchedModels
from ..networks.torchvision import Architecture
from .canvases import PREFIX, Canvases, find_sources
from .splits import check_sizes, load_raw, make_splits
from .task import Batch, MeasuredTask, Split, take

# COCO's metric looks at no more detections than this in an image.
MAX_DETECTIONS = 100
MEASURE_BATCH_SIZE = 32


@dataclass
class ObjectDetectionTask(MeasuredTask):
    """
    Networks are judged by COCO's AP in percent: the mean of the average precision over the classes and over the IoU
    thresholds 0.50, 0.55, ..., 0.95.

    Args:
        model (`str`, *optional*, defaults to `"fasterrcnn_resnet50_fpn"`): A builder of
            `torchvision.models.detection`, with fresh weights; `builder:WEIGHTS` for pretrained ones, such as
            `fasterrcnn_resnet50_fpn:COCO_V1`. Where every class of the data has a name that is one of the weights' own,
            the network keeps all its classes and its last layers; else the layers whose shape follows from the number
            of classes are fresh.
        dataset (`str`): A local folder or the Hub id of a data set, `id:config` for one of several configs, with a
            column `image` and a column `objects`, which has for each image the lists `bbox`, of left, top, right and
            bottom in pixels, and `category`, of class labels: the format of `detection-datasets/coco`. Or
            `canvas:ID_OR_FOLDER`: see [`~pdiff_hf.tasks.canvases.Canvases`].
        image_size (`int`, *optional*): Side of the square that the network scales images to fit into (SSD has a fixed
            one); the network's own by default. Side of the canvases too, which need it.
        model_args (`dict`, *optional*): More arguments of the builder, such as `rpn_post_nms_top_n_test`.
        holdout_fraction (`float`, *optional*, defaults to 0.2): Share of the training data that becomes the validation
            split, and the test split, where the data set has none; see [`~pdiff_hf.tasks.splits.make_splits`].
        max_train_samples, max_eval_samples (`int`, *optional*): Use no more than this many images of a split.

    Raises:
        ValueError: when created, for an unknown model or data set, or one that does not fit object detection.
    """

    model: str = "fasterrcnn_resnet50_fpn"
    dataset: str = "detection-datasets/coco"
    image_size: int | None = None
    model_args: dict = field(default_factory=dict)
    holdout_fraction: float = 0.2
    max_train_samples: int | None = None
    max_eval_samples: int | None = None

    metric, unit = "AP", "%"

    def __post_init__(self):
        check_sizes(self, "image_size", "max_train_samples", "max_eval_samples")
        self._architecture = Architecture.find(self.model, detection, self.model_args)
        if self.image_size is not None and "min_size" in self._architecture.known_args:
            sizes = {"min_size": self.image_size, "max_size": self.image_size}
            self._architecture = Architecture.find(self.model, detection, sizes | self.model_args)
        limits = (self.holdout_fraction, self.max_train_samples, self.max_eval_samples)
        if self.dataset.startswith(PREFIX):
            if self.image_size is None:
                raise ValueError(f"dataset '{self.dataset}' needs image_size, the side of its canvases in pixels")
            self._raw = find_sources(self.dataset, *limits)
            self.class_names: list[str] = self._raw["train"].features["label"].names
        else:
            self._raw = make_splits(load_raw(self.dataset, f"{PREFIX}..., "), self.dataset, *limits)
            self.class_names = self._check_columns()
        categories = self._architecture.categories
        is_own = set(self.class_names) <= set(categories)
        names = categories if is_own else [None, *self.class_names]  # the background is class 0
        self._num_classes = len(names)
        self._labels = torch.tensor([names.index(name) for name in self.class_names])  # classes of the data's labels

    def _check_columns(self) -> list[str]:
        """The names of the classes; the objects of every image must be what a detector can be trained with."""
        for name, split in self._raw.items():
            objects = split.features.get("objects")
            parts = objects if isinstance(objects, dict) else {}
            category = getattr(parts.get("category"), "feature", None)
            if (
                not isinstance(split.features.get("image"), datasets.Image)
                or "bbox" not in parts
                or not isinstance(category, datasets.ClassLabel)
            ):
                raise ValueError(
                    f"dataset '{self.dataset}' needs a column image and a column objects with the lists bbox and "
                    f"category, of class labels, for object detection, got {split.features} in the split {name}"
                )
            for i, row in enumerate(split["objects"]):
                wrong = [box for box in row["bbox"] if len(box) != 4 or box[2] < box[0] or box[3] < box[1]]
                if wrong:
                    raise ValueError(
                        f"image {i} of the split {name} of dataset '{self.dataset}' has the box {wrong[0]}; boxes are "
                        "left, top, right and bottom in pixels. If these are left, top, width and height, convert them"
                    )
        return category.names

    def load_base_model(self) -> "Detector":
        """The network. Fresh weights depend on torch's global seed."""
        network = self._architecture.build(self._num_classes)
        if self._architecture.weights is not None:
            self._architecture.load_pretrained(network)
        return Detector(network)

    def load_split(self, split: Split) -> "DetectionSplit":
        """Images with their objects."""
        if split not in self._splits:
            raw = self._raw[split]
            if self.dataset.startswith(PREFIX):
                canvases = Canvases(raw, split, self.image_size)
                images, boxes, labels = canvases.images, canvases.boxes, [labels - 1 for labels in canvases.labels]
            else:
                images, boxes, labels = raw["image"], [], []
                for row in raw["objects"]:
                    corners = torch.tensor(row["bbox"], dtype=torch.float32).reshape(-1, 4)
                    seen = (corners[:, 2:] > corners[:, :2]).all(1)  # COCO has boxes without any area
                    boxes.append(corners[seen])
                    labels.append(torch.tensor(row["category"], dtype=torch.int64)[seen])
            self._splits[split] = DetectionSplit(images, boxes, [self._labels[row] for row in labels])
        return self._splits[split]

    def fingerprint(self, split: Split) -> str:
        """Follows the data set's own fingerprint, the choice of examples, the size, and all boxes and classes."""
        examples = self.load_split(split)
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (*examples.boxes, *examples.labels):
            digest.update(tensor.numpy().tobytes())
        return f"{self._raw[split]._fingerprint} {len(examples)} {self.image_size} {digest.hexdigest()}"

    @cached_property
    def _splits(self) -> dict[str, "DetectionSplit"]:
        return {}

    @staticmethod
    def collate(examples: Batch) -> Batch:
        """`DetectionSplit` returns whole batches."""
        return examples

    @staticmethod
    def loss(call: Callable, batch: Batch) -> torch.Tensor:
        """The sum of the detector's own losses."""
        return torch.stack(list(call(batch["images"], batch["targets"]).values())).sum()

    @staticmethod
    def predict(call: Callable, batch: Batch) -> torch.Tensor:
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

    def measure(self, models: BatchedModels, split: Split, parameters: torch.Tensor) -> torch.Tensor:
        """The AP of N networks on a split; see [`MeasuredTask`]."""
        # It takes seconds to import, which whoever measures nothing should not wait for.
        from torchmetrics.detection import MeanAveragePrecision

        examples = self.load_split(split)
        device = next(models.model.parameters()).device
        parameters = parameters.to(device)
        # For each network, the detections in each image: what is packed takes much more memory.
        found: list[list[dict[str, torch.Tensor]]] = [[] for _ in parameters]
        for start in range(0, len(examples), MEASURE_BATCH_SIZE):
            indices = list(range(start, min(start + MEASURE_BATCH_SIZE, len(examples))))
            batch = send_to_device(self.collate(take(examples, indices)), device)
            for rows, packed in models(lambda call, batch=batch: self.predict(call, batch), parameters):
                for network, images in zip(range(rows.start, rows.stop), packed.cpu(), strict=True):
                    found[network] += [_unpack(image) for image in images]
        targets = [
            {"boxes": boxes, "labels": labels} for boxes, labels in zip(examples.boxes, examples.labels, strict=True)
        ]
        results = []
        for detections in found:
            metric = MeanAveragePrecision(max_detection_thresholds=[1, 10, MAX_DETECTIONS])
            metric.update(detections, targets)
            results.append(100 * metric.compute()["map"].double())
        return torch.stack(results)


def _unpack(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = rows[rows[:, 4] > 0]
    return {"boxes": rows[:, :4], "scores": rows[:, 4], "labels": rows[:, 5].long()}


class DetectionSplit(Dataset):
    """
    Images with the boxes and classes of their objects.

    Args:
        images (`Sequence`): Images of PIL, or one tensor of them, uint8 of shape `(N, 3, H, W)`.
        boxes (`list[torch.Tensor]`): For each image, left, top, right and bottom in pixels, shape `(n, 4)`.
        labels (`list[torch.Tensor]`): For each image, the network's own classes, shape `(n,)`.

    `__getitems__(indices)` returns a batch: `images`, a list of float32 of shape `(3, H, W)` between 0 and 1, and
    `targets`, a list of `boxes` and `labels`.
    """

    def __init__(self, images: Sequence[Any], boxes: list[torch.Tensor], labels: list[torch.Tensor]):
        self.images, self.boxes, self.labels = images, boxes, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images = [self.images[i] for i in indices]
        images = [image if isinstance(image, torch.Tensor) else pil_to_tensor(image.convert("RGB")) for image in images]
        return {
            "images": [image / 255 for image in images],
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

    def __init__(self, network: nn.Module):
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)
        # Past nn.Module, to which it would be one more module: its parts are registered already.
        self.__dict__["network"] = network

    def forward(
        self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]] | None = None
    ) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """The losses if there are `targets`, or else the detections: `boxes`, `scores` and `labels` of each image."""
        with self._computing_losses(targets is not None), self._same_draws(targets is not None, images[0].device):
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

    @contextlib.contextmanager
    def _same_draws(self, losses: bool, device: torch.device) -> Iterator[None]:
        if not losses or self.training:
            yield
            return
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type):
            torch.manual_seed(0)
            yield
