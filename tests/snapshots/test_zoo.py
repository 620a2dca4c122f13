"""A zoo: specialists side by side are those that one by one training gives, and are kept with their conditions."""

import datasets
import pytest
import torch
from accelerate import Accelerator
from support.families import make_family, make_networks

from pdiff_hf import ParameterLayout
from pdiff_hf.models import ConditionError, Fields
from pdiff_hf.snapshots.dataset import SnapshotError, SnapshotWriter, condition_table, load_fields, load_snapshots
from pdiff_hf.snapshots.zoo import ZooArguments, train_specialists, write_zoo
from pdiff_hf.training.loop import Loop, epoch_indices

ARGS = ZooArguments(num_steps=12, num_snapshots=2, every_n_steps=4, batch_size=8, learning_rate=0.01)


def test_a_zoo_is_what_one_after_the_other_gives(tmp_path):
    family = make_family()
    networks = make_networks(family)
    conditions = family.conditions(3, seed=0)
    table = family.fields.table(conditions)
    trained = train_specialists(Loop(Accelerator(cpu=True), 5), family, networks, table, ARGS)
    write_zoo(tmp_path / "zoo", family, networks.layout, conditions, ARGS, trained, seed=5)
    dataset, layout = load_snapshots(tmp_path / "zoo")
    assert dataset["step"] == [8] * 3 + [12] * 3
    fields = load_fields(tmp_path / "zoo")
    assert fields.to_dict() == family.fields.to_dict()
    assert torch.equal(condition_table(dataset, fields), family.fields.table(conditions).repeat(2, 1))

    start = networks.base_parameters()
    for t, condition in enumerate(conditions):
        task, model = family.task(condition), family.load_base_model()
        model.load_state_dict(layout.unflatten(start))
        optimizer = torch.optim.AdamW(model.parameters(), lr=ARGS.learning_rate, weight_decay=0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + torch.cos(torch.tensor(step / 12 * torch.pi)).item())
        )
        batches = epoch_indices(len(task.load_split("train")), ARGS.batch_size, 5)
        for step in range(1, 13):
            loss = task.loss(model, task.collate(task.load_split("train").__getitems__(next(batches).tolist())))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step in (8, 12):
                row = torch.tensor(dataset["parameters"][t if step == 8 else 3 + t])
                torch.testing.assert_close(row, layout.flatten(model.state_dict()), atol=1e-5, rtol=1e-4)


def test_a_resumed_zoo_is_the_uninterrupted_one(tmp_path):
    family = make_family()
    networks = make_networks(family)
    table = family.fields.table(family.conditions(2, seed=0))
    whole = train_specialists(Loop(Accelerator(cpu=True), 1), family, networks, table, ARGS)
    loop = Loop(Accelerator(cpu=True), 1, tmp_path, checkpointing_steps=9, resume=True)

    class Killed(Exception):
        pass

    def killed_batch(table, indices, generator, batch=family.training_batch):
        calls.append(1)
        if len(calls) > 10:  # after the first snapshot, which was taken at step 8
            raise Killed
        return batch(table, indices, generator)

    calls, family.training_batch = [], killed_batch
    with pytest.raises(Killed):
        train_specialists(loop, family, networks, table, ARGS)
    del family.training_batch
    assert torch.equal(train_specialists(loop, family, networks, table, ARGS), whole)


def test_columns_of_conditions(tmp_path):
    fields = Fields(
        {
            "angle": {"type": "angle"},
            "kind": {"type": "category", "values": ["a", "b"]},
            "text": {"type": "vector", "length": 2},
        }
    )
    layout = ParameterLayout(("w",), ((2,),), ("float32",))
    conditions = [{"angle": 37.3, "kind": "b", "text": [0.5, -1.0]}, {"kind": None}, {"angle": -5.0, "text": [1, 2]}]
    with SnapshotWriter(tmp_path / "set", layout, fields=fields) as writer:
        for i, condition in enumerate(conditions):
            writer.write(torch.tensor([i, i + 0.5]), step=i, seed=0, condition=condition)
        with pytest.raises(ConditionError, match="'kind' must be one of a, b, got 'c'"):
            writer.write(torch.ones(2), step=9, seed=0, condition={"kind": "c"})
    dataset, _ = load_snapshots(tmp_path / "set")
    assert dataset["kind"] == ["b", None, None] and dataset["text"][1] is None
    assert dataset.features["text"] == datasets.List(datasets.Value("float32"), length=2)
    expected = fields.table(conditions)
    assert torch.equal(condition_table(dataset, fields).nan_to_num(7.0), expected.nan_to_num(7.0))
    assert load_fields(tmp_path / "set").to_dict() == fields.to_dict()
    with SnapshotWriter(tmp_path / "plain", layout) as writer:
        writer.write(torch.ones(2), step=0, seed=0)
        with pytest.raises(SnapshotError, match="was made without fields"):
            writer.write(torch.zeros(2), step=1, seed=0, condition={"angle": 1.0})
    assert len(load_fields(tmp_path / "plain")) == 0
    with pytest.raises(SnapshotError, match="cannot have the name 'step'"):
        SnapshotWriter(tmp_path / "other", layout, fields=Fields({"step": {"type": "angle"}}))
