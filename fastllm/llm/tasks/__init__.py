"""What a model can be fine-tuned for and evaluated on. A task reads rows, makes batches, and scores a model on them."""

from fastllm.llm.tasks.base import Task
from fastllm.llm.tasks.classification import Classification
from fastllm.llm.tasks.language import Language
from fastllm.llm.tasks.questions import Questions
from fastllm.llm.tasks.seq2seq import Seq2Seq

__all__ = ["TASKS", "Task"]

TASKS = {task.name: task for task in (Classification, Language, Seq2Seq, Questions)}
