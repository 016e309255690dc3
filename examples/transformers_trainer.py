"""SimReg in a script of your own with transformers' Trainer, in one process or in many.

torchrun --nproc-per-node 2 examples/transformers_trainer.py
accelerate launch --multi_gpu --num_processes 2 examples/transformers_trainer.py
"""

import argparse
import json
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments, set_seed

from simreg import SimRegLoss
from simreg.integrations.transformers import SimRegTrainer

text = Path(argparse.__file__).read_bytes()  # bytes serve as tokens
rows = [list(text[i : i + 128]) for i in range(0, len(text) - 128, 128)]
set_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = AutoModelForCausalLM.from_config(
    LlamaConfig(vocab_size=256, num_attention_heads=4, num_key_value_heads=4, **shape)
)
arguments = TrainingArguments(
    output_dir="runs/transformers_trainer",
    max_steps=20,
    per_device_train_batch_size=16 // int(os.environ.get("WORLD_SIZE", "1")),  # 16 rows a step
    learning_rate=3e-3,
    warmup_steps=6,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
    ddp_find_unused_parameters=False,
    use_cpu=not torch.accelerator.is_available(),
)
data = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in rows]
trainer = SimRegTrainer(model, arguments, train_dataset=data, objective=SimRegLoss(weight=0.3))
trainer.train()
if trainer.is_world_process_zero():
    print(json.dumps(trainer.state.log_history[-2] | {"processes": arguments.world_size}))
trainer.accelerator.end_training()  # closes the process group
