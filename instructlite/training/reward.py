"""The reward model, the second stage of InstructGPT: a scalar head and an adapter, from comparisons and rankings.

One row is one prompt with its K ranked answers: K forward passes instead of K(K-1), all pairs of a prompt in one batch
element with weight 1/pairs, because pairs dealt out singly overfit within an epoch (Ouyang 2022, section 3.5). TRL's
RewardTrainer does the rest. Answers are scored at the token that ends them, as PPO will score its own.
"""

import gc
import json
import random
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from statistics import NormalDist, fmean, pstdev
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import suppress_seqcls_warning

from ..config import RewardOptions
from ..data.records import as_groups, write_records
from ..errors import InstructLiteError
from ..models.base import Base, base_of, lora_config
from ..models.manifest import Adapter, add_members, verify
from .checkpoints import Checkpointing
from .interrupt import Interruption
from .policy_samples import add_policy_samples
from .ppo_math import ordered, ranking_loss
from .recipe import (
    HARMLESS,
    SOURCES,
    Recipe,
    Run,
    check_target,
    full_precision,
    parent_of,
    progress,
    save_adapter,
    training_metrics,
    wait_for_all_processes,
    without_dataset_bars,
)
from .sft import report_too_long
from .shares import EqualRows, Row, dealt
from .work import (
    MEMBERS,
    RECORD,
    flat,
    forget,
    has_saved,
    is_main_process,
    publish,
    read_json,
    refuse_differences,
    work_directory,
    working,
    write_record,
    write_text,
)

POLICY_SAMPLES = "policy_samples.jsonl"
STARTS = ("policy", "reward")  # roles of adapters that a reward model may start from
BIAS_SAMPLE = 256  # demonstrations scored for the bias; its standard error is then 1/16 of their spread


