"""The main job is killed at random moments of all its stages, or stopped, and ends as if nothing had happened."""

import random
import shutil
import signal

import pytest
from support.run_server import FLAGS, RESUME, STAGES, files


@pytest.mark.slow
def test_killed_at_random_moments_of_all_stages_it_ends_with_the_same_bits(run_server, whole_run, full, tmp_path):
    """With `--full` up to 25 times, otherwise up to 5 times."""
    expected, operations = whole_run
    chance = random.Random(0)
    times = 5 if full else 1
    folder = tmp_path / "out"
    killed = []
    for stage in STAGES:
        for time in range(times):
            if (folder / "stages" / f"{stage}.json").is_file():
                break  # the last kill came just after its end
            # First anywhere; then soon, because after a checkpoint there is less to do. The last stage must not end.
            most = operations[stage] * (3 if stage == "evaluate" else 4) // 4 if time == 0 else 10
            at = chance.randint(1, most)
            # At once, which is just before the operation, or a little after, which may be in the middle of it.
            delay = chance.choice([0.0, chance.uniform(0.0, 0.02)])
            result = run_server.run(folder, *RESUME, at=(stage, at), delay=delay)
            assert result.reached and result.status == -signal.SIGKILL, (stage, at, result)
            killed.append((stage, at, delay))
    assert {stage for stage, *_ in killed} == set(STAGES) and len(killed) >= 20 * full
    print("killed at", killed)
    last = run_server.run(folder, *RESUME)
    assert last.status == 0, last.errors
    assert files(folder) == files(expected)


@pytest.mark.slow
def test_stopped_in_every_stage_it_says_how_to_go_on_and_does(run_server, whole_run, tmp_path):
    expected, operations = whole_run
    chance = random.Random(1)
    folder = tmp_path / "out"
    for stage in STAGES:
        # Not among the last operations, so that the stop comes within the stage.
        at = chance.randint(1, operations[stage] * 3 // 4)
        result = run_server.run(folder, *RESUME, at=(stage, at), action="interrupt")
        assert result.reached and result.status == 1, (stage, at, result)
        last_line = result.errors.strip().splitlines()[-1]
        assert last_line.startswith("stopped; go on with: accelerate launch ")
        assert last_line.endswith(" --resume_from_checkpoint latest") and f"--output_dir={folder}" in last_line
        assert "Traceback" not in result.errors
        assert not [path for path in folder.rglob("*.part") if path.name != ".snapshots.part"]
    result = run_server.run(folder, *RESUME)
    assert result.status == 0, result.errors
    assert files(folder) == files(expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stages/denoiser.json", "out/pipeline", ".pipeline.part", ".denoiser.json.part"])
def test_killed_while_an_older_result_is_replaced_it_takes_neither_for_the_other(run_server, whole_run, tmp_path, name):
    """The generator of other settings takes the place of the first one, and is killed before the named operation."""
    expected, _ = whole_run
    folder = tmp_path / "out"
    shutil.copytree(expected, folder)
    others = [*FLAGS, "--stages=denoiser", "--denoiser_steps=9", "--overwrite_output_dir=true"]
    result = run_server.run(folder, *others, at=name)
    assert result.reached and result.status == -signal.SIGKILL, result
    result = run_server.run(folder, *FLAGS, "--stages=denoiser")
    assert result.status == 0, result.errors
    assert files(folder) == files(expected)


@pytest.mark.slow
def test_checkpoints_of_other_settings_are_not_gone_on_with(run_server, whole_run, tmp_path):
    _, operations = whole_run
    folder = tmp_path / "out"
    run_server.run(folder, *RESUME, at=("base", operations["base"] // 2))
    kept = files(folder)
    assert any(name.startswith("checkpoints/base/checkpoint-") for name in kept)
    result = run_server.run(folder, *RESUME, "--base_learning_rate=0.01")
    assert result.status == 1
    assert (
        "error: the checkpoints of stage base" in result.errors and "base_learning_rate: 0.001 there" in result.errors
    )
    assert files(folder) == kept
    for other in (folder, tmp_path / "new"):
        assert run_server.run(other, *FLAGS, "--base_learning_rate=0.01", "--stages=base").status == 0
    assert files(folder / "base_model") == files(tmp_path / "new" / "base_model")
