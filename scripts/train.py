"""
Turns a network's training run into a generator of new, working networks, and says how good they are.

    accelerate launch scripts/train.py                                    # networks on demand, for kinds of digits
    accelerate launch scripts/train.py digits.yaml                        # many networks of one task, as in the paper
    accelerate launch scripts/train.py scripts/recipes/fashion_mnist.yaml # a recipe
    accelerate launch scripts/train.py RECIPE.yaml --num_snapshots 100    # with something changed
    accelerate launch scripts/train.py --stages denoiser evaluate         # some stages only
    accelerate launch scripts/train.py --resume_from_checkpoint latest    # continue a run that was stopped
    accelerate launch scripts/train.py --push_to_hub --hub_model_id user/name  # publish the generator with its report
    accelerate launch --quiet scripts/train.py ...                 # without the launcher's traceback after an error

On several hosts (on CPUs with ACCELERATE_USE_CPU=true and GLOO_SOCKET_IFNAME=eth0, or whatever joins them):

    torchrun --nnodes 2 --node_rank 0 --master_addr FIRST_HOST scripts/train.py --output_dir SHARED_FOLDER
    torchrun --nnodes 2 --node_rank 1 --master_addr FIRST_HOST scripts/train.py --output_dir SHARED_FOLDER
"""

import sys

from pdiff_hf.run.cli import ConfigParser
from pdiff_hf.utils.terminal import start_script


def main() -> None:
    config, _ = ConfigParser("on_demand.yaml", description=start_script(__doc__)).parse_config()
    # These take seconds to import, which a mistyped flag should not wait for.
    from pdiff_hf.evaluation.report import Report
    from pdiff_hf.hub.push import push_run_to_hub, resolve_repo_id
    from pdiff_hf.run.processes import start_processes
    from pdiff_hf.run.terminal import command, one_line_errors, quiet_libraries
    from pdiff_hf.run.trainer import execute, prepare
    from pdiff_hf.scripts.opponents import wanted_opponents
    from pdiff_hf.utils import names

    with one_line_errors():
        state = start_processes()
    quiet_libraries(state.is_main_process)
    try:
        with one_line_errors():
            run = prepare(config, extra_groups=wanted_opponents(config))
            repo_id = config.hub_model_id or run.folder.name
            if config.push_to_hub and state.is_main_process:
                repo_id = resolve_repo_id(repo_id)  # a wrong token must not be found out after hours
            execute(run)
            if config.push_to_hub and state.is_main_process:
                with run.lock():
                    url = push_run_to_hub(
                        run.folder,
                        repo_id,
                        private=config.hub_private_repo or None,
                    )
                print(f"The generator is on the Hub: {url}")
    except KeyboardInterrupt:
        again = [a for a in sys.argv[1:] if a not in ("--resume_from_checkpoint", "latest")]
        again += ["--resume_from_checkpoint", "latest"]
        sys.exit(f"\nstopped; go on with: {command('train', *again, launcher='accelerate launch')}")
    with one_line_errors():
        if state.is_main_process and run.is_finished("evaluate"):
            report = run.folder / names.EVALUATION / names.REPORT
            print(Report.load(report).to_terminal())
            generator = names.generator_folder(run.folder)
            print(f"The generator is in {generator}, the report in {report.parent}. Next:")
            print(f"  {command('generate', generator, '--num_models', 10)}")
            print(f"  {command('app', run.folder)}")
    state.destroy_process_group()  # its threads would otherwise be ended, at times with an error, by the interpreter


if __name__ == "__main__":
    main()