class RewardRecipe(Recipe, RewardOptions):
    """Train a reward adapter. With the SFT adapter as `model` it starts from that one, in its shape (`lora` is ignored).

    With a reward adapter as `model` it goes on from that one, head included; with an ensemble, each member from its own.

    Afterwards the scores are shifted so that `demonstrations` score 0 on average (without any, the best answers of the
    training data do). Hugging Face's sequence classifiers have no bias, so the shift stands in the manifest
    (`score_bias`): the directory loaded with plain PEFT scores `score - score_bias`.

    Metrics: with `eval_data` the held-out accuracy over pairs that are no ties, its 95 % Wilson interval (`eval_accuracy`,
    `_low`, `_high`, `eval_pairs`; pairs of one ranking are counted as independent) and that of preferring the longer
    answer (`eval_longer_wins`); `train_accuracy`, measured on each batch before it is learnt from; `score_mean` and
    `score_std` over the held-out answers (else over the answers that gave the bias), after the shift.

    With `policy_samples` the answers that were sampled stand in policy_samples.jsonl, beside the others to their prompts.

    With `ensemble` the directory is the first member's, the others stand in `member-1`, `member-2`, ... below it. Each is
    what a recipe of its own with the seed `seed` + its number would have written; a resumed run keeps those that are done.
    """

    name = "reward"
    config_class = RewardConfig

    def run(self, output_dir: str | Path, resume: bool = False) -> Adapter:
        if self.ensemble == 1:
            return super().run(output_dir, resume)
        target, main = Path(output_dir).absolute(), is_main_process()
        check_target(target)
        made_from = self._made_from(Run(self.name, target, target, self.resolved()))
        if resume and read_json(target / RECORD).get("ensemble_made_from") == made_from:
            return Adapter.load(output_dir)
        again = f"RewardRecipe(...).run({str(output_dir)!r}, resume=True)"
        with Interruption(again), working(target) if main else nullcontext(work_directory(target)) as work:
            if main and resume and has_saved(work):
                refuse_differences(work, read_json(work / RECORD).get("made_from", {}), made_from)
            elif main:
                forget(work)
            if main:
                write_record(work, made_from=made_from)
            paths = [work / MEMBERS / f"member-{number}" for number in range(self.ensemble)]
            for number, (path, start) in enumerate(zip(paths, self._starts(), strict=True)):
                # Without `resume` none is there. With it, one that is done is found to be made from the same.
                replace(self, model=start, seed=self.seed + number, ensemble=1).run(path, resume)
                gc.collect()  # its base, before the next one loads its own
            if main:
                publish(self._together(paths, work / target.name, made_from), target)
                forget(work)
        wait_for_all_processes()
        return Adapter.load(output_dir)

    def _starts(self) -> list[Any]:
        """What each member starts from."""
        parent = parent_of(self.model, roles=STARTS)
        if parent is None or parent.role == "policy":
            return [self.model] * self.ensemble
        if len(parent.members) != self.ensemble:
            found = len(parent.members)
            raise InstructLiteError(f"{parent}: {found} reward models, and ensemble={self.ensemble}; go on with as many (ensemble={found})")
        return parent.members

    def _made_from(self, run: Run) -> dict[str, Any]:
        """What decides what an ensemble becomes, as far as it is known before a base is loaded; each member knows the rest."""
        self._records(run)
        parent = parent_of(self.model, roles=STARTS)
        options = {name: value for name, value in run.config.items() if name not in SOURCES}
        training = {name: value for name, value in options.pop("training").items() if name not in HARMLESS}
        data = {name: source["sha256"] for name, source in run.data.items()}
        return flat({"start": parent.sha256 if parent else str(self.model), "data": data, **options, "training": training})

    def _together(self, paths: list[Path], directory: Path, made_from: dict[str, Any]) -> Path:
        """The first member's directory with the others in it."""
        runs = [read_json(path / RECORD) for path in paths]
        runs[0]["config"]["ensemble"], runs[0]["seconds"] = self.ensemble, round(sum(run["seconds"] for run in runs), 1)
        shutil.copytree(paths[0], directory)
        write_text(directory / RECORD, json.dumps(runs[0] | {"ensemble_made_from": made_from}, indent=2, ensure_ascii=False) + "\n")
        add_members(directory, paths[1:])
        return directory

    def train(self, run: Run) -> None:
        parent = parent_of(self.model, roles=STARTS)
        records, held_out, shown = self._records(run)
        if self.policy_samples:
            records = self._with_policy_samples(as_groups(records), parent, run)
        with suppress_seqcls_warning():  # that the head is new is no news
            base = base_of(self.model, self, head="score")
        config = self.trainer_config(run, base)
        groups = encode_groups(base, records, config.max_length, run)
        eval_groups = encode_groups(base, held_out, config.max_length, run, "eval_") if held_out else []
        parents = _lineage(parent)
        checkpoint = run.begin(base, config, parents)
        model = self._model(base, parent)
        with full_precision(model), without_dataset_bars():
            trainer = RankingTrainer(
                model=model, args=config, data_collator=Collator(base.pad_id), train_dataset=Dataset.from_list(groups),
                eval_dataset=Dataset.from_list(eval_groups) if eval_groups else None, processing_class=base.tokenizer,
            )  # fmt: skip
        trainer.head_learning_rate_scale = self.head_learning_rate_scale
        if self.length_controlled:
            trainer.length_weight = run.metrics["length_weight"] = length_weight(groups)
        run.watch(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        run.metrics |= training_metrics(trainer)
        run.metrics["train_accuracy"] = mean_over_steps("accuracy", trainer.state.log_history)
        bias = self._measure(run, trainer, self._anchors(base, shown, groups, config.max_length), eval_groups)
        save_adapter(model, base, run.directory, role="reward", score_bias=bias, parents=parents)

    def _with_policy_samples(self, groups: list[dict], parent: Adapter | None, run: Run) -> list[dict]:
        if parent is None or parent.role != "policy":
            raise InstructLiteError("policy_samples: nobody to sample from; pass the SFT adapter as `model`")
        limit = self.training.get("max_length", RewardConfig.max_length)
        found = add_policy_samples(groups, parent, self.policy_samples, options=self, seed=self.seed, max_length=limit)
        more = [group for group, before in zip(found, groups, strict=True) if group is not before]
        run.metrics["policy_samples"] = len(more)
        if is_main_process():
            write_records(run.directory / POLICY_SAMPLES, more)
        return found

    def _records(self, run: Run) -> tuple[list[dict], list[dict], list[dict]]:
        """Training data, held-out data and demonstrations."""
        # None: files of comparisons and of rankings are told apart by their keys. The starter data has both.
        records = run.records("comparisons", self.data, "comparisons" if self.data == "starter" else None)
        held_out = [] if self.eval_data is None else run.records("eval", self.eval_data)
        shown = [] if self.demonstrations is None else run.records("demonstrations", self.demonstrations, "demonstrations")
        return records, held_out, shown

    def _model(self, base: Base, parent: Adapter | None) -> PeftModel:
        head = ScalarHead(base.model.config.get_text_config().hidden_size).to(base.device)
        base.model.score = head
        if parent is None:
            return get_peft_model(base.model, _with_head(lora_config(self.lora, base.model, "SEQ_CLS")))
        verify(parent, base)
        model = get_peft_model(base.model, _with_head(PeftConfig.from_pretrained(str(parent.path))))
        weights = load_file(parent.path / "adapter_model.safetensors")
        result = set_peft_model_state_dict(model, {"base_model.model.score.weight": head.weight.data} | weights)
        missing = [name for name in result.missing_keys if ".lora_" in name]
        if result.unexpected_keys or missing:
            odd = (result.unexpected_keys + missing)[0]
            raise InstructLiteError(f"{parent.path}: does not fit a reward model ({odd}); start from the base model instead")
        return model

    def _anchors(self, base: Base, demonstrations: list[dict], groups: list[dict], max_length: int | None) -> list[list[int]]:
        """Token sequences that shall score 0 on average: at most BIAS_SAMPLE demonstrations, or best answers."""
        if demonstrations:
            anchors = [base.encode_prompt(row["prompt"]) + base.encode_completion(row["completion"]) for row in demonstrations]
        else:
            anchors = [row["responses_ids"][row["ranks"].index(min(row["ranks"]))] for row in groups]
        fitting = [ids for ids in anchors if max_length is None or len(ids) <= max_length] or anchors
        return random.Random(self.seed).sample(fitting, min(BIAS_SAMPLE, len(fitting)))

    def _measure(self, run: Run, trainer: RewardTrainer, anchors: list[list[int]], held_out: list[dict]) -> float:
        """The bias; everything measured of the finished model goes into the metrics."""
        sequences = anchors + [ids for group in held_out for ids in group["responses_ids"]]
        scores = score_sequences(trainer, sequences)
        bias = -fmean(scores[: len(anchors)])
        rest = iter(scores[len(anchors) :])
        by_group = [[next(rest) for _ in group["ranks"]] for group in held_out]
        spread = [score + bias for score in scores[len(anchors) if held_out else 0 :]]
        run.metrics |= {"score_bias": bias, "score_mean": fmean(spread), "score_std": pstdev(spread)}
        if held_out:
            right, pairs = right_pairs(by_group, held_out)
            lengths = [[len(ids) for ids in group["responses_ids"]] for group in held_out]
            longer, _ = right_pairs(lengths, held_out)
            low, high = wilson(right, pairs)
            run.metrics |= {
                "eval_accuracy": right / pairs, "eval_accuracy_low": low, "eval_accuracy_high": high, "eval_pairs": pairs,
                "eval_longer_wins": longer / pairs, "eval_length_correlation": length_correlation(by_group, lengths),
            }  # fmt: skip
        return bias


class ScalarHead(nn.Linear):
    """hidden -> 1 without a bias, in fp32 whatever the base computes in; small at first (Stiennon 2020: 1/sqrt(hidden + 1)).

    Started at 0 instead, the demo's reward model was no better (0.60 [0.52, 0.68] of held-out pairs, against 0.65 and 0.69).
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(self.weight, std=(hidden_size + 1) ** -0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float())


def _lineage(parent: Adapter | None) -> dict[str, str]:
    """sha256 by role of what a reward model comes from. One that goes on keeps the SFT adapter that the first one started from."""
    if parent is None:
        return {}
    if parent.role == "policy":
        return {"sft": parent.sha256}
    return {role: sha256 for role, sha256 in parent.manifest.parents.items() if role == "sft"} | {"reward": parent.sha256}


def _with_head(config: LoraConfig) -> LoraConfig:
    config.task_type, config.inference_mode, config.modules_to_save = "SEQ_CLS", False, ["score"]
    return config


def encode_groups(base: Base, records: list[dict], max_length: int | None, run: Run, prefix: str = "") -> list[dict]:
    """Comparisons and rankings as {responses_ids: K token lists with the prompt in each, ranks: K, length: the longest}.

    A group with an answer beyond `max_length` is left out whole: its other pairs would stand for all of it.
    """
    groups = []
    for group in as_groups(records):
        prompt = base.encode_prompt(group["prompt"])
        responses = [prompt + base.encode_completion(text) for text in group["responses"]]
        groups.append({"responses_ids": responses, "ranks": [float(rank) for rank in group["ranks"]], "length": max(map(len, responses))})
    kept = [group for group in groups if max_length is None or group["length"] <= max_length]
    report_too_long(run, [group["length"] for group in groups], len(kept), max_length, prefix, "groups")
    return kept


@dataclass
class Collator:
    """Groups -> right-padded `input_ids` and `attention_mask` (answers, length) with `groups` and `ranks` (answers,)."""

    pad_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        answers = [torch.tensor(ids) for row in rows for ids in row["responses_ids"]]
        lengths = torch.tensor([len(answer) for answer in answers])
        ids = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=self.pad_id)
        ids = nn.functional.pad(ids, (0, -ids.shape[1] % 8), value=self.pad_id)  # fewer shapes: on a CPU each costs compiled kernels
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "groups": torch.tensor([number for number, row in enumerate(rows) for _ in row["ranks"]]),
            "ranks": torch.tensor([rank for row in rows for rank in row["ranks"]]),  # nan: an answer that only fills the batch up
        }


class RankingTrainer(EqualRows, Checkpointing, RewardTrainer):
    """TRL's RewardTrainer on groups of K ranked answers, with a learning rate of its own for the head; a group counts as a row.

    Relies on trl 1.16: `_prepare_dataset` (called on each data set), `_set_signature_columns_if_needed` (columns that
    reach the collator and the length-grouping sampler), `_metrics` (averaged and emptied by `log`).
    """

    head_learning_rate_scale = 1.0
    length_weight = 0.0

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # tokenized already

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["responses_ids", "ranks", "length"]

    def blank(self, row: Row) -> Row:
        return {"responses_ids": [row["responses_ids"][0][:1]], "ranks": [float("nan")]}

    def rows_that_count(self, inputs: dict[str, Tensor]) -> int:
        groups = inputs["groups"]
        return len(groups[ordered(groups, inputs["ranks"]).any(1)].unique())

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        scores = outputs.logits[:, 0].float()
        lengths = self.length_weight * inputs["attention_mask"].sum(1)
        loss, accuracy = ranking_loss(scores, inputs["groups"], inputs["ranks"], self.args.center_rewards_coefficient or 0.0, lengths)
        loss = self.of_update(loss, inputs, num_items_in_batch)
        self._measure(scores.detach().double(), accuracy.double(), inputs, "train" if model.training else "eval")
        return (loss, outputs) if return_outputs else loss

    def _measure(self, scores: Tensor, accuracy: Tensor, inputs: dict[str, Tensor], mode: str) -> None:
        """Into TRL's metrics, over the batches of all processes."""
        pairs, counted = ordered(inputs["groups"], inputs["ranks"]).sum(), ~inputs["ranks"].isnan()
        known, tokens = scores[counted], inputs["attention_mask"][counted].sum()
        sums = [accuracy * pairs, pairs, counted.sum(), known.sum(), known.square().sum(), tokens]
        right, pairs, answers, total, squares, tokens = self.accelerator.reduce(torch.stack([x.double() for x in sums]), "sum").tolist()
        variance = max(0.0, squares - total**2 / answers) / max(1, answers - 1)
        found = {"accuracy": right / max(1, pairs), "mean_reward": total / answers, "std_reward": variance**0.5}
        for name, value in found.items():
            self._metrics[mode][name].append(value)
        self._total_train_tokens += tokens if mode == "train" else 0
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        head = next(p for name, p in self.model.named_parameters() if "score.modules_to_save" in name)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not head]
        options = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
        optimizer.add_param_group({**options, "params": [head], "lr": self.args.learning_rate * self.head_learning_rate_scale})
        return optimizer


