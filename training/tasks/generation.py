"""Free text: GSM8K and HumanEval, as {"prompt", "completion"} rows with what a checker of the answer needs."""

from credence.training.data import DataFormat
from credence.training.tasks.base import BadRecord, Fields, Record, Task, text

FINAL_ANSWER = "####"


def gsm8k(record: Record) -> Fields:
    """{"question", "answer"}; the number after #### is the final answer, kept as it is written."""
    worked = text(record, "answer")
    head, mark, final = worked.rpartition(FINAL_ANSWER)
    if not mark or not head.strip() or not final.strip():
        raise BadRecord(f'"answer" is {worked!r}; a solution that ends with {FINAL_ANSWER} and its result is needed')
    return {"prompt": text(record, "question"), "completion": worked, "answer": final.strip()}


def humaneval(record: Record) -> Fields:
    """{"prompt", "canonical_solution", "test", "entry_point"}; texts are kept to the space, they are Python."""
    return {
        "prompt": text(record, "prompt"),
        "completion": text(record, "canonical_solution"),
        "test": text(record, "test"),
        "entry_point": text(record, "entry_point"),
    }


TASKS = (
    Task(
        name="gsm8k",
        title="GSM8K",
        source="openai/gsm8k, main",
        format=DataFormat.COMPLETION,
        fields=("question", "answer"),
        convert=gsm8k,
        test="test",
        splits_note="there is no validation split",
        prompt_note="the bare question is the prompt, the worked answer with its #### line the completion",
        license="MIT",
        citation="Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv:2110.14168",
    ),
    Task(
        name="humaneval",
        title="HumanEval",
        source="openai/openai_humaneval",
        format=DataFormat.COMPLETION,
        fields=("prompt", "canonical_solution", "test", "entry_point"),
        convert=humaneval,
        train=None,
        test="test",
        license="MIT",
        citation="Chen et al., Evaluating Large Language Models Trained on Code, arXiv:2107.03374",
    ),
)
