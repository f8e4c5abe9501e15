"""Generation tasks: those of the paper, and your own.

A task is one frozen `Task`; ``--task my_task.py=examples.jsonl`` takes it from ``get_task()`` in your Python file.
lm-evaluation-harness ships HumanEval and CNN/DM too, but importing it needs torch, and these tasks do not.
"""

import dataclasses
import string
from collections.abc import Callable, Mapping, Sequence

from layerskip_jax.evaluation.scores import Score, exact_match, passes_tests, rouge_2, rouge_l


@dataclasses.dataclass(frozen=True)
class Task:
    """One generation task; ``prompt`` and ``answer`` are `str.format` templates over the fields of an example.

    A prompt consists of ``shots`` solved examples and the unsolved one, joined by ``between``.
    """

    prompt: str
    answer: str  # the wanted text, as it follows the prompt
    scores: Mapping[str, Score]
    shots: int = 0
    between: str = "\n\n"
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 128
    shortens: str = ""  # the field to cut at its end if a prompt is too long
    tfds: str = ""  # the TFDS dataset of the examples; empty: they must come from a file
    split: str = "test"
    shots_split: str = "train"
    code_scores: Mapping[str, Score] = dataclasses.field(default_factory=dict)  # scores that run generated code
    code_fields: tuple[str, ...] = ()  # the fields that these scores read

    def __post_init__(self) -> None:
        for template in (self.prompt, self.answer):
            template.format_map(dict.fromkeys(self.fields, ""))  # now, so that an error names the task's file

    @property
    def fields(self) -> list[str]:
        """The fields of an example that the templates and the scores of code use."""
        named = [field for text in (self.prompt, self.answer) for _, field, _, _ in string.Formatter().parse(text)]
        if self.code_scores.keys() & self.scores.keys():
            named += self.code_fields
        return sorted({field for field in named if field})

    def wanted(self, example: Mapping[str, str]) -> str:
        return self.answer.format_map(example)

    def prompt_for(
        self, example: Mapping[str, str], shots: Sequence[Mapping[str, str]], fits: Callable[[str], bool]
    ) -> tuple[str, bool]:
        """Return the prompt, and whether it was shortened.

        A prompt that does not satisfy ``fits`` first loses shots, then the end of the field ``shortens``. If it does
        not fit even then, it is returned anyway.
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

        def cut(length: int) -> str:
            return self.prompt.format_map(
                {field: example[field] for field in self.fields} | {self.shortens: whole[:length]}
            )

        kept, too_many = 0, len(whole)
        while too_many - kept > 1:
            middle = (kept + too_many) // 2
            kept, too_many = (middle, too_many) if fits(cut(middle)) else (kept, middle)
        return cut(kept), bool(shots or whole)


TASKS = {
    # LayerSkip section 5: one shot for CNN/DM, none for XSUM and HumanEval; its tables report ROUGE-2.
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
        code_fields=("test", "entry_point"),
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
