"""Open each adapter below a directory with stock PEFT and write its logits. Runs in another environment.

``python open_with_stock_peft.py CASES``: every ``CASES/<case>`` holds ``case.json`` (``base``), ``adapter/`` and
``logits.safetensors`` (``input_ids``); ``stock.safetensors`` is written beside them. Knows nothing of unfed.
"""

import json
import sys
from pathlib import Path

import peft
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(cases):
    torch.set_num_threads(1)
    for case in sorted(p.parent for p in Path(cases).glob("*/case.json")):
        base = json.loads((case / "case.json").read_text(encoding="utf-8"))["base"]
        model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(case / "adapter")).eval()
        ids = load_file(case / "logits.safetensors")["input_ids"]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        save_file({"logits": logits.contiguous()}, case / "stock.safetensors", {"peft": peft.__version__})


if __name__ == "__main__":
    main(sys.argv[1])
