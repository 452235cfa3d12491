r"""A folder that optimum-intel exported, timed in OpenVINO's own pipeline for decoders.

    optimum-cli export openvino -m HF_FOLDER --task text-generation-with-past --weight-format int4 --sym \
        --group-size 32 --ratio 1.0 OUT
    python openvino_bench.py OUT [--threads 2]

See serving.py for what it answers. Precision is left to OpenVINO: sums in bfloat16 where the CPU has it, activations
rounded to 8 bits, a paged cache of 8 bits. The pipeline computes the logits of the last token only; the same model
stepped through openvino.Core computes those of every token, and is slower at prompts.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import openvino
import openvino_genai
from serving import main


class OpenVino:
    """One pipeline; its own clock, since a call returns when the last token is there."""

    name = "openvino"

    def __init__(self, options: argparse.Namespace) -> None:
        """Load it, with so many threads; a prompt is read in one piece."""
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # the pipeline's default would not read the same prompt twice
        scheduler.max_num_batched_tokens = 4096
        self.pipeline = openvino_genai.LLMPipeline(
            options.model, "CPU", INFERENCE_NUM_THREADS=options.threads, scheduler_config=scheduler
        )

    def generate(self, tokens: list[int], count: int) -> Any:
        """Write `count` tokens greedily; the times that were measured."""
        config = openvino_genai.GenerationConfig(do_sample=False, ignore_eos=True)
        config.min_new_tokens = config.max_new_tokens = count
        ids = np.array([tokens])
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return self.pipeline.generate(inputs, config).perf_metrics

    def prefill(self, tokens: list[int]) -> float:
        """Seconds until the first token."""
        return float(self.generate(tokens, 1).get_ttft().mean) / 1000

    def decode(self, tokens: list[int], count: int) -> float:
        """Seconds of the `count` tokens that follow the first."""
        return float(self.generate(tokens, count + 1).get_tpot().mean) / 1000 * count


if __name__ == "__main__":
    main(__doc__, OpenVino)
