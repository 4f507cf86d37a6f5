"""Supervised fine-tuning, the first stage of InstructGPT: TRL's SFTTrainer on tokens that InstructLite made itself.

The tokens are those of every other stage (`encode_prompt` + `encode_completion`), so prompts are never tokenized one way
here and another way in PPO; the loss is that of the completion, with the token that ends it. Rows longer than
`max_length` are left out and counted: cut, they would teach the model not to end.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import quantiles

import torch
import trl
import trl.trainer.utils
from accelerate.utils import send_to_device
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from trl import SFTConfig

from ..config import Lora, SFTOptions
from ..errors import InstructLiteError
from ..models.base import Base, base_of, lora_config
from ..models.manifest import Adapter, verify
from ..progress import progress
from .checkpoints import Checkpointing
from .recipe import Recipe, Run, full_precision, parent_of, save_adapter, training_metrics, without_dataset_bars
from .shares import Row, Together, dealt


class SFTTrainer(Together, Checkpointing, trl.SFTTrainer):
    """TRL's, with crash-safe checkpoints, the same for any number of processes."""

    def blank(self, row: Row) -> Row:
        short = {"input_ids": row["input_ids"][:2], "labels": [-100, -100]}
        return short | ({"seq_lengths": [2]} if "seq_lengths" in row else {})  # of packed rows


class SFTRecipe(Recipe, SFTOptions):
    """Fine-tune an adapter on demonstrations; with an adapter as `model`, go on training that one (`lora` is then its own).

    Metrics: `train_loss`, `rows_too_long`, and with `eval_data` the held-out loss in nats per completion token before and
    after (`eval_loss_before`, `eval_loss`) with the perplexities.
    """

    name = "sft"
    config_class = SFTConfig

    def train(self, run: Run) -> None:
        parent = parent_of(self.model)
        demonstrations = run.records("demonstrations", self.data, "demonstrations")
        held_out = None if self.eval_data is None else run.records("eval", self.eval_data, "demonstrations")
        base = base_of(self.model, self)
        # TRL masks the prompts of rows that come tokenized only when told to.
        config = self.trainer_config(run, base, completion_only_loss=True)
        rows = completions(base, demonstrations, config.max_length, run)
        eval_rows = None if held_out is None else completions(base, held_out, config.max_length, run, "eval_")
        parents = {"sft": parent.sha256} if parent else {}
        checkpoint = run.begin(base, config, parents)
        model = policy_model(base, parent, self.lora)
        with full_precision(model), without_dataset_bars():
            trainer = SFTTrainer(model=model, args=config, train_dataset=rows, eval_dataset=eval_rows, processing_class=base.tokenizer)
        run.watch(trainer)
        with head_on_completions():
            if eval_rows is not None and checkpoint is None:
                run.metrics |= held_out_metrics(trainer, "_before")
                run.keep_metrics()
            trainer.train(resume_from_checkpoint=checkpoint)
            run.metrics |= training_metrics(trainer)
            if eval_rows is not None:
                run.metrics |= held_out_metrics(trainer)
        save_adapter(model, base, run.directory, role="policy", parents=parents)


def policy_model(base: Base, parent: Adapter | None, lora: Lora) -> PeftModel:
    """A policy to be trained: the parent's adapter, or a fresh one."""
    if parent is None:
        return get_peft_model(base.model, lora_config(lora, base.model, "CAUSAL_LM"))
    verify(parent, base)
    return PeftModel.from_pretrained(base.model, str(parent.path), is_trainable=True)


def completions(base: Base, records: list[dict], max_length: int | None, run: Run, prefix: str = "") -> Dataset:
    """Demonstrations as rows of `input_ids` and `completion_mask` (1 on the answer and its end token)."""
    rows = []
    for record in records:
        prompt, answer = base.encode_prompt(record["prompt"]), base.encode_completion(record["completion"])
        rows.append({"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)})
    lengths = [len(row["input_ids"]) for row in rows]
    kept = [row for row, length in zip(rows, lengths, strict=True) if max_length is None or length <= max_length]
    report_too_long(run, lengths, len(kept), max_length, prefix, "rows")
    return Dataset.from_list(kept)


def report_too_long(run: Run, lengths: list[int], kept: int, max_length: int | None, prefix: str, what: str) -> None:
    """Count what is longer than `max_length` into the metrics and say so; refuse to go on with nothing."""
    dropped = len(lengths) - kept
    run.metrics[f"{prefix}{what}_too_long"] = dropped
    if not kept:
        longest = quantiles(lengths, n=20)[-1] if len(lengths) > 1 else lengths[0]
        raise InstructLiteError(
            f"all {len(lengths)} {prefix}{what} are longer than training.max_length={max_length} tokens "
            f"(95 % of them have at most {longest:.0f}): raise it, or bring shorter ones"
        )
    if dropped:
        run.note(f"left out {dropped} of {len(lengths)} {prefix}{what}: longer than training.max_length={max_length} tokens")


@contextmanager
def head_on_completions() -> Iterator[None]:
    """Have TRL project only completion tokens onto the vocabulary on every device, not just where Triton runs.

    Elsewhere it projects every position (trl/trainer/utils.py, `compact` in add_fused_lm_head) for the sake of Neuron's
    compiler; on a CPU that was 40 % of the time of SFT. The losses are the same to the last bit.
    """
    original = trl.trainer.utils._use_triton
    trl.trainer.utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = original


@torch.no_grad()
def held_out_metrics(trainer: SFTTrainer, suffix: str = "") -> dict[str, float]:
    """Loss per completion token over the held-out rows, in nats, and its perplexity.

    Trainer's own `eval_loss` is a mean of batch means, which changes with the batch size.
    """
    accelerator, processes, model, rows = trainer.accelerator, trainer.args.world_size, trainer.model.eval(), trainer.eval_dataset
    lengths = [len(ids) for ids in rows["input_ids"]]
    measured = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    batches = dealt(lengths, trainer.args.per_device_eval_batch_size, trainer.args.process_index, processes)
    loader = DataLoader(rows, batch_sampler=[numbers for numbers, _ in batches], collate_fn=trainer.data_collator)
    with progress("sft: held-out loss", len(batches)) as advance:
        for inputs, (_, alone) in zip(loader, batches, strict=True):
            inputs = send_to_device(inputs, accelerator.device)
            with accelerator.autocast():
                output = model(**inputs, use_cache=False, fused_lm_head=True)  # the head that TRL trains with
            found = torch.stack([-output.log_probs.double().sum(), output.label_mask.double().sum()])
            measured += found if alone else found / processes
            advance()
    nats, tokens = accelerator.reduce(measured, "sum").tolist()
    return {f"eval_loss{suffix}": nats / tokens, f"eval_perplexity{suffix}": math.exp(nats / tokens)}
