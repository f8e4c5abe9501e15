"""Generation tasks: what is asked, what is wanted, how an answer is scored. Those of the paper, and yours.

A task is one frozen `Task`. A file of yours with ``get_task() -> Task`` is as good as a name
(``--task my_task.py=examples.jsonl``).
"""

import dataclasses
import string
from collections.abc import Callable, Mapping

from layerskip_jax.evaluation.examples import Example
from layerskip_jax.evaluation.scores import Score, exact_match, passes_tests, rouge_2, rouge_l


@dataclasses.dataclass(frozen=True)
class Task:
    """One generation task. ``prompt`` and ``answer`` are templates in the fields of an example, as of `str.format`.

    The prompt of an example is ``shots`` solved ones, then its own unsolved: templates joined by ``between``.
    """

    prompt: str
    answer: str  # what is wanted, as it would follow the prompt
    scores: Mapping[str, Score]
    shots: int = 0
    between: str = "\n\n"
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 128
    shortens: str = ""  # the field whose end is cut where a prompt would be too long
    tfds: str = ""  # the TFDS dataset of the examples; without one, they come from a file
    split: str = "test"
    shots_split: str = "train"
    code_scores: Mapping[str, Score] = dataclasses.field(default_factory=dict)  # scores that run what the model wrote

    @property
    def fields(self) -> list[str]:
        """The fields that the two templates name."""
        named = [field for text in (self.prompt, self.answer) for _, field, _, _ in string.Formatter().parse(text)]
        return sorted({field for field in named if field})

    def wanted(self, example: Example) -> str:
        return self.answer.format_map(example)

    def prompt_for(self, example: Example, shots: list[Example], fits: Callable[[str], bool]) -> tuple[str, bool]:
        """Return the prompt, and whether something was left out so that it ``fits``: shots first, then of `shortens`.

        A prompt that cannot be made to fit is returned as it is.
        """
        own = self.prompt.format_map(example)
        solved = [self.prompt.format_map(shot) + self.wanted(shot) for shot in shots]
        for count in range(len(shots), -1, -1):
            text = self.between.join([*solved[:count], own])
            if fits(text):
                return text, count < len(shots)
        if not self.shortens:
            return own, bool(shots)
        whole = example[self.shortens]
        kept, too_many = 0, len(whole)
        while too_many - kept > 1:
            middle = (kept + too_many) // 2
            text = self.prompt.format_map({**example, self.shortens: whole[:middle]})
            kept, too_many = (middle, too_many) if fits(text) else (kept, middle)
        return self.prompt.format_map({**example, self.shortens: whole[:kept]}), bool(shots or whole)


TASKS = {
    # LayerSkip section 5: one shot for CNN/DM, none for XSUM and HumanEval; ROUGE-2 is the score of its tables.
    "cnn_dm": Task(
        prompt="Article: {article}\nSummary:",
        answer=" {highlights}",
        scores={"rouge2": rouge_2, "rougeL": rouge_l},
        shots=1,
        stop=("\n\n", "\nArticle:"),
        shortens="article",
        tfds="cnn_dailymail",
    ),
    "xsum": Task(
        prompt="Article: {document}\nSummary:",
        answer=" {summary}",
        scores={"rouge2": rouge_2, "rougeL": rouge_l},
        stop=("\n",),
        shortens="document",
        tfds="xsum",
    ),
    "humaneval": Task(
        prompt="{prompt}",
        answer="{canonical_solution}",
        scores={"rouge2": rouge_2},
        code_scores={"pass@1": passes_tests},
        stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        max_new_tokens=512,
    ),
    "topv2": Task(
        prompt="Utterance: {utterance}\nParse:",
        answer=" {semantic_parse}",
        scores={"exact_match": exact_match},
        stop=("\n",),
        between="\n",
    ),
}
