"""Recipes: file, flags, precedence, and errors that name the key."""

import dataclasses

import pytest
import yaml

from pdiff_hf.run.recipe import Recipe, RecipeParser


def parse(*argv) -> Recipe:
    return RecipeParser(prog="train.py").parse_recipe([str(a) for a in argv])


def test_flags_take_precedence_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: test_resnet\nlatent_dim: 32\nbase_learning_rate: 1e-2\nselect: ['norm[-1]', 'conv[0]']\n"
        "model_args: {img_size: 32}\nmax_train_samples: null\noverwrite_output_dir: true\nexclude: []\n"
    )
    recipe = parse(path, "--latent_dim", 16, "--seed=3")
    assert (recipe.model, recipe.latent_dim, recipe.seed) == ("test_resnet", 16, 3)
    assert recipe.base_learning_rate == 0.01  # YAML reads 1e-2 as a string
    assert recipe.select == ["norm[-1]", "conv[0]"] and recipe.exclude == []
    assert recipe.model_args == '{"img_size": 32}' and recipe.overwrite_output_dir is True
    assert recipe.num_snapshots == Recipe().num_snapshots


def test_a_saved_recipe_gives_the_same_recipe(tmp_path):
    recipe = parse("--select", "norm[-2:]", "bias", "--model_args", '{"a": [1]}', "--denoiser_learning_rate", "3e-4")
    recipe.save(tmp_path / "recipe.yaml")
    assert parse(tmp_path / "recipe.yaml") == recipe


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
    assert "(default: 300)" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--latent_dmi", "3"], "unknown argument '--latent_dmi'; did you mean latent_dim"),
        (["--latent_dim", "many"], "--latent_dim"),
        (["--num_models", "0"], "num_models must be at least 1, got 0"),
        (["--stages", "bake"], "stages must be of base, collect"),
        (["--model_args", "[1]"], "model_args must be a mapping"),
        (["--model_args", "{"], "model_args must be JSON"),
        (["--resume_from_checkpoint", "newest"], "must be 'latest', got 'newest'"),
        (["--ema_decay", "1"], "ema_decay must be between 0 and 1, got 1.0"),
        (["--heldout_snapshots", "0.9"], "heldout_snapshots must be between 0 and 0.5"),
        (["--collect_optimizer", "lion"], "collect_optimizer must be of"),
        (
            ["--token_size", "64", "--autoencoder_preset", "pca"],
            "token_size must be left out with autoencoder_preset=pca",
        ),
        (["--normalization", "batch"], "normalization must be of"),
        (["nowhere.yaml"], "recipe 'nowhere.yaml' cannot be read"),
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
        ("- 1", "must be a mapping of keys to values, got a list"),
        ("a: [", "is not YAML"),
        ("latent_dim: many", "--latent_dim"),
        ("", None),
    ],
)
def test_recipe_files(content, message, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    if message is None:
        assert parse(path) == Recipe()
        return
    with pytest.raises(SystemExit):
        parse(path)
    assert message in capsys.readouterr().err


def test_yaml_cannot_run_code(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: !!python/object/apply:pathlib.Path.touch [{tmp_path}/touched]")
    with pytest.raises(SystemExit):
        parse(path)
    assert not (tmp_path / "touched").exists() and "is not YAML" in capsys.readouterr().err


def test_the_recipes_that_come_with_the_project_are_valid():
    import pathlib

    paths = list((pathlib.Path(__file__).parents[2] / "scripts" / "recipes").glob("*.yaml"))
    assert paths
    for path in paths:
        assert isinstance(yaml.safe_load(path.read_text()), dict)
        parse(path)