def length_weight(groups: list[dict]) -> float:
    """What one more token is worth by itself: w of the best fit of sigmoid(w * (tokens of the better - of the worse answer)).

    The reward model then learns from score + w * tokens, and w is dropped: a product of experts, of which the biased one is
    known beforehand (Clark 2019, arXiv:1909.03683). Without it a small reward model is mostly a measure of length (Singhal 2023,
    arXiv:2310.03716), and a policy trained on it writes until it is cut off.
    """
    margins = torch.tensor([
        float(len(group["responses_ids"][better]) - len(group["responses_ids"][worse]))
        for group in groups
        for better, worse in ordered_pairs(group["ranks"])
    ])  # fmt: skip
    scale, w = margins.std(unbiased=False).clamp(min=1.0), torch.zeros(())
    x = margins / scale
    for _ in range(50):  # Newton; a weak prior keeps w finite where the longer answer always wins
        share = torch.sigmoid(w * x)
        w = w + (((1 - share) * x).mean() - 1e-3 * w) / ((share * (1 - share) * x * x).mean() + 1e-3)
    return (w / scale).item()


def mean_over_steps(metric: str, logs: list[dict[str, Any]]) -> float:
    """Mean over all steps of what the logs give as means over the steps since the log before."""
    logged = [(log["step"], log[metric]) for log in logs if metric in log]
    before = [0, *(step for step, _ in logged)]
    return sum((step - last) * value for last, (step, value) in zip(before, logged, strict=False)) / logged[-1][0]


