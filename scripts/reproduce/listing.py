"""What experiments there are, which runs they need, and about what these cost."""

from pdiff_hf.evaluation.render import table

from .plan import Plan, expand
from .tables import ARCHITECTURES, EXPERIMENTS, find_experiment


def list_experiments(**arguments) -> str:
    """Every table and figure, and what it costs; `arguments` are those of `expand`."""
    rows, at_paper = [], arguments.get("scale") == "paper"
    for name, experiment in EXPERIMENTS.items():
        count, price = _cost(expand(name, ".", **arguments), at_paper)
        rows.append(
            [name, *(("–", "minutes") if experiment.measures_memory else (str(count), price)), experiment.title]
        )
    about = "Costs are those of an A100 in the paper, 1 to 3 h a run." if at_paper else "Costs are of one slow core."
    about += " They are lower where runs share stages, which are run once, or stages are finished already."
    return "\n".join([table(["name", "runs", "cost", "title"], rows), "", about])


def list_runs(name: str, **arguments) -> str:
    """The runs of an experiment by name, with what they vary and what each costs by itself."""
    rows, at_paper = {}, arguments.get("scale") == "paper"
    for row, recipes in expand(name, ".", **arguments):
        price = _cost([(row, recipes)], at_paper)[1] if recipes else "–"
        varies = ", ".join(f"{key}: {value}" for key, value in row.varies.items()) or "–"
        rows[row.run] = [row.run, price, varies]
    text = table(["run", "cost", "varies"], list(rows.values()))
    return f"{name}: {find_experiment(name).title}\n\n{text}"


def _cost(plan: Plan, at_paper: bool) -> tuple[int, str]:
    """The number of different runs of a plan, and what they cost."""
    minutes = {r.output_dir: ARCHITECTURES[row.architecture].minutes for row, recipes in plan for r in recipes}
    count = len(minutes)
    return count, f"{count} to {3 * count} h" if at_paper else f"{sum(minutes.values())} min"
