import torch
from torch import nn

from pdiff_hf import ModuleTask, PDiffConfig, PDiffTrainer

x = torch.randn(1000, 4)
y = (x.sum(1) > 0).long()
net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))

args = PDiffConfig(select=["all"], num_snapshots=50, latent_dim=16, baselines="few")
trainer = PDiffTrainer(ModuleTask(net, (x, y)), args=args)
pipe = trainer.train()
networks = pipe(num_models=5, output_type="model").parameters
print(networks[0](x[:3]))
report = trainer.evaluate()
