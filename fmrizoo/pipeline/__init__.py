"""The main jobs, whole: pretrain, fine-tune, evaluate, baselines. What the command line calls.

Each job writes one run folder (see the README's table of files) and can be called again: a
finished run is left alone, an interrupted one goes on.
"""

from fmrizoo.pipeline.evaluation import baselines, evaluate
from fmrizoo.pipeline.finetuning import finetune
from fmrizoo.pipeline.inputs import encoder_folder
from fmrizoo.pipeline.pretraining import pretrain

__all__ = ["baselines", "encoder_folder", "evaluate", "finetune", "pretrain"]
