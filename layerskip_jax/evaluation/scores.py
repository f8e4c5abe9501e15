"""Scores in [0, 1] that compare a generated text with the wanted one."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.sandbox import runs_to_its_end

Score = Callable[[Mapping[str, str], str, str], float]
"""``(example, wanted, generated) -> score``, at best 1."""


@cache
def _rouge(kind: str) -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise UserError("ROUGE is in the extra 'evaluation': pip install 'layerskip-jax[evaluation]'") from None
    return rouge_scorer.RougeScorer([kind], use_stemmer=True)


def rouge_2(example: Mapping[str, str], wanted: str, generated: str) -> float:
    """F1 of the bigrams that both texts have (ROUGE-2, Lin 2004), after Porter stemming."""
    return _rouge("rouge2").score(wanted, generated)["rouge2"].fmeasure


def rouge_l(example: Mapping[str, str], wanted: str, generated: str) -> float:
    """F1 of the longest common subsequence of words (ROUGE-L, Lin 2004), after Porter stemming."""
    return _rouge("rougeL").score(wanted, generated)["rougeL"].fmeasure


def exact_match(example: Mapping[str, str], wanted: str, generated: str) -> float:
    """1 if the texts are equal except for white space.

    >>> exact_match({}, "[IN:GET_TIME ]", " [IN:GET_TIME  ] ")
    1.0
    """
    return float(wanted.split() == generated.split())


def passes_tests(example: Mapping[str, str], wanted: str, generated: str) -> float:
    """1 if prompt and generated body pass the tests of the example; with one answer each, the mean is pass@1.

    HumanEval, arXiv 2107.03374 section 2.1. Runs the generated code in `sandbox`.
    """
    check = f"{example['test']}\ncheck({example['entry_point']})\n"
    return float(runs_to_its_end(f"{example['prompt']}{generated}\n\n{check}"))
