import torch
from torch import nn

from pdiff_hf import SnapshotRecorder, load_snapshots

model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
with SnapshotRecorder(model, "my_snapshots", select="norm[-2:]") as recorder:
    for step in range(1, 21):
        x = torch.randn(32, 4)
        loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recorder.snapshot(step, loss=loss.item())

snapshots, layout = load_snapshots("my_snapshots")
print(len(snapshots), layout.num_parameters)
