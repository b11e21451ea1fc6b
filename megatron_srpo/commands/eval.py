"""srpo eval: evaluate a model folder, or the policy of a run."""

from megatron_srpo.commands.common import add_config_arguments, configured, is_first_rank
from megatron_srpo.config.schema import Config
from megatron_srpo.data.visible import visible

HELP = "evaluate model.hf_path by a configuration file"

add_arguments = add_config_arguments


@configured
def run(config: Config) -> int:
    """Evaluate, and print result.md on the first rank."""
    from megatron_srpo.evaluation.run import run_evaluation

    directory = run_evaluation(config)
    if is_first_rank():
        print(visible((directory / "result.md").read_text(encoding="utf-8")))
        print(f"result folder: {directory}  (result.json, result.md, samples/)")
    return 0
