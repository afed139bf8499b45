"""The README.md of a run folder: what was made, how it compares, how to load and repeat it."""

from __future__ import annotations

from collections.abc import Mapping

from llmprune.recipe import Recipe


def run_card(
    recipe: Recipe,
    origin: str,
    samples: Mapping[str, str],
    table: str,
    *,
    evaluation_table: str = "",
    bench_table: str = "",
) -> str:
    """Markdown for the run folder.

    Args:
        recipe: Of the run; quoted whole.
        origin: Where the dense model really came from.
        samples: `dense` and `pruned` -> a greedy generation.
        table: The figures, dense beside pruned, as Markdown.
        evaluation_table, bench_table: What `llmprune eval` and `bench` found, where they were run.
    """
    remote = ", trust_remote_code=True" if recipe.export.format == "per_layer" else ""
    more = _section("Evaluation", "eval", evaluation_table)
    more += _section("Latency and memory", "bench", bench_table)
    quoted = "\n>\n".join(f"> **{name}**: {' '.join(s.split())}" for name, s in samples.items())
    return f"""# {origin.rpartition("/")[2]}, pruned

Pruned with llmprune from {origin}.

{table}
Greedy continuation of {recipe.evaluation.prompt!r}:

{quoted}

{more}## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model"{remote})
tokenizer = AutoTokenizer.from_pretrained("model")
```

`verification.json` says how far the reloaded model's logits are from the recorded ones;
`llmprune verify` checks it again.

## Repeat it

`llmprune prune recipe.yaml`, where recipe.yaml is

```yaml
{recipe.to_yaml()}```
"""


def _section(heading: str, command: str, table: str) -> str:
    """A table of another command under its heading; nothing where there is none."""
    if not table:
        return ""
    return f"## {heading}\n\nMeasured by `llmprune {command}`.\n\n{table.strip()}\n\n"
