"""DPO (Rafailov et al. 2023): a policy straight from comparisons, the alternative that PPO has to be better than.

TRL's DPOTrainer on tokens that InstructLite made itself, those of every other stage. The reference is a frozen copy of the adapter it
starts from, in the same base: TRL adds it as the PEFT adapter "ref", so that no second model is in memory.
"""

import math
from typing import Any

import torch
import trl
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig

from ..config import DPOOptions
from ..data.records import as_groups
from ..models.base import Base, base_of
from ..progress import progress
from .checkpoints import Checkpointing
from .recipe import Recipe, Run, full_precision, parent_of, save_adapter, training_metrics, without_dataset_bars
from .reward import mean_over_steps, ordered_pairs, wilson
from .sft import head_on_completions, policy_model, report_too_long
from .shares import EqualRows, Row, dealt


class DPOTrainer(EqualRows, Checkpointing, trl.DPOTrainer):
    """TRL's on tokenized pairs, with crash-safe checkpoints, the same for any number of processes.

    A pair whose answers are the same teaches nothing: what it adds to the gradient cancels out. Such rows fill batches up, are not
    counted among those that the loss is a mean of, and in its metrics are no preference and no margin.

    Relies on trl 1.16: a `compute_loss` that is a mean over pairs, whose better answers are the first half of the batch,
    `_prepare_dataset` (called on each data set), `_set_signature_columns_if_needed` (columns that reach the collator and the
    length-grouping sampler), `_metrics` (a value for each batch, emptied by `log`).
    """

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # tokenized already

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "length"})

    def blank(self, row: Row) -> Row:
        one = row["chosen_ids"][:1]
        blank = {"prompt_ids": row["prompt_ids"][:1], "chosen_ids": one, "rejected_ids": one}
        return blank | {f"ref_{side}_logps": 0.0 for side in ("chosen", "rejected") if "ref_chosen_logps" in row}

    def rows_that_count(self, inputs: dict[str, Tensor]) -> int:
        chosen, rejected = inputs["input_ids"].chunk(2)
        return int((chosen != rejected).any(1).sum())

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Tensor | None = None):
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs)
        loss, metrics = super().compute_loss(model, inputs), self._metrics["train" if self.model.training else "eval"]
        rows, counted = len(inputs["input_ids"]) // 2, self.rows_that_count(inputs)
        if counted < rows:  # the mean over all rows, less what the others add to it: a constant
            equal = math.log(2) if self.args.loss_type == ["sigmoid"] else 0.0  # only the loss that is logged is off
            loss = (loss * rows - equal * (rows - counted)) / max(counted, 1)
        pairs = self.accelerator.reduce(torch.tensor([rows, counted], device=loss.device), "sum").tolist()
        for name in ("rewards/accuracies", "rewards/margins"):
            metrics[name][-1] *= pairs[0] / max(pairs[1], 1)
        return self.of_update(loss, inputs, num_items_in_batch)

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
    """Means over the held-out pairs, whatever the size of batches and the number of processes."""
    measured = {"eval_loss": 0.0, "eval_accuracy": 0.0, "eval_margin": 0.0}
    model, rows, metrics, processes = trainer.model.eval(), trainer.eval_dataset, trainer._metrics["eval"], trainer.args.world_size
    batches = dealt(list(rows["length"]), trainer.args.per_device_eval_batch_size, trainer.args.process_index, processes)
    with progress("dpo: held-out pairs", len(batches)) as advance:
        for numbers, alone in batches:
            inputs = send_to_device(trainer.data_collator([rows[i] for i in numbers]), trainer.accelerator.device)
            with trainer.accelerator.autocast():
                loss = trainer.accelerator.reduce(trainer.compute_loss(model, inputs), "mean").item()
            pairs = len(numbers) * (processes if alone else 1)
            for name, mean in zip(measured, (loss, metrics["rewards/accuracies"][-1], metrics["rewards/margins"][-1]), strict=True):
                measured[name] += pairs * mean
            advance()
    metrics.clear()
    pairs = len(rows)
    found = {name: total / pairs for name, total in measured.items()}
    low, high = wilson(found["eval_accuracy"] * pairs, pairs)
    return found | {"eval_accuracy_low": low, "eval_accuracy_high": high, "eval_pairs": pairs}
