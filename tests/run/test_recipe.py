"""Recipes: file, flags, precedence, paths, and errors that name the key."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from pdiff_hf.models import AUTOENCODER_PRESETS, DENOISER_PRESETS
from pdiff_hf.models.tokens import NORMALIZATIONS
from pdiff_hf.run.recipe import STAGES as STAGE_NAMES
from pdiff_hf.run.recipe import Recipe, RecipeParser, load_recipe
from pdiff_hf.run.stages import STAGES
from pdiff_hf.training.loop import OPTIMIZERS


def parse(*argv) -> Recipe:
    return RecipeParser(prog="train.py").parse_recipe([str(a) for a in argv])


def test_flags_take_precedence_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: test_resnet\nlatent_dim: 32\nbase_learning_rate: 1e-2\nselect: ['norm[-1]', '-conv[0]']\n"
        "model_args: {img_size: 32}\nmax_train_samples: null\noverwrite_output_dir: true\nexclude: []\nema_decay: 0\n"
    )
    recipe = parse(path, "--latent_dim", 16, "--seed=3")
    assert (recipe.model, recipe.latent_dim, recipe.seed) == ("test_resnet", 16, 3)
    assert recipe.base_learning_rate == 0.01  # YAML reads 1e-2 as a string
    assert recipe.select == ["norm[-1]", "-conv[0]"] and recipe.exclude == []
    assert recipe.model_args == '{"img_size": 32}' and recipe.overwrite_output_dir is True
    assert recipe.ema_decay == 0.0 and type(recipe.ema_decay) is float
    assert recipe.num_snapshots == Recipe().num_snapshots
    assert load_recipe(path, seed=3, latent_dim=16) == recipe


def test_a_saved_recipe_gives_the_same_recipe(tmp_path):
    recipe = parse("--select", "norm[-2:]", "bias", "--model_args", '{"a": [1]}', "--denoiser_learning_rate", "3e-4")
    recipe.save(tmp_path / "recipe.yaml")
    assert parse(tmp_path / "recipe.yaml") == recipe == load_recipe(tmp_path / "recipe.yaml")


def test_changes_are_the_keys_that_flags_name(capsys):
    parser = RecipeParser()
    argv = ["--select", "norm", "head", "--latent_noise=0", "--overwrite_output_dir", "--max_eval_samples", "5"]
    changes = {"select": ["norm", "head"], "latent_noise": 0.0, "overwrite_output_dir": True, "max_eval_samples": 5}
    assert parser.parse_changes(argv) == changes
    assert parser.parse_changes([]) == {}
    with pytest.raises(SystemExit):
        parser.parse_changes(["--latent_nois", "1"])
    assert "did you mean latent_noise" in capsys.readouterr().err


def test_every_key_is_explained_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name}" in text and field.metadata["help"]
    assert "(default: 300)" in text and "One of paper, small, mlp." in text


def test_spaces_in_json_make_no_other_run():
    assert parse("--model_args", '{"img_size":32}') == parse("--model_args", '{ "img_size" : 32 }')


def test_choices_are_those_of_the_modules_that_define_them():
    choices = {field.name: field.metadata.get("choices") for field in dataclasses.fields(Recipe)}
    assert choices["autoencoder_preset"] == tuple(AUTOENCODER_PRESETS)
    assert choices["denoiser_preset"] == tuple(DENOISER_PRESETS)
    assert choices["normalization"] == tuple(NORMALIZATIONS)
    assert choices["collect_optimizer"] == tuple(OPTIMIZERS)
    assert tuple(STAGES) == STAGE_NAMES


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--latent_dmi", "3"], "unknown argument '--latent_dmi'; did you mean latent_dim"),
        (["--holdout_fraction=0.1"], "unknown argument '--holdout_fraction=0.1'; it is called validation_fraction now"),
        (["--latent_dim", "many"], "--latent_dim"),
        (["--latent_dim", "1.5"], "--latent_dim"),
        (["--num_models", "0"], "num_models must be at least 1, got 0"),
        (["--stages", "bake"], "stages must be one of base, collect"),
        (["--model_args", "[1]"], "model_args must be a mapping"),
        (["--task_args", "{"], "task_args must be JSON"),
        (["--resume_from_checkpoint", "newest"], "resume_from_checkpoint must be one of latest, got 'newest'"),
        (["--ema_decay", "1"], "ema_decay must be at least 0 and below 1, got 1.0"),
        (["--validation_fraction", "0"], "validation_fraction must be above 0 and below 0.5, got 0.0"),
        (["--heldout_snapshots", "0.9"], "heldout_snapshots must be at least 0 and below 0.5"),
        (["--collect_optimizer", "lion"], "collect_optimizer must be one of adamw, adam, sgd"),
        (["--num_runs", "7"], "num_runs must be a divisor of num_snapshots=300, got 7"),
        (
            ["--token_size", "64", "--autoencoder_preset", "pca"],
            "token_size must be left out with autoencoder_preset=pca",
        ),
        (["--tune_ensemble_size", "5"], "tune_ensemble_size must be a divisor of tune_models=32, got 5"),
        (["--tune_diversity", "0", "1"], "tune_diversity=[0.0, 1.0] needs a tune_ensemble_size above 1"),
        (["--tune_diversity", "-1"], "tune_diversity must be at least 0, got -1.0"),
        (["nowhere.yaml"], "recipe 'nowhere.yaml' cannot be read"),
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
        ("heldout_fraction: 0.1", "unknown key 'heldout_fraction'; it is called heldout_snapshots now"),
        ("- 1", "must be a mapping of keys to values, got a list"),
        ("false", "must be a mapping of keys to values, got a bool"),
        ("a: [", "is not YAML"),
        ("latent_dim: many", "--latent_dim"),
        ("latent_dim: [8]", "a list for the key 'latent_dim', which takes one value"),
        ("seed: null", "no value for the key 'seed'"),
        ("base_learning_rate: .inf", "base_learning_rate must be finite, got inf"),
        ("collect_weight_decay: .nan", "collect_weight_decay must be finite, got nan"),
        ("num_train_timesteps: 1000000000", "num_train_timesteps must be at least 1 and at most 1000000"),
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
        assert parse("recipe.yaml") == Recipe(**yaml.safe_load(content.replace("all", "[all]")) or {})
        return
    with pytest.raises(SystemExit):
        parse("recipe.yaml")
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1 and not Path("touched").exists()
    with pytest.raises(ValueError) as error:
        load_recipe("recipe.yaml")
    assert message in str(error.value) or "python" in content


def test_home_and_environment_variables_are_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    (tmp_path / "recipe.yaml").write_text("output_dir: ~/run\ndataset: ${DATA}/images\ntask: $HOME/own.py:Own\n")
    recipe = parse("~/recipe.yaml", "--snapshots=~/snapshots", "--fid_features=$DATA/net", "--model", "~/model")
    assert (recipe.output_dir, recipe.dataset) == (f"{tmp_path}/run", "/data/images")
    assert (recipe.snapshots, recipe.model) == (f"{tmp_path}/snapshots", f"{tmp_path}/model")
    assert recipe.task == f"{tmp_path}/own.py:Own" and recipe.fid_features == "/data/net"
    assert Recipe(output_dir="~/run") == Recipe(output_dir=f"{tmp_path}/run")


def test_a_model_of_ones_own_has_no_default_data_set(tmp_path):
    assert Recipe().with_dataset().dataset == "digits" and Recipe(dataset="some/data").with_dataset().dataset
    for model in (str(tmp_path), "user/model"):
        with pytest.raises(ValueError, match=f"--dataset is needed: there is no default one for '{model}'"):
            Recipe(model=model).with_dataset()


def test_the_recipes_that_come_with_the_project_are_valid():
    paths = list((Path(__file__).parents[2] / "scripts" / "recipes").glob("*.yaml"))
    assert paths
    for path in paths:
        parse(path)
