"""Push and pull over HTTP, against the server of `hub_server.py`: round trips, rights, cards, and faults on the way."""

import configparser
import dataclasses
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError
from support.evaluation import regression, report_on, snapshots_around
from support.hub_server import Fault
from support.markdown import check_markdown, tables
from support.pipelines import make_network, make_pipeline
from support.recipes import TINY
from support.runs import finish
from transformers import AutoModelForImageClassification

from pdiff_hf import LatentDenoiser, ParameterLayout, PDiffPipeline
from pdiff_hf.evaluation import Report
from pdiff_hf.hub.card import PRIVATE_KEYS, HubError, make_model_card
from pdiff_hf.hub.push import push_pipeline_to_hub, push_run_to_hub, push_snapshots_to_hub
from pdiff_hf.models.condition import Fields
from pdiff_hf.run.context import RunContext
from pdiff_hf.run.settings import RunSection
from pdiff_hf.run.tuning import load_tuning
from pdiff_hf.snapshots import SnapshotError, SnapshotWriter, load_snapshots, parameter_matrix
from pdiff_hf.snapshots.dataset import condition_table, load_fields
from pdiff_hf.training.ensembles import EnsembleObjective, Tuning

ROOT = Path(__file__).parents[2]
ID = "alice/generator"
COMPONENTS = {
    "model_index.json",
    "autoencoder/config.json",
    "autoencoder/diffusion_pytorch_model.safetensors",
    "base_model/config.json",
    "base_model/model.safetensors",
    "denoiser/config.json",
    "denoiser/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
}
# What a process that has nothing but the id does.
PULL = """
import hashlib, sys, torch
from pdiff_hf import PDiffPipeline
pipe = PDiffPipeline.from_pretrained(sys.argv[1])
parameters = pipe(3, 4, torch.Generator().manual_seed(7), output_type="pt").parameters
models = pipe(3, 4, torch.Generator().manual_seed(7), output_type="model").parameters
assert torch.equal(pipe.autoencoder.layout.flatten(models[2].state_dict()), parameters[2])
print(hashlib.sha256(parameters.numpy().tobytes()).hexdigest())
"""


