"""DPO (Rafailov et al. 2023): a policy straight from comparisons, the alternative that PPO has to be better than.

TRL's DPOTrainer on tokens that InstructLite made itself, those of every other stage. The reference is a frozen copy of the adapter it
starts from, in the same base: TRL adds it as the PEFT adapter "ref", so that no second model is in memory.
"""

from typing import Any

import torch
import trl
from datasets import Dataset
from trl import DPOConfig

from ..config import DPOOptions
from ..data.records import as_groups
from ..models.base import Base, base_of
from ..progress import progress
from .checkpoints import Checkpointing
from .recipe import Recipe, Run, full_precision, parent_of, save_adapter, training_metrics, without_dataset_bars
from .reward import mean_over_steps, ordered_pairs, wilson
from .sft import head_on_completions, policy_model, report_too_long


class DPOTrainer(Checkpointing, trl.DPOTrainer):
    """TRL's on tokenized pairs, with crash-safe checkpoints.

    Relies on trl 1.16: `_prepare_dataset` (called on each data set), `_set_signature_columns_if_needed` (columns that reach the collator
    and the length-grouping sampler), `_metrics` (a value for each batch, emptied by `log`).
    """

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # tokenized already

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "length"})

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        self.model.train()  # PEFT has left it in eval mode, for the frozen reference, and `log` goes by that


class DPORecipe(Recipe, DPOOptions):
    """Train a policy on comparisons and rankings against the adapter it starts from (a bare base as `model`: against the base).

    A ranking counts as all its pairs that are no ties; a pair with an answer beyond `max_length` is left out.

    Metrics: with `eval_data` the share of held-out pairs whose better answer the policy has come to prefer, against the reference
    (`eval_accuracy`, its 95 % Wilson interval `_low`, `_high`, `eval_pairs`), the mean margin of the implicit rewards in nats times beta
    (`eval_margin`) and the loss (`eval_loss`); `train_accuracy` and `train_margin`, measured on each batch before it is learnt from.
    """

    name = "dpo"
    config_class = DPOConfig

    def train(self, run: Run) -> None:
        parent = parent_of(self.model)
        # None: files of comparisons and of rankings are told apart by their keys. The starter data has both.
        records = run.records("comparisons", self.data, "comparisons" if self.data == "starter" else None)
        held_out = None if self.eval_data is None else run.records("eval", self.eval_data)
        base = base_of(self.model, self)
        config = self.trainer_config(run, base, pad_to_multiple_of=8)  # fewer shapes: on a CPU each costs compiled kernels
        pairs = encode_pairs(base, records, config.max_length, run)
        eval_pairs = None if held_out is None else encode_pairs(base, held_out, config.max_length, run, "eval_")
        parents = {"sft": parent.sha256} if parent else {}
        checkpoint = run.begin(base, config, parents)
        model = policy_model(base, parent, self.lora)
        with full_precision(model), without_dataset_bars():
            trainer = DPOTrainer(model=model, args=config, train_dataset=pairs, eval_dataset=eval_pairs, processing_class=base.tokenizer)
        run.watch(trainer)
        with head_on_completions():
            trainer.train(resume_from_checkpoint=checkpoint)
            run.metrics |= training_metrics(trainer)
            for name, logged in {"train_accuracy": "rewards/accuracies", "train_margin": "rewards/margins"}.items():
                run.metrics[name] = mean_over_steps(logged, trainer.state.log_history)
            if eval_pairs is not None:
                run.metrics |= held_out_metrics(trainer)
        save_adapter(model, base, run.directory, role="policy", parents=parents)


def encode_pairs(base: Base, records: list[dict], max_length: int | None, run: Run, prefix: str = "") -> Dataset:
    """Comparisons and rankings as rows of `prompt_ids`, `chosen_ids`, `rejected_ids` and `length`, the longer sequence's."""
    rows = []
    for group in as_groups(records):
        prompt = base.encode_prompt(group["prompt"])
        responses = [base.encode_completion(text) for text in group["responses"]]
        for better, worse in ordered_pairs(group["ranks"]):
            chosen, rejected = responses[better], responses[worse]
            length = len(prompt) + max(len(chosen), len(rejected))
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "length": length})
    kept = [row for row in rows if max_length is None or row["length"] <= max_length]
    report_too_long(run, [row["length"] for row in rows], len(kept), max_length, prefix, "pairs")
    return Dataset.from_list(kept)


@torch.no_grad()
def held_out_metrics(trainer: DPOTrainer) -> dict[str, float]:
    """Means over the held-out pairs, whatever the batch size; several processes may count a few pairs twice."""
    measured = {"eval_loss": 0.0, "eval_accuracy": 0.0, "eval_margin": 0.0}
    model, loader, metrics, seen = trainer.model.eval(), trainer.get_eval_dataloader(), trainer._metrics["eval"], 0
    with progress("dpo: held-out pairs", len(loader)) as advance:
        for inputs in loader:
            with trainer.accelerator.autocast():
                loss = trainer.accelerator.gather(trainer.compute_loss(model, inputs)).mean().item()
            pairs = len(inputs["input_ids"]) // 2
            seen += pairs
            for name, mean in zip(measured, (loss, metrics["rewards/accuracies"][-1], metrics["rewards/margins"][-1]), strict=True):
                measured[name] += pairs * mean
            advance()
    metrics.clear()
    found, pairs = {name: total / seen for name, total in measured.items()}, len(trainer.eval_dataset)
    low, high = wilson(found["eval_accuracy"] * pairs, pairs)
    return found | {"eval_accuracy_low": low, "eval_accuracy_high": high, "eval_pairs": pairs}