@torch.no_grad()
def score_sequences(trainer: RewardTrainer, sequences: list[list[int]]) -> list[float]:
    """What the model in training gives each sequence, without any bias; several processes share the work."""
    model, args = trainer.model.eval(), trainer.args
    batches = dealt(list(map(len, sequences)), 2 * args.per_device_eval_batch_size, args.process_index, args.world_size)
    scores: dict[int, float] = {}
    with progress("reward: scoring", len(batches)) as advance:
        for rows, _ in batches:
            batch = trainer.data_collator([{"responses_ids": [sequences[i]], "ranks": [0.0]} for i in rows])
            inputs = {name: batch[name].to(trainer.args.device) for name in ("input_ids", "attention_mask")}
            with trainer.accelerator.autocast():
                logits = model(**inputs, use_cache=False).logits[:, 0]
            scores |= zip(rows, logits.float().tolist(), strict=True)
            advance()
    found = gather_object([scores]) if args.world_size > 1 else [scores]
    together = {i: value for part in found for i, value in part.items()}
    return [together[i] for i in range(len(sequences))]


def right_pairs(values: list[Sequence[float]], groups: list[dict]) -> tuple[float, int]:
    """How many pairs that are no ties have the higher value at the better answer (equal values: a half), and of how many."""
    right, pairs = 0.0, 0
    for value, group in zip(values, groups, strict=True):
        for better, worse in ordered_pairs(group["ranks"]):
            pairs += 1
            right += 0.5 * ((value[better] > value[worse]) + (value[better] >= value[worse]))
    return right, pairs


def ordered_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse) answers of a group by their numbers; ties are none."""
    return [(i, j) for i, j in permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]


def length_correlation(scores: list[list[float]], lengths: list[list[int]]) -> float:
    """Correlation of the differences in score with those in length, over all pairs of answers to one prompt; 0 where none varies."""
    differences = [
        (score[i] - score[j], length[i] - length[j])
        for score, length in zip(scores, lengths, strict=True)
        for i, j in permutations(range(len(score)), 2)  # both ways round, so that the means are 0
    ]
    x, y = torch.tensor(differences, dtype=torch.float64).T
    return (x @ y / (x.norm() * y.norm()).clamp(min=1e-12)).item()


def wilson(right: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (1927): unlike the normal one it stays within 0 and 1, and holds for small n."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / n + spread / (4 * n)) ** 0.5
    return middle - half, middle + half