def sample(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(3, 4, torch.Generator().manual_seed(7), output_type="pt").parameters


@pytest.fixture(scope="module")
def pipe() -> PDiffPipeline:
    return make_pipeline(make_network())


@pytest.fixture(scope="module")
def run(digits_run, tmp_path_factory) -> RunContext:
    """In a folder of its own, which tests change."""
    folder = shutil.copytree(digits_run.folder, tmp_path_factory.mktemp("run") / "out")
    return finish(digits_run.config.changed(output_dir=str(folder)))


@pytest.fixture
def published(hub, pipe):
    pipe.push_to_hub(ID)
    return hub


@pytest.fixture
def no_waiting(monkeypatch):
    """The client's waits between its own attempts."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def files(hub, repo_id=ID, revision="main", kind="models") -> dict[str, bytes]:
    files = hub.repos[kind, repo_id].files(revision)
    return {path: content for path, content in files.items() if path != ".gitattributes"}


# ----------------------------------------------------------------------------------------------------------- the push


def test_a_pipeline_is_pushed_in_one_commit(hub, pipe):
    url = pipe.push_to_hub("generator")
    repo = hub.repos["models", ID]
    assert repo.titles == ["initial commit", "Upload PDiffPipeline"] and not repo.private
    assert set(files(hub)) == COMPONENTS | {"pipeline.py", "README.md"}
    assert files(hub)["pipeline.py"] == (ROOT / "pipelines" / "pipeline_pdiff.py").read_bytes()
    assert url == f"{hub.url}/{ID}/commit/{repo.branches['main']}"
    assert [model.id for model in HfApi().list_models(author="alice")] == [ID]
    assert set(HfApi().list_repo_files(ID)) == {".gitattributes", *files(hub)}


def test_a_run_is_pushed_in_one_commit(hub, run):
    (run.folder / "checkpoints" / "denoiser").mkdir(parents=True, exist_ok=True)
    (run.folder / "checkpoints" / "denoiser" / "optimizer.bin").write_bytes(b"state")
    (run.folder / "evaluation" / "notes.txt").write_text("not for others")
    push_run_to_hub(run.folder, ID)
    assert hub.repos["models", ID].titles == ["initial commit", "Upload PDiffPipeline"]
    figures = {path for path in files(hub) if path.endswith(".png")}
    reports = {f"evaluation/report.{kind}" for kind in ("json", "md", "html")}
    assert set(files(hub)) == COMPONENTS | {"pipeline.py", "README.md", "recipe.yaml"} | reports | figures
    assert figures
    for path in COMPONENTS:
        assert files(hub)[path] == (run.folder / "pipeline" / path).read_bytes()
    # Neither the token nor where the run lives is published, or written down at all.
    texts = [content for path, content in files(hub).items() if not path.endswith((".png", ".safetensors"))]
    assert not any(str(run.folder).encode() in text or b"alice-token" in text for text in texts)
    assert "alice-token" not in (run.folder / "recipe.yaml").read_text()


def test_an_unfinished_run_is_not_pushed(hub, run, tmp_path):
    with pytest.raises(HubError, match=r"is not a finished pipeline: model_index.json .*is missing"):
        push_run_to_hub(tmp_path, ID)
    make_pipeline(make_network()).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "denoiser" / "config.json").unlink()
    (tmp_path / "pipeline" / "denoiser" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(HubError, match="has no files for its component denoiser"):
        push_run_to_hub(tmp_path, ID)
    with pytest.raises(HubError, match="is not a parameter data set"):
        push_snapshots_to_hub(tmp_path, ID)
    assert not hub.repos


def test_a_report_of_another_pipeline_is_not_pushed(hub, run):
    record = run.folder / "stages" / "denoiser.json"
    kept = record.read_text()
    changed = json.loads(kept)
    changed["settings"]["denoiser_steps"] += 1
    record.write_text(json.dumps(changed))
    try:
        with pytest.raises(HubError, match="describes a pipeline with other settings; run the stage evaluate again"):
            push_run_to_hub(run.folder, ID)
    finally:
        record.write_text(kept)
    assert not hub.repos


def test_what_earlier_pushes_left_is_deleted_in_the_same_commit(published, pipe):
    repo = published.repos["models", ID]
    HfApi().upload_file(path_or_fileobj=b"1", path_in_repo="denoiser/old-00001-of-00002.safetensors", repo_id=ID)
    HfApi().upload_file(path_or_fileobj=b"2", path_in_repo="notes.md", repo_id=ID)
    make_pipeline(make_network(1), seed=1).push_to_hub(ID)
    assert set(files(published)) == COMPONENTS | {"pipeline.py", "README.md", "notes.md"}
    assert len(repo.titles) == 5


def test_how_a_generator_was_tuned_goes_with_it(hub, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    tuning = Tuning(EnsembleObjective(4, 0.5, 0.1), 10, 8, 16, passes=1280)
    (tmp_path / "tuning.json").write_text(json.dumps(tuning.to_dict()))
    push_pipeline_to_hub(tmp_path, ID)
    assert load_tuning(Path(PDiffPipeline.download(ID))) == tuning
    pipe.push_to_hub(ID)  # one that is not tuned
    assert "tuning.json" not in files(hub) and load_tuning(Path(PDiffPipeline.download(ID))) is None


def test_the_same_push_twice_makes_one_commit(published, pipe):
    pipe.push_to_hub(ID)
    assert published.repos["models", ID].titles == ["initial commit", "Upload PDiffPipeline"]


def test_a_card_on_the_hub_is_kept_by_a_pipeline_and_renewed_by_a_run(published, pipe, run):
    text = "---\nlicense: mit\n---\n# By hand\n"
    HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=ID)
    make_pipeline(make_network(1), seed=1).push_to_hub(ID)
    assert files(published)["README.md"].decode() == text
    push_run_to_hub(run.folder, ID)
    assert b"By hand" not in files(published)["README.md"]


def test_save_pretrained_can_push(hub, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "generator", push_to_hub=True, private=True, commit_message="First")
    assert hub.repos["models", ID].private and hub.repos["models", ID].titles[-1] == "First"
    assert set(files(hub)) == COMPONENTS | {"pipeline.py", "README.md"}


def test_revisions_pull_requests_and_organizations(hub, pipe):
    other = make_pipeline(make_network(1), seed=1)
    pipe.push_to_hub("lab/generator")
    other.push_to_hub("lab/generator", revision="draft")
    repo = hub.repos["models", "lab/generator"]
    assert set(repo.branches) == {"main", "draft"}
    url = other.push_to_hub("lab/generator", create_pr=True, commit_message="Please")
    assert url.pr_url.endswith("/discussions/1") and "refs/pr/1" in repo.branches
    assert torch.equal(sample(PDiffPipeline.from_pretrained("lab/generator")), sample(pipe))
    for revision in ("draft", "refs/pr/1", repo.branches["draft"]):
        pulled = PDiffPipeline.from_pretrained("lab/generator", revision=revision)
        assert torch.equal(sample(pulled), sample(other))


# ----------------------------------------------------------------------------------------------------------- the pull


@pytest.mark.slow
def test_bit_for_bit_in_a_new_process_and_offline(published, pipe, tmp_path):
    PDiffPipeline.from_pretrained(ID, cache_dir=tmp_path / "hub")
    published.requests.clear()
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", PULL, ID], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hashlib.sha256(sample(pipe).numpy().tobytes()).hexdigest()
    assert not published.requests


def test_the_base_model_comes_back(published, pipe, tmp_path):
    pulled = PDiffPipeline.from_pretrained(ID, cache_dir=tmp_path)
    assert type(pulled.base_model) is type(pipe.base_model)
    alone = AutoModelForImageClassification.from_pretrained(ID, subfolder="base_model", cache_dir=tmp_path)
    for network in (pulled.base_model, alone):
        assert not network.training and network.state_dict().keys() == pipe.base_model.state_dict().keys()
        for name, tensor in pipe.base_model.state_dict().items():
            assert torch.equal(network.state_dict()[name], tensor)


def test_a_component_of_ones_own(published, pipe, tmp_path):
    other = make_pipeline(make_network(1), seed=1)
    published.requests.clear()
    pulled = PDiffPipeline.from_pretrained(ID, denoiser=other.denoiser, cache_dir=tmp_path)
    assert pulled.denoiser is other.denoiser
    assert not any("/denoiser/" in request for request in published.requests)
    pipe = make_pipeline(make_network())
    pipe.register_modules(denoiser=other.denoiser)
    assert torch.equal(sample(pulled), sample(pipe))
    single = LatentDenoiser.from_pretrained(ID, subfolder="denoiser", cache_dir=tmp_path)
    assert torch.equal(single.conv_out.weight, make_pipeline(make_network()).denoiser.conv_out.weight)


def test_private_repositories_need_the_token(hub, pipe, tmp_path):
    pipe.push_to_hub(ID, private=True)
    assert torch.equal(sample(PDiffPipeline.from_pretrained(ID, cache_dir=tmp_path / "a")), sample(pipe))
    pulled = PDiffPipeline.from_pretrained(ID, token="reader-token", cache_dir=tmp_path / "b")
    assert torch.equal(sample(pulled), sample(pipe))
    for token in (False, "bob-token", "wrong-token"):
        with pytest.raises(OSError):
            PDiffPipeline.from_pretrained(ID, token=token, cache_dir=tmp_path / "c")


def test_what_does_not_exist(published, tmp_path):
    for name in ("alice/nothing", "outputs/run/nothing", "no name!"):
        for load in (PDiffPipeline.from_pretrained, PDiffPipeline.download):
            with pytest.raises(OSError, match=f"'{name}' is neither the folder of a finished run .* nor the id"):
                load(name, cache_dir=tmp_path)
    with pytest.raises(OSError, match="specified revision"):
        PDiffPipeline.from_pretrained(ID, revision="no-branch", cache_dir=tmp_path)


def test_the_folder_of_a_run_is_its_generator(pipe, tmp_path):
    with pytest.raises(OSError, match="nor the id of one on the Hub: it has no model_index"):
        PDiffPipeline.from_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path / "pipeline")
    found = PDiffPipeline.from_pretrained(tmp_path)
    assert torch.equal(sample(found), sample(pipe))


@pytest.mark.parametrize("fault", [{"status": 503}, {"cut_after": 0}])
def test_a_pull_that_fails_can_be_repeated(published, pipe, no_waiting, tmp_path, fault):
    published.faults.append(Fault("GET", "/resolve/.*safetensors", times=100, **fault))
    with pytest.raises((OSError, HTTPError)):
        PDiffPipeline.from_pretrained(ID, cache_dir=tmp_path)
    published.faults.clear()
    assert torch.equal(sample(PDiffPipeline.from_pretrained(ID, cache_dir=tmp_path)), sample(pipe))


# ------------------------------------------------------------------------------------------------ code in a repository


def test_the_pipeline_code_of_a_repository(published, pipe, tmp_path):
    pulled = DiffusionPipeline.from_pretrained(ID, custom_pipeline=ID, trust_remote_code=True, cache_dir=tmp_path)
    assert type(pulled).__module__.startswith("diffusers_modules")
    assert torch.equal(sample(pulled), sample(pipe))
    # It can be pushed on.
    pulled.push_to_hub("alice/copy")
    assert files(published, "alice/copy")["pipeline.py"] == files(published)["pipeline.py"]
    assert torch.equal(sample(PDiffPipeline.from_pretrained("alice/copy", cache_dir=tmp_path)), sample(pipe))


def test_code_of_a_repository_does_not_run_unasked(published, tmp_path):
    marker = tmp_path / "it-ran"
    code = f"open({str(marker)!r}, 'w').close()\n" + files(published)["pipeline.py"].decode()
    for path in ("pipeline.py", "denoiser/pdiff_hf.py", "base_model/transformers.py", "base_model/modeling.py"):
        HfApi().upload_file(path_or_fileobj=code.encode(), path_in_repo=path, repo_id=ID)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(ID, custom_pipeline=ID, cache_dir=tmp_path / "a")
    with pytest.raises(ValueError, match="trust_remote_code=True"):  # for the component's own file
        PDiffPipeline.from_pretrained(ID, cache_dir=tmp_path / "a")
    HfApi().delete_file("denoiser/pdiff_hf.py", ID)
    HfApi().delete_file("base_model/transformers.py", ID)
    PDiffPipeline.from_pretrained(ID, cache_dir=tmp_path / "a")
    index = json.loads(files(published)["model_index.json"])
    index["_class_name"] = ["pipeline", "PDiffPipeline"]
    HfApi().upload_file(path_or_fileobj=json.dumps(index).encode(), path_in_repo="model_index.json", repo_id=ID)
    for cls in (PDiffPipeline, DiffusionPipeline):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            cls.from_pretrained(ID, cache_dir=tmp_path / "a")
    assert not marker.exists()
    DiffusionPipeline.from_pretrained(ID, custom_pipeline=ID, trust_remote_code=True, cache_dir=tmp_path / "b")
    assert marker.exists()


# ------------------------------------------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        (ID, "wrong-token", "the Hub answered 401 .*hf auth login"),
        ("bob/generator", "alice-token", r"the token belongs to alice, who can push to \['alice', 'lab'\]"),
        (ID, "reader-token", "the Hub answered 403 .*token that can write"),
    ],
)
def test_whoever_may_not_write_is_told_so(hub, pipe, repo_id, token, message):
    with pytest.raises(HubError, match=message):
        pipe.push_to_hub(repo_id, token=token)
    assert not hub.repos


def test_without_a_token(hub, pipe, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login"):
        pipe.push_to_hub(ID)
    assert not hub.repos


def test_a_private_push_does_not_end_up_in_a_public_repository(published):
    with pytest.raises(HubError, match="exists and is public"):
        make_pipeline(make_network(1), seed=1).push_to_hub(ID, private=True)
    assert len(published.repos["models", ID].titles) == 2


def test_an_invalid_card_is_found_out_before_anything_is_created(hub, run):
    with pytest.raises(HubError, match='"license" must be one of'):
        push_run_to_hub(run.folder, ID, license="my-own")
    assert not hub.repos


@pytest.mark.parametrize(
    ("method", "path", "fault"),
    [
        ("POST", "/repos/create", {"status": 500}),
        ("POST", "/preupload/", {"status": 503}),
        ("POST", "/objects/batch", {"status": 500}),
        ("PUT", "/lfs/", {"status": 503}),
        ("PUT", "/lfs/", {"cut_after": 1000}),
        ("POST", "/commit/", {"status": 502}),
        ("POST", "/commit/", {"cut_after": 2000}),
    ],
)
def test_a_push_that_fails_publishes_nothing_and_can_be_repeated(hub, pipe, no_waiting, tmp_path, method, path, fault):
    hub.faults.append(Fault(method, path, times=100, **fault))
    with pytest.raises(HubError, match=f"'{ID}' could not be pushed: .*push again"):
        pipe.push_to_hub(ID)
    assert not hub.repos or files(hub) == {}
    hub.faults.clear()
    pipe.push_to_hub(ID)
    assert set(files(hub)) == COMPONENTS | {"pipeline.py", "README.md"}
    assert hub.repos["models", ID].titles == ["initial commit", "Upload PDiffPipeline"]
    assert torch.equal(sample(PDiffPipeline.from_pretrained(ID, cache_dir=tmp_path)), sample(pipe))


def test_a_failed_renewal_leaves_the_old_generator(published, pipe, no_waiting, tmp_path):
    published.cut("PUT", "/lfs/", after=1000, times=100)
    with pytest.raises(HubError):
        make_pipeline(make_network(1), seed=1).push_to_hub(ID)
    assert torch.equal(sample(PDiffPipeline.from_pretrained(ID, cache_dir=tmp_path)), sample(pipe))


def test_what_has_arrived_is_not_sent_again(hub, pipe):
    hub.fail("POST", "/commit/", status=503)
    with pytest.raises(HubError):
        pipe.push_to_hub(ID)
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 3
    pipe.push_to_hub(ID)
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 3


def test_a_push_between_is_not_overwritten(published, pipe, monkeypatch):
    """Another process pushes after this one has looked at the repository."""
    upload = HfApi.preupload_lfs_files

    def another_push_first(self, *args, **kwargs):
        monkeypatch.setattr(HfApi, "preupload_lfs_files", upload)
        HfApi().upload_file(path_or_fileobj=b"1", path_in_repo="notes.md", repo_id=ID)
        return upload(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", another_push_first)
    with pytest.raises(HubError, match="A commit has happened since"):
        make_pipeline(make_network(1), seed=1).push_to_hub(ID)
    assert published.repos["models", ID].titles[-1] != "Upload PDiffPipeline"


# ------------------------------------------------------------------------------------------------------ the model card


def test_the_card_of_a_run(hub, run):
    push_run_to_hub(run.folder, "lab/digits", license="mit")
    card = ModelCard.load("lab/digits")
    card.validate()
    report = json.loads((run.folder / "evaluation" / "report.json").read_text())
    generated = next(group for group in report["groups"] if group["name"] == "generated")

    info = HfApi().model_info("lab/digits")
    assert (info.library_name, info.pipeline_tag, info.card_data.license) == ("pdiff_hf", "other", "mit")
    assert {"diffusers", "pdiff-hf"} <= set(info.tags)
    assert card.data.base_model is None and card.data.datasets is None  # neither is on the Hub
    assert card.data.model_name == "digits"
    results = {result.metric_name: result for result in card.data.eval_results}
    mean = results["Mean accuracy (%) of 6 networks"]
    assert mean.metric_value == pytest.approx(generated["measures"]["score_mean"], abs=1e-4)
    assert (mean.task_type, mean.dataset_type, mean.dataset_split) == ("image-classification", "digits", "test")

    check_markdown(card.text, run.folder)
    assert "> " + " ".join(report["verdict"]) in card.text
    summary = report["summary"]
    assert [summary["header"], *summary["rows"]] in tables(card.text) and summary["about"] in card.text
    assert all(f"> **Warning:** {warning}" in card.text for warning in report["warnings"])
    assert "pip install -e ." in card.text
    assert "scikit-learn's digits" in card.text and "num_snapshots: 12" in card.text
    assert "## What it does not do" in card.text
    text = re.sub("```.*?```", "", card.text, flags=re.DOTALL)
    assert re.findall(r"^# .*", text, re.MULTILINE) == ["# digits"]
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", card.text)
    assert links and set(links) <= set(files(hub, "lab/digits"))


@pytest.mark.slow
def test_the_card_of_a_family_of_tasks(hub, family_run):
    run = family_run
    push_run_to_hub(run.folder, "lab/on-demand")
    card = ModelCard.load("lab/on-demand")
    card.validate()
    report = json.loads((run.folder / "evaluation" / "report.json").read_text())
    accuracies = Report.from_dict(report).generated.scores()
    (result,) = card.data.eval_results
    assert result.metric_name == "Mean accuracy (%) on 3 unseen tasks (test)"
    assert result.metric_value == pytest.approx(sum(accuracies) / 3, abs=1e-4)
    check_markdown(card.text, run.folder)
    assert "> " + " ".join(report["verdict"]) in card.text
    assert [report["summary"]["header"], *report["summary"]["rows"]] in tables(card.text)
    fields = [["field", "value"], ["`angle`", "an angle with period 360"], ["`invert`", "one of no, yes"]]
    assert [*fields, ["`occlude`", "one of none, left, right, top, bottom"]] in tables(card.text)
    assert "on networks for 6 tasks of the family `transformed`" in card.text
    assert "learned from one task" not in card.text and "variations of the snapshots" not in card.text
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", card.text)
    assert "evaluation/accuracy_along_field.png" in links and set(links) <= set(files(hub, "lab/on-demand"))
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], names)
    assert names["condition"] == {"angle": 36, "invert": "no", "occlude": "none"} and len(names["networks"]) == 8
    generator = torch.Generator().manual_seed(0)
    expected = run.pipeline(8, 4, generator, condition=names["condition"], output_type="model").parameters
    for name, tensor in expected[7].state_dict().items():
        assert torch.equal(names["networks"][7].state_dict()[name], tensor)


def test_what_is_private_about_a_run_is_known():
    """Of the settings that are about the run itself, these may be published; a new one has to be decided on."""
    keys = {field.name for field in dataclasses.fields(RunSection)}
    published = {"seed", "mixed_precision", "gradient_accumulation_steps"}
    assert keys == set(PRIVATE_KEYS) | published


def test_a_report_of_another_version_is_not_published(hub, run, tmp_path):
    shutil.copytree(run.folder / "pipeline", tmp_path / "pipeline")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "report.json").write_text('{"groups": []}')
    with pytest.raises(HubError, match="is a report of format 1.*Evaluate again"):
        make_model_card(tmp_path / "pipeline", ID, run=tmp_path)


def test_the_card_of_a_measured_task(pipe, tmp_path):
    scorer = regression()
    snapshots = snapshots_around(scorer)
    pipe.save_pretrained(tmp_path / "pipeline")
    report_on(scorer, snapshots, snapshots[:3] + 0.1, tmp_path / "evaluation", baseline_models=1)
    card = make_model_card(tmp_path / "pipeline", ID, run=tmp_path)
    check_markdown(card.text, tmp_path)
    results = {result.metric_name: result for result in card.data.eval_results}
    assert set(results) == {"Mean MSE of 3 networks", "MSE of the network chosen on validation data"}
    assert card.data.metrics == ["MSE"] and "![" in card.text
    path = tmp_path / "evaluation" / "report.json"
    report = json.loads(path.read_text())
    generated = next(group for group in report["groups"] if group["kind"] == "generated")
    del generated["measures"]["score_best"]  # as of sets of data
    path.write_text(json.dumps(report))
    assert len(make_model_card(tmp_path / "pipeline", ID, run=tmp_path).data.eval_results) == 1


def test_the_code_of_the_card_works(hub, pipe):
    pipe.push_to_hub(ID)
    text = ModelCard.load(ID).text
    check_markdown(text)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and len(names["networks"]) == 200
    assert names["networks"][0](torch.randn(1, 3, 32, 32)).logits.shape == (1, 4)


@pytest.mark.parametrize(
    ("model", "dataset", "base_model", "datasets"),
    [
        ("timm/resnet18.a1_in1k", "org/images", "timm/resnet18.a1_in1k", "org/images"),
        ("resnet18", "org/images:small", None, "org/images"),
        ("../models/mine", "/data/mine", None, None),
    ],
)
def test_the_card_names_what_is_on_the_hub(hub, pipe, tmp_path, model, dataset, base_model, datasets):
    pipe.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "recipe.yaml").write_text(f"model: {model}\ndataset: {dataset}\noutput_dir: /home/alice/out\n")
    card = make_model_card(tmp_path / "pipeline", ID, run=tmp_path)
    card.validate()
    assert (card.data.base_model, card.data.datasets) == (base_model, datasets)
    assert "It has not been evaluated" in card.text and card.data.eval_results is None
    assert not any(text in str(card) for text in ("/home/alice", "/data/", "../"))


# --------------------------------------------------------------------------------------------- the parameter data set


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    layout = ParameterLayout(("conv.weight", "bias"), ((2, 3), (4,)), ("float32", "float16"))
    folder = tmp_path_factory.mktemp("snapshots") / "snapshots"
    with SnapshotWriter(folder, layout, metrics=("validation_accuracy",)) as writer:
        for step, row in enumerate(torch.randn(20, 10).half().float()):
            writer.write(row, step=step, seed=3, validation_accuracy=90 + step / 10)
    return folder


def test_snapshots_come_back_identical(hub, snapshots, tmp_path):
    push_snapshots_to_hub(snapshots, "alice/snapshots")
    repo = hub.repos["datasets", "alice/snapshots"]
    assert repo.titles == ["initial commit", "Upload parameter snapshots"]
    expected, layout = load_snapshots(snapshots)
    pulled, pulled_layout = load_snapshots("alice/snapshots", cache_dir=tmp_path)
    assert pulled_layout == layout and pulled.features == expected.features
    assert torch.equal(parameter_matrix(pulled, layout), parameter_matrix(expected, layout))
    for column in ("step", "seed", "validation_accuracy"):
        assert pulled[column][:] == expected[column][:]
    streamed = list(datasets.load_dataset("alice/snapshots", split="train", streaming=True))
    assert torch.equal(torch.tensor([row["parameters"] for row in streamed]), parameter_matrix(expected, layout))
    streamed = datasets.load_dataset("alice/snapshots", "layout", split="train", streaming=True)
    assert [row["name"] for row in streamed] == ["conv.weight", "bias"]


def test_the_conditions_of_snapshots_come_back(hub, tmp_path):
    layout = ParameterLayout(("bias",), ((4,),), ("float32",))
    fields = Fields({"angle": {"type": "angle"}, "word": {"type": "category", "values": ["a", "b"]}})
    with SnapshotWriter(tmp_path / "snapshots", layout, fields=fields) as writer:
        for step, condition in enumerate(({"angle": 3.0, "word": "b"}, {"word": "a"})):
            writer.write(torch.randn(4), step=step, seed=3, condition=condition)
    push_snapshots_to_hub(tmp_path / "snapshots", "alice/conditions")
    found = load_fields("alice/conditions", cache_dir=tmp_path / "cache")
    pulled, _ = load_snapshots("alice/conditions", cache_dir=tmp_path / "cache")
    assert found.to_dict() == load_fields(tmp_path / "snapshots").to_dict()
    assert found.conditions(condition_table(pulled, found)) == [
        {"angle": 3.0, "word": "b"},
        {"angle": None, "word": "a"},
    ]


def test_private_snapshots_on_a_branch(hub, snapshots, tmp_path):
    push_snapshots_to_hub(snapshots, "lab/snapshots", private=True, revision="v2")
    assert hub.repos["datasets", "lab/snapshots"].private
    assert files(hub, "lab/snapshots", kind="datasets") == {}
    dataset, _ = load_snapshots("lab/snapshots", revision="v2", cache_dir=tmp_path)
    assert len(dataset) == 20
    for repo_id, arguments in (("lab/snapshots", {"token": "bob-token"}), ("lab/nothing", {})):
        with pytest.raises(SnapshotError, match=f"'{repo_id}' is neither a folder nor a Hub id"):
            load_snapshots(repo_id, cache_dir=tmp_path / "other", **arguments)


def test_snapshots_whose_upload_was_cut(hub, snapshots, no_waiting, tmp_path):
    hub.cut("PUT", "/lfs/", after=100, times=100)
    with pytest.raises(HubError, match="Error while uploading"):
        push_snapshots_to_hub(snapshots, "alice/snapshots")
    assert files(hub, "alice/snapshots", kind="datasets") == {}
    hub.faults.clear()
    push_snapshots_to_hub(snapshots, "alice/snapshots")
    assert len(load_snapshots("alice/snapshots", cache_dir=tmp_path)[0]) == 20


# --------------------------------------------------------------------------------------------------------- the scripts


def run_script(monkeypatch, capsys, script, *argv) -> str:
    """What `script` prints, or the message that it ends with. It runs in this process: its imports take seconds."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
    capsys.readouterr()
    try:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    except SystemExit as end:
        return end.code
    return capsys.readouterr().out


@pytest.mark.slow
def test_train_pushes_what_it_has_made(hub, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("".join(f"{key}: {value}\n" for key, value in TINY.items()))
    argv = ["train.py", recipe, "--output_dir", tmp_path / "out", "--push_to_hub", "--hub_private_repo"]
    refused = run_script(monkeypatch, capsys, *argv, "--hub_model_id", "bob/digits")
    assert refused.startswith("error: cannot push to 'bob/digits'")
    refused = run_script(monkeypatch, capsys, *argv, "--stages", "base")
    assert refused == "error: push_to_hub needs a finished generator, which the chosen stages do not make"
    assert not (tmp_path / "out").exists() and not hub.repos

    argv += ["--hub_model_id", "lab/digits"]
    hub.fail("POST", "/commit/", status=503)
    failed = run_script(monkeypatch, capsys, *argv)
    assert failed.startswith("error: ") and failed.endswith("push again")
    assert files(hub, "lab/digits") == {}
    assert f"{hub.url}/lab/digits/commit/" in run_script(monkeypatch, capsys, *argv)
    assert hub.repos["models", "lab/digits"].private
    assert COMPONENTS | {"pipeline.py", "README.md", "evaluation/report.json"} <= set(files(hub, "lab/digits"))


@pytest.mark.parametrize(
    ("part", "kind", "text"),
    [
        ("", "models", "license: mit"),
        ("pipeline", "models", "license: apache-2.0"),
        ("snapshots", "datasets", "layout/*"),
    ],
)
def test_the_script_for_what_is_finished(hub, run, monkeypatch, capsys, part, kind, text):
    argv = ["push_to_hub.py", run.folder / part, "--hub_model_id", "lab/it", "--hub_license", "mit", "--revision", "v2"]
    assert run_script(monkeypatch, capsys, *argv).startswith(f"Published: {hub.url}/")
    assert text in files(hub, "lab/it", "v2", kind)["README.md"].decode()
    assert files(hub, "lab/it", kind=kind) == {}


def test_a_space_with_the_page(hub, run, monkeypatch, capsys):
    """It has the package itself, because no index has it, and opens with the generator."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extra = [f"{line}; extra == 'app'" for line in setup["options.extras_require"]["app"].split("\n") if line]
    lines = [line for line in setup["options"]["install_requires"].split("\n") if line and line[0] != "#"] + extra
    monkeypatch.setattr("importlib.metadata.requires", lambda name: [*lines, "peft >= 0.17; extra == 'peft'"])
    monkeypatch.setattr("importlib.metadata.version", lambda name: "6.31.0")
    argv = ["push_to_hub.py", run.folder, "--hub_model_id", "lab/it", "--space"]
    assert f"Its page: {hub.url}/" in run_script(monkeypatch, capsys, *argv)
    assert "model_index.json" in files(hub, "lab/it")
    space = {name: content.decode() for name, content in files(hub, "lab/it", kind="spaces").items()}
    assert 'build_app("lab/it").launch' in space["app.py"]
    assert "sdk: gradio\nsdk_version: 6.31.0\napp_file: app.py" in space["README.md"]
    needed = space["requirements.txt"].split("\n")
    assert {"torch>=2.6", "matplotlib>=3.10"} <= set(needed)
    assert not any("gradio" in line or "peft" in line for line in needed)
    for module in ("", "scripts/", "pipelines/", "hub/"):
        assert f"pdiff_hf/{module}__init__.py" in space
    assert {"pdiff_hf/__init__.pyi", "pdiff_hf/scripts/page.py", "pdiff_hf/hub/card.md.jinja"} <= set(space)
    compile(space["app.py"], "app.py", "exec")
    argv[1] = run.folder / "snapshots"
    assert "holds snapshots" in run_script(monkeypatch, capsys, *argv)


def test_the_script_for_what_is_not_finished(hub, tmp_path, monkeypatch, capsys):
    assert run_script(monkeypatch, capsys, "push_to_hub.py", tmp_path).startswith("error: ")
    assert not hub.repos
