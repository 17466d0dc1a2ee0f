"""Retrieval tasks of the needle model, and facts planted in any text.

Nothing here needs PyTorch. `make_sample` gives the samples that the model is evaluated on;
`plant` and `question_prompt` hide facts in a text of one's own and ask about them.
"""

from .facts import Fact, plant, question_prompt
from .tasks import TASKS, TRAINING_TASKS, NeedleSample, make_sample
from .text import TextSource, held_out_source, training_source

__all__ = [
    "TASKS",
    "TRAINING_TASKS",
    "Fact",
    "NeedleSample",
    "TextSource",
    "held_out_source",
    "make_sample",
    "plant",
    "question_prompt",
    "training_source",
]
