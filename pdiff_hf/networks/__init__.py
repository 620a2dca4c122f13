"""What is generated: many networks in one pass, ensembles, and networks of the paper and of torchvision."""

from . import mini as mini  # registers the mini networks with timm
