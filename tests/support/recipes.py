"""Settings of runs that take seconds."""

from pathlib import Path

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
TINY = {
    "model": "test_resnet",
    "image_size": 16,
    "max_train_samples": 200,
    "max_eval_samples": 100,
    "base_epochs": 1,
    "num_snapshots": 12,
    "collect_batch_size": 32,
    "latent_dim": 8,
    "autoencoder_steps": 5,
    "autoencoder_batch_size": 5,
    "denoiser_steps": 5,
    "denoiser_batch_size": 5,
    "num_models": 6,
    "num_inference_steps": 3,
    "baseline_models": 4,
}
# Of one row of a table.
TINY_ROW = {
    "model": "test_resnet",
    "image_size": 16,
    "max_train_samples": 600,
    "max_eval_samples": 100,
    "base_epochs": 4,
    "num_snapshots": 20,
    "collect_batch_size": 32,
    "latent_dim": 8,
    "autoencoder_steps": 20,
    "autoencoder_batch_size": 10,
    "denoiser_steps": 60,
    "denoiser_batch_size": 10,
    "num_models": 10,
    "num_inference_steps": 5,
    "checkpointing_steps": 10,
}
