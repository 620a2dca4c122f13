"""Names inside a run's folder, for everything that writes or reads one."""

from pathlib import Path

RECIPE = "recipe.yaml"
BASE_MODEL = "base_model"
SNAPSHOTS = "snapshots"
AUTOENCODER = "autoencoder"
PIPELINE = "pipeline"
TUNED = "tuned"
TUNING = "tuning.json"  # in the folder of a tuned pipeline: how it was tuned
EVALUATION = "evaluation"
REPORT = "report.json"
# Records of finished stages, checkpoints of the one at work, scores of networks, and what trackers write.
RECORDS = "stages"
CHECKPOINTS = "checkpoints"
SCORES = "scores"
LOGS = "logs"


def generator_folder(run: Path) -> Path:
    """Where the generator of a run is: tuned, if it was."""
    return run / (TUNED if (run / RECORDS / "tune.json").is_file() else PIPELINE)
