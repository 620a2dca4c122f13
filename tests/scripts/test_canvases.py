"""Canvases follow from their images, share none, and are data sets for detection and segmentation."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from reproduce.canvases import MAX_OVERLAP, _overlap, main, write_canvases
from support.data import write_parquet
from torchvision.transforms.functional import pil_to_tensor

from pdiff_hf.tasks.image_classification import ImageClassificationTask
from pdiff_hf.tasks.object_detection import ObjectDetectionTask
from pdiff_hf.tasks.semantic_segmentation import SemanticSegmentationTask


def test_canvases(tmp_path, monkeypatch):
    options = {"size": 40, "max_train_samples": 10, "max_eval_samples": 8}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr("sys.argv", ["canvases.py", "digits", str(tmp_path / "a"), *arguments])
    main()
    write_canvases("digits", tmp_path / "b", **options)
    data, again = (datasets.load_dataset(str(tmp_path / name)) for name in ("a", "b"))
    assert {name: len(rows) for name, rows in data.items()} == {"train": 10, "validation": 8, "test": 8}
    seen = set()
    for name, rows in data.items():
        for row, other in zip(rows, again[name], strict=True):
            image, mask = pil_to_tensor(row["image"]), pil_to_tensor(row["mask"])[0]
            assert torch.equal(image, pil_to_tensor(other["image"])) and row["objects"] == other["objects"]
            assert torch.equal(mask, pil_to_tensor(other["mask"])[0])
            assert image.shape == (3, 40, 40) and image.numpy().tobytes() not in seen
            seen.add(image.numpy().tobytes())
            boxes, classes = torch.tensor(row["objects"]["bbox"]), [c + 1 for c in row["objects"]["category"]]
            assert boxes.shape == (len(classes), 4) and (boxes >= 0).all() and (boxes <= 40).all()
            assert 1 <= len(classes) <= 3 and set(mask.unique().tolist()) == {0, *classes}
            pairs = [(a, b) for i, a in enumerate(boxes.tolist()) for b in boxes.tolist()[:i]]
            assert all(_overlap(a, b) <= MAX_OVERLAP for a, b in pairs)
            inside = torch.zeros_like(mask, dtype=torch.bool)
            for left, top, right, bottom in boxes.int().tolist():
                inside[top:bottom, left:right] = True
            assert not mask[~inside].any() and image.amax(0)[mask > 0].min() >= 32
            ys, xs = (mask == classes[-1]).nonzero().T  # nothing lies on the last one
            if classes.count(classes[-1]) == 1:
                assert boxes[-1].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    detection = ObjectDetectionTask("fcos_resnet50_fpn", str(tmp_path / "a"), image_size=40)
    segmentation = SemanticSegmentationTask("lraspp_mobilenet_v3_large", str(tmp_path / "a"), image_size=40)
    assert detection.class_names == [str(digit) for digit in range(10)]
    pixels = detection.load_split("test").__getitems__([3])["images"][0]
    assert torch.equal((255 * pixels).round().byte(), pil_to_tensor(data["test"][3]["image"]))
    assert torch.equal(segmentation.load_split("test").masks[3], pil_to_tensor(data["test"][3]["mask"])[0])


def test_no_image_serves_two_canvases(tmp_path, monkeypatch):
    served = []
    examples = ImageClassificationTask.raw_examples

    def record(self, split):
        images, labels = examples(self, split)
        get = images.read
        images.read = lambda indices: served.extend((split, i) for i in indices) or get(indices)
        return images, labels

    monkeypatch.setattr(ImageClassificationTask, "raw_examples", record)
    write_canvases("digits", tmp_path / "data", size=24, max_train_samples=20, max_eval_samples=5)
    assert len(served) == len(set(served)) > 30


def test_what_cannot_become_canvases_is_refused(tmp_path):
    def write(name, values, classes):
        columns = {"image": [Image.fromarray(np.full((8, 8), v, dtype=np.uint8)) for v in values]}
        columns["label"] = [i % 2 for i in range(len(values))]
        write_parquet(tmp_path / name / "train.parquet", columns, {"label": datasets.ClassLabel(num_classes=classes)})
        return str(tmp_path / name)

    for source, message in {
        write("many", range(20, 40), 255): "has 255 classes; canvases can have 254",
        write("black", [i % 3 for i in range(60)], 2): "of the train images cannot be placed on a canvas: none of its",
        write("few", [200] * 20, 2): "the (validation|test) split of dataset .* has 2 images; a canvas needs 3",
        "nowhere": "'nowhere' is neither 'digits', a local data set folder nor a Hub id",
    }.items():
        with pytest.raises(ValueError, match=message):
            write_canvases(source, tmp_path / "out")
    with pytest.raises(ValueError, match="at least 8 pixels, got 4"):
        write_canvases("digits", tmp_path / "out", size=4)
    assert not (tmp_path / "out").exists()
