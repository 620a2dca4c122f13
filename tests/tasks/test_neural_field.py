"""Images as neural fields, and a task of one's own whose networks are data."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from support.waves import Waves

from pdiff_hf import NeuralField, NeuralFieldTask
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.selection import select_layout
from pdiff_hf.tasks import make_task


@pytest.fixture(scope="module")
def task():
    return NeuralFieldTask(max_train_samples=40, max_eval_samples=20)


def test_the_digits_are_one_split_of_which_a_fifth_is_held_out():
    task = NeuralFieldTask()
    assert task.signals("train").shape == (1437, 64, 1) and task.signals("test").shape == (360, 64, 1)
    assert task.fingerprint("test") == task.fingerprint("validation") != task.fingerprint("train")


def test_signals_are_pixels_at_the_centres_that_coordinates_say(task):
    signals, coordinates = task.signals("train"), task.coordinates()
    assert coordinates[[0, 1, 8, 63]].tolist() == [[-0.875, -0.875], [-0.875, -0.625], [-0.625, -0.875], [0.875, 0.875]]
    assert signals.min() == -1 and signals.max() == 1
    images = task.images(signals)
    assert images.shape == (40, 1, 8, 8)
    assert torch.equal(images[3, 0, 1, 2], task.data(signals)[3, 10, 0])
    assert task.coordinates(16).shape == (256, 2)  # any resolution of the same square
    assert task.coordinates(16).view(16, 16, 2)[:2, :2].mean((0, 1)).tolist() == pytest.approx([-0.875, -0.875])


def test_the_class_or_any_column_is_the_condition(task, tmp_path):
    assert task.fields.to_dict() == {"label": {"type": "category", "values": tuple(map(str, range(10)))}}
    assert len(task.conditions("train")) == 40 and set(task.conditions("train")[0]) == {"label"}
    pixels = np.random.default_rng(0).integers(0, 255, (12, 4, 6, 3), dtype=np.uint8)
    columns = {"image": list(pixels), "size": [float(i) for i in range(12)], "kind": ["a", "b"] * 6}
    features = datasets.Features(image=datasets.Image(), size=datasets.Value("float32"), kind=datasets.Value("string"))
    rows = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(train=rows, validation=rows.select(range(4))).save_to_disk(tmp_path / "data")
    own = NeuralFieldTask(dataset=str(tmp_path / "data"), condition_columns=["size", "kind"], image_size=5)
    assert own.fields["size"].bounds == (0.0, 11.0) and own.fields["kind"].choices == ("a", "b")
    assert own.signals("train").shape == (12, 25, 3) and own.signals("test").shape == (4, 25, 3)
    assert own.conditions("test")[3] == {"size": 3.0, "kind": "b"}
    assert not NeuralFieldTask(dataset=str(tmp_path / "data"), condition_columns=[]).fields
    with pytest.raises(ValueError, match="has no column colour; its columns are image, size, kind"):
        NeuralFieldTask(dataset=str(tmp_path / "data"), condition_columns=["colour"])


def test_images_in_no_folders_of_classes_have_no_condition(tmp_path):
    for split, count in (("train", 6), ("test", 3)):
        (tmp_path / split).mkdir()
        for i in range(count):
            Image.fromarray(np.full((4, 4, 3), 20 * i, dtype=np.uint8)).save(tmp_path / split / f"{i}.png")
    task = NeuralFieldTask(dataset=str(tmp_path))
    assert not task.fields and task.conditions("test") == [{}] * 3


def test_one_image_in_colour_makes_fields_of_colours(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(4):
            pixels = np.full((4, 4) if i == 0 else (4, 4, 3), 20 * i, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{i}.png")
    assert NeuralFieldTask(dataset=str(tmp_path)).signals("train").shape == (4, 16, 3)


def test_the_loss_of_the_start_is_least_for_the_mean_of_the_data(task):
    batch = task.collate(task.load_split("train").__getitems__([0, 1, 2]))
    values = batch["signals"].mean(0).requires_grad_()
    loss = task.loss(lambda coordinates: values, batch)
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient.abs().max() < 1e-6 and loss > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet18"}, "model must be one of siren, fourier for the task neural_field, got 'resnet18'"),
        ({"start": "last"}, "start must be one of mean, first, meta"),
        ({"model_args": {"depth": 3}}, "model_args: .*depth"),
        ({"augmentation": "flip"}, "augmentation has no effect"),
    ],
)
def test_what_a_task_of_fields_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        NeuralFieldTask(**settings)


def test_by_name_it_takes_the_settings_of_a_run():
    task = make_task("neural_field", {"model": "fourier", "max_train_samples": 30, "condition_columns": []})
    assert isinstance(task, NeuralFieldTask) and task.load_base_model().config.kind == "fourier"


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 697),
        ({"width": 32, "in_features": 2}, 1185),
        ({"kind": "fourier", "in_features": 3, "width": 128, "num_layers": 3}, 36_737),  # of HyperDiffusion
    ],
)
def test_sizes_of_fields(settings, count, tmp_path):
    field = NeuralField(**settings)
    assert sum(parameter.numel() for parameter in field.parameters()) == count
    points = torch.rand(7, field.config.in_features)
    assert field(points).shape == (7, 1)
    field.save_pretrained(tmp_path)
    torch.testing.assert_close(NeuralField.from_pretrained(tmp_path)(points), field(points))


def test_networks_render_at_any_resolution():
    task = Waves()
    networks = NetworkRunner(task.load_base_model(), select_layout(task.load_base_model(), ["all"]))
    parameters = networks.base_parameters().repeat(3, 1)
    assert task.render_all(networks, parameters).shape == (3, 16, 1)
    assert task.render_all(networks, parameters, task.coordinates(40)).shape == (3, 40, 1)
    assert task.images(task.signals("test")) is None
