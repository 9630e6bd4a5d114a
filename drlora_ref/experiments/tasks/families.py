"""The families of tasks: which module knows a task, and what every such module has.

To add a task to a family, add a row to the module's TASKS. To add a family, write a module with the
names of Family, and put it into the tuple below.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drlora_ref.experiments.sources.models import ModelSource
from drlora_ref.experiments.tasks import commonsense, glue, instructions, squad, xsum
from drlora_ref.experiments.tasks.data import Inputs, TaskData


class Family(Protocol):
    """What a run asks of its task's module.

    Every function that is given a task raises ValueError, with the nearest name, for one that is
    not in TASKS.
    """

    # Properties, so that a module may have a narrower type than is asked of it.
    @property
    def TASKS(self) -> Mapping[str, object]:
        """The tasks by name, each with what is particular to it."""

    @property
    def OPTIONS(self) -> tuple[str, ...]:
        """The parameters of a run that `make_inputs` takes: max_length, and others by name."""

    def load_task(
        self, task: str, data_dir: str = "", train_size: int = 0, seed: int = 0, holdout: int = 0
    ) -> TaskData:
        """The rows: from a folder, made up ("generated"), or from the hub; as task_data draws."""

    def load_model(
        self, source: ModelSource, task: str
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """(pretrained model with the task's head, its tokenizer)."""

    @property
    def make_inputs(self) -> Callable[..., Inputs]:
        """make_inputs(data, tokenizer, **OPTIONS): what the training loop needs."""

    def metric_name(self, task: str) -> str:
        """The metric by which runs on this task are compared."""


FAMILIES: dict[str, Family] = {
    task: family
    for family in (glue, squad, xsum, commonsense, instructions)
    for task in family.TASKS
}
