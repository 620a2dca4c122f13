"""The config: file, flags, precedence, what has no effect, paths, and errors that name the key."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from pdiff_hf.models import AUTOENCODER_PRESETS, DENOISER_PRESETS
from pdiff_hf.models.tokens import NORMALIZATIONS
from pdiff_hf.run.cli import ConfigParser, load_config
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.context import stage_settings
from pdiff_hf.run.options import default_of
from pdiff_hf.run.settings import SECTIONS, STAGE_NAMES, AutoencoderArgs, CollectArgs
from pdiff_hf.run.stages import STAGES
from pdiff_hf.training.loop import OPTIMIZERS


def parse(*argv) -> PDiffConfig:
    return ConfigParser(prog="train.py").parse_config([str(a) for a in argv])[0]


def test_flags_take_precedence_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: test_resnet\nlatent_dim: 32\nbase_learning_rate: 1e-2\nselect: ['norm[-1]', '-conv[0]']\n"
        "model_args: {img_size: 32}\nmax_train_samples: null\noverwrite_output_dir: true\nexclude: []\n"
        "denoiser_args: {ema_decay: 0, num_train_timesteps: 50}\nbase_args: {weight_decay: 1e-2}\n"
    )
    config = parse(path, "--latent_dim", 16, "--seed=3", "--denoiser_args", "num_train_timesteps=60")
    assert (config.model, config.latent_dim, config.seed) == ("test_resnet", 16, 3)
    assert config.base_learning_rate == config.base_args.weight_decay == 0.01  # YAML reads 1e-2 as a string
    assert config.select == ["norm[-1]", "-conv[0]"] and config.exclude == []
    assert config.model_args == {"img_size": 32} and config.overwrite_output_dir is True
    decay = config.denoiser_args.ema_decay
    assert decay == 0.0 and type(decay) is float and config.denoiser_args.num_train_timesteps == 60
    assert config.num_snapshots == PDiffConfig().num_snapshots
    changes = {"seed": 3, "latent_dim": 16, "denoiser_args.num_train_timesteps": 60}
    assert load_config(path, **changes) == config
    few = parse("on_demand.yaml", "--num_snapshots", 12)  # of a recipe with more tasks than that
    assert few.num_tasks == 12 and parse("on_demand.yaml", "--num_snapshots", 576).num_tasks == 192


def test_a_saved_config_gives_the_same_config(tmp_path):
    flags = ["--select", "norm[-2:]", "bias", "--model_args", '{"a": [1]}', "--denoiser_learning_rate", "3e-4"]
    config = parse(
        *flags, "--tune_steps=5", "--tune_args", "map=true", "diversity=[0]", "--task_args", "label_column=x"
    )
    config.save(tmp_path / "recipe.yaml")
    assert config.tune_args.map is True and config.tune_args.diversity == [0.0]
    assert parse(tmp_path / "recipe.yaml") == config == load_config(tmp_path / "recipe.yaml")


def test_changes_are_the_keys_that_flags_name(capsys):
    parser = ConfigParser()
    argv = ["--select", "norm", "head", "--autoencoder_args", "latent_noise=0", "--max_eval_samples", "5"]
    changes = {"select": ["norm", "head"], "autoencoder_args.latent_noise": 0, "max_eval_samples": 5}
    assert parser.parse_changes(argv) == changes
    assert parser.parse_changes([]) == {}
    with pytest.raises(SystemExit):
        parser.parse_changes(["--latent_dmi", "1"])
    assert "did you mean latent_dim" in capsys.readouterr().err


def test_help_shows_what_people_set_and_help_all_every_setting(capsys, monkeypatch):
    keys = {key.name: key for key in dataclasses.fields(PDiffConfig)}
    assert len(keys) <= 65 and sum(key.metadata["common"] for key in keys.values()) <= 25
    for flag in ("--help", "--help-all"):
        monkeypatch.setattr("sys.argv", ["train.py", flag])
        with pytest.raises(SystemExit):
            parse(flag)
        text = capsys.readouterr().out
        for name, key in keys.items():
            assert (re.search(rf"--{name}\b", text) is not None) == (flag == "--help-all" or key.metadata["common"])
        assert "(default: 300)" in text and " ".join(["One", "of", "paper,", "small,", "mlp."]) in " ".join(
            text.split()
        )
    assert "penalty (Weight of the squared" in " ".join(text.split())


def test_choices_are_those_of_the_modules_that_define_them():
    sections = (PDiffConfig, AutoencoderArgs, CollectArgs)
    choices = {
        field.name: field.metadata.get("choices") for section in sections for field in dataclasses.fields(section)
    }
    assert choices["autoencoder_preset"] == tuple(AUTOENCODER_PRESETS)
    assert choices["denoiser_preset"] == tuple(DENOISER_PRESETS)
    assert choices["normalization"] == tuple(NORMALIZATIONS)
    assert choices["optimizer"] == tuple(OPTIMIZERS)
    assert tuple(STAGES) == STAGE_NAMES


def all_settings() -> dict[str, dataclasses.Field]:
    return {name: key for name, key, _ in PDiffConfig()._settings()}


def other_value(key: dataclasses.Field):
    """A value that is possible, and not the default one."""
    default, bounds = default_of(key), key.metadata
    special = {"diversity": [0.0, 0.5], "batch_norm_statistics": "generated", "num_snapshots": 576}
    if key.name in special:
        return special[key.name]
    if "choices" in bounds and bounds["choices"] != STAGE_NAMES:
        return next(choice for choice in reversed(bounds["choices"]) if choice != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default * 2 or 2
    if isinstance(default, float):
        return default * 1.5 if default and "below" not in bounds else default / 2 or 0.25
    return (
        {"x": 1} if key.type is dict else ["norm"] if isinstance(default, list) else 3 if "min" in bounds else "other"
    )


@pytest.mark.parametrize("name", [name for name, key in all_settings().items() if key.metadata["when"].why_not])
def test_a_setting_without_effect_is_refused_and_in_no_fingerprint(name):
    """In a run where each such setting is not read, whichever that is: one task, imported snapshots, nothing tuned."""
    key = all_settings()[name]
    situations = [
        {},
        {"base_epochs": 0},
        {"snapshots": "elsewhere"},
        {"autoencoder_preset": "pca"},
        {"family": "transformed", "num_snapshots": 384},
        {"family": "transformed", "snapshots": "elsewhere"},
        {"task": "neural_field"},
    ]
    refused = 0
    for situation in situations:
        config = PDiffConfig().changed(**situation)
        config.conditional = False
        values = {name: other_value(key)} | ({"tune_args.ensemble_size": 2} if name == "tune_args.diversity" else {})
        changed = config.changed(**values)
        if key.metadata["when"].holds(changed):
            continue
        refused += 1
        with pytest.raises(ValueError, match=r"has no effect: .*; leave it out"):
            changed.check()
        assert name in {found for found, _, _ in changed.unread()}
        assert stage_settings(changed, "evaluate", STAGES) == stage_settings(config, "evaluate", STAGES)
        assert name not in changed.section(*SECTIONS.values())
    assert refused


def test_what_a_flag_makes_moot_in_a_recipe_is_left_out_and_a_flag_never_is(tmp_path):
    (tmp_path / "recipe.yaml").write_text("autoencoder_steps: 7\n")
    config = parse(tmp_path / "recipe.yaml", "--autoencoder_preset=pca")
    config.check()
    assert "autoencoder_steps" not in config.section(*SECTIONS.values())
    with pytest.raises(ValueError, match="autoencoder_steps=8 has no effect: autoencoder_preset=pca is linear"):
        parse(tmp_path / "recipe.yaml", "--autoencoder_preset=pca", "--autoencoder_steps=8").check()
    (tmp_path / "recipe.yaml").write_text("autoencoder_steps: 7\nautoencoder_preset: pca\n")
    with pytest.raises(ValueError, match="recipe.yaml': autoencoder_steps=7 has no effect"):
        load_config(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--latent_dmi", "3"], "unknown argument '--latent_dmi'; did you mean latent_dim"),
        (["--latent_dim", "many"], "latent_dim must be a whole number, got 'many'"),
        (["--latent_dim", "1.5"], "latent_dim must be a whole number"),
        (["--num_models", "0"], "num_models must be at least 1, got 0"),
        (["--stages", "bake"], "stages must be one of base, collect"),
        (["--model_args", "[1]"], "model_args must be a mapping"),
        (["--task_args", "{"], "task_args must be JSON"),
        (["--resume_from_checkpoint", "newest"], "resume_from_checkpoint must be one of latest, got 'newest'"),
        (["--denoiser_args", "ema_decay=1"], "denoiser_args.ema_decay must be at least 0 and below 1, got 1.0"),
        (["--denoiser_args", "ema=1"], "denoiser_args has no setting 'ema'"),
        (["--denoiser_args", "ema_decay=["], "denoiser_args cannot be read: while parsing"),
        (["--denoiser_args", "0.5"], "--denoiser_args takes KEY=VALUE or a mapping as JSON, got '0.5'"),
        (["--tune_penalty", "1"], "unknown argument '--tune_penalty'; did you mean tune_args.penalty?"),
        (["--weight_decay", "1"], "'--weight_decay'; did you mean base_args.weight_decay or collect_args.weight_decay"),
        (["--validation_fraction", "0"], "validation_fraction must be above 0 and below 0.5, got 0.0"),
        (
            ["--heldout_snapshots", "0.9"],
            "heldout_snapshots must be at least 0 and below 0.5",
        ),
        (["--collect_args", "optimizer=lion"], "collect_args.optimizer must be one of adamw, adam, sgd"),
        (["--collect_args", "num_runs=7"], "collect_args.num_runs must be a divisor of num_snapshots=300, got 7"),
        (["--tune_args", "ensemble_size=5"], "tune_args.ensemble_size must be a divisor of tune_models=32, got 5"),
        (["--tune_args", "diversity=[0, 1]"], "tune_args.diversity=[0.0, 1.0] needs an ensemble_size above 1"),
        (["--tune_args", "diversity=-1"], "tune_args.diversity must be at least 0, got -1.0"),
        (["nowhere.yaml"], "there is no recipe 'nowhere.yaml'"),
        (["--output_dir", "$NOT_SET_HERE/x"], "output_dir: '$NOT_SET_HERE/x' cannot be used: the environment variable"),
        (["--model", "~nobody-at-all/x"], "model: '~nobody-at-all/x' cannot be used: there is no home folder of"),
    ],
)
def test_errors_are_one_line_that_names_the_key(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(*argv)
    text = capsys.readouterr().err
    assert error.value.code == 2 and message in text and text.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("laten_dim: 3", "unknown key 'laten_dim'; did you mean latent_dim"),
        ("tune_map: true", "unknown key 'tune_map'; did you mean tune_args.map?"),
        ("- 1", "must be a mapping of keys to values, got a list"),
        ("false", "must be a mapping of keys to values, got a bool"),
        ("a: [", "is not YAML"),
        ("latent_dim: many", "recipe.yaml': latent_dim must be a whole number, got 'many'"),
        ("latent_dim: [8]", "latent_dim must be a whole number, got [8]"),
        ("seed: null", "seed must be a whole number, got None"),
        ("base_learning_rate: .inf", "base_learning_rate must be finite, got inf"),
        ("collect_args: {weight_decay: .nan}", "collect_args.weight_decay must be finite, got nan"),
        (
            "denoiser_args: {num_train_timesteps: 1000000000}",
            "denoiser_args.num_train_timesteps must be at least 1 and at most 1000000",
        ),
        ("select: &a [all]\nexclude: *a", "references such as *a cannot be used"),
        ("model: " + "[" * 5000, "is not YAML: maximum recursion depth"),
        ("seed: !!timestamp 2001-99-99", "is not YAML"),
        ("model: !!python/object/apply:pathlib.Path.touch [touched]", "is not YAML"),
        ("", None),
        ("select: all", None),
    ],
)
def test_recipe_files(content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(content)
    if message is None:
        assert parse("recipe.yaml") == PDiffConfig(**yaml.safe_load(content.replace("all", "[all]")) or {})
        return
    with pytest.raises(SystemExit):
        parse("recipe.yaml")
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1 and not Path("touched").exists()
    with pytest.raises(ValueError) as error:
        load_config("recipe.yaml")
    assert message in str(error.value) or "python" in content


def test_home_and_environment_variables_are_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    (tmp_path / "recipe.yaml").write_text("output_dir: ~/run\ndataset: ${DATA}/images\ntask: $HOME/own.py:Own\n")
    recipe = parse("~/recipe.yaml", "--snapshots=~/snapshots", "--model", "~/model")
    assert (recipe.output_dir, recipe.dataset) == (f"{tmp_path}/run", "/data/images")
    assert (recipe.snapshots, recipe.model) == (f"{tmp_path}/snapshots", f"{tmp_path}/model")
    assert recipe.task == f"{tmp_path}/own.py:Own"
    assert PDiffConfig(output_dir="~/run") == PDiffConfig(output_dir=f"{tmp_path}/run")


def test_a_model_of_ones_own_has_no_default_data_set(tmp_path):
    assert PDiffConfig().with_dataset().dataset == "digits" and PDiffConfig(dataset="some/data").with_dataset().dataset
    for model in (str(tmp_path), "user/model"):
        with pytest.raises(ValueError, match=f"--dataset is needed: there is no default one for '{model}'"):
            PDiffConfig(model=model).with_dataset()


def test_the_recipes_that_come_with_the_project_are_valid():
    paths = list((Path(__file__).parents[2] / "scripts" / "recipes").glob("*.yaml"))
    assert paths
    for path in paths:
        parse(path)
